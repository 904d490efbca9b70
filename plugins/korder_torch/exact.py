"""The exact method on PyTorch: tiles of a few megabytes, in place, on whatever device the tensors are on.

A tile is two products and one exponential. The largest score is not looked for while the row sums stay in the middle of
the number range, which leaves no other pass over the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from korder.spi import (
    Contracted,
    ExactKernel,
    Folded,
    KernelOutput,
    OperandGradients,
    Operands,
    OutputGradients,
    Plan,
    RowCotangent,
    RowState,
    TileArithmetic,
    TileGradients,
    TileMask,
    Wanted,
    choose_tiling,
)
from korder_torch.products import batched_product

TILE_SCORES = 2**21
"""Scores in a tile: enough work to hide what calling a few tensor operations costs, and still inside a cache."""
LEAST, MOST = 2.0**-40, 2.0**40
"""Row sums between which weights need no other reference than the one they have."""


class TorchExactKernel(ExactKernel):
    """The exact kernel with PyTorch's in-place arithmetic."""

    in_place = True

    def __init__(self, xp: Any, plan: Plan) -> None:
        super().__init__(xp, plan, choose_tiling(plan.problem, TILE_SCORES))

    def arithmetic(self) -> TileArithmetic:
        """Return the arithmetic of one call."""
        return TorchTileArithmetic(self.xp)

    def put(self, total: Tensor, ranges: Sequence[tuple[int, int]], part: Tensor) -> Tensor:
        """Write a block in place."""
        total[tuple(slice(*span) for span in ranges)] = part
        return total

    def add(self, total: Tensor, ranges: Sequence[tuple[int, int]], part: Tensor) -> Tensor:
        """Add to a block in place."""
        total[tuple(slice(*span) for span in ranges)] += part
        return total

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, object] | None = None) -> KernelOutput:
        """Compute output and lse; autograd is not recorded, the door does that."""
        with torch.no_grad():
            return super().forward(operands, save=save, residuals=residuals)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names."""
        with torch.no_grad():
            return super().backward(operands, saved, grads, needs=needs)


class TorchTileArithmetic(TileArithmetic):
    """Tiles in place; a row's reference is 0 until its sums leave the middle of the number range."""

    def folded(self, query: Tensor, gate: Tensor | None, additive: Tensor | None) -> Folded:
        """Return the outer side in one layout of memory, so that strides change neither speed nor a bit."""
        return Folded(query.contiguous(), gate, additive)

    def contracted(self, keys: Tensor, values: Tensor, additive: Tensor | None) -> Contracted:
        """Return the contracted side, likewise."""
        return Contracted(keys.contiguous(), values.contiguous(), additive)

    def absorb(self, state: RowState, folded: Folded, contracted: Contracted, mask: TileMask | None) -> RowState:
        """Add one more tile to the state, in place."""
        seen = state.reference != -inf
        shift = torch.where(seen, state.reference, 0.0)
        total, weighted = self._sums(self._shifted(folded, contracted, mask, shift).exp_(), folded, contracted)
        total += state.total
        weighted += state.weighted
        fits = (total < MOST) & (seen | (total > LEAST)) & weighted.isfinite().all(dim=-1)
        if bool(fits.all()):
            return RowState(shift, total, weighted)
        return self._raised(state, folded, contracted, mask)

    def _raised(self, state: RowState, folded: Folded, contracted: Contracted, mask: TileMask | None) -> RowState:
        """Add one more tile, with the largest score so far as the reference."""
        scores = self._shifted(folded, contracted, mask, None)
        reference = torch.maximum(state.reference, scores.amax(dim=(-2, -1)))
        shift = torch.where(reference == -inf, 0.0, reference)
        scores -= shift[..., None, None]
        total, weighted = self._sums(scores.exp_(), folded, contracted)
        rescale = torch.exp(state.reference - shift)
        return RowState(reference, total + state.total * rescale, weighted + state.weighted * rescale[..., None])

    def _shifted(self, folded: Folded, contracted: Contracted, mask: TileMask | None, shift: Tensor | None) -> Tensor:
        """Return scores - shift (b, g, c, I, F, S) of a tile, -inf where not live."""
        extra = folded.additive
        if shift is not None and (extra is not None or bool(shift.any())):
            extra = -shift[..., None] if extra is None else extra - shift[..., None]
        if mask is not None and mask.outer is not None:
            extra = torch.where(mask.outer, 0.0 if extra is None else extra, -inf)
        scores = batched_product(_rows(folded.query), contracted.keys.mT).view(*folded.query.shape[:5], -1)
        if extra is not None:
            scores += extra[..., None]
        if contracted.additive is not None:
            scores += contracted.additive[..., None, :]
        for part in () if mask is None else mask.inner:
            scores.masked_fill_(~part, -inf)
        return scores

    def _sums(self, weights: Tensor, folded: Folded, contracted: Contracted) -> tuple[Tensor, Tensor]:
        """Return the row sums of the weights (b, g, c, I), and of the weights times the value products."""
        sums = self._times_values(weights, contracted)
        total = weights.sum(dim=(-2, -1))
        if folded.gate is None:
            return total, sums[..., 0, :]
        return total, sums.mul_(folded.gate[:, :, None, None]).sum(dim=-2)

    def _times_values(self, weights: Tensor, contracted: Contracted) -> Tensor:
        return batched_product(_rows(weights), contracted.values).view(*weights.shape[:5], -1)

    def gradients(
        self, row: RowCotangent, folded: Folded, contracted: Contracted, mask: TileMask | None, wanted: Wanted
    ) -> TileGradients:
        """Return the gradients of one tile: two products for the weights and theirs, one more for each gradient."""
        weights = self._shifted(folded, contracted, mask, row.lse).exp_()
        gated = row.output[..., None, :]
        if folded.gate is not None:
            gated = gated * folded.gate[:, :, None, None]
        flat_gated, flat_weights = _rows(gated), _rows(weights)
        gate = None
        if wanted.values and folded.gate is not None:
            gate = self._times_values(weights, contracted).mul_(row.output[..., None, :]).sum(dim=(2, 3))
        score_gradient = batched_product(flat_gated, contracted.values.mT).view(weights.shape)
        score_gradient -= row.delta[..., None, None]
        score_gradient *= weights
        flat = _rows(score_gradient)
        return TileGradients(
            query=batched_product(flat, contracted.keys).view(folded.query.shape) if wanted.queries else None,
            gate=gate,
            keys=batched_product(flat.mT, _rows(folded.query)) if wanted.keys else None,
            values=batched_product(flat_weights.mT, flat_gated) if wanted.values else None,
            outer_biases=score_gradient.sum(dim=-1) if wanted.outer_biases else None,
            inner_biases=score_gradient.sum(dim=-2) if wanted.inner_biases else None,
        )


def _rows(x: Tensor) -> Tensor:
    """(b, g, c, I, F, width) as (b, g, c * I * F, width)."""
    return x.reshape(*x.shape[:2], prod(x.shape[2:5]), x.shape[-1])
