"""Masks by positions: indices compared with bounds that are run-time scalars, so one compiled plan takes any offset."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from korder.spi import Operands

Array = Any
FARTHEST = 2**29
"""Differences of positions beyond this are as good as infinite, and sums of a few of them fit 32 bits."""


class Bounds(NamedTuple):
    """Where indices stand against each other; j and i are indices, not positions.

    Shapes:  (k,) int32; `steps` (k - 1,).
    """

    last: Array
    """A query i sees no key of mode t with j > i + last[t]."""
    first: Array
    """Under a window it sees none with j <= i + first[t]."""
    steps: Array
    """Under an ordered mask it sees no tuple with j_t+1 <= j_t + steps[t]."""


def bounds_of(mask: Any, operands: Operands) -> Bounds:
    """Return the bounds of a mask at the operands' offsets, which may be traced."""
    order = len(operands.keys)
    keys = tuple(operands.key_offsets) or (0,) * order
    query = operands.query_offset
    sizes = getattr(mask, "sizes", (1,) * order)
    return Bounds(
        _numbers([query - offset for offset in keys]),
        _numbers([query - offset - size for offset, size in zip(keys, sizes, strict=True)]),
        _numbers([keys[t] - keys[t + 1] for t in range(order - 1)]),
    )


def _numbers(differences: list[Any]) -> Array:
    if all(isinstance(x, (int, np.integer)) for x in differences):
        return np.clip(np.asarray(differences, dtype=object), -FARTHEST, FARTHEST).astype(np.int32)
    return jnp.stack([jnp.clip(jnp.asarray(x), -FARTHEST, FARTHEST).astype(jnp.int32) for x in differences])


class Sight:
    """A mask over indices.

    Args:
        kind: Of the mask.
        bounds: Its bounds.
    """

    def __init__(self, kind: str, bounds: Bounds) -> None:
        self.kind = kind
        self.bounds = bounds
        self.order = bounds.last.shape[0]

    @property
    def closes(self) -> bool:
        """Whether any tuple may be closed."""
        return self.kind != "full"

    def open(self, mode: int, rows: Array, keys: Array) -> Array | None:
        """Return which keys of a mode each row may see as far as that mode alone says: (I, S), None for all."""
        if self.kind == "full" or (self.kind == "ordered" and mode < self.order - 1):
            return None
        seen = keys[None, :] <= rows[:, None] + self.bounds.last[mode]
        if self.kind == "window":
            seen &= keys[None, :] > rows[:, None] + self.bounds.first[mode]
        return seen

    def in_order(self, mode: int, keys: Array, following: Array) -> Array:
        """Return whether keys of mode and mode + 1 come in order; broadcast."""
        return following > keys + self.bounds.steps[mode]

    def alive(self, rows: Array, ends: list[tuple[Array, Array]]) -> Array:
        """Return whether some row may see some tuple of a tile: false only if none does; `ends` first and last keys."""
        low, high = rows[0], rows[-1]
        if self.kind == "ordered":
            return self._alive_in_order(high, ends)
        alive = jnp.asarray(True)
        for mode, (first, last) in enumerate(ends):
            alive &= first <= high + self.bounds.last[mode]
            if self.kind == "window":
                alive &= last > low + self.bounds.first[mode]
        return alive

    def _alive_in_order(self, high: Array, ends: list[tuple[Array, Array]]) -> Array:
        lowest, alive = ends[0][0], jnp.asarray(True)
        for mode, (first, last) in enumerate(ends):
            if mode:
                lowest = jnp.maximum(first, lowest + self.bounds.steps[mode - 1] + 1)
            alive &= lowest <= last
        return alive & (lowest <= high + self.bounds.last[self.order - 1])
