"""Values that are NaN or infinite, which tiles leave out: put into the rows and channels that see them, no other."""

from __future__ import annotations

from math import inf
from typing import Any

import jax.numpy as jnp
from jax import lax

from korder_jax.tiles import UnitTiles

Array = Any
_NOWHERE = 2**30
"""Beyond every index and step."""


def any_unfinished(values: tuple[Array, ...]) -> Array:
    """Return whether any value of any mode is NaN or infinite."""
    found = jnp.asarray(False)
    for value in values:
        found |= ~jnp.all(jnp.isfinite(value))
    return found


def with_unfinished_values(
    tiles: UnitTiles, unfinished: Array, rows: tuple[Array, Array], output: Array, lse: Array
) -> Array:
    """Return the output (c, I, e) of a block of rows with the NaN and infinities that they see.

    Cost:  nothing where all values are finite, else O(I m e) for every mode.
    """

    def put(output: Array) -> Array:
        seen = [_seen(tiles, mode, visible) for mode, visible in enumerate(visible_keys(tiles, rows))]
        nan, above, below = (_any([part[kind] for part in seen]) for kind in range(3))
        if len(seen) > 1:  # times another value, and in sums with others, an infinity has no sign to speak of
            nan = nan | above | below
        marked = jnp.where(above, inf, jnp.where(below, -inf, output))
        marked = jnp.where(nan | (above & below), jnp.nan, marked)
        return jnp.where((lse == -inf)[..., None], output, marked)

    return lax.cond(unfinished, put, lambda same: same, output)


def _seen(tiles: UnitTiles, mode: int, visible: Array) -> tuple[Array, Array, Array]:
    """Return which channels (c or 1, I or 1, e) see NaN, +inf and -inf in a mode."""
    value = tiles.unit.values[mode]
    counted = visible.astype(value.dtype)
    kinds = (jnp.isnan(value), value == inf, value == -inf)
    nan, above, below = (jnp.einsum("cis,se->cie", counted, kind.astype(value.dtype)) > 0.0 for kind in kinds)
    return nan, above, below


def _any(parts: list[Array]) -> Array:
    found = parts[0]
    for part in parts[1:]:
        found = found | part
    return found


def visible_keys(tiles: UnitTiles, rows: tuple[Array, Array]) -> list[Array]:
    """Return per mode which keys stand in a tuple that a row sees, if it sees any: (c or 1, I or 1, m_t) bool."""
    alone = []
    for mode, length in enumerate(tiles.lengths):
        extra = tiles.key_block(mode, jnp.asarray(0, jnp.int32), length, rows).extra
        alone.append(jnp.ones((1, 1, length), bool) if extra is None else extra != -inf)
    return _in_chains(tiles, alone) if tiles.sight.kind == "ordered" else alone


def _in_chains(tiles: UnitTiles, alone: list[Array]) -> list[Array]:
    """Keep the keys that stand in an increasing chain of keys, one of each mode."""
    index = [jnp.arange(length, dtype=jnp.int32) for length in tiles.lengths]
    sight, order = tiles.sight, len(alone)
    forward = [alone[0]]
    for t in range(1, order):
        lowest = jnp.min(jnp.where(forward[-1], index[t - 1], _NOWHERE), axis=-1, keepdims=True)
        forward.append(alone[t] & sight.in_order(t - 1, lowest, index[t]))
    found = [forward[-1]]
    for t in range(order - 2, -1, -1):
        highest = jnp.max(jnp.where(found[0], index[t + 1], -_NOWHERE), axis=-1, keepdims=True)
        found.insert(0, forward[t] & sight.in_order(t, index[t], highest))
    return found
