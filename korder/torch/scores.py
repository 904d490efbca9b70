"""What a layer does to scores beside its projections: rows normalised so that scores are bounded, and linear biases."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(x: Tensor, order: int, *, pairs: bool = False) -> Tensor:
    """Return `x` with every row divided by its norm of exponent k + 1; a zero row stays zero.

    The sum over columns of the product of k + 1 such rows is at most 1 in size, by Hoelder's inequality with k + 1
    equal exponents, and 1 where all rows are equal and not negative. For order 1 it is the cosine of two rows.

    Shapes:  x (.., n, d), result the same.
    Args:
        x: The rows.
        order: The order k of the attention that they go to.
        pairs: Take the norm of the moduli of the pairs (x[2 l], x[2 l + 1]), which rotary positions leave alone and
            which bound the rotary score in the same way.
    Numerics:  The row is divided by its largest entry first, so that no power over- or underflows.
    """
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    # A constant for autograd: the result does not depend on what the row is divided by first.
    top = wide.detach().abs().amax(-1, keepdim=True)
    scaled = wide / torch.where(top > 0, top, torch.ones_like(top))
    exponent = order + 1
    if pairs:
        powers = scaled.unflatten(-1, (-1, 2)).square().sum(-1).pow(exponent / 2)
    else:
        powers = scaled.abs().pow(exponent)
    # At least 1 but for zero rows, whose derivative would be infinite.
    total = powers.sum(-1, keepdim=True).clamp_min(1.0)
    return (scaled * total.pow(-1.0 / exponent)).to(x.dtype)


def alibi(
    heads: int,
    queries: int,
    keys: int,
    *,
    query_offset: int = 0,
    key_offset: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the linear bias -slope_h * |i - j| of one mode, for the `biases` of an attention.

    Shapes:  result (h, n, m).
    Args:
        heads: Query heads; head h of them has the slope 2 ** (-8 (h + 1) / heads).
        queries: Number of queries, n.
        keys: Number of keys of the mode, m.
        query_offset: Position of the first query.
        key_offset: Position of the first key.
        dtype: As of the operands; torch's default when omitted.
        device: As of the operands.
    Source:  Press et al., arXiv 2108.12409, for one mode; with one such bias per mode a tuple loses the slope times the
        sum of its distances.
    Example:
        >>> alibi(1, 2, 3)[0, 1].mul(256).tolist()
        [-1.0, 0.0, -1.0]
    """
    dtype = dtype or torch.get_default_dtype()
    # Distances in whole numbers, so that far positions lose nothing.
    positions = torch.arange(queries, device=device)[:, None] + query_offset
    distances = (positions - torch.arange(keys, device=device) - key_offset).abs()
    slopes = torch.exp2(-8.0 * torch.arange(1, heads + 1, dtype=torch.float64, device=device) / heads)
    return (slopes[:, None, None] * -distances).to(dtype)
