"""The arithmetic of one tile of the exact method: ordinary attention of effective queries, gated by outer values.

A kernel walks the tiles; what happens inside one is here, in the few functions that a backend may replace. Axes of a
tile: b batch, g key heads, c query heads of one key head, I queries, F tuples of outer keys, S contracted keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from array_api_compat import device

from korder.methods.masks import TileMask

Array = Any


@dataclass(frozen=True, slots=True)
class Folded:
    """The outer side of a tile: the queries with the outer keys folded in, and the products of the outer values.

    Shapes:  query (b, g, c, I, F, d); gate (b, g, F, e), None for order 1; additive (b, g, c, I, F) or None, any of its
        first four axes may be 1; it holds the biases of the outer modes, -inf for masked keys.
    """

    query: Array
    gate: Array | None
    additive: Array | None


@dataclass(frozen=True, slots=True)
class Contracted:
    """The side of a tile that the products run over.

    Shapes:  keys (b, g, S, d); values (b, g, S, e); additive (b, g, c, I, S) or None, as in `Folded`.
    """

    keys: Array
    values: Array
    additive: Array | None


@dataclass(frozen=True, slots=True)
class RowState:
    """The running softmax of a block of queries.

    Shapes:  reference, total (b, g, c, I); weighted (b, g, c, I, e).
    """

    reference: Array
    """Largest score so far, -inf before any live one."""
    total: Array
    """Sum of exp(score - reference)."""
    weighted: Array
    """Sum of exp(score - reference) times the value products."""


@dataclass(frozen=True, slots=True)
class RowCotangent:
    """What backward knows of a block of queries.

    Shapes:  output (b, g, c, I, e), the gradient of the output; lse, delta (b, g, c, I).
    """

    output: Array
    lse: Array
    """Natural log of the row sum, 0 in place of -inf."""
    delta: Array
    """Gradient of the output times the output, less the gradient of lse."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients of a tile are wanted."""

    queries: bool
    keys: bool
    values: bool
    outer_biases: bool
    inner_biases: bool


@dataclass(frozen=True, slots=True)
class TileGradients:
    """Gradients of one tile, None where not wanted; shapes as in `Folded` and `Contracted`."""

    query: Array | None
    gate: Array | None
    keys: Array | None
    values: Array | None
    outer_biases: Array | None
    """(b, g, c, I, F), the gradient of the scores summed over the contracted keys."""
    inner_biases: Array | None
    """(b, g, c, I, S), summed over the tuples of outer keys."""


