"""The polynomial method by the C++ kernels: korder's own passes, whose features are made where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from korder.spi import KernelOutput, OperandGradients, Operands, OutputGradients, Plan, PolynomialKernel
from korder_native import _native
from korder_native.arrays import address, dense, namespace, new, quietly, thread_count
from korder_native.backend import wanted_isa

Array = Any
BLOCK = 4096
"""Tokens that go through the kernels together, whatever smaller blocks the plan has for kernels that keep features."""
_SUMS, _READING, _GRADIENT = range(3)


@dataclass(frozen=True, slots=True)
class Laid:
    """What rows are read against: entries of at most 1 without gaps, and what each degree of them is multiplied with.

    Shapes:  values (r, e + 1) and sizes (r, 1) in the compute dtype; factors and size_factors 0-d float64.
    """

    values: Array
    sizes: Array
    factors: list[Array]
    size_factors: list[Array]


class PreallocatedRows:
    """Writes blocks of rows where they belong."""

    def __init__(self, rows: Array) -> None:
        self._rows = rows

    def put(self, batch: int, head: int, start: int, rows: Array) -> None:
        """Write the rows from `start` on."""
        self._rows[batch, head, start : start + rows.shape[0]] = rows

    def result(self) -> Array:
        """Return all rows."""
        return self._rows


class Passes(PolynomialKernel):
    """The passes over blocks of tokens of one array library."""

    def __init__(self, xp: Any, plan: Plan) -> None:
        super().__init__(xp, plan)
        self.kernels = _native.kernels(wanted_isa())
        self.monomials = _native.Monomials(self.table.width)
        for degree in range(self.table.degree + 1):
            paths, levels, rows = self._walk(degree)
            self.monomials.add(len(rows), *(x.ctypes.data for x in (paths, levels, rows)))
        self.workspace_bytes = self._workspace()

    def _walk(self, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the monomials of a degree in the order of a walk through their tree; see `cpp/monomials.hpp`."""
        first = self.table.offsets[degree]
        if degree == 0:
            return np.empty((1, 0), np.int32), np.ones(1, np.int32), np.zeros(1, np.int32)
        place = np.arange(self.table.offsets[degree + 1] - first)
        ancestors, columns = [], []
        for step in range(degree, 0, -1):
            above, variables = (np.asarray(x) for x in self.parents(step, "cpu"))
            ancestors.append(place)
            columns.append(variables[place])
            place = above[place]
        order = np.lexsort(ancestors)  # the last one, nearest to the root, decides first
        path = np.stack(ancestors[::-1], axis=1)[order]
        levels = np.ones(len(order), np.int32)
        levels[1:] += np.argmax(path[1:] != path[:-1], axis=1).astype(np.int32)
        paths = np.ascontiguousarray(np.stack(columns[::-1], axis=1)[order], np.int32)
        return paths, levels, (first + order).astype(np.int32)

    def _workspace(self) -> int:
        """Return the bytes beyond inputs and outputs of a forward, on as many threads as it would now."""
        problem, item = self.problem, 8 if self.problem.accumulation == "float64" else 4
        features, channels, degrees = self.table.features, problem.value_width + 1, self.table.degree + 1
        tokens = min(self._tokens(), max(problem.queries, *problem.lengths, 1))
        states = 8 * features * (channels + 1) * problem.order
        table = features * (channels + 1) * (3 * 8 + item)
        block = tokens * (self.table.width * (8 + 2 * item) + channels * (8 + 2 * item) + 8 * 8 * degrees)
        kernels = max(self.kernels.feature_bytes(self._call(tokens), work) for work in (_SUMS, _READING))
        return int(states + max(table, block + features * (channels + 1) * item + kernels))

    def _tokens(self) -> int:
        return max(self.polynomial.chunk, BLOCK)

    def blocks(self, length: int) -> Iterator[tuple[int, int]]:
        """Yield the blocks of tokens that go through the kernels together."""
        step = self._tokens()
        for start in range(0, length, step):
            yield start, min(start + step, length)

    def _call(self, tokens: int) -> Any:
        wide = self.problem.accumulation == "float64"
        return _native.FeatureCall(self.monomials, wide, thread_count(), tokens, self.problem.value_width + 1)

    def add_keys(self, block: Any, weighted: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        """Add a block of keys to the sums, in place."""
        columns, weighted = dense(block.columns), dense(weighted)
        operands = map(address, (columns, weighted, None, *state))
        self.kernels.feature_sums(self._call(columns.shape[1]), *operands)
        return state

    def read_table(self, states: list[tuple[Array, Array]], scales: Array) -> Any:
        """Return the table that the key states make together."""
        table = super().read_table(states, scales)
        values, sizes = self.laid_out(table.values), self.laid_out(table.absolute)
        return Laid(values, sizes, table.factors, table.absolute_factors)

    def finish_block(self, block: Any, table: Any, centre: Array, live: Array) -> Any:
        """Return what a block of rows comes to; every degree's share of the sums is taken inside the kernel."""
        columns, live = dense(block.columns), dense(live)
        tokens, degrees = columns.shape[1], self.table.degree + 1
        shares = self._stacked(self.shares(centre), table.factors)
        sums = new(columns, (tokens, self.problem.value_width + 1), "float64")
        powers, sizes = (new(columns, (tokens, degrees), "float64") for _ in range(2))
        operands = map(address, (columns, table.values, table.sizes, shares, live, sums, powers, sizes))
        self.kernels.read_features(self._call(tokens), *operands)
        found = (
            sums[:, -1],
            [powers[:, s] * factor for s, factor in enumerate(table.factors)],
            [sizes[:, s] * factor for s, factor in enumerate(table.size_factors)],
        )
        return sums[:, :-1], *self.finish_powers(found, centre, live)

    def _stacked(self, shares: list[Array], factors: list[Any]) -> Array:
        """Return shares times factors (c, degree + 1)."""
        return dense(self.xp.stack([x * factor for x, factor in zip(shares, factors, strict=True)], axis=1))

    def new_sums(self, like: list[Array]) -> Array:
        """Return zeros to collect into: (r, e + 1)."""
        return new(like[0], (self.table.features, self.problem.value_width + 1), "float64", zeros=True)

    def collect(self, block: Any, shares: list[Array], gradient: Array, sums: Array) -> None:
        """Add a block's features times each row's gradient and its share of every degree, in place."""
        columns, gradient = dense(block.columns), dense(gradient)
        spread = self._stacked(shares, [self.scale_sign**s for s in range(len(shares))])
        operands = map(address, (columns, gradient, spread, sums, None))
        self.kernels.feature_sums(self._call(columns.shape[1]), *operands)

    def joined(self, sums: Array) -> Array:
        """Return collected sums (r, e + 1)."""
        return sums

    def laid_out(self, table: list[Array]) -> Array:
        """Return a table without gaps."""
        return dense(self.xp.concat(table, axis=0))

    def columns_gradient(self, block: Any, table: Any, values: Array, shares: list[Array] | None = None) -> Array:
        """Return the gradient of the columns (w, c), that of the features being table @ values."""
        columns, values = dense(block.columns), dense(values)
        spread = None if shares is None else self._stacked(shares, [1.0] * len(shares))
        gradient = new(columns, columns.shape, self.problem.accumulation)
        operands = map(address, (columns, values, spread, table, gradient))
        self.kernels.feature_gradient(self._call(columns.shape[1]), *operands)
        return gradient

    def read_sums(self, block: Any, table: Any) -> Array:
        """Return features times a table: (c, e + 1) float64."""
        columns = dense(block.columns)
        sums = new(columns, (columns.shape[1], table.shape[1]), "float64")
        operands = map(address, (columns, table, None, None, None, sums, None, None))
        self.kernels.read_features(self._call(columns.shape[1]), *operands)
        return sums

    def collector(self, place: Any, trailing: tuple[int, ...] = (), dtype: Any = None) -> Any:
        """Return a preallocated array to write rows into."""
        shape = (self.problem.batch, self.problem.heads, self.problem.queries, *trailing)
        return PreallocatedRows(self.xp.empty(shape, dtype=dtype or self.xp.float64))


class NativePolynomialKernel:
    """The polynomial method on NumPy arrays and PyTorch tensors, features never in memory.

    Cost:      2 (k + 1) n r (e + 1) flop forward and twice that backward; workspace k r (e + 1) and what blocks of 4096
        tokens take.
    Numerics:  as korder's generic kernel: at most 256 terms in `problem.accumulation`, then float64.
    Source:    Alman & Song, arXiv 2310.04064; `korder.spi.PolynomialKernel`.
    """

    def __init__(self, plan: Plan) -> None:
        import array_api_compat.numpy as xp

        self.plan = plan
        self._passes = {xp: Passes(xp, plan)}

    @property
    def workspace_bytes(self) -> int:
        """Bytes beyond inputs and outputs that a forward takes."""
        return self._any().workspace_bytes

    @property
    def rounding_unit(self) -> float:
        """The relative rounding error of one sum."""
        return self._any().rounding_unit

    def residual_shapes(self, operands: Operands) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of everything that forward returns beside the output."""
        return self._any().residual_shapes(operands)

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, Any] | None = None) -> KernelOutput:
        """Compute output, lse and what certificates need."""
        with quietly(operands.query):
            return self._of(operands.query).forward(operands, save=save, residuals=residuals)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names."""
        with quietly(operands.query):
            return self._of(operands.query).backward(operands, saved, grads, needs=needs)

    def _of(self, array: Array) -> Passes:
        """Return the passes of an array's library."""
        xp = namespace(array)
        if xp not in self._passes:
            self._passes[xp] = Passes(xp, self.plan)
        return self._passes[xp]

    def _any(self) -> Passes:
        return next(iter(self._passes.values()))
