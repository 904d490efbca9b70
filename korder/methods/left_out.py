"""Rigorous bounds, row by row, of what a pruned polynomial leaves out of the powers of a score.

The sum of all absolute monomials of degree s is B^s, B the row's sum of absolute terms; that of those that are kept is
made term by term, and the difference bounds the others.
"""

from __future__ import annotations

from typing import Any

from array_api_compat import device

from korder.methods.factors import Factor, assemble, planes
from korder.methods.features import FeatureTable, multinomials, polynomial_features, table_of
from korder.methods.readings import nonzero, prod_arrays
from korder.methods.sight import TOKENS
from korder.planning.plan import PolynomialPlan
from korder.problem import Problem
from korder.spi.operands import Operands

Array = Any
UNIT64 = 2.0**-53
_ELEMENTS = 2**22
"""Most monomials that are made at a time."""


def left_out_sums(xp: Any, problem: Problem, polynomial: PolynomialPlan, operands: Operands) -> tuple[Array, ...]:
    """Return, for each degree s, a bound on |x^s - what is kept of it| for every tuple that a row sees.

    x is the score, not centred. Empty where nothing is left out.

    Shapes:    each (b, h, n), float64.
    Cost:      O((n + m1 + .. + mk) width + r) for every head.
    Numerics:  Rounded outward. A row with a NaN has NaN. A head is taken at its largest entries, a row at the largest
               share of its entries in these, to the power of the degree.
    """
    if polynomial.pruning is None:
        return ()
    table = table_of(problem.score_width, polynomial)
    places: list[tuple[int, int]] = []
    terms: list[Array] = []
    shares: dict[tuple[int, int], list[Array]] = {}
    for plane in planes(xp, problem, operands):
        keys = prod_arrays([_peaks(xp, problem, key) for key in plane.keys])
        for head, query in zip(plane.heads, plane.queries, strict=True):
            peaks = _peaks(xp, problem, query)
            places.append((plane.batch, head))
            terms.append(abs(problem.scale) * peaks * keys * (1.0 + 8 * (problem.order + 2) * UNIT64))
            shares[plane.batch, head] = _shares(xp, problem, query, peaks)
    share = assemble(xp, shares, problem, device(operands.query))
    masses: list[dict[tuple[int, int], list[Array]]] = [{} for _ in range(table.degree + 1)]
    for place, mass in zip(places, _masses(xp, table, xp.stack(terms, axis=1)), strict=True):
        for s, store in enumerate(masses):
            store[place] = [xp.broadcast_to(mass[s], (problem.queries,))]
    found, power = [], xp.ones_like(share)
    for store in masses:
        mass = assemble(xp, store, problem, device(operands.query))
        found.append(xp.where(xp.isfinite(mass), mass * power, mass + 0.0 * power))
        power = power * share
    return tuple(found)


def _masses(xp: Any, table: FeatureTable, terms: Array) -> list[list[Array]]:
    """Return, per head and degree (0-d), a bound on the sum of the monomials that are left out of terms (w, heads)."""
    width, heads = terms.shape
    counts = xp.asarray(multinomials(table).copy(), device=device(terms))[:, None]
    step = max(_ELEMENTS // table.features, 1)
    found: list[list[Array]] = []
    for start in range(0, heads, step):
        block = terms[:, start : min(start + step, heads)]
        kept = polynomial_features(xp, table, block) * counts
        whole = xp.sum(block, axis=0)
        power, degrees = xp.ones_like(whole), []
        for s in range(table.degree + 1):
            rows = table.rows(s)
            rounding = (2 * s * (width + 4) + (rows.stop - rows.start) + 32) * UNIT64
            rest = power * (1.0 + rounding) - xp.sum(kept[rows, :], axis=0) * (1.0 - rounding)
            usable = xp.isfinite(power)
            rest = xp.where(usable, xp.maximum(rest, xp.zeros_like(rest)), xp.full_like(rest, float("inf")))
            # no monomial of degree 0 is ever left out; of the others some may be too small for float64
            degrees.append(rest * (1.0 + 4 * UNIT64) + 1e-300 if s else xp.zeros_like(rest))
            power = power * whole
        found += [[degree[head] for degree in degrees] for head in range(block.shape[1])]
    return found


def _sizes(xp: Any, problem: Problem, factor: Factor, start: int, stop: int) -> Array:
    """Return absolute columns (w, c) in float64, not below those that a kernel works with, nor the exact ones."""
    raw = factor.operand_columns(xp, start, stop)
    sizes = xp.abs(xp.astype(factor.projection.apply(xp, raw), xp.float64))
    if problem.weight == "none":
        return sizes
    magnitudes = xp.astype(factor.projection.magnitudes(xp, raw), xp.float64)
    widest = max(problem.query_width, *problem.key_widths) + 4
    unit = float(xp.finfo(factor.dtype).eps)
    return sizes * (1.0 + 2.0 * unit) + 4.0 * (widest * UNIT64) * magnitudes * (1.0 + unit)


def _peaks(xp: Any, problem: Problem, factor: Factor) -> Array:
    """Return the largest finite live size of each column: (w,), 0 where there is none."""
    largest = _sizes(xp, problem, factor, -1, 0)[:, 0]
    for start in range(0, factor.length, TOKENS):
        sizes = _sizes(xp, problem, factor, start, min(start + TOKENS, factor.length))
        largest = xp.maximum(largest, xp.max(xp.where(xp.isfinite(sizes), sizes, xp.zeros_like(sizes)), axis=1))
    return largest


def _shares(xp: Any, problem: Problem, query: Factor, peaks: Array) -> list[Array]:
    """Return blocks of rows' (c,) largest share of their columns in the peaks."""
    found = []
    for start in range(0, query.length, TOKENS):
        sizes = _sizes(xp, problem, query, start, min(start + TOKENS, query.length))
        found.append(xp.max(sizes / nonzero(xp, peaks)[:, None], axis=0) * (1.0 + 4 * UNIT64))
    return found or [xp.zeros((0,), dtype=xp.float64, device=device(peaks))]
