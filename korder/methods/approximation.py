"""How far a polynomial of the score shifts a softmax, row by row: the sup bound and the much sharper moment bound.

About exact sums only; rounding enters through `RowFacts.relative`, by which computed means may be off.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial, prod
from typing import Any

from korder.methods.readings import centred_coefficients, centred_powers
from korder.planning.coefficients import critical_points, moment_constants
from korder.planning.plan import PolynomialPlan

Array = Any
UNIT64 = 2.0**-53
_SUMMED = 1e-12
_SERIES = 120
_SERIES_REACH = 30.0
_NARROWEST = 1e-3
_WIDTH_STEP = 2.0**0.125


@dataclass(frozen=True, slots=True)
class RowFacts:
    """What is known of every row, (b, h, n) float64; `low` and `high` are the score bounds about the row's centre."""

    low: Array
    high: Array
    centre: Array
    mean: Array
    """The polynomial's mean over the row's tuples."""
    moments: Array
    """(b, h, n, degree + 1)."""
    relative: Array
    """Bound on the rounding of sums, relative to the sum of the polynomial."""
    lost: Array
    """Bound on the sum over tuples whose weight was dropped, relative to the sum of the polynomial."""
    slack: Array
    """How far the centre may be from the one that the kernel used."""
    left_out: tuple[Array, ...] = ()
    """Per degree, a bound on what is left out of that power of the score, not centred; empty for nothing."""


def sup_bound(xp: Any, polynomial: PolynomialPlan, rows: RowFacts) -> tuple[Array, Array]:
    """Return tanh(ln(max / min) / 4) and max |ln| of P / exp over each row's range; inf where P may not be positive."""
    lowest, highest = _log_ratio(xp, polynomial.values, rows.low)
    points = [rows.high]
    for turning in critical_points(polynomial.values):
        inside = xp.logical_and(rows.low < turning, rows.high > turning)
        points.append(xp.where(inside, xp.full_like(rows.low, turning), rows.low))
    for point in points:
        low, high = _log_ratio(xp, polynomial.values, point)
        lowest, highest = xp.minimum(lowest, low), xp.maximum(highest, high)
    bad = xp.logical_or(lowest == -float("inf"), xp.isnan(lowest + highest))
    gap = xp.where(bad, xp.zeros_like(lowest), highest - lowest)
    infinite = xp.full_like(gap, float("inf"))
    shift = xp.where(bad, infinite, xp.tanh(0.25 * gap * (1.0 + 1e-9)))
    return shift, xp.where(bad, infinite, xp.maximum(xp.abs(lowest), xp.abs(highest)))


def _log_ratio(xp: Any, values: tuple[float, ...], x: Array) -> tuple[Array, Array]:
    """Return lower and upper bounds of ln(P(x) / exp(x)); -inf below where P may not be positive."""
    total, size = xp.zeros_like(x), xp.zeros_like(x)
    for value in reversed(values):
        total, size = total * x + value, size * xp.abs(x) + abs(value)
    slack = 4.0 * (len(values) + 1) * UNIT64 * size
    low, high = total - slack, total + slack
    minus = xp.full_like(x, -float("inf"))
    low = xp.where(low > 0.0, xp.log(xp.where(low > 0.0, low, xp.ones_like(low))) - x, minus)
    high = xp.where(high > 0.0, xp.log(xp.where(high > 0.0, high, xp.ones_like(high))) - x, minus)
    return low - 1e-15 * xp.abs(x), high + 1e-15 * xp.abs(x)


def left_out_bound(xp: Any, polynomial: PolynomialPlan, rows: RowFacts) -> Array:
    """Return how much the monomials that are left out shift a softmax: the sum of their sizes over the mean of P.

    The polynomial of which the others are left out must be positive on the row's range, as it is where `sup_bound` is
    finite, or else be bounded by its distance from exp as a whole, as `moment_bound` does: then shifts add up.
    """
    total = xp.zeros_like(rows.mean)
    if not rows.left_out:
        return total
    # coefficients of the score's powers; between the centre used and the one known they change by less than sizes do
    exact = centred_coefficients(polynomial.values, -rows.centre)
    sizes = [abs(value) for value in polynomial.values]
    near, far = (centred_coefficients(tuple(sizes), x) for x in (xp.abs(rows.centre), xp.abs(rows.centre) + rows.slack))
    for coefficient, less, more, rest in zip(exact, near, far, rows.left_out, strict=True):
        total = total + (xp.abs(coefficient) + (more - less) + _SUMMED * more) * rest
    return total / xp.abs(rows.mean)


