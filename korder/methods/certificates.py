"""Bounds on the error of a polynomial result that always hold: of the polynomial against exp, and of rounding.

Computed from the operands and from what any kernel returns (normaliser, central moments, magnitude), never by a kernel.
The approximation part bounds the exact sums of the polynomial against softmax; the rounding part bounds the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import device

from korder.methods.approximation import UNIT64, RowFacts, left_out_bound, moment_bound, sup_bound
from korder.methods.factors import SMALLEST_WEIGHT, Plane, assemble, planes
from korder.methods.left_out import left_out_sums
from korder.methods.readings import prod_arrays
from korder.methods.sight import Sight, Statistic, live_rows, visible_maxima
from korder.methods.statistics import RowBounds, column_peaks, product_range, row_bounds
from korder.methods.tolerances import ToleranceCheck, meets_tolerance
from korder.planning.plan import Plan
from korder.problem import Problem
from korder.result import Certificate
from korder.spec.masks import Window
from korder.spi.operands import KernelOutput, Operands

__all__ = ["ToleranceCheck", "certify", "meets_tolerance"]

Array = Any
_SMALLEST_VALUES = 64.0 * float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What bounds the error of a result beside what its kernel returned.

    Shapes:  (b, h, n) float64 where nothing else is said.
    """

    bounds: RowBounds
    live: Array
    """Bool: whether the row sees a tuple."""
    log_weights: Array
    """Logarithm of the row's sum of weights, -inf for none."""
    maxima: Array
    """What the biases' maxima add to lse."""
    spread: Array
    """Range of the value products that the row sees, the largest over channels."""
    sizes: Array
    """Largest absolute value product plus the output, likewise."""
    largest: Array
    """Largest absolute output."""
    farthest: Array
    """How far a value product lies from the output, the largest over channels."""
    reach: Array
    """0-d: the sum over columns of |scale| times the products of the factors' largest entries, each doubled."""
    tuples: float
    additions: tuple[float, ...]
    """How many block sums join a total in float64: of a reading, then of each mode's keys."""
    biased: bool = False
    left_out: tuple[Array, ...] = ()
    """Per degree, what is left out of that power of the score; empty for nothing."""


@np.errstate(all="ignore")
def certify(xp: Any, plan: Plan, operands: Operands, output: KernelOutput, *, rounding_unit: float) -> Certificate:
    """Return bounds on |output - exact answer of these operands| for every row, and on lse.

    Shapes:    see `korder.result.Certificate`; all float64.
    Args:      rounding_unit: Relative rounding error of one block sum of the kernel.
    Cost:      O(n (d + e)), no features.
    Numerics:  The final cast of a 16-bit output does not count. A row with a NaN has NaN bounds.
    Source:    The smaller of the sup bound tanh(ln(max / min of P / exp) / 4) and the moment bound
               (A + C mean x^p) / mean P; both ours, sharpness and derivation in docs.
    """
    return certificate_of(xp, plan, evidence_of(xp, plan, operands, output), output, rounding_unit)


def evidence_of(xp: Any, plan: Plan, operands: Operands, output: KernelOutput) -> Evidence:
    """Return what the operands say of their rows."""
    problem, polynomial = plan.problem, plan.polynomial
    assert polynomial is not None
    bounds = row_bounds(xp, problem, operands)
    live, log_weights = live_rows(xp, problem, operands)
    spread, sizes, largest, farthest = value_sizes(xp, problem, operands, output)
    return Evidence(
        bounds=bounds,
        live=live,
        log_weights=log_weights,
        maxima=_row_maxima(xp, problem, operands),
        spread=spread,
        sizes=sizes,
        largest=largest,
        farthest=farthest,
        reach=_reach(xp, problem, operands),
        tuples=float(problem.tuples),
        additions=_additions(problem, polynomial.features),
        biased=any(bias is not None for bias in operands.biases),
        left_out=left_out_sums(xp, problem, polynomial, operands),
    )


def _additions(problem: Problem, features: int) -> tuple[float, ...]:
    """Return how many blocks join in float64 where features, and each mode's keys, are summed.

    No block is shorter than 16 but under a window that is.
    """
    sizes = problem.spec.mask.sizes if isinstance(problem.spec.mask, Window) else ()
    return (features / 16, *(length / min((16, *sizes)) for length in problem.lengths))


