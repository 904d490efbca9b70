"""Small facts about JAX arrays: what is finite, which axes of a device mesh an array varies over, blocks of an axis."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Array = Any
HIGHEST = lax.Precision.HIGHEST
"""Products in full precision on every device."""


def cleaned(x: Array) -> Array:
    """Return x with zeros in place of NaN and infinities, so that a weight of zero times it is zero."""
    return jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))


def clamped(x: Array) -> Array:
    """Return x with the largest finite numbers in place of infinities, for the same reason."""
    limit = jnp.finfo(x.dtype).max
    return jnp.clip(x, -limit, limit)


def as_varying(x: Array, like: Array) -> Array:
    """Return x as varying over the mesh axes that `like` varies over, which loops inside `shard_map` insist on."""
    missing = _varying(like) - _varying(x)
    return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x


def _varying(x: Array) -> frozenset[str]:
    return frozenset(jax.typeof(x).manual_axis_type.varying)


def filled(shape: tuple[int, ...], value: float, like: Array) -> Array:
    """Return an array of one value, of the dtype and on the mesh axes of `like`."""
    return as_varying(jnp.full(shape, value, dtype=like.dtype), like)


def block_count(length: int, size: int) -> int:
    """Return how many blocks of `size` cover `length`."""
    return -(-length // size)


def block_start(block: Array, size: int, length: int) -> Array:
    """Return the first index of a block; the last block reaches back, so that all have one size."""
    return jnp.minimum(block * size, length - size)


def part(x: Array, axis: int, start: Array, size: int) -> Array:
    """Return a block of one axis; an axis of length one is shared and returned whole."""
    if x.shape[axis] in (1, size):
        return x
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def add_part(total: Array, axis: int, start: Array, block: Array) -> Array:
    """Return the total with a block of one axis added to."""
    if total.shape[axis] == block.shape[axis]:
        return total + block
    known = lax.dynamic_slice_in_dim(total, start, block.shape[axis], axis)
    return lax.dynamic_update_slice_in_dim(total, known + block, start, axis)


def joined(blocks: Array, length: int, axis: int) -> Array:
    """Return one array of `length` along `axis` from blocks (count, ..), the last of which reaches back.

    `axis` counts in the blocks, without their first axis.
    """
    count, size = blocks.shape[0], blocks.shape[axis + 1]
    moved = jnp.moveaxis(blocks, 0, axis)  # (.., count, size, ..)
    if count == 1:
        return jnp.squeeze(moved, axis)
    rest = length - (count - 1) * size
    flat = moved.reshape(*moved.shape[:axis], count * size, *moved.shape[axis + 2 :])
    if rest == size:
        return flat
    first = lax.slice_in_dim(flat, 0, (count - 1) * size, axis=axis)
    return jnp.concatenate([first, lax.slice_in_dim(flat, count * size - rest, count * size, axis=axis)], axis)


def mapped(function: Callable[[Array], Any], count: int, together: int) -> Any:
    """Return the results of function(0), .., function(count - 1), stacked, about `together` of them at a time."""
    if together >= count:
        return jax.vmap(function)(jnp.arange(count))
    together = max(size for size in range(1, together + 1) if count % size == 0)
    if together == 1:
        return lax.map(function, jnp.arange(count))
    stacked = lax.map(jax.vmap(function), jnp.arange(count).reshape(-1, together))
    return jax.tree.map(lambda x: x.reshape(prod(x.shape[:2]), *x.shape[2:]), stacked)
