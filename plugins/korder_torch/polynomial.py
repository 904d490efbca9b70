"""The polynomial method on PyTorch: the generic kernel with features written in place and oneDNN products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from korder.spi import KernelOutput, OperandGradients, Operands, OutputGradients, Plan, PolynomialKernel
from korder_torch.products import product

Gather = tuple[Tensor, Tensor, Tensor]
"""Features of a degree, positions of the parents of those of the next, and where these go."""
Blocks = list[tuple[Gather | None, int, Tensor, Tensor]]
"""What is to be gathered before, column, parents, and the features that are their products."""


class TorchPolynomialKernel(PolynomialKernel):
    """The polynomial method on tensors.

    Cost:  as the generic kernel; every feature is written once, where it belongs.
    """

    def __init__(self, xp: Any, plan: Plan) -> None:
        self.in_place = plan.problem.device == "cpu"  # elsewhere running sums are made in a copy
        super().__init__(xp, plan)
        self._kept = threading.local()  # the memory of one call, so that threads may share a kernel

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, Any] | None = None) -> KernelOutput:
        """Compute output, lse and what certificates need; autograd is not recorded, the door does that."""
        try:
            with torch.no_grad():
                return super().forward(operands, save=save, residuals=residuals)
        finally:
            self.release()

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names."""
        try:
            with torch.no_grad():
                return super().backward(operands, saved, grads, needs=needs)
        finally:
            self.release()

    def release(self) -> None:
        """Let go of this thread's memory for features."""
        vars(self._kept).clear()

    def features(self, columns: Tensor) -> Tensor:
        """Return the monomials (r, c); for the full mask in memory that the next call overwrites."""
        result, blocks = self._memory(columns)
        variables = columns.unbind(0)
        for gather, column, parents, rows in blocks:
            if gather is not None:
                torch.index_select(gather[0], 0, gather[1], out=gather[2])
            torch.mul(variables[column], parents, out=rows)
        return result

    def _memory(self, columns: Tensor) -> tuple[Tensor, Blocks]:
        """Return memory for features and its blocks; under the full mask those of the call before if they fit."""
        count = columns.shape[1]
        kept: tuple[Tensor, Blocks] | None = getattr(self._kept, "features", None)
        if kept is not None and kept[0].shape[1] == count:
            return kept
        result = columns.new_empty((self.table.features, count))
        result[0] = 1.0
        found = (result, [*self._blocks(result)])
        if self.problem.spec.mask.kind == "full":  # others hold the features of several modes at once
            self._kept.features = found  # fresh pages would cost more than the multiplications
        return found

    def _blocks(self, result: Tensor) -> Iterator[tuple[Gather | None, int, Tensor, Tensor]]:
        """Yield what to gather, column, parents and place of every block of features."""
        pruned = self.table.pruned
        for m in range(1, self.table.degree + 1):
            parents, block = result[self.table.rows(m - 1)], result[self.table.rows(m)]
            gather = (parents, self.parents(m, result.device)[0], block) if pruned else None
            for group in self.table.children[m]:
                yield gather, group.column, block[group.rows] if pruned else parents[group.parents], block[group.rows]
                gather = None

    def running_state(self, tokens: tuple[Tensor, Tensor], carry: Tensor) -> Tensor:
        """Return carry + running sums over tokens, (c, rho, e'), in place."""
        return self.running_terms(tokens).cumsum_(dim=0).add_(carry)

    def sliding_state(self, arriving: tuple[Tensor, Tensor], leaving: tuple[Tensor, Tensor], carry: Tensor) -> Tensor:
        """Return carry + sums of arriving terms up to each token and of leaving ones from it on, (c, rho, e')."""
        features, weighted = leaving
        after = self.running_terms((features.flip(1), weighted.flip(0))).cumsum_(dim=0)
        return self.running_state(arriving, carry).add_(after.flip(0))

    def chained_terms(self, tokens: tuple[Tensor, Tensor], before: Tensor, carry: Tensor) -> Tensor:
        """Return terms times the states (c, rho, e') of the token before each, for the first one times the carry."""
        terms: Tensor = self.running_terms(tokens)
        terms[1:].mul_(before[:-1])
        terms[0].mul_(carry)
        return terms

    def product(self, left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
        """Return total + left (p, q) @ right (q, s) in float64, added in place."""
        if total is None:
            total = left.new_zeros((left.shape[0], right.shape[1]), dtype=torch.float64)
        for start in range(0, left.shape[1], self.sum_block):
            stop = start + self.sum_block
            total += product(left[:, start:stop], right[start:stop])
        return total