@np.errstate(all="ignore")
def certificate_of(xp: Any, plan: Plan, evidence: Evidence, output: KernelOutput, rounding_unit: float) -> Certificate:
    """Return the bounds that the evidence and the kernel's output allow."""
    assert plan.polynomial is not None
    problem, polynomial, bounds, live = plan.problem, plan.polynomial, evidence.bounds, evidence.live
    rows = _gather(xp, plan, evidence, output, rounding_unit)
    sup, sup_log = sup_bound(xp, polynomial, rows)
    moment = moment_bound(xp, polynomial, rows) / (1.0 - rows.relative)
    left_out = left_out_bound(xp, polynomial, rows) / (1.0 - rows.relative)
    zero = xp.zeros_like(sup)
    spread, sizes = evidence.spread, evidence.sizes
    logarithm = xp.minimum(sup_log + _log_shift(xp, left_out), _log_shift(xp, moment + left_out))
    lost = xp.where(rows.lost > 0.0, rows.lost * xp.exp(logarithm), zero)
    inexact = rows.relative / (1.0 - rows.relative) * sizes
    moved = xp.where(spread > 0.0, (lost + xp.tanh(0.5 * bounds.perturbation)) * spread, 0.0 * spread)
    # the last term: value products, and an output, too small for their dtype
    smallest = xp.where(sizes > 0.0, _SMALLEST_VALUES + zero, zero)
    rounding = inexact + moved + final_unit(xp, problem) * evidence.largest + smallest
    by_sup = (sup + left_out) * spread
    by_moment = _by_moment(xp, moment + left_out, spread, evidence.farthest + rounding)
    # where all values agree nothing can go wrong, however little is known of the weights
    approximation = xp.where(spread > 0.0, xp.minimum(by_sup, by_moment), 0.0 * spread)
    lse_bound = logarithm + _log_shift(xp, lost) + _log_shift(xp, rows.relative) + bounds.perturbation
    lse_bound = lse_bound + _lse_rounding(xp, output.lse, rows)
    # sums that may be half wrong say nothing; NaN stays NaN
    hopeless = xp.logical_and(live, rows.relative >= 0.5)
    infinite = xp.full_like(sup, float("inf"))
    approximation, rounding, lse_bound = (xp.where(hopeless, infinite, x) for x in (approximation, rounding, lse_bound))
    decided = xp.sum(xp.astype(xp.logical_and(live, by_moment <= by_sup), xp.int64))
    total = xp.sum(xp.astype(live, xp.int64))
    return Certificate(
        bound=xp.where(live, approximation + rounding, zero),
        approximation=xp.where(live, approximation, zero),
        rounding=xp.where(live, rounding, zero),
        lse_bound=xp.where(live, lse_bound, zero),
        score_range=xp.stack([xp.where(live, bounds.low, zero), xp.where(live, bounds.high, zero)], axis=3),
        kind="moment" if bool(2 * decided >= total) else "sup",
    )


def _by_moment(xp: Any, moment: Array, spread: Array, farthest: Array) -> Array:
    """Return how far the output may be off when weights are shifted by `moment` of their sum in all.

    A shift of weights moves the output by that of the value products about the exact output, so by the farthest of them
    times the shift; the exact output is no farther from the computed one than what is returned.
    """
    inside = xp.where(moment < 1.0, moment, xp.zeros_like(moment))
    about = xp.where(moment < 1.0, inside / (1.0 - inside) * farthest, xp.full_like(moment, float("inf")))
    return xp.minimum(moment * spread, xp.where(xp.isnan(moment), moment, about))


def final_unit(xp: Any, problem: Problem) -> float:
    """Return the relative error of the division and of its cast to the output, a cast to 16 bits not counted."""
    wide = problem.dtype == "float64"
    return 2.0 * UNIT64 if wide else 0.51 * float(xp.finfo(xp.float32).eps)


def _log_shift(xp: Any, relative: Array) -> Array:
    """Return the most that a relative change of a sum moves its logarithm: -log(1 - relative), inf from 1 on."""
    inside = xp.where(relative < 1.0, relative, xp.zeros_like(relative))
    return xp.where(relative < 1.0, -xp.log1p(-inside), xp.where(relative >= 1.0, float("inf"), relative))


