"""The exact method on PyTorch: tiles of a few megabytes, in place, on whatever device the tensors are on.

A tile is two products and one exponential. The largest score is not looked for while the row sums stay in the middle of
the number range, which leaves no other pass over the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from korder.spi import (
    Contracted,
    ExactKernel,
    Folded,
    GradientSums,
    KernelOutput,
    Layout,
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
from korder_torch.fused import FusedAttention, is_faster
from korder_torch.products import batched_product

TILE_SCORES = 2**21
"""Scores in a tile: enough work to hide what calling a few tensor operations costs, and still inside a cache."""
TILE_SCORES_ON_GPU = 2**26
"""The same where calls are dear and memory is fast; the policy's memory limit makes most tiles smaller."""
LEAST, MOST = 1.0, 2.0**40
"""Row sums between which weights need no other reference than the one they have."""
SMALL_VALUE = 1e-20
"""Largest value of a head below which weights always have the largest score as reference: others might underflow."""


@dataclass(frozen=True, slots=True)
class TorchRowState(RowState):
    """The running softmax, and whether a reference is anything but 0 or, before the first live score, -inf."""

    moved: bool = False


class TorchExactKernel(ExactKernel):
    """The exact kernel with PyTorch's in-place arithmetic.

    Numerics:  weights are exp(score) while the row sums stay in [LEAST, MOST] and exp(score - largest) otherwise;
        16-bit operands are widened to float32 first. Where PyTorch's fused attention is faster, full and causal masks
        without biases go to it (decision 009), unless the result is not finite.
    """

    in_place = True

    def __init__(self, xp: Any, plan: Plan) -> None:
        tile = TILE_SCORES if plan.problem.device == "cpu" else TILE_SCORES_ON_GPU
        super().__init__(xp, plan, choose_tiling(plan.problem, tile))
        self.fused = FusedAttention.for_problem(plan.problem) if is_faster() else None

    @property
    def workspace_bytes(self) -> int:
        """Bytes beyond inputs and outputs that a forward needs."""
        return max(super().workspace_bytes, 0 if self.fused is None else self.fused.workspace_bytes)

    def attend(self, layout: Layout, operands: Operands) -> tuple[Tensor, Tensor]:
        """Return output and lse, by the fused kernel where it applies."""
        if self.fused is not None:
            output, lse = self.fused.forward(layout, self._offsets(operands))
            if bool(output.isfinite().all()) and not bool(lse.isnan().any()):
                return output, lse
        return super().attend(layout, operands)

    def differentiate(
        self, layout: Layout, operands: Operands, saved: KernelOutput, grads: OutputGradients, sums: GradientSums
    ) -> bool:
        """Add the gradients to `sums`, by the fused kernel where it applies; it knows no gradient of lse."""
        if self.fused is not None and grads.lse is None:
            wide = (saved.residuals or {}).get("output", saved.output), saved.lse, grads.output.to(layout.query.dtype)
            query, keys, values = self.fused.backward(layout, self._offsets(operands), *wide)
            if all(bool(x.isfinite().all()) for x in (query, *keys, *values)):
                sums.set(query, keys, values)
                return True
        return super().differentiate(layout, operands, saved, grads, sums)

    def _offsets(self, operands: Operands) -> tuple[int, ...]:
        return (operands.query_offset, *(operands.key_offsets or (0,) * self.plan.problem.order))

    def arithmetic(self, layout: Layout) -> TileArithmetic:
        """Return the arithmetic of one call."""
        return TorchTileArithmetic(self.xp, careful=any(_has_small_head(value) for value in layout.values))

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
    """Tiles in place; a row's reference is 0 until its sums leave the middle of the number range.

    Args:
        xp: The namespace.
        careful: Whether fresh rows look for their largest score at once; it is on from the first time that the sums of
            a fresh row fell outside, because then those of others will as well.
    """

    def __init__(self, xp: Any, *, careful: bool) -> None:
        super().__init__(xp)
        self.careful = careful

    def folded(self, query: Tensor, gate: Tensor | None, additive: Tensor | None) -> Folded:
        """Return the outer side in one layout of memory, so that strides change neither speed nor a bit."""
        return Folded(query.contiguous(), gate, additive)

    def contracted(self, keys: Tensor, values: Tensor, additive: Tensor | None) -> Contracted:
        """Return the contracted side, likewise."""
        return Contracted(keys.contiguous(), values.contiguous(), additive)

    def start(self, shape: tuple[int, ...], width: int, like: Tensor) -> RowState:
        """Return the state of queries that have seen nothing."""
        return TorchRowState(like.new_full(shape, -inf), like.new_zeros(shape), like.new_zeros((*shape, width)))

    def absorb(self, state: RowState, folded: Folded, contracted: Contracted, mask: TileMask | None) -> RowState:
        """Add one more tile to the state."""
        assert isinstance(state, TorchRowState)
        seen = state.reference != -inf
        if self.careful and not bool(seen.all()):
            return self._raised(state, folded, contracted, mask)
        shift = torch.where(seen, state.reference, 0.0)
        weights = self._shifted(folded, contracted, mask, shift if state.moved else None).exp_()
        total, weighted = self._sums(weights, folded, contracted)
        total += state.total
        weighted += state.weighted
        fits = (total < MOST) & (seen | (total >= LEAST)) & weighted.isfinite().all(dim=-1)
        if bool(fits.all()):
            return TorchRowState(shift, total, weighted, state.moved)
        self.careful = True
        del weights, total, weighted
        return self._raised(state, folded, contracted, mask)

    def _raised(self, state: TorchRowState, folded: Folded, contracted: Contracted, mask: TileMask | None) -> RowState:
        """Add one more tile, with the largest score so far as the reference."""
        scores = self._shifted(folded, contracted, mask, None)
        reference = torch.maximum(state.reference, scores.amax(dim=(-2, -1)))
        shift = torch.where(reference == -inf, 0.0, reference)
        scores -= shift[..., None, None]
        total, weighted = self._sums(scores.exp_(), folded, contracted)
        rescale = torch.exp(state.reference - shift)
        total += state.total * rescale
        weighted += state.weighted * rescale[..., None]
        return TorchRowState(reference, total, weighted, True)

    def _shifted(self, folded: Folded, contracted: Contracted, mask: TileMask | None, shift: Tensor | None) -> Tensor:
        """Return scores - shift (b, g, c, I, F, S) of a tile, -inf where not live."""
        extra = folded.additive
        if shift is not None:
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


def _has_small_head(values: Tensor) -> bool:
    largest = values.abs().amax(dim=(-2, -1)) if values.numel() else values.new_zeros(())
    return bool(((largest > 0.0) & (largest < SMALL_VALUE)).any())


def _rows(x: Tensor) -> Tensor:
    """(b, g, c, I, F, width) as (b, g, c * I * F, width)."""
    return x.reshape(*x.shape[:2], prod(x.shape[2:5]), x.shape[-1])
