"""What a pruned polynomial is: some of the monomials of the terms that a score is the sum of, one by one.

Terms stand on the last axis, one for each column of the score.
"""

from __future__ import annotations

from math import comb, factorial, prod
from typing import Any

import numpy as np

from korder.planning.plan import Plan
from korder.spi import kept_monomials

Array = Any
Monomial = tuple[int, ...]
"""Columns, each as often as its power says."""


def monomials_of(plan: Plan) -> tuple[Monomial, ...]:
    """Return the monomials that a plan keeps; none where it keeps all."""
    assert plan.polynomial is not None
    if plan.polynomial.pruning is None:
        return ()
    kept = kept_monomials(plan.polynomial.pruning)
    assert kept is not None
    levels: list[list[Monomial]] = [[()]]
    for variables, parents in zip(kept.variables[1:], kept.parents[1:], strict=True):
        made = zip(variables, parents, strict=True)
        levels.append([(*levels[-1][parent], kept.columns[variable]) for variable, parent in made])
    return tuple(monomial for level in levels for monomial in level)


def kept_powers(terms: Array, monomials: tuple[Monomial, ...], degree: int) -> list[Array]:
    """Return what is kept of the powers 0, 1, .. of the sum of the terms (.., w): each (..)."""
    powers = [np.zeros_like(terms[..., 0]) for _ in range(degree + 1)]
    for monomial in monomials:
        term = np.full_like(terms[..., 0], _orderings(monomial))
        for column in monomial:
            term = term * terms[..., column]
        powers[len(monomial)] += term
    return powers


def kept_slopes(terms: Array, monomials: tuple[Monomial, ...], degree: int) -> list[Array]:
    """Return the derivatives of `kept_powers` with respect to each term: each (.., w)."""
    slopes = [np.zeros_like(terms) for _ in range(degree + 1)]
    for monomial in monomials:
        for place, column in enumerate(monomial):
            term = np.full_like(terms[..., 0], _orderings(monomial))
            for other in monomial[:place] + monomial[place + 1 :]:
                term = term * terms[..., other]
            slopes[len(monomial)][..., column] += term
    return slopes


def _orderings(monomial: Monomial) -> int:
    """Return how often a monomial occurs in the power of a sum."""
    return factorial(len(monomial)) // prod(factorial(monomial.count(column)) for column in set(monomial))


def about(powers: list[Array], shift: Array) -> list[Array]:
    """Return the powers of x + shift, given those of x, by the binomial theorem."""
    return [
        sum((comb(m, s) * shift ** (m - s) * powers[s] for s in range(1, m + 1)), shift**m * powers[0])
        for m in range(len(powers))
    ]