def _lse_rounding(xp: Any, lse: Array, rows: RowFacts) -> Array:
    wide = xp.astype(lse, xp.float64)
    size = xp.abs(wide) + xp.abs(rows.centre) + xp.abs(xp.log(rows.mean)) + 64.0
    return 4.0 * float(xp.finfo(lse.dtype).eps) * size


def _gather(xp: Any, plan: Plan, evidence: Evidence, output: KernelOutput, rounding_unit: float) -> RowFacts:
    problem, polynomial = plan.problem, plan.polynomial
    assert polynomial is not None
    assert output.normaliser is not None
    assert output.moments is not None
    assert output.magnitude is not None
    live, log_weights, maxima = evidence.live, evidence.log_weights, evidence.maxima
    low, high = evidence.bounds.low, evidence.bounds.high
    one = xp.ones_like(low)
    normaliser = xp.where(live, xp.astype(output.normaliser, xp.float64), one)
    mean = normaliser / xp.exp(xp.where(live, log_weights, xp.zeros_like(log_weights)))
    lse = xp.where(live, xp.astype(output.lse, xp.float64), xp.zeros_like(low))
    # the kernel's own centre: everything below is about it, so its error widens the range
    centre = lse - xp.log(normaliser) - maxima
    slack = 4.0 * float(xp.finfo(output.lse.dtype).eps) * (xp.abs(lse) + xp.abs(xp.log(normaliser)) + xp.abs(maxima))
    low, high = low - centre - slack, high - centre + slack
    relative = _relative_rounding(xp, plan, evidence, output.magnitude, rounding_unit)
    relative = relative + _underflow(xp, plan, evidence, centre, mean)
    lost = xp.zeros_like(low)
    if evidence.biased:
        dropped = SMALLEST_WEIGHT * problem.order * evidence.tuples
        lost = dropped * xp.exp(xp.minimum(high, xp.full_like(high, 700.0))) / (normaliser * (1.0 - relative))
    moments = xp.astype(output.moments, xp.float64)
    return RowFacts(low, high, centre, mean, moments, relative, lost, slack, evidence.left_out)


def _row_maxima(xp: Any, problem: Problem, operands: Operands) -> Array:
    """Return what the biases' maxima add to lse: (b, h, n) float64."""
    pieces: dict[tuple[int, int], list[Array]] = {}
    for plane in planes(xp, problem, operands):
        known = [key.bias_maximum for key in plane.keys if key.bias_maximum is not None]
        for head in plane.heads:
            total = xp.zeros((problem.queries,), dtype=xp.float64, device=device(operands.query))
            for maximum in known:
                total = total + maximum
            pieces[plane.batch, head] = [total]
    return assemble(xp, pieces, problem, device(operands.query))


def _relative_rounding(xp: Any, plan: Plan, evidence: Evidence, magnitude: Array, rounding_unit: float) -> Array:
    """Return the bound on the rounding of any of the row's sums, relative to the sum of the polynomial.

    Each of the k key states and the reading loses one block sum, the features' own rounding and the float64 carry; the
    states, tables and readings are then multiplied and combined.
    """
    problem, polynomial = plan.problem, plan.polynomial
    assert polynomial is not None
    unit = 0.5 * float(xp.finfo(getattr(xp, problem.accumulation)).eps)
    features = (polynomial.degree + 8) * unit
    weights = 80.0 * UNIT64  # exp of a bias at most 70 below the largest
    loss = problem.order * weights
    for additions in evidence.additions:
        loss += rounding_unit + features + (additions + 8) * UNIT64
    loss += (problem.order + 8) * unit + (8 * polynomial.degree + 4 * problem.order + 16) * UNIT64
    loss = loss * (1.0 + loss) * (1.0 + loss)
    if loss >= 0.25:
        return xp.full_like(magnitude, float("inf"), dtype=xp.float64)
    return loss / (1.0 - loss) * xp.astype(magnitude, xp.float64)