class TileArithmetic:
    """Readable truth for any Array API namespace; functional, so that traced namespaces can run it.

    A kernel makes one per call, so a subclass may keep buffers in it.
    """

    def __init__(self, xp: Any) -> None:
        self.xp = xp

    def folded(self, query: Array, gate: Array | None, additive: Array | None) -> Folded:
        """Return the outer side of the tiles of one block of outer keys."""
        return Folded(query, gate, additive)

    def contracted(self, keys: Array, values: Array, additive: Array | None) -> Contracted:
        """Return the contracted side of the tiles of one block of contracted keys."""
        return Contracted(keys, values, additive)

    def start(self, shape: tuple[int, ...], width: int, like: Array) -> RowState:
        """Return the state of queries, `shape` (b, g, c, I), that have seen nothing."""
        options = {"dtype": like.dtype, "device": device(like)}
        xp = self.xp
        return RowState(
            xp.full(shape, -float("inf"), **options), xp.zeros(shape, **options), xp.zeros((*shape, width), **options)
        )

    def scores(self, folded: Folded, contracted: Contracted, mask: TileMask | None) -> Array:
        """Return the scores of a tile, (b, g, c, I, F, S), -inf where not live."""
        xp = self.xp
        query = folded.query
        flat = self.rows(query) @ xp.matrix_transpose(contracted.keys)
        scores = xp.reshape(flat, (*query.shape[:5], flat.shape[-1]))
        if folded.additive is not None:
            scores = add_biases(xp, scores, folded.additive[..., None])
        if contracted.additive is not None:
            scores = add_biases(xp, scores, contracted.additive[..., None, :])
        if mask is not None:
            closed = xp.asarray(-float("inf"), dtype=scores.dtype, device=device(scores))
            outer = () if mask.outer is None else (mask.outer[..., None],)
            for part in (*outer, *mask.inner):
                scores = xp.where(part, scores, closed)
        return scores

    def absorb(self, state: RowState, folded: Folded, contracted: Contracted, mask: TileMask | None) -> RowState:
        """Return the state after one more tile."""
        xp = self.xp
        scores = self.scores(folded, contracted, mask)
        reference = xp.maximum(state.reference, xp.max(scores, axis=(-2, -1)))
        shift = finite_reference(xp, reference)
        weights = xp.exp(scores - shift[..., None, None])
        rescale = xp.exp(state.reference - shift)
        return RowState(
            reference,
            state.total * rescale + xp.sum(weights, axis=(-2, -1)),
            state.weighted * rescale[..., None] + self.gated_sum(weights, folded, contracted),
        )

    def gated_sum(self, weights: Array, folded: Folded, contracted: Contracted) -> Array:
        """Return the weights of a tile times its value products, (b, g, c, I, e)."""
        xp = self.xp
        sums = xp.reshape(self.rows(weights) @ contracted.values, (*weights.shape[:5], contracted.values.shape[-1]))
        if folded.gate is None:
            return sums[..., 0, :]
        return xp.sum(sums * folded.gate[:, :, None, None, :, :], axis=-2)

    def finish(self, state: RowState) -> tuple[Array, Array]:
        """Return output and lse of a block of queries; zeros and -inf where nothing was live."""
        xp = self.xp
        empty = state.total == 0.0
        total = xp.where(empty, xp.ones_like(state.total), state.total)
        lse = finite_reference(xp, state.reference) + xp.log(total)
        return state.weighted / total[..., None], xp.where(empty, state.reference, lse)

    def gradients(
        self, row: RowCotangent, folded: Folded, contracted: Contracted, mask: TileMask | None, wanted: Wanted
    ) -> TileGradients:
        """Return the gradients of one tile: its weights again from lse, then one product for each gradient."""
        xp = self.xp
        scores = self.scores(folded, contracted, mask)
        weights = xp.exp(scores - row.lse[..., None, None])
        gated = row.output[..., None, :]
        if folded.gate is not None:
            gated = gated * folded.gate[:, :, None, None, :, :]
        weight_gradient = xp.reshape(self.rows(gated) @ xp.matrix_transpose(contracted.values), scores.shape)
        score_gradient = weights * (weight_gradient - row.delta[..., None, None])
        gate = None
        if wanted.values and folded.gate is not None:
            sums = xp.reshape(self.rows(weights) @ contracted.values, gated.shape)
            gate = xp.sum(row.output[..., None, :] * sums, axis=(2, 3))
        return TileGradients(
            query=self.back(score_gradient, contracted.keys, folded.query) if wanted.queries else None,
            gate=gate,
            keys=xp.matrix_transpose(self.rows(score_gradient)) @ self.rows(folded.query) if wanted.keys else None,
            values=xp.matrix_transpose(self.rows(weights)) @ self.rows(gated) if wanted.values else None,
            outer_biases=xp.sum(score_gradient, axis=-1) if wanted.outer_biases else None,
            inner_biases=xp.sum(score_gradient, axis=-2) if wanted.inner_biases else None,
        )

    def back(self, score_gradient: Array, keys: Array, query: Array) -> Array:
        """Return the gradient of the effective queries."""
        return self.xp.reshape(self.rows(score_gradient) @ keys, query.shape)

    def rows(self, x: Array) -> Array:
        """(b, g, c, I, F, width) as the rows of one matrix per key head, (b, g, c * I * F, width)."""
        return self.xp.reshape(x, (*x.shape[:2], x.shape[2] * x.shape[3] * x.shape[4], x.shape[5]))


def finite_reference(xp: Any, reference: Array) -> Array:
    """Return the reference, 0 in place of -inf, so that it can be subtracted."""
    return xp.where(reference == -float("inf"), xp.zeros_like(reference), reference)


def add_biases(xp: Any, scores: Array, biases: Array) -> Array:
    """Return scores + biases; a bias of -inf closes its tuples whatever their scores hold."""
    closed = xp.asarray(-float("inf"), dtype=scores.dtype, device=device(scores))
    return xp.where(biases == -float("inf"), closed, scores + biases)
