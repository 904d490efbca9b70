"""Which monomials a pruned polynomial keeps: the largest first, each with its parents, until what is left out is small.

Monomial a of the score adds at most c_|a| (|a|! / a!) b^a to the polynomial, b_l being the largest size of a term of
column l. The choice is a plan; what was left out for the operands at hand is for certificates to bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from korder.errors import UnsupportedProblemError
from korder.planning.coefficients import Coefficients, taylor_remainder
from korder.planning.plan import Pruning
from korder.problem import Problem

Array = NDArray[Any]
LARGEST_SEARCH = 2**19
"""Monomials that are looked at; a polynomial that keeps more is not pruned."""
_SMALLEST_SHARE = 1e-12
_STEP = 0.25


@dataclass(frozen=True, eq=False, slots=True)
class KeptMonomials:
    """Monomials by degree, each the product of a variable and its parent, a monomial of one degree less.

    A monomial's variables come in order: its own is not after those of its parent. Inside a degree monomials are sorted
    by variable, then by parent.
    """

    columns: tuple[int, ...]
    """The column that each variable stands for: least important first."""
    variables: tuple[Array, ...]
    """Per degree (r_m,): each monomial's variable; the constant has the last one."""
    parents: tuple[Array, ...]
    """Per degree (r_m,): the place of its parent inside the degree below."""
    dropped: float
    """Bound on what all other monomials add, by the numbers of the pruning."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Monomials of each degree."""
        return tuple(len(variables) for variables in self.variables)


def pruning_of(problem: Problem, kind: str, values: Coefficients, mass: float) -> Pruning | None:
    """Return what decides which monomials of a polynomial are kept; None if all of them are.

    Args:
        problem: The problem, with its statistics.
        kind: "taylor" or "minimax".
        values: The coefficients of the powers of the centred score.
        mass: How much the monomials that are left out may add.

    Raises:
        UnsupportedProblemError: There may be something to leave out, and no statistics to choose it by.
    """
    if mass <= 0.0:
        return None
    statistics = problem.statistics
    if statistics is None or not statistics.columns:
        raise _unmeasured(problem)
    centres, degree = statistics.centres, len(values) - 1
    weights = [max(abs(_centred(values, s, centre)) for centre in centres) for s in range(degree + 1)]
    if kind == "taylor" and degree and degree % 2 == 0:
        # the moment that the certificate takes is too small by what is left out of it
        slope, far = taylor_remainder(degree, min(statistics.half_width, 300.0)), max(map(abs, centres))
        weights = [weight + slope * comb(degree, s) * far ** (degree - s) for s, weight in enumerate(weights)]
    pruning = Pruning(statistics.columns, tuple(weights), mass)
    return None if kept_monomials(pruning) is None else pruning


def _centred(values: Coefficients, power: int, centre: float) -> float:
    """Return the coefficient of a power of the score in a polynomial of the score less its centre."""
    return sum(values[m] * comb(m, power) * (-centre) ** (m - power) for m in range(power, len(values)))


def _unmeasured(problem: Problem) -> UnsupportedProblemError:
    return UnsupportedProblemError(
        "pruning needs to know how large each column's terms are.",
        code="needs-statistics",
        expected="statistics= of such operands, whose scores have few enough columns to be listed",
        got="none" if problem.statistics is None else f"statistics without columns, d = {problem.score_width}",
        hint="korder.measure(query, keys, values, spec=spec) gives them; attend measures by itself.",
    )


@lru_cache(maxsize=64)
@np.errstate(all="ignore")
def kept_monomials(pruning: Pruning) -> KeptMonomials | None:
    """Return the monomials that a pruning keeps; None where these are all of them, or too many to look at.

    The powers of the most important column are always kept, so that no degree is empty.

    Cost:    O(r width) for the r monomials that are kept.
    Source:  docs/method_polynomial.md, "Pruned features".
    """
    sizes = np.asarray(pruning.bounds)
    columns = np.argsort(sizes, kind="stable")
    total = float(sum(weight * sizes.sum() ** s for s, weight in enumerate(pruning.weights)))
    total *= 1.0 + _SMALLEST_SHARE  # not below the same sum in another order
    threshold = pruning.mass / max(pruning.degree, 1)
    while threshold > _SMALLEST_SHARE * pruning.mass:
        levels = _above(sizes[columns], pruning.weights, threshold)
        if levels is None:
            return None
        if total - sum(float(level.mass.sum()) for level in levels) <= pruning.mass:
            return _chosen(pruning, columns, levels, total)
        threshold *= _STEP
    return None


