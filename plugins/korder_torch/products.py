"""The matrix product of the PyTorch kernels: the fastest one that PyTorch has for these tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ONE_PRODUCT = 2**22
"""Multiplications a head from which a batch is multiplied head by head."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (p, q) @ right (q, s).

    On the CPU in float32 this goes to oneDNN, through the operation that compiled linear layers use: `torch.mm` goes to
    the BLAS that torch was built with, whose best kernels some processors are not given.
    """
    linear = _linear(left)
    if linear is None or 0 in (*left.shape, *right.shape) or not _dense(left):  # which it would copy
        return left @ right
    if left.mT.is_contiguous() and not left.is_contiguous():  # as the first factor it would be copied
        return linear(right.mT.contiguous(), left, None, "none", [], "").mT
    return linear(left, right.mT if _dense(right) else right.mT.contiguous(), None, "none", [], "")


def batched_product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (b, g, p, q) @ right (b, g, q, s)."""
    b, g, p, q = left.shape
    s = right.shape[-1]
    if _linear(left) is None or (b * g != 1 and p * q * s < ONE_PRODUCT):
        return left @ right
    if b * g == 1:
        return product(left[0, 0], right[0, 0]).reshape(1, 1, p, s)
    out = left.new_empty((b, g, p, s))
    for place, x, y in zip(out.flatten(0, 1), left.flatten(0, 1), right.flatten(0, 1), strict=True):
        place.copy_(product(x, y))
    return out


def _dense(x: Tensor) -> bool:
    """Whether a matrix has no gaps: as the second factor, oneDNN multiplies others in a slow loop."""
    return bool(x.is_contiguous() or x.mT.is_contiguous())


def _linear(x: Tensor) -> Any:
    """Return oneDNN's linear, left (p, q) times the transpose of right (s, q); None where it does not apply."""
    if x.dtype is not torch.float32 or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
