"""The exact method on NumPy: the tiles in reused buffers, two matrix products and one exponential over each score.

Three things make it fast. Shifts and biases ride on the product: queries and keys get columns whose product is the
amount to add, so no pass over the scores adds anything. A column of ones among the values makes the product return the
row sums as well. And the largest score of a tile is looked for only when a sum grows, not for every tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from korder.spi import (
    Contracted,
    ExactKernel,
    Folded,
    KernelOutput,
    Layout,
    OperandGradients,
    Operands,
    OutputGradients,
    RowCotangent,
    RowState,
    TileArithmetic,
    TileGradients,
    TileMask,
    Wanted,
)

Array = Any
GROWN = 2.0**20
"""Row sum, relative to exp(reference), at which the reference of a row is raised."""


class NumpyExactKernel(ExactKernel):
    """The exact kernel with NumPy's in-place arithmetic; every call has buffers of its own, so threads may share it."""

    in_place = True

    def arithmetic(self, layout: Layout) -> TileArithmetic:
        """Return arithmetic with fresh buffers."""
        return NumpyTileArithmetic(self.xp)

    def put(self, total: Array, ranges: Sequence[tuple[int, int]], part: Array) -> Array:
        """Write a block in place."""
        total[tuple(slice(*span) for span in ranges)] = part
        return total

    def add(self, total: Array, ranges: Sequence[tuple[int, int]], part: Array) -> Array:
        """Add to a block in place."""
        total[tuple(slice(*span) for span in ranges)] += part
        return total

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, object] | None = None) -> KernelOutput:
        """Compute output and lse; NaN and infinities in the operands pass without a warning."""
        with np.errstate(all="ignore"):
            return super().forward(operands, save=save, residuals=residuals)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names."""
        with np.errstate(all="ignore"):
            return super().backward(operands, saved, grads, needs=needs)


class NumpyTileArithmetic(TileArithmetic):
    """Tiles in reused buffers.

    Its arrays are wider than those of the generic arithmetic: `Folded.query` is [q, shift, 1], `Contracted.keys` is
    [k, 1] or [k, 1, bias], values and gates end in a column of ones, and `RowState.weighted` ends in the row sum.
    """

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self._buffers: dict[str, Array] = {}

    def buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an uninitialised array of `shape` in the memory kept under `name`."""
        count = prod(shape)
        if name not in self._buffers or self._buffers[name].size < count:
            self._buffers.pop(name, None)  # let go of the old memory before asking for more
            self._buffers[name] = np.empty(count, dtype)
        return self._buffers[name][:count].reshape(shape)

    def folded(self, query: Array, gate: Array | None, additive: Array | None) -> Folded:
        """Copy the effective queries next to columns for the shift and the keys' biases."""
        width = query.shape[-1]
        wide = self.buffer("query", (*query.shape[:-1], width + 2), query.dtype)
        wide[..., :width] = query
        wide[..., width + 1] = 1.0
        return Folded(wide, None if gate is None else _with_ones(gate), additive)

    def contracted(self, keys: Array, values: Array, additive: Array | None) -> Contracted:
        """Copy keys next to a column of ones, and to their biases where these depend on the key alone."""
        columns = [keys, np.ones((*keys.shape[:-1], 1), keys.dtype)]
        if additive is not None and additive.shape[2:4] == (1, 1):
            columns.append(np.broadcast_to(additive[:, :, 0, 0, :, None], (*keys.shape[:-1], 1)))
            additive = None
        return Contracted(np.concatenate(columns, axis=-1), _with_ones(values), additive)

    def start(self, shape: tuple[int, ...], width: int, like: Array) -> RowState:
        """Return the state of queries that have seen nothing."""
        weighted = np.zeros((*shape, width + 1), like.dtype)
        return RowState(np.full(shape, -np.inf, like.dtype), weighted[..., -1], weighted)

    def shifted_scores(
        self, folded: Folded, contracted: Contracted, mask: TileMask | None, shift: Array | float
    ) -> Array:
        """Return scores + shift (b, g, c, I) of a tile in the buffer of scores."""
        query, keys = folded.query, contracted.keys
        extra = shift if isinstance(shift, float) else shift[..., None]
        if folded.additive is not None:
            extra = extra + folded.additive
        if mask is not None and mask.outer is not None:
            extra = np.where(mask.outer, extra, -np.inf)
        query[..., query.shape[-1] - 2] = extra
        flat = self.buffer("scores", (*keys.shape[:2], *_rows(query).shape[2:3], keys.shape[2]), query.dtype)
        np.matmul(_rows(query[..., : keys.shape[-1]]), keys.swapaxes(-1, -2), out=flat)
        scores = flat.reshape(*query.shape[:5], keys.shape[2])
        if contracted.additive is not None:
            scores += contracted.additive[..., None, :]
        for part in () if mask is None else mask.inner:
            _close(scores, part)
        return scores

    def absorb(self, state: RowState, folded: Folded, contracted: Contracted, mask: TileMask | None) -> RowState:
        """Add one more tile to the state, in place."""
        if np.isfinite(state.reference).all():
            weights = self.shifted_scores(folded, contracted, mask, -state.reference)
            part = self._weighted(np.exp(weights, out=weights), folded, contracted)
            if (part[..., -1] < GROWN).all():
                state.weighted[...] += part
                return state
        scores = self.shifted_scores(folded, contracted, mask, 0.0)
        reference = np.maximum(state.reference, scores.reshape(*scores.shape[:4], -1).max(axis=-1))
        shift = np.where(reference == -np.inf, reference.dtype.type(0), reference)
        scores -= shift[..., None, None]
        part = self._weighted(np.exp(scores, out=scores), folded, contracted)
        state.weighted[...] *= np.exp(state.reference - shift)[..., None]
        state.weighted[...] += part
        state.reference[...] = reference
        return state

    def _weighted(self, weights: Array, folded: Folded, contracted: Contracted) -> Array:
        """Weights times value products, and in the last column the sums of the weights, (b, g, c, I, e + 1)."""
        sums = self._product("sums", weights, contracted.values)
        if folded.gate is None:
            return sums[..., 0, :]
        return np.einsum("bgcife,bgfe->bgcie", sums, folded.gate)

    def _product(self, name: str, weights: Array, right: Array) -> Array:
        flat = _rows(weights)
        out = self.buffer(name, (*flat.shape[:3], right.shape[-1]), right.dtype)
        return np.matmul(flat, right, out=out).reshape(*weights.shape[:5], right.shape[-1])

    def finish(self, state: RowState) -> tuple[Array, Array]:
        """Return output and lse of a block of queries."""
        return super().finish(RowState(state.reference, state.total, state.weighted[..., :-1]))

    def gradients(
        self, row: RowCotangent, folded: Folded, contracted: Contracted, mask: TileMask | None, wanted: Wanted
    ) -> TileGradients:
        """Return the gradients of one tile: two products for the weights and theirs, one more for each gradient."""
        weights = self.shifted_scores(folded, contracted, mask, -row.lse)
        np.exp(weights, out=weights)
        gated = self._gated(row, folded)
        score_gradient = self.buffer("score gradient", weights.shape, weights.dtype)
        np.matmul(_rows(gated), contracted.values.swapaxes(-1, -2), out=_rows(score_gradient))
        score_gradient *= weights
        query, keys = folded.query[..., :-2], contracted.keys[..., : folded.query.shape[-1] - 2]
        gate = None
        if wanted.values and folded.gate is not None:
            sums = self._product("sums", weights, contracted.values[..., :-1])
            gate = np.einsum("bgcife,bgcie->bgfe", sums, row.output)
        return TileGradients(
            query=(_rows(score_gradient) @ keys).reshape(query.shape) if wanted.queries else None,
            gate=gate,
            keys=_rows(score_gradient).swapaxes(-1, -2) @ _rows(query) if wanted.keys else None,
            values=_rows(weights).swapaxes(-1, -2) @ _rows(gated[..., :-1]) if wanted.values else None,
            outer_biases=score_gradient.sum(axis=-1) if wanted.outer_biases else None,
            inner_biases=score_gradient.sum(axis=-2) if wanted.inner_biases else None,
        )

    def _gated(self, row: RowCotangent, folded: Folded) -> Array:
        """The output's gradient times the gates, (b, g, c, I, F, e + 1), with -delta in the last column."""
        cotangent = np.concatenate([row.output, -row.delta[..., None]], axis=-1)[..., None, :]
        if folded.gate is None:
            return cotangent
        out = self.buffer("gated", (*folded.query.shape[:5], cotangent.shape[-1]), cotangent.dtype)
        return np.multiply(cotangent, folded.gate[:, :, None, None], out=out)


def _close(scores: Array, part: Array) -> None:
    """Set scores to -inf where `part` of a mask fails, touching only the columns of keys that it cuts."""
    cut = np.flatnonzero(~part.all(axis=(0, 1)))
    if cut.size:
        columns = slice(cut[0], cut[-1] + 1)
        scores[..., columns] += np.where(part[..., columns], scores.dtype.type(0), scores.dtype.type(-np.inf))


def _with_ones(x: Array) -> Array:
    return np.concatenate([x, np.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def _rows(x: Array) -> Array:
    """(b, g, c, I, F, width) as (b, g, c * I * F, width), without a copy."""
    return x.reshape(*x.shape[:2], -1, x.shape[-1])
