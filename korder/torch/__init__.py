"""The PyTorch door: order-k attention of tensors, differentiable through whatever backend runs it, and its modules."""

from korder.torch.attention import OrderKAttention
from korder.torch.block import OrderKTransformerBlock
from korder.torch.functional import attend, attend_result
from korder.torch.rotary import embed_rotary
from korder.torch.scores import alibi

__all__ = ["OrderKAttention", "OrderKTransformerBlock", "alibi", "attend", "attend_result", "embed_rotary"]