def moment_bound(xp: Any, polynomial: PolynomialPlan, rows: RowFacts) -> Array:
    """Return (A + C mean of (x - centre)^p) / mean P, the smallest over the triples (A, C, p) at hand."""
    if polynomial.coefficients == "taylor":
        power, slope = taylor_slope(xp, polynomial.degree, rows.low, rows.high)
        return slope * _moment(xp, polynomial, rows, power) / rows.mean
    return _tabled_moment_bound(xp, polynomial, rows)


def _moment(xp: Any, polynomial: PolynomialPlan, rows: RowFacts, power: int) -> Array:
    """Return an upper bound of the mean of (x - centre)^power over the row's tuples, all monomials counted.

    The magnitude holds the absolute terms of every c_m (x - centre)^m: its rounding over |c_power| bounds this one's.
    """
    coefficient = abs(polynomial.values[power])
    slack = rows.relative * rows.mean / coefficient if coefficient else rows.relative * float("inf")
    moment = rows.moments[..., power] * (1.0 + 1e-6) + slack
    if not rows.left_out:
        return moment
    missing = centred_powers(list(rows.left_out[: power + 1]), xp.abs(rows.centre) + rows.slack)[power]
    return moment + missing * (1.0 + 1e-6)


def taylor_slope(xp: Any, degree: int, low: Array, high: Array) -> tuple[int, Array]:
    """Return p and C with |exp(x) - T_degree(x)| <= C x^p on [low, high], p the largest even power up to the degree.

    (exp(x) - T_degree(x)) / x^degree grows with x; below 0 it is at least -min(|x| / (degree + 1)!, 1 / degree!).
    """
    zero = xp.zeros_like(low)
    above, below = xp.maximum(high, zero), xp.maximum(-low, zero)
    right = _remainder_ratio(xp, degree, above)
    left = xp.minimum(below / factorial(degree + 1), zero + 1.0 / factorial(degree))
    if degree % 2:
        return degree - 1, xp.maximum(right * above, left * below) * (1.0 + 1e-9)
    return degree, xp.maximum(right, left) * (1.0 + 1e-9)


def taylor_slopes(xp: Any, degrees: tuple[int, ...], low: Array, high: Array) -> list[Array]:
    """Return C of `taylor_slope` for even degrees that grow: estimates, with one series for all of them."""
    zero = xp.zeros_like(low)
    above, below = xp.maximum(high, zero), xp.maximum(-low, zero)
    found, last = [], max(degrees, default=0)
    right = _remainder_ratio(xp, last, above)
    for degree in range(last, min(degrees, default=1) - 1, -1):
        if degree in degrees:
            left = xp.minimum(below / factorial(degree + 1), zero + 1.0 / factorial(degree))
            found.append(xp.maximum(right, left))
        right = above * (right + 1.0 / factorial(degree))  # that of the degree below
    return found[::-1]


def _remainder_ratio(xp: Any, degree: int, x: Array) -> Array:
    """Return the sum of x^m / (degree + m)! over m >= 1, for x >= 0; exp(x) / x^degree, which is more, far out."""
    near = xp.minimum(x, xp.full_like(x, _SERIES_REACH))
    total = xp.zeros_like(x)
    for m in range(_SERIES, 0, -1):
        total = (total + 1.0) * near / (degree + m)
    safe = xp.maximum(x, xp.full_like(x, _SERIES_REACH))
    far = xp.exp(xp.minimum(safe - degree * xp.log(safe), xp.full_like(x, 700.0)))
    return xp.where(x > _SERIES_REACH, far, total / factorial(degree))


def _tabled_moment_bound(xp: Any, polynomial: PolynomialPlan, rows: RowFacts) -> Array:
    """Return the moment bound from a table of (A, C, p) over half-widths; rows take the next larger entry."""
    width = xp.maximum(xp.abs(rows.low), xp.abs(rows.high))
    best = xp.full_like(width, float("inf"))
    finite = xp.where(xp.isfinite(width), width, xp.zeros_like(width))
    widest = float(xp.max(finite)) if prod(finite.shape) else 0.0
    step = _NARROWEST
    while step < min(widest, 300.0) * _WIDTH_STEP:
        edge, step = step, step * _WIDTH_STEP
        here = xp.logical_and(width <= step, xp.logical_or(width > edge, edge == _NARROWEST))
        if not bool(xp.any(here)):
            continue
        for floor, slope, power in moment_constants(polynomial.values, step):
            bound = (floor + slope * _moment(xp, polynomial, rows, power)) / rows.mean
            best = xp.where(xp.logical_and(here, bound < best), bound, best)
    return best
