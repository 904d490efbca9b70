"""The matrix product of the PyTorch kernels: the fastest one that PyTorch has for these tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ONE_PRODUCT = 2**15
"""Multiplications below which a product of many heads is done as one batch."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return left (b, g, p, q) @ right^T, of right (b, g, s, q).

    On the CPU in float32 this goes to oneDNN, through the operation that compiled linear layers use: `torch.bmm` goes
    to the BLAS that torch was built with, whose best kernels some processors are not given. Both take any strides.
    """
    heads = left.shape[0] * left.shape[1]
    rows, columns, width = left.shape[2], right.shape[2], left.shape[3]
    if left.dtype is torch.float32 and left.device.type == "cpu" and heads * rows * columns * width > 0:
        linear = _linear()
        if linear is not None and (heads == 1 or rows * columns * width >= ONE_PRODUCT):
            parts = [
                linear(x, y, None, "none", [], "") for x, y in zip(left.flatten(0, 1), right.flatten(0, 1), strict=True)
            ]
            out = parts[0] if heads == 1 else torch.stack(parts)
            return out.view(*left.shape[:2], rows, columns)
    return left @ right.mT


def _linear() -> Any:
    """Return oneDNN's linear, None where this torch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)
