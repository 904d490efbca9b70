"""The polynomial kernel for NumPy: the generic one, its array operations in place and laid out for BLAS."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from korder.spi import KernelOutput, OperandGradients, Operands, OutputGradients, Plan, PolynomialKernel

Array = NDArray[Any]


class PreallocatedRows:
    """Writes blocks of rows where they belong, so that no second copy of a result exists."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._rows = np.empty(shape, dtype=dtype)

    def put(self, batch: int, head: int, start: int, rows: Array) -> None:
        """Write the rows from `start` on."""
        self._rows[batch, head, start : start + rows.shape[0]] = rows

    def result(self) -> Array:
        """Return all rows."""
        return self._rows


class NumpyPolynomialKernel(PolynomialKernel):
    """The polynomial method on NumPy arrays.

    Cost:  as the generic kernel; the features of a block are written once, into a buffer that lives as long as the call
        and belongs to the calling thread, so threads may share a kernel.
    """

    in_place = True

    def __init__(self, xp: Any, plan: Plan) -> None:
        super().__init__(xp, plan)
        self._buffers = threading.local()

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, Any] | None = None) -> KernelOutput:
        """Return output, lse and what certificates need."""
        try:
            return super().forward(operands, save=save, residuals=residuals)
        finally:
            self.release()

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Return the gradients that `needs` names."""
        try:
            return super().backward(operands, saved, grads, needs=needs)
        finally:
            self.release()

    def release(self) -> None:
        """Let go of this thread's buffers."""
        vars(self._buffers).clear()

    def normalise_columns(self, columns: Array, scale: Array) -> Array:
        """Return columns (w, c) over their scales, rows contiguous."""
        result: Array = np.empty(columns.shape, dtype=columns.dtype)
        np.divide(columns, scale.astype(columns.dtype)[:, None], out=result)
        return result

    def features(self, columns: Array) -> Array:
        """Return the monomials (r, c); for the full mask in a buffer that the next call overwrites."""
        full = self.problem.spec.mask.kind == "full"  # other masks hold the features of several modes at once
        shape = (self.table.features, columns.shape[1])
        result = self._buffer("features", shape, columns.dtype) if full else np.empty(shape, columns.dtype)
        result[0] = 1
        for m in range(1, self.table.degree + 1):
            parents = result[self.table.rows(m - 1)]
            block = result[self.table.rows(m)]
            if self.table.pruned:
                np.take(parents, self.parents(m, "cpu")[0], axis=0, out=block, mode="clip")  # the mode that has no copy
            for group in self.table.children[m]:
                rows = block[group.rows]
                np.multiply(columns[group.column], rows if self.table.pruned else parents[group.parents], out=rows)
        return result

    def adjoint(self, columns: Array, features: Array, gradient: Array) -> Array:
        """Return the gradient of the columns (w, c); overwrites that of the features."""
        total = np.zeros_like(columns)
        for m in range(self.table.degree, 0, -1):
            block, parents = gradient[self.table.rows(m)], features[self.table.rows(m - 1)]
            passed = gradient[self.table.rows(m - 1)]
            for group in self.table.children[m]:
                own = block[group.rows]
                total[group.column] += np.einsum("ij,ij->j", own, parents[group.parents])
                if m > 1:
                    own *= columns[group.column]
                    passed[group.parents] += own  # every parent once
        return total

    def product(self, left: Array, right: Array, total: Array | None = None) -> Array:
        """Return total + left (p, q) @ right (q, s) in float64, added in place."""
        shape = (left.shape[0], right.shape[1])
        result = np.zeros(shape) if total is None else total
        part = self._buffer("part", shape, left.dtype)
        for start in range(0, left.shape[1], self.sum_block):
            np.matmul(left[:, start : start + self.sum_block], right[start : start + self.sum_block], out=part)
            result += part
        return result

    def running_state(self, tokens: tuple[Array, Array], carry: Array) -> Array:
        """Return carry + running sums over tokens, (c, rho, e'); a loop of adds, faster than NumPy's cumulative sum."""
        states: Array = self.running_terms(tokens)
        before = carry
        for state in states:
            state += before
            before = state
        return states

    def running_sums(self, terms: Array, carry: Array) -> tuple[Array, Array]:
        """Return carry + the sums up to each token, in place of the terms, and the sum of all."""
        for place in range(1, terms.shape[0]):
            terms[place] += terms[place - 1]
        total = terms[-1].copy()
        terms += carry
        return terms, total

    def sliding_state(self, arriving: tuple[Array, Array], leaving: tuple[Array, Array], carry: Array) -> Array:
        """Return carry + sums of arriving terms up to each token and of leaving ones from it on, (c, rho, e')."""
        states, after = self.running_state(arriving, carry), self.running_terms(leaving)
        for place in range(after.shape[0] - 2, -1, -1):
            after[place] += after[place + 1]
        states += after
        return states

    def reverse_running(self, terms: Array, carry: Array) -> tuple[Array, Array]:
        """Return carry + the sums from each token on, in place of the terms, and the sum of all."""
        for place in range(terms.shape[0] - 2, -1, -1):
            terms[place] += terms[place + 1]
        total = terms[0].copy()
        terms += carry
        return terms, total

    def chained_terms(self, tokens: tuple[Array, Array], before: Array, carry: Array) -> Array:
        """Return terms times the states (c, rho, e') of the token before each, for the first one times the carry."""
        terms: Array = self.running_terms(tokens)
        terms[1:] *= before[:-1]
        terms[0] *= carry
        return terms

    def collector(self, place: Any, trailing: tuple[int, ...] = (), dtype: Any = None) -> Any:
        """Return a preallocated array to write rows into."""
        shape = (self.problem.batch, self.problem.heads, self.problem.queries, *trailing)
        return PreallocatedRows(shape, dtype or np.float64)

    def _buffer(self, name: str, shape: tuple[int, int], dtype: Any) -> Array:
        """Return a scratch array of this thread's call, grown when needed."""
        kept = getattr(self._buffers, name, None)
        if kept is None or kept.size < shape[0] * shape[1] or kept.dtype != dtype:
            kept = None
            setattr(self._buffers, name, None)  # the old one goes before the new one comes
            kept = np.empty(shape[0] * shape[1], dtype)
            setattr(self._buffers, name, kept)
        scratch: Array = kept[: shape[0] * shape[1]].reshape(shape)
        return scratch
