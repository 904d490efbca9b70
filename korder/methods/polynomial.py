"""The polynomial method over any Array API namespace: exp becomes a polynomial, sums over tuples products of sums.

`PolynomialKernel` is functional and readable; a backend overrides the array operations at its end, those in
`running_arrays`, or a pass. The forms of other masks than the full one stand in `running`, `windows` and `ordered`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from array_api_compat import device

from korder.errors import AccuracyError
from korder.methods.block_passes import BlockPasses
from korder.methods.factors import Factor, Plane, plane_count, planes
from korder.methods.features import (
    FeatureTable,
    feature_adjoint,
    gathered_features,
    multinomials,
    parents,
    polynomial_features,
    table_of,
)
from korder.methods.readings import (
    FinishedRows,
    Kept,
    Progress,
    ReadTable,
    RowCollector,
    finish_rows,
    nonzero,
    prod_arrays,
)
from korder.methods.running_arrays import RunningArrays
from korder.methods.scales import scales_of_peaks
from korder.methods.sight import live_rows
from korder.methods.statistics import column_peaks, row_centres
from korder.planning.plan import Plan, PolynomialPlan
from korder.planning.polynomial import forward_workspace
from korder.spi.backend import StateKernel
from korder.spi.operands import KernelOutput, OperandGradients, Operands, OutputGradients
from korder.spi.progress import PROGRESS

if TYPE_CHECKING:
    from korder.methods.feature_gradients import RowGradients
    from korder.methods.running import Pace

Array = Any


class PolynomialKernel(BlockPasses, RunningArrays):
    """A compiled polynomial plan.

    Cost:      2 (k + 1) n r (e + 1) flop, linear in tokens; workspace k r (e + 1) plus one block of features.
    Numerics:  sums of at most 256 terms in the compute dtype, joined in float64; degrees are combined in float64.
    Source:    Alman & Song, arXiv 2310.04064; certificates, centring and layout are ours.
    """

    sum_block: ClassVar[int] = 256
    """Terms summed in the compute dtype before they join a float64 total."""
    in_place: bool = False
    """Whether features and running states are written where they belong; it sets `workspace_bytes`."""

    def __init__(self, xp: Any, plan: Plan) -> None:
        assert plan.polynomial is not None
        self.xp = xp
        self.plan = plan
        self.problem = plan.problem
        self.polynomial: PolynomialPlan = plan.polynomial
        self.table: FeatureTable = table_of(plan.problem.score_width, plan.polynomial)
        self.dtype = getattr(xp, plan.problem.accumulation)
        self.rounding_unit = (self.sum_block + 8) * 0.5 * float(xp.finfo(self.dtype).eps)
        self.scale_sign = -1.0 if plan.problem.scale < 0 else 1.0
        sizes = (plan.polynomial.degree, plan.polynomial.chunk, plan.polynomial.pruning)
        self.workspace_bytes = forward_workspace(plan.problem, *sizes, in_place=self.in_place)
        self._index: dict[Any, tuple[Array, ...]] = {}

    @np.errstate(all="ignore")
    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, Any] | None = None) -> KernelOutput:
        """Return output, lse and what certificates need; see `korder.spi.Kernel`.

        Raises:
            AccuracyError: The polynomial sums to a number that is not positive in a row with a live tuple.
        """
        xp, problem = self.xp, self.problem
        known = residuals or {}
        if problem.batch == 0:
            return self._nothing(operands)
        centre = known.get("centre")
        if centre is None:
            centre = self.centres(operands)
        live, log_weights = live_rows(xp, problem, operands, known.get("maxima"))
        progress = self._progress(operands)
        place, degree, dtype = device(operands.query), self.polynomial.degree, getattr(xp, problem.dtype)
        stores = (
            self.collector(place, (problem.value_width,), operands.query.dtype),
            self.collector(place),
            self.collector(place, (degree + 1,)),
            self.collector(place),
        )
        kept = Kept(save)
        for index, plane in enumerate(self.planes(operands, known.get("maxima"))):
            scales = self.column_scales(plane) if "scales" not in known else known["scales"][index, ...]
            states: list[Array] = []
            for head, start, finished in self.finished_blocks(
                operands, plane, scales, (centre, live), states, progress
            ):
                for store, part in zip(stores, (xp.astype(finished[0], dtype), *finished[1:]), strict=True):
                    store.put(plane.batch, head, start, part)
            kept.close(xp, plane, scales, states)
        progress.finish()
        output, mean, moments, magnitude = (store.result() for store in stores)
        self.check_normaliser(mean, live)
        logs = xp.log(xp.where(live, mean, xp.ones_like(mean))) + log_weights + centre + kept.row_maxima(xp, problem)
        return KernelOutput(
            output=output,
            lse=xp.where(live, logs, xp.full_like(logs, -float("inf"))),
            normaliser=xp.where(live, mean * xp.exp(log_weights), xp.zeros_like(mean)),
            moments=moments,
            magnitude=magnitude,
            residuals=kept.residuals(xp, centre) if save else None,
        )

    def centres(self, operands: Operands) -> Array:
        """Return the centre of every row's scores: (b, h, n) float64."""
        return row_centres(self.xp, self.problem, operands, self.polynomial.coefficients)

    def planes(self, operands: Operands, maxima: Array | None = None) -> Iterator[Plane]:
        """Yield the planes of the problem; see `factors.planes`."""
        return planes(self.xp, self.problem, operands, maxima)

    def pace(self, operands: Operands, scales: Array) -> Pace:
        """Return what stays fixed while the rows of a plane are walked; for masks other than the full one."""
        from korder.methods.running import Pace

        return Pace.of(self, operands, scales)

    def way_back(self, plane: Plane, pace: Pace, statistics: tuple[Array, Array, Array], rows: RowGradients) -> Any:
        """Return what walks rows backwards under a causal mask: `running_gradients.CausalWalk`, or one like it."""
        from korder.methods.running_gradients import CausalWalk

        return CausalWalk(self, plane, pace, statistics, rows)

    def residual_shapes(self, operands: Operands) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of everything that forward returns beside the output, residuals included."""
        problem, order = self.problem, self.problem.order
        rows = (problem.batch, problem.heads, problem.queries)
        planes = plane_count(problem, operands)
        kept = self.table.features if problem.spec.mask.kind in ("full", "causal") else 0
        shapes = {
            **dict.fromkeys(("lse", "normaliser", "magnitude", "centre"), rows),
            "moments": (*rows, self.polynomial.degree + 1),
            "scales": (planes, order + 1, self.table.width),
            "maxima": (planes, order),
            "states": (planes, order, kept, problem.value_width + 1),
        }
        return {name: (shape, "float64") for name, shape in shapes.items()}

    def _nothing(self, operands: Operands) -> KernelOutput:
        """Return the output of a problem without a batch entry."""
        width, dtype = self.problem.value_width, operands.query.dtype
        shapes = (((width,), dtype), ((), None), ((self.polynomial.degree + 1,), None))
        place = device(operands.query)
        output, lse, moments = (self.collector(place, trailing, dtype).result() for trailing, dtype in shapes)
        return KernelOutput(output, lse, lse, moments, lse, {})

    def finished_blocks(
        self,
        operands: Operands,
        plane: Plane,
        scales: Array,
        of_rows: tuple[Array, Array],
        states: list[Array],
        progress: Progress,
    ) -> Iterator[tuple[int, int, FinishedRows]]:
        """Yield (head, first row, what `finish_rows` returns) for blocks of rows, given (centre, live) of all rows.

        Puts the modes' key states into `states`.
        """
        centre, live = of_rows
        if self.problem.spec.mask.kind != "full":
            from korder.methods.running import running_readings

            for head, start, stop, reading in running_readings(self, operands, plane, scales, states, progress):
                at = (plane.batch, head, slice(start, stop))
                yield head, start, finish_rows(self.xp, self.polynomial.values, reading, centre[at], live[at])
            return
        found = [self.key_state(plane, t, scales, progress) for t in range(self.problem.order)]
        states += [state for state, _ in found]
        table = self.read_table(found, scales)
        for head, query in zip(plane.heads, plane.queries, strict=True):
            for start, stop in self.blocks(query.length):
                at = (plane.batch, head, slice(start, stop))
                rows = (centre[at], live[at])
                yield head, start, self.finish_block(query, scales[0, ...], (start, stop), table, rows)
                progress.advance(stop - start)

    def key_state(self, plane: Plane, mode: int, scales: Array, progress: Progress) -> tuple[Array, Array]:
        """Return the sums over keys of u [w v, w] (r, e + 1) and of |u| w (r, 1), in float64."""
        xp = self.xp
        key = plane.keys[mode]
        shape = (self.table.features, self.problem.value_width + 1)
        state = xp.zeros(shape, dtype=xp.float64, device=device(key.rows))
        absolute = xp.zeros((shape[0], 1), dtype=xp.float64, device=device(key.rows))
        for start, stop in self.blocks(key.length):
            state, absolute = self.add_keys(plane, mode, scales, (start, stop), (state, absolute))
            progress.advance(stop - start)
        return state, absolute

    def read_table(self, states: list[tuple[Array, Array]], scales: Array) -> ReadTable:
        """Return the table that the key states make together: mean products, times multiplicities and scales."""
        xp = self.xp
        counts = [nonzero(xp, state[:1, -1:]) for state, _ in states]
        values = prod_arrays([state / count for (state, _), count in zip(states, counts, strict=True)])
        absolute = prod_arrays([total / count for (_, total), count in zip(states, counts, strict=True)])
        return self.normalised(values, absolute, scales)

    def normalised(self, values: Array, absolute: Array, scales: Array) -> ReadTable:
        """Split a table (r, ..) by degree, times `monomial_weights` and the scale's sign, each degree to at most 1."""
        xp = self.xp
        monomials = self.monomial_weights(scales)
        parts = ReadTable([], [], [], [])
        for s in range(self.polynomial.degree + 1):
            rows = self.table.rows(s)
            for source, entries, factors, sign in (
                (values, parts.values, parts.factors, self.scale_sign**s),
                (absolute, parts.absolute, parts.absolute_factors, 1.0),
            ):
                block = source[rows, :] * monomials[rows, :]
                finite = xp.where(xp.isfinite(block), xp.abs(block), xp.zeros_like(block))
                largest = nonzero(xp, xp.max(finite))
                entries.append(xp.astype(block / largest, self.dtype))
                factors.append(largest * sign)
        return parts

    def monomial_weights(self, scales: Array) -> Array:
        """Return multiplicities times the monomials of |scale| times all column scales: (r, 1) float64.

        The scale goes with the columns, because a power of it alone may overflow where the scores are small.
        """
        xp = self.xp
        # a copy, because not every library takes memory that it may not write to
        counts = xp.asarray(multinomials(self.table).copy(), dtype=xp.float64, device=device(scales))
        product = prod_arrays([scales[t, ...] for t in range(self.problem.order + 1)]) * abs(self.problem.scale)
        return counts[:, None] * polynomial_features(xp, self.table, product[:, None])

    @np.errstate(all="ignore")
    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Return the gradients of the function that forward computed, its statistics held constant."""
        from korder.methods.feature_gradients import backward

        return backward(self, operands, saved, grads, needs)

    def states(self) -> StateKernel:
        """Return what keeps and reads sums over keys that come one after another."""
        from korder.methods.states import PolynomialStates

        return PolynomialStates(self)

    def release(self) -> None:
        """Let go of scratch memory that belongs to a call; there is none here."""

    def check_normaliser(self, mean: Array, live: Array) -> None:
        """Raise if a row with a live tuple has a finite mean polynomial that is not positive."""
        xp = self.xp
        bad = xp.logical_and(live, xp.logical_and(xp.isfinite(mean), mean <= 0.0))
        if not bool(xp.any(bad)):
            return
        flat = int(xp.argmax(xp.reshape(xp.astype(bad, xp.int8), (-1,))))
        head, row = divmod(flat, mean.shape[2])
        batch, head = divmod(head, mean.shape[1])
        value = float(mean[batch, head, row])
        raise AccuracyError(
            f"the polynomial of degree {self.polynomial.degree} sums to a number that is not positive "
            f"in batch {batch}, head {head}, row {row}.",
            code="normaliser-not-positive",
            expected="a positive mean of the polynomial over the row's tuples",
            got=f"{value:g}",
            hint="use an even degree, float64, a smaller scale, or method Exact(): this row's scores spread too far.",
        )

    def blocks(self, length: int) -> Iterator[tuple[int, int]]:
        """Yield the blocks of tokens of which features are built at a time."""
        for start in range(0, length, self.polynomial.chunk):
            yield start, min(start + self.polynomial.chunk, length)

    def column_scales(self, plane: Plane) -> Array:
        """Return powers of two near the largest finite live entry of every column: (k + 1, w) float64."""
        xp = self.xp
        queries = xp.max(xp.stack([column_peaks(xp, query) for query in plane.queries], axis=0), axis=0)
        return self.scales_of(xp.stack([queries, *(column_peaks(xp, key) for key in plane.keys)], axis=0))

    def scales_of(self, peaks: Array) -> Array:
        """Return the powers of two near peaks (k + 1, w), such that no product of scales leaves the numbers' range."""
        return scales_of_peaks(self.xp, peaks)

    def scaled(self, factor: Factor, scale: Array, start: int, stop: int) -> Array:
        """Return a factor's columns over their scales: (w, stop - start), entries of at most 1."""
        return self.normalise_columns(factor.columns(self.xp, start, stop), scale)

    def normalise_columns(self, columns: Array, scale: Array) -> Array:
        """Return columns (w, c) over their scales; for gradients, the adjoint of the same."""
        return columns / self.xp.astype(scale, self.dtype)[:, None]

    def _progress(self, operands: Operands) -> Progress:
        tokens = sum(self.problem.lengths) * self.problem.groups + self.problem.queries * self.problem.heads
        return Progress(tokens * self.problem.batch, PROGRESS.get(), [0])

    # The array operations that a backend may override.

    def features(self, columns: Array) -> Array:
        """Return the monomials (r, c) of columns (w, c)."""
        if not self.table.pruned:
            return polynomial_features(self.xp, self.table, columns)
        indices = [self.parents(degree, device(columns)) for degree in range(1, self.table.degree + 1)]
        return gathered_features(self.xp, self.table, columns, indices)

    def adjoint(self, columns: Array, features: Array, gradient: Array) -> Array:
        """Return the gradient of the columns (w, c), given that of the features (r, c)."""
        return feature_adjoint(self.xp, self.table, columns, features, gradient, self.index)

    def product(self, left: Array, right: Array, total: Array | None = None) -> Array:
        """Return total (p, s) + left (p, q) @ right (q, s) in float64; `total` belongs to the callee.

        Summed in the compute dtype over at most `sum_block` terms, then in float64.
        """
        xp = self.xp
        for start in range(0, left.shape[1], self.sum_block):
            stop = min(start + self.sum_block, left.shape[1])
            part = xp.astype(xp.matmul(left[:, start:stop], right[start:stop, :]), xp.float64)
            total = part if total is None else total + part
        return total

    def parents(self, degree: int, where: Any) -> tuple[Array, Array]:
        """Return `features.parents` of a degree as arrays of a device; made once."""
        return self.constants(degree, where, lambda: parents(self.table, degree))

    def index(self, positions: np.ndarray, where: Any) -> Array:
        """Return positions of the table as an array of a device; made once."""
        return self.constants(("positions", id(positions)), where, lambda: (positions,))[0]

    def constants(self, name: Any, where: Any, make: Callable[[], tuple[np.ndarray, ...]]) -> tuple[Array, ...]:
        """Return arrays of a device, made once for a name."""
        key = (name, where)
        if key not in self._index:
            self._index[key] = tuple(self.xp.asarray(x.copy(), device=where) for x in make())
        return self._index[key]

    def collector(self, place: Any, trailing: tuple[int, ...] = (), dtype: Any = None) -> RowCollector:
        """Return what gathers blocks of rows on a device into (b, h, n, ..); float64 when no dtype is named."""
        return RowCollector(self.xp, self.problem, place, trailing, dtype)
