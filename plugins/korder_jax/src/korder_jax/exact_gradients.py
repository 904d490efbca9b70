"""Gradients of the exact method for XLA: the tiles again, their weights from lse, one product for each gradient.

A gradient is that of the laid-out operands; `jax.vjp` of the layout brings it to the operands. Every product takes
finite numbers only: a row that is NaN, or whose gradient is, has NaN weights, which reach what it sees and no more.
"""

from __future__ import annotations

from math import inf
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from korder_jax.arrays import HIGHEST, add_part, as_varying, clamped, cleaned, joined, part
from korder_jax.layout import Layout
from korder_jax.tiles import KeyBlock, UnitTiles, clean, fold, gate, weighted_query

Array = Any


class Cotangent(NamedTuple):
    """What backward knows of rows: output (.., e), the gradient of the output; lse and delta (..)."""

    output: Array
    lse: Array
    """Natural log of the row sum, 0 in place of -inf, NaN where the row or its gradient is not finite."""
    delta: Array
    """Gradient of the output times the output, less the gradient of lse."""

    @classmethod
    def of(cls, output: Array, lse: Array, gradient: Array, lse_gradient: Array | None) -> Cotangent:
        """Return the cotangent of rows; one that saw nothing contributes nothing."""
        empty = lse == -inf
        delta = jnp.sum(gradient * output, axis=-1)
        if lse_gradient is not None:
            delta = delta - lse_gradient
        sound = jnp.isfinite(delta) & jnp.all(jnp.isfinite(gradient), axis=-1) & jnp.isfinite(lse)
        lse = jnp.where(empty, 0.0, jnp.where(sound, lse, jnp.nan))
        return cls(cleaned(gradient), lse, cleaned(delta))


