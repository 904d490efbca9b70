"""The exact method on PyTorch: tiles in reused buffers, in place, with every product a `bmm` of the tensors' device.

Shifts and biases of the outer modes ride on the product as an extra column, and a column of ones among the values
returns the row sums, so one exponential is the only pass over the scores of an open tile.
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
    RowCotangent,
    RowState,
    TileArithmetic,
    TileGradients,
    TileMask,
    Wanted,
)

GROWN = 2.0**20
"""Row sum, relative to exp(reference), at which the reference of a row is raised."""


class TorchExactKernel(ExactKernel):
    """The exact kernel with PyTorch's in-place arithmetic; every call has buffers of its own."""

    def arithmetic(self) -> TileArithmetic:
        """Return arithmetic with fresh buffers."""
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
    """Tiles in reused buffers.

    Its tensors are wider than those of the generic arithmetic: `Folded.query` is [q, shift], `Contracted.keys` is
    [k, 1], values and gates end in a column of ones, and `RowState.weighted` ends in the row sum.
    """

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an uninitialised tensor of `shape` in the memory kept under `name`."""
        count = prod(shape)
        kept = self._buffers.get(name)
        if kept is None or kept.numel() < count:
            self._buffers.pop(name, None)  # let go of the old memory before asking for more
            kept = self._buffers[name] = torch.empty(count, dtype=like.dtype, device=like.device)
        return kept[:count].view(shape)

    def folded(self, query: Tensor, gate: Tensor | None, additive: Tensor | None) -> Folded:
        """Copy the effective queries next to a column for the shift."""
        width = query.shape[-1]
        wide = self.buffer("query", (*query.shape[:-1], width + 1), query)
        wide[..., :width] = query
        return Folded(wide, None if gate is None else _with_ones(gate), additive)

    def contracted(self, keys: Tensor, values: Tensor, additive: Tensor | None) -> Contracted:
        """Copy keys and values next to a column of ones."""
        return Contracted(_with_ones(keys), _with_ones(values), additive)

    def start(self, shape: tuple[int, ...], width: int, like: Tensor) -> RowState:
        """Return the state of queries that have seen nothing."""
        weighted = like.new_zeros((*shape, width + 1))
        return RowState(like.new_full(shape, -inf), weighted[..., -1], weighted)

    def shifted_scores(self, folded: Folded, contracted: Contracted, mask: TileMask | None, shift: Tensor) -> Tensor:
        """Return scores + shift (b, g, c, I) of a tile in the buffer of scores."""
        query, keys = folded.query, contracted.keys
        extra = shift[..., None]
        if folded.additive is not None:
            extra = extra + folded.additive
        if mask is not None and mask.outer is not None:
            extra = torch.where(mask.outer, extra, -inf)
        query[..., -1] = extra
        scores = self._product("scores", query, keys.mT)
        if contracted.additive is not None:
            scores += contracted.additive[..., None, :]
        for part in () if mask is None else mask.inner:
            scores.masked_fill_(~part, -inf)
        return scores

    def absorb(self, state: RowState, folded: Folded, contracted: Contracted, mask: TileMask | None) -> RowState:
        """Add one more tile to the state, in place."""
        if bool(torch.isfinite(state.reference).all()):
            weights = self.shifted_scores(folded, contracted, mask, -state.reference).exp_()
            part = self._weighted(weights, folded, contracted)
            if bool((part[..., -1] < GROWN).all()):
                state.weighted.add_(part)
                return state
        scores = self.shifted_scores(folded, contracted, mask, torch.zeros_like(state.reference))
        reference = torch.maximum(state.reference, scores.flatten(4).amax(-1))
        shift = torch.where(reference == -inf, 0.0, reference)
        scores -= shift[..., None, None]
        part = self._weighted(scores.exp_(), folded, contracted)
        state.weighted.mul_(torch.exp(state.reference - shift)[..., None]).add_(part)
        state.reference.copy_(reference)
        return state

    def _weighted(self, weights: Tensor, folded: Folded, contracted: Contracted) -> Tensor:
        """Weights times value products, and in the last column the sums of the weights, (b, g, c, I, e + 1)."""
        sums = self._product("sums", weights, contracted.values)
        if folded.gate is None:
            return sums[..., 0, :]
        return sums.mul_(folded.gate[:, :, None, None]).sum(dim=-2)

    def _product(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """Return left (b, g, c, I, F, x) @ right (b, g, x, y) in the buffer of `name`."""
        flat = _rows(left)
        out = self.buffer(name, (*flat.shape[:3], right.shape[-1]), left)
        torch.bmm(flat.flatten(0, 1), right.flatten(0, 1), out=out.flatten(0, 1))
        return out.view(*left.shape[:5], right.shape[-1])

    def finish(self, state: RowState) -> tuple[Tensor, Tensor]:
        """Return output and lse of a block of queries."""
        return super().finish(RowState(state.reference, state.total, state.weighted[..., :-1]))

    def gradients(
        self, row: RowCotangent, folded: Folded, contracted: Contracted, mask: TileMask | None, wanted: Wanted
    ) -> TileGradients:
        """Return the gradients of one tile: two products for the weights and theirs, one more for each gradient."""
        weights = self.shifted_scores(folded, contracted, mask, -row.lse).exp_()
        gated = self._gated(row, folded)
        score_gradient = self._product("score gradient", gated, contracted.values.mT).mul_(weights)
        query, keys = folded.query[..., :-1], contracted.keys[..., :-1]
        gate = None
        if wanted.values and folded.gate is not None:
            sums = self._product("sums", weights, contracted.values[..., :-1])
            gate = sums.mul_(row.output[..., None, :]).sum(dim=(2, 3))
        return TileGradients(
            query=(_rows(score_gradient) @ keys).reshape(query.shape) if wanted.queries else None,
            gate=gate,
            keys=_rows(score_gradient).mT @ _rows(query) if wanted.keys else None,
            values=_rows(weights).mT @ _rows(gated[..., :-1]) if wanted.values else None,
            outer_biases=score_gradient.sum(dim=-1) if wanted.outer_biases else None,
            inner_biases=score_gradient.sum(dim=-2) if wanted.inner_biases else None,
        )

    def _gated(self, row: RowCotangent, folded: Folded) -> Tensor:
        """The output's gradient times the gates, (b, g, c, I, F, e + 1), with -delta in the last column."""
        cotangent = torch.cat([row.output, -row.delta[..., None]], dim=-1)[..., None, :]
        if folded.gate is None:
            return cotangent
        out = self.buffer("gated", (*folded.query.shape[:5], cotangent.shape[-1]), cotangent)
        return torch.mul(cotangent, folded.gate[:, :, None, None], out=out)


def _with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones((*x.shape[:-1], 1))], dim=-1)


def _rows(x: Tensor) -> Tensor:
    """(b, g, c, I, F, width) as (b, g, c * I * F, width)."""
    return x.reshape(*x.shape[:2], prod(x.shape[2:5]), x.shape[-1])