@dataclass(frozen=True, eq=False, slots=True)
class _Level:
    """Monomials of one degree, arrays (r_m,)."""

    variables: Array
    parents: Array
    exponents: Array
    """Of the monomial's own variable."""
    counts: Array
    """|a|! / a! b^a."""
    mass: Array
    """The same times the weight of its degree."""
    rank: Array
    """The least mass on the way to it: in this order every prefix holds the parents of all that it holds."""

    @classmethod
    def joined(cls, parts: list[_Level]) -> _Level:
        """Return the monomials of all parts, one part after another."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__slots__))


def _above(sizes: Array, weights: tuple[float, ...], threshold: float) -> list[_Level] | None:
    """Return the monomials whose rank is at least a threshold; None if these are too many.

    The rank of the powers of the last variable is infinite.
    """
    width, none, one = len(sizes), np.zeros(1, dtype=np.int64), np.ones(1)
    levels = [_Level(none + width - 1, none, 0.0 * one, one, weights[0] * one, np.inf * one)]
    found = 1
    for m in range(1, len(weights)):
        parts: list[_Level] = []
        for variable, size in enumerate(sizes):
            least = threshold if variable < width - 1 else -np.inf
            parts.append(_children(levels[-1], variable, m * size, weights[m], least))
            found += len(parts[-1].mass)
            if found > LARGEST_SEARCH:
                return None
        parts[-1].rank[:] = np.inf
        levels.append(_Level.joined(parts))
    return levels


def _children(below: _Level, variable: int, factor: float, weight: float, threshold: float) -> _Level:
    """Return the monomials that are a variable times one of the degree below, their rank at least a threshold."""
    first = int(np.searchsorted(below.variables, variable))
    again = below.variables[first:] == variable
    exponents = np.where(again, below.exponents[first:], 0.0) + 1.0
    counts = below.counts[first:] * factor / exponents
    rank = np.minimum(below.rank[first:], weight * counts)
    kept = np.flatnonzero(rank >= threshold)
    counts = counts[kept]
    return _Level(np.full(len(kept), variable), first + kept, exponents[kept], counts, weight * counts, rank[kept])


def _chosen(pruning: Pruning, columns: Array, levels: list[_Level], total: float) -> KeptMonomials | None:
    """Return, in order of rank, as few monomials as leave no more than the pruning allows; None if these are all."""
    mass, rank = (np.concatenate([getattr(level, name) for level in levels]) for name in ("mass", "rank"))
    order = np.argsort(-rank, kind="stable")
    enough = int(np.argmax(total - np.cumsum(mass[order]) <= pruning.mass)) + 1
    count = max(enough, int(np.isinf(rank).sum()))
    if count == comb(len(columns) + pruning.degree, pruning.degree):
        return None
    kept = np.zeros(len(mass), dtype=bool)
    kept[order[:count]] = True
    edges = np.cumsum([0, *(len(level.mass) for level in levels)])
    chosen = [kept[start:stop] for start, stop in pairwise(edges)]
    places = [np.cumsum(here) - 1 for here in chosen]
    variables = tuple(level.variables[here] for level, here in zip(levels, chosen, strict=True))
    parents = [level.parents[here] for level, here in zip(levels, chosen, strict=True)]
    above = (parents[0], *(below[at] for below, at in zip(places, parents[1:], strict=False)))
    return KeptMonomials(tuple(map(int, columns)), variables, above, max(total - float(mass[kept].sum()), 0.0))