class Sums(NamedTuple):
    """Running gradients of one key head; biases as `Unit` has them, None where not wanted."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    weight: Array | None


class TileGradients(NamedTuple):
    """Gradients of one tile.

    Shapes:  query (c, I, F, d); gate (F, e); keys (S, d); values (S, e); outer_bias (c, I, F); inner_bias (c, I, S).
    """

    query: Array
    gate: Array
    keys: Array
    values: Array
    outer_bias: Array
    inner_bias: Array


def unit_gradients(tiles: UnitTiles, cotangent: Cotangent, biases: bool) -> tuple[Array, Sums]:
    """Return the gradients of a key head: of its queries (c, n, d), and the rest."""
    unit = tiles.unit
    like = unit.query
    zeros = Sums(
        tuple(jnp.zeros_like(key) for key in unit.keys),
        tuple(jnp.zeros_like(value) for value in unit.values),
        tuple(jnp.zeros_like(bias) if biases and bias is not None else None for bias in unit.biases),
        None if unit.weight is None else jnp.zeros_like(unit.weight),
    )
    zeros = jax.tree.map(lambda x: as_varying(x, like), zeros)

    def row_block(sums: Sums, block: Array) -> tuple[Sums, Array]:
        return _row_gradients(tiles, sums, cotangent, block)

    blocks = jnp.arange(tiles.row_blocks)
    sums, query = lax.scan(jax.checkpoint(row_block, prevent_cse=False), zeros, blocks)
    return joined(query, tiles.queries, 1), sums


def _row_gradients(tiles: UnitTiles, sums: Sums, cotangent: Cotangent, block: Array) -> tuple[Sums, Array]:
    """Return the sums with a block of rows added, and the gradient of its queries (c, I, d)."""
    rows = tiles.rows(block)
    size = tiles.tiles.queries
    row = Cotangent(*(part(x, 1, rows[0], size) for x in cotangent))
    if tiles.queries % size:  # rows that an earlier block had: their weights become zero
        row = row._replace(lse=jnp.where(rows[1] < block * size, inf, row.lse))
    plain = part(tiles.unit.query, 1, rows[0], size)
    weighted = weighted_query(plain, tiles.unit.weight)

    def outer_block(carry: tuple[Sums, Array], number: Array) -> tuple[tuple[Sums, Array], None]:
        sums, gradient = carry
        sums, found = _outer_gradients(tiles, sums, row, rows, weighted, number)
        return (sums, gradient + found), None

    start = (sums, jnp.zeros_like(weighted))
    numbers = jnp.arange(tiles.tiles.blocks(tiles.lengths))
    (sums, gradient), _ = lax.scan(jax.checkpoint(outer_block, prevent_cse=False), start, numbers)
    if sums.weight is None:
        return sums, gradient
    weight = cleaned(tiles.unit.weight)
    axes = tuple(range(2, gradient.ndim))
    found = jnp.tensordot(cleaned(plain), gradient, axes=((0, 1), (0, 1)), precision=HIGHEST)
    query = jnp.tensordot(gradient, weight, axes=(axes, tuple(range(1, weight.ndim))), precision=HIGHEST)
    return sums._replace(weight=sums.weight + found), query


def _outer_gradients(
    tiles: UnitTiles, sums: Sums, row: Cotangent, rows: tuple[Array, Array], query: Array, number: Array
) -> tuple[Sums, Array]:
    """Return the sums with the tiles of a block of outer keys added, and the gradient of `query`."""
    modes, full = tiles.tiles.outer, tiles.unit.weight is not None
    outer = tiles.outer(number, rows)
    folded = fold(query, [mode.key for mode in outer], modes, full=full)
    extra = tiles.outer_extra(outer)
    finite = [clean(mode) for mode in outer]
    keys, values = [mode.key for mode in finite], [mode.value for mode in finite]
    # Linear in each operand, so its adjoint at the finite ones serves both.
    clean_folded, unfold = jax.vjp(lambda query, keys: fold(query, keys, modes, full=full), cleaned(query), keys)
    gates, ungate = jax.vjp(gate, values)
    side = (folded, cleaned(clean_folded), extra, None if gates is None else clamped(gates))

    def key_block(carry: tuple[Sums, Array, Array, Array], number: Array) -> tuple[Any, None]:
        sums, *held = carry
        inner = tiles.contracted(number, rows)
        tile = _tile(tiles, row, rows, side, outer, inner)
        sums = _with_mode(sums, tiles.tiles.contracted, inner, rows, tile.keys, tile.values, tile.inner_bias)
        parts = (tile.query, tile.gate, tile.outer_bias)
        return (sums, *(total + found for total, found in zip(held, parts, strict=True))), None

    start = (sums, *_held(folded, tiles.unit.values[0].shape[-1]))
    (sums, of_query, of_gate, of_bias), _ = lax.scan(
        jax.checkpoint(key_block, prevent_cse=False), start, jnp.arange(tiles.key_blocks)
    )
    found, of_keys = unfold(of_query)
    of_values = ungate(of_gate)[0] if gates is not None else []
    shape = (*of_bias.shape[:2], *tiles.tiles.folded)
    for axis, (mode, block) in enumerate(zip(modes, outer, strict=True)):
        others = tuple(2 + other for other in range(len(modes)) if other != axis)
        bias = jnp.sum(of_bias.reshape(shape), axis=others)
        sums = _with_mode(sums, mode, block, rows, of_keys[axis], of_values[axis], bias)
    return sums, found


def _held(folded: Array, width: int) -> tuple[Array, Array, Array]:
    """Zeros for the gradients of effective queries, gates, and outer biases."""
    gates = as_varying(jnp.zeros((folded.shape[2], width), folded.dtype), folded)
    return jnp.zeros_like(folded), gates, jnp.zeros_like(folded[..., 0])


def _tile(
    tiles: UnitTiles,
    row: Cotangent,
    rows: tuple[Array, Array],
    side: tuple[Array, Array, Array | None, Array | None],
    outer: list[KeyBlock],
    inner: KeyBlock,
) -> TileGradients:
    """Return the gradients of one tile, zeros where positions leave nothing of it."""
    folded, clean_folded, extra, gates = side

    def computed() -> TileGradients:
        scores = tiles.scores(folded, extra, outer, inner)
        return tile_gradients(row, scores, clean_folded, gates, clean(inner))

    if not tiles.sight.closes:
        return computed()
    shapes = jax.eval_shape(computed)
    like = tiles.unit.query

    def nothing() -> TileGradients:
        return TileGradients(*(as_varying(jnp.zeros(x.shape, x.dtype), like) for x in shapes))

    return TileGradients(*lax.cond(tiles.alive(rows, outer, inner), computed, nothing))


def tile_gradients(row: Cotangent, scores: Array, query: Array, gates: Array | None, inner: KeyBlock) -> TileGradients:
    """Return the gradients of one tile, given its scores (c, I, F, S) and finite operands."""
    live = scores != -inf
    weights = jnp.where(live, jnp.exp(scores - row.lse[..., None, None]), 0.0)
    gated = row.output[:, :, None, :] if gates is None else row.output[:, :, None, :] * gates
    gated = jnp.broadcast_to(gated, (*scores.shape[:3], gated.shape[-1]))
    of_weights = jnp.einsum("cife,se->cifs", gated, inner.value, precision=HIGHEST)
    of_scores = jnp.where(live, weights * (of_weights - row.delta[..., None, None]), 0.0)
    if gates is None:
        of_gates = jnp.zeros((scores.shape[2], inner.value.shape[-1]), scores.dtype)
    else:
        sums = jnp.einsum("cifs,se->cife", weights, inner.value, precision=HIGHEST)
        of_gates = jnp.sum(sums * row.output[:, :, None, :], axis=(0, 1))
    return TileGradients(
        jnp.einsum("cifs,sd->cifd", of_scores, inner.key, precision=HIGHEST),
        as_varying(of_gates, scores),
        jnp.einsum("cifs,cifd->sd", of_scores, query, precision=HIGHEST),
        jnp.einsum("cifs,cife->se", weights, gated, precision=HIGHEST),
        jnp.sum(of_scores, axis=3),
        jnp.sum(of_scores, axis=2),
    )


def _with_mode(
    sums: Sums, mode: int, block: KeyBlock, rows: tuple[Array, Array], key: Array, value: Array, bias: Array
) -> Sums:
    """Return the sums with what a block of a mode gets added; `bias` (c, I, S)."""
    keys, values, biases = list(sums.keys), list(sums.values), list(sums.biases)
    keys[mode] = add_part(keys[mode], 0, block.start, key)
    values[mode] = add_part(values[mode], 0, block.start, value)
    total = biases[mode]
    if total is not None:
        for axis in (0, 1):
            if total.shape[axis] == 1:
                bias = jnp.sum(bias, axis=axis, keepdims=True)
        biases[mode] = _add_bias(total, rows[0], block.start, bias)
    return sums._replace(keys=tuple(keys), values=tuple(values), biases=tuple(biases))


def _add_bias(total: Array, row: Array, key: Array, block: Array) -> Array:
    """Return a bias's gradient (c, n, m) with a block added at a row and a key."""
    if total.shape == block.shape:
        return total + block
    start = (jnp.zeros_like(key), row if total.shape[1] > 1 else jnp.zeros_like(key), key)
    known = lax.dynamic_slice(total, start, block.shape)
    return lax.dynamic_update_slice(total, known + block, start)


def bias_sums(layout: Layout, parts: tuple[Array | None, ...], groups: int) -> tuple[Array | None, ...]:
    """Return the gradients of biases (b, g, c, n, m), from those of key heads (u, c, n, m)."""
    found: list[Array | None] = []
    for bias, gradient in zip(layout.biases, parts, strict=True):
        if bias is None or gradient is None:
            found.append(None if bias is None else jnp.zeros_like(bias))
            continue
        split = gradient.reshape(-1, groups, *gradient.shape[1:])
        for axis in (0, 1):
            if bias.shape[axis] == 1:
                split = jnp.sum(split, axis=axis, keepdims=True)
        found.append(split)
    return tuple(found)
