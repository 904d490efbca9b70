"""The polynomial method on PyTorch: the generic kernel with features gathered in place and oneDNN products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from korder.spi import KernelOutput, OperandGradients, Operands, OutputGradients, PolynomialKernel
from korder_torch.products import product


class TorchPolynomialKernel(PolynomialKernel):
    """The polynomial method on tensors.

    Cost:  as the generic kernel; a feature is two gathers and one multiplication, a few operations for a whole degree.
    """

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, Any] | None = None) -> KernelOutput:
        """Compute output, lse and what certificates need; autograd is not recorded, the door does that."""
        with torch.no_grad():
            return super().forward(operands, save=save, residuals=residuals)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names."""
        with torch.no_grad():
            return super().backward(operands, saved, grads, needs=needs)

    def features(self, columns: Tensor) -> Tensor:
        """Return the monomials (r, c) of columns (w, c)."""
        result = columns.new_empty((self.table.features, columns.shape[1]))
        result[0] = 1.0
        for m in range(1, self.table.degree + 1):
            above, first = self.parents(m, columns.device)
            block = result[self.table.rows(m)]
            torch.index_select(result[self.table.rows(m - 1)], 0, above, out=block)
            block.mul_(columns.index_select(0, first))
        return result

    def product(self, left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
        """Return total + left (p, q) @ right (q, s) in float64, added in place."""
        if total is None:
            total = left.new_zeros((left.shape[0], right.shape[1]), dtype=torch.float64)
        for start in range(0, left.shape[1], self.sum_block):
            stop = start + self.sum_block
            total += product(left[:, start:stop], right[start:stop])
        return total
