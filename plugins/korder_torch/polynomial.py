"""The polynomial method on PyTorch: the generic kernel with features written in place, one block after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from korder.spi import KernelOutput, OperandGradients, Operands, OutputGradients, PolynomialKernel


class TorchPolynomialKernel(PolynomialKernel):
    """The polynomial method on tensors.

    Cost:  as the generic kernel; every feature is written once, where it belongs.
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
            parents, block = result[self.table.rows(m - 1)], result[self.table.rows(m)]
            starts, positions = self.table.starts[m - 1], self.table.starts[m]
            for first in range(self.table.width):
                rows = block[positions[first] : positions[first + 1]]
                torch.mul(columns[first], parents[starts[first] :], out=rows)
        return result

    def product(self, left: Tensor, right: Tensor, total: Tensor | None = None) -> Tensor:
        """Return total + left (p, q) @ right (q, s) in float64, added in place."""
        if total is None:
            total = left.new_zeros((left.shape[0], right.shape[1]), dtype=torch.float64)
        for start in range(0, left.shape[1], self.sum_block):
            stop = start + self.sum_block
            total += left[:, start:stop] @ right[start:stop]
        return total