def _reach(xp: Any, problem: Problem, operands: Operands) -> Array:
    """Return `Evidence.reach` of the operands."""
    reach = xp.zeros((), dtype=xp.float64, device=device(operands.query))
    for plane in planes(xp, problem, operands):
        queries = xp.max(xp.stack([column_peaks(xp, query) for query in plane.queries], axis=0), axis=0)
        peaks = xp.stack([queries, *(column_peaks(xp, key) for key in plane.keys)], axis=0)
        reach = xp.maximum(reach, reach_of_peaks(xp, problem, peaks))
    return reach


def reach_of_peaks(xp: Any, problem: Problem, peaks: Array) -> Array:
    """Return the reach of one plane, 0-d, given the largest absolute entries of its factors' columns (k + 1, w)."""
    product = prod_arrays([2.0 * peaks[t, ...] for t in range(problem.order + 1)])
    # columns that are zero in some factor count as much as the largest of the others
    product = xp.where(product > 0.0, product, xp.max(product))
    return abs(problem.scale) * xp.sum(product)


def _underflow(xp: Any, plan: Plan, evidence: Evidence, centre: Array, mean: Array) -> Array:
    """Return what monomials too small for the compute dtype may cost, relative to the sum of the polynomial."""
    problem, polynomial, log_weights = plan.problem, plan.polynomial, evidence.log_weights
    assert polynomial is not None
    smallest = float(xp.finfo(getattr(xp, problem.accumulation)).smallest_normal)
    reach = evidence.reach + xp.abs(centre)
    total = xp.zeros_like(mean)
    for value in reversed(polynomial.values):
        total = total * reach + abs(value)
    count = 8.0 * (problem.order + 1) * (polynomial.degree + 4) * evidence.tuples
    # divided by the sum of weights in two steps, so that neither factor overflows
    share = xp.exp(-xp.where(log_weights > -float("inf"), log_weights, xp.zeros_like(log_weights)))
    return (smallest * count * share) * total / xp.abs(mean)


def _value_extremes(xp: Any, plane: Plane) -> Statistic:
    def statistic(mode: int, start: int, stop: int) -> Array:
        values = xp.astype(xp.permute_dims(plane.live_values(xp, mode, start, stop), (1, 0)), xp.float64)
        block = xp.concat([values, -values], axis=0)
        live = plane.keys[mode].live_tokens(xp, start, stop)
        return xp.where(live[None, :], block, xp.full_like(block, -float("inf")))

    return statistic


def value_sizes(xp: Any, problem: Problem, operands: Operands, output: KernelOutput) -> tuple[Array, ...]:
    """Return `Evidence.spread`, `.sizes`, `.largest` and `.farthest` of every row.

    Each is the largest over channels, (b, h, n) float64, over the keys that the row sees; the ranges are attained.
    """
    sight, width = Sight.of(problem, operands), problem.value_width
    pieces: list[dict[tuple[int, int], list[Array]]] = [{}, {}, {}, {}]
    for plane in planes(xp, problem, operands):
        for start, stop, extremes in visible_maxima(xp, sight, _value_extremes(xp, plane)):
            low, high = product_range(xp, extremes, width)
            for head in plane.heads:
                parts = row_sizes(xp, low, high, output.output[plane.batch, head, start:stop, :])
                for store, part in zip(pieces, parts, strict=True):
                    store.setdefault((plane.batch, head), []).append(part)
    return tuple(assemble(xp, store, problem, device(operands.query)) for store in pieces)


def row_sizes(xp: Any, low: Array, high: Array, output: Array) -> tuple[Array, ...]:
    """Return what `value_sizes` does for rows, given their extreme value products and their output.

    Shapes:  low and high (e, c) or (e, 1); output (c, e); each of the four (c,).
    """
    given = xp.permute_dims(xp.astype(output, xp.float64), (1, 0))
    shown = 1.01 * xp.abs(given)  # an output of 16 bits was rounded once more
    around = xp.maximum(high - given, given - low) * (1.0 + 1e-14) + (shown - xp.abs(given))
    largest = xp.maximum(xp.abs(low), xp.abs(high)) + shown
    ranges = xp.broadcast_to(xp.max(high - low, axis=0) * (1.0 + 1e-14), (output.shape[0],))
    return ranges, xp.max(largest, axis=0), xp.max(shown, axis=0), xp.max(around, axis=0)
