"""Rotary positions for any order, as an embedding: afterwards a plain real order-k attention has the rotary scores.

A score of order k is a product of k + 1 complex numbers per pair of columns; the cosine of the sum of their angles is
a sum of k + 1 real products, so (k + 1) d / 2 columns hold it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor

from korder.errors import ShapeError


def embed_rotary(
    query: Tensor,
    keys: Sequence[Tensor],
    *,
    query_offset: int = 0,
    key_offsets: Sequence[int] | None = None,
    base: float = 10000.0,
) -> tuple[Tensor, tuple[Tensor, ...], float]:
    """Return query, keys and the factor by which their plain order-k scores are the rotary ones.

    With z = x[2 l] + i x[2 l + 1] for pair l and w_l = base ** (-2 l / d), positions p = index + offset,

        score[i, j1..jk] = Re sum_l q[l] conj(k1[l]) .. conj(kk[l]) exp(i w_l (k p_i - p_j1 - .. - p_jk))

    A shift of all positions changes nothing. The query turns by k times its angle, every key by its own, conjugated.

    Shapes:
        query (.., n, d); keys[t] (.., m_t, d); results have (k + 1) d / 2 columns.
    Args:
        query: Rows with an even number of columns.
        keys: One tensor per mode; k is their number.
        query_offset: Position of the first query.
        key_offsets: Position of the first key of each mode; 0 when omitted.
        base: Sets the slowest turn.
    Returns:
        The embedded query and keys, and 2 ** k / (k + 1), to be multiplied into the scale.
    Raises:
        ShapeError: An odd width, or keys of another width.
    Numerics:
        Entries grow by at most sqrt(2). Angles are computed in float64, 16-bit rows in float32.
    Source:
        Su et al., arXiv 2104.09864, for k = 1; cos of a sum of k + 1 angles is (2 ** k / (k + 1)) sum_m (-1) ** m times
        the product of cos(angle - m pi / (k + 1)).
    Example:
        >>> x = torch.ones(3, 4)
        >>> query, keys, factor = embed_rotary(x, (x, x))
        >>> tuple(query.shape), len(keys), round(factor, 3)
        ((3, 6), 2, 1.333)
    """
    order, width = len(keys), query.shape[-1]
    for name, rows in (("query", query), *((f"keys[{t}]", key) for t, key in enumerate(keys))):
        if rows.shape[-1] != width or width % 2:
            raise ShapeError(
                "rotary positions need an even number of columns, the same in query and keys.",
                expected=f"an even width, as query.shape == {tuple(query.shape)}",
                got=f"{name}.shape == {tuple(rows.shape)}",
            )
    signs = torch.tensor([(-1.0) ** m for m in range(order + 1)], dtype=query.dtype, device=query.device)
    embedded = _waves(query, order, query_offset, base, turn=float(order)).mul(signs).flatten(-2)
    offsets = key_offsets or (0,) * order
    turned = tuple(
        _waves(key, order, offset, base, turn=-1.0, conjugate=True).flatten(-2)
        for key, offset in zip(keys, offsets, strict=True)
    )
    return embedded, turned, rotary_factor(order)


def rotary_factor(order: int) -> float:
    """Return 2 ** k / (k + 1), the factor from the embedding's plain scores to the rotary ones."""
    return 2.0**order / (order + 1)


def _waves(x: Tensor, order: int, offset: int, base: float, *, turn: float, conjugate: bool = False) -> Tensor:
    """Return |z| cos(arg z + turn * position * w_l - m pi / (k + 1)), or that of conj z.

    Shapes:  x (.., n, d); result (.., n, d / 2, k + 1).
    """
    length, width = x.shape[-2:]
    options = {"dtype": torch.float64, "device": x.device}
    speeds = base ** (-torch.arange(0, width, 2, **options) / width)
    angles = turn * (torch.arange(length, **options) + offset)[:, None] * speeds
    shifts = torch.arange(order + 1, **options) * (pi / (order + 1))
    angles = angles[..., None] - shifts  # (n, d / 2, k + 1)
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    real, imaginary = wide.unflatten(-1, (-1, 2)).unsqueeze(-2).unbind(-1)  # (.., n, d / 2, 1)
    sine = angles.sin() if conjugate else -angles.sin()
    return (real * angles.cos().to(wide.dtype) + imaginary * sine.to(wide.dtype)).to(x.dtype)
