"""The polynomial method by the C++ kernels: korder's own passes, whose features are made where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from korder.spi import KernelOutput, OperandGradients, Operands, OutputGradients, Plan, PolynomialKernel
from korder_native import _native
from korder_native.arrays import (
    NUMBERS,
    address,
    dense,
    namespace,
    new,
    plain_view,
    quietly,
    readable,
    thread_count,
)
from korder_native.backend import wanted_isa
from korder_native.running import FORWARD_BLOCK, Laid, WayBack, WayForward

Array = Any
BLOCK_BYTES, LONGEST_BLOCK = 2 << 20, 16384
"""What the results of a block may take, and its tokens; plans have smaller ones, for kernels that keep features."""
_SUMS, _READING, _GRADIENT = range(3)


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
            paths, levels = self._paths(degree)
            self.monomials.add(len(levels), paths.ctypes.data, levels.ctypes.data)
        self.workspace_bytes = self._workspace()

    def _paths(self, degree: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of every monomial of a degree, and where they first differ; see `cpp/monomials.hpp`."""
        place = np.arange(self.table.offsets[degree + 1] - self.table.offsets[degree])
        paths, levels = np.empty((len(place), degree), np.int32), np.ones(len(place), np.int32)
        for step in range(degree):
            above, columns = (np.asarray(x) for x in self.parents(degree - step, "cpu"))
            paths[:, step] = columns[place]
            place = above[place]
        if degree:
            levels[1:] += np.argmax(paths[1:] != paths[:-1], axis=1).astype(np.int32)
        return paths, levels

    def _workspace(self) -> int:
        """Return the bytes beyond inputs and outputs of a forward, on as many threads as it would now."""
        problem, item = self.problem, 8 if self.problem.accumulation == "float64" else 4
        features, channels, degrees = self.table.features, problem.value_width + 1, self.table.degree + 1
        running = problem.spec.mask.kind != "full"
        tokens = min(FORWARD_BLOCK if running else self._tokens(), max(problem.queries, *problem.lengths, 1))
        rows = 8 * problem.batch * problem.heads * problem.queries
        weights = 48 * max(problem.lengths) if any((*problem.biases, *problem.key_masks)) else 0
        states = 8 * features * (channels + 1) * problem.order
        block = tokens * (8 * (channels + degrees + 1) + item * problem.value_width)
        if problem.weight != "none":
            block += tokens * self.table.width * (8 + 2 * item)
        if running:
            # other heads of a key head read copies; weights and their running totals stand beside the keys
            states += states if problem.heads > problem.groups else 0
            weights += 16 * sum(problem.lengths)
            work = features * (4 * 8 + item) + block + self.kernels.running_bytes(self._running_call(tokens))
        else:
            kernels = max(self.kernels.feature_bytes(self.call(tokens), work) for work in (_SUMS, _READING))
            work = features * (channels + 1) * item + max(24 * features, block + kernels)
        # rows: centres, weights and means; at the end lse out of them
        return int(max(3 * rows + states + weights + work, 7 * rows))

    def _running_call(self, rows: int) -> Any:
        call = _native.RunningCall(self.call(rows), None)
        for _ in range(self.problem.order):
            call.add_mode(self.call(rows), 0, None, None)
        return call

    def _tokens(self) -> int:
        wanted = BLOCK_BYTES // (8 * (self.problem.value_width + 1)) // 256 * 256
        return max(self.polynomial.chunk, min(wanted, LONGEST_BLOCK))

    def blocks(self, length: int) -> Iterator[tuple[int, int]]:
        """Yield the blocks of tokens that go through the kernels together."""
        step = self._tokens()
        for start in range(0, length, step):
            yield start, min(start + step, length)

    def call(self, tokens: int) -> Any:
        """Return a call about tokens, on as many threads as there are now."""
        wide = self.problem.accumulation == "float64"
        return _native.FeatureCall(self.monomials, wide, thread_count(), tokens, self.problem.value_width + 1)

    def _of_columns(self, columns: Array) -> tuple[Any, Any]:
        """Return a call about columns (w, c) in the compute dtype, and what it points at."""
        call, rows = self.call(columns.shape[1]), self.xp.permute_dims(columns, (1, 0))
        call.set_columns(plain_view(rows), NUMBERS[self.problem.accumulation], None, None)
        return call, rows

    def of_factor(self, factor: Any, tokens: tuple[int, int], scale: Array | None = None) -> tuple[Any, Any]:
        """Return a call about a factor's columns over their scales (w,), and what it points at.

        The kernels read a factor's own rows. Projected columns are made, and so are those with a scale of no inverse.
        """
        start, stop = tokens
        inverse = None if scale is None else 1.0 / scale
        call = self.call(stop - start)
        projected = factor.projection.matrix is not None or factor.projection.widths
        if projected or not (inverse is None or bool(self.xp.all(self.xp.isfinite(inverse)))):
            columns = factor.columns(self.xp, start, stop)
            rows = self.xp.permute_dims(columns if scale is None else self.normalise_columns(columns, scale), (1, 0))
            call.set_columns(plain_view(rows), NUMBERS[self.problem.accumulation], None, None)
            return call, rows
        rows = readable(factor.rows[start:stop, :])
        live = None if factor.live is None else dense(factor.live[start:stop])
        call.set_columns(plain_view(rows), NUMBERS[self.problem.dtype], address(inverse), address(live))
        return call, (rows, live, inverse)

    def column_scales(self, plane: Any) -> Array:
        """Return powers of two near the largest finite live entry of every column: (k + 1, w) float64."""
        keys = [self._column_facts(key)[0] for key in plane.keys]
        queries = [self._column_facts(query)[0] for query in plane.queries]
        largest = self.xp.max(self.xp.stack(queries, axis=0), axis=0)
        return self.scales_of(self.xp.stack([largest, *keys], axis=0))

    def centres(self, operands: Operands) -> Array:
        """Return the centre of every row's scores: (b, h, n) float64."""
        if self.polynomial.coefficients != "taylor" or self.problem.spec.mask.kind != "full":
            return super().centres(operands)
        rows = (self.problem.batch, self.problem.heads, self.problem.queries)
        found = new(operands.query, rows, "float64")
        for plane in self.planes(operands):
            mean = self.problem.scale
            for key in plane.keys:
                _, totals, weight = self._column_facts(key)
                mean = mean * totals / (weight or 1.0)
            for head, query in zip(plane.heads, plane.queries, strict=True):
                call, _kept = self.of_factor(query, (0, query.length))
                self.kernels.token_products(call, *map(address, (mean, found[plane.batch, head, ...])))
        return found

    def _column_facts(self, factor: Any) -> tuple[Array, Array, float]:
        """Return the peaks and weighted totals of a factor's columns (w,), and the sum of its weights."""
        call, _kept = self.of_factor(factor, (0, factor.length))
        weights = None if factor.weights is None else dense(factor.weights)
        peaks, totals = (new(factor.rows, (self.table.width,), "float64") for _ in range(2))
        self.kernels.column_facts(call, *map(address, (weights, peaks, totals)))
        return peaks, totals, float(factor.length if weights is None else weights.sum())

    def add_keys(self, plane: Any, mode: int, scales: Array, tokens: tuple[int, int], state: Any) -> Any:
        """Add a block of keys to the sums, in place."""
        weights = plane.keys[mode].weights
        call, _kept = self.of_keys(plane, mode, scales, tokens, None if weights is None else weights[slice(*tokens)])
        self.kernels.feature_sums(call, None, *map(address, state))
        return state

    def of_keys(
        self, plane: Any, mode: int, scales: Array, tokens: tuple[int, int], weights: Array | None
    ) -> tuple[Any, Any]:
        """Return a call about keys and their values times weights (c,), these behind them, and what it points at."""
        call, kept = self.of_factor(plane.keys[mode], tokens, scales[mode + 1, ...])
        values, weights = readable(plane.values[mode][slice(*tokens), :]), None if weights is None else dense(weights)
        call.set_values(plain_view(values), NUMBERS[self.problem.dtype], True, address(weights))
        return call, (kept, values, weights)

    def read_table(self, states: list[tuple[Array, Array]], scales: Array) -> Any:
        """Return the table that the key states make together."""
        features, degrees, like = self.table.features, self.table.degree + 1, states[0][0]
        values, sizes = (
            new(like, (features, width), self.problem.accumulation) for width in (self.problem.value_width + 1, 1)
        )
        factors, size_factors = (new(like, (degrees,), "float64") for _ in range(2))
        weights, kept = dense(self.monomial_weights(scales)), [tuple(map(dense, state)) for state in states]
        sums, absolute = ([address(x) for x in arrays] for arrays in zip(*kept, strict=True))
        written = (address(x) for x in (values, sizes, factors, size_factors))
        self.kernels.read_table(self.call(1), sums, absolute, address(weights), self.scale_sign, *written)
        return Laid(values, sizes, np.asarray(self.polynomial.values, np.float64), factors, size_factors)

    def finish_block(
        self, query: Any, scale: Array, tokens: tuple[int, int], table: Any, rows: tuple[Array, Array]
    ) -> Any:
        """Return what a block of rows comes to; every degree's share of the sums is taken inside the kernel."""
        call, _kept = self.of_factor(query, tokens, scale)
        finish, (sums, moments, magnitude, *_read) = self.finishing(table, rows, query.rows)
        self.kernels.read_features(call, address(table.values), address(sums), finish)
        return sums[:, :-1], sums[:, -1], moments, magnitude

    def finished_blocks(
        self, operands: Operands, plane: Any, scales: Array, of_rows: Any, states: list[Array], progress: Any
    ) -> Iterator[Any]:
        """Yield (head, first row, what the rows come to) for blocks of rows; puts key states into `states`."""
        if self.problem.spec.mask.kind == "full":
            yield from super().finished_blocks(operands, plane, scales, of_rows, states, progress)
            return
        walk = WayForward(self, plane, self.pace(operands, scales))
        for start, stop in walk.blocks():
            for place, head in enumerate(plane.heads):
                at = (plane.batch, head, slice(start, stop))
                yield head, start, walk.read(place, start, stop, [x[at] for x in of_rows])
            progress.advance((stop - start) * (len(plane.heads) + self.problem.order))
        states += walk.sums

    def way_back(self, plane: Any, pace: Any, statistics: Any, rows: Any) -> WayBack:
        """Return what walks a plane's rows backwards under a causal mask."""
        return WayBack(self, plane, pace, statistics, rows)

    def finishing(self, table: Laid, rows: Any, like: Array) -> tuple[Any, tuple[Array, ...]]:
        """Return what finishes rows of these centres that are live or not, and what it writes, the sums first.

        Shapes:  sums (c, e + 1), moments (c, degree + 1), magnitude (c,).
        """
        centre, live = (dense(x) for x in rows)
        count, degrees = centre.shape[0], self.table.degree + 1
        shapes = ((count, self.problem.value_width + 1), (count, degrees), (count,))
        written = tuple(new(like, shape, "float64") for shape in shapes)
        constants = (table.coefficients, table.factors, table.sizes, table.size_factors)
        finish = _native.Finish(*map(address, (*constants, centre, live, *written[1:])))
        return finish, (*written, centre, live)

    def copied(self, array: Array) -> Array:
        """Return a dense copy."""
        return self.xp.asarray(dense(array), copy=True)

    def stacked(self, shares: list[Array], factors: list[Any]) -> Array:
        """Return shares times factors (c, degree + 1)."""
        return dense(self.xp.stack([x * factor for x, factor in zip(shares, factors, strict=True)], axis=1))

    def new_sums(self, like: list[Array]) -> Array:
        """Return zeros to collect into: (r, e + 1)."""
        return new(like[0], (self.table.features, self.problem.value_width + 1), "float64", zeros=True)

    def collect(self, block: Any, shares: list[Array], gradient: Array, sums: Array) -> None:
        """Add a block's features times each row's gradient and its share of every degree, in place."""
        call, _kept = self._of_columns(block.columns)
        spread, gradient = self.stacked(shares, [self.scale_sign**s for s in range(len(shares))]), dense(gradient)
        call.set_values(plain_view(gradient), NUMBERS["float64"], False, None)
        self.kernels.feature_sums(call, address(spread), address(sums), None)

    def joined(self, sums: Array) -> Array:
        """Return collected sums (r, e + 1)."""
        return sums

    def laid_out(self, table: list[Array]) -> Array:
        """Return a table without gaps."""
        return dense(self.xp.concat(table, axis=0))

    def columns_gradient(self, block: Any, table: Any, values: Array, shares: list[Array] | None = None) -> Array:
        """Return the gradient of the columns (w, c), that of the features being table @ values."""
        call, _kept = self._of_columns(block.columns)
        spread, values = None if shares is None else self.stacked(shares, [1.0] * len(shares)), dense(values)
        number = NUMBERS[self.problem.accumulation if shares is None else "float64"]
        call.set_values(plain_view(values), number, False, None)
        gradient = new(values, block.columns.shape, self.problem.accumulation)
        self.kernels.feature_gradient(call, *map(address, (spread, table, gradient)))
        return gradient

    def read_sums(self, block: Any, table: Any) -> Array:
        """Return features times a table: (c, e + 1) float64."""
        call, _kept = self._of_columns(block.columns)
        sums = new(table, (block.columns.shape[1], table.shape[1]), "float64")
        self.kernels.read_features(call, address(table), address(sums), None)
        return sums

    def collector(self, place: Any, trailing: tuple[int, ...] = (), dtype: Any = None) -> Any:
        """Return a preallocated array to write rows into."""
        shape = (self.problem.batch, self.problem.heads, self.problem.queries, *trailing)
        return PreallocatedRows(self.xp.empty(shape, dtype=dtype or self.xp.float64))


class NativePolynomialKernel:
    """The polynomial method on NumPy arrays and PyTorch tensors, features never in memory.

    Cost:      2 (k + 1) n r (e + 1) flop forward and twice that backward; workspace k r (e + 1) and a few MiB for a
        block of tokens.
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
