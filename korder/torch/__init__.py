"""The PyTorch door: order-k attention of tensors, differentiable by autograd through whatever backend runs it."""

from korder.torch.functional import attend, attend_result

__all__ = ["attend", "attend_result"]
