"""Pruned polynomials: an oracle by explicit monomials of explicit terms, and anisotropic problems to try them on."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations_with_replacement
from math import comb, factorial, prod
from typing import Any

import numpy as np

from korder.methods.statistics import measure
from korder.planning.polynomial import polynomial_plan
from korder.planning.pruning import kept_monomials
from korder.problem import Problem
from korder.spec import Polynomial
from korder.spi import Plan, Pruning
from tests.oracle_polynomial import _factors, _live_keys, dense_scores, value_products, weighted_answer
from tests.polynomial_cases import polynomial_case, xp
from tests.problems import Case

Array = Any
Monomial = tuple[int, ...]
"""Columns in ascending order, each as often as its power says."""


def measured(case: Case) -> Problem:
    """Return the problem of a case with its statistics."""
    problem = case.problem()
    return replace(problem, statistics=measure(xp, problem, case.operands()))


def pruned_plan(case: Case, prune: float, chunk: int | None = None) -> Plan:
    """Return the plan of a case that leaves out monomials of a total."""
    method = case.spec.polynomial
    assert method is not None
    assert method.degree is not None
    plan = polynomial_plan(measured(case), method.degree, prune)
    assert plan.polynomial is not None
    return plan if chunk is None else replace(plan, polynomial=replace(plan.polynomial, chunk=chunk))


def all_monomials(width: int, degree: int) -> list[Monomial]:
    """Return every monomial up to a degree, by degree."""
    return [m for size in range(degree + 1) for m in combinations_with_replacement(range(width), size)]


def kept_by(given: Pruning) -> list[Monomial]:
    """Return the monomials that a pruning keeps, in its order."""
    kept = kept_monomials(given)
    assert kept is not None
    levels: list[list[Monomial]] = [[()]]
    for variables, parents in zip(kept.variables[1:], kept.parents[1:], strict=True):
        made = zip(variables, parents, strict=True)
        levels.append([tuple(sorted((*levels[-1][above], kept.columns[variable]))) for variable, above in made])
    return [m for level in levels for m in level]


def monomials_of(plan: Plan) -> list[Monomial]:
    """Return the monomials that a plan keeps, in its order."""
    assert plan.polynomial is not None
    pruning = plan.polynomial.pruning
    if pruning is None:
        return all_monomials(plan.problem.score_width, plan.polynomial.degree)
    return kept_by(pruning)


def count_of(monomial: Monomial) -> int:
    """Return how often a monomial occurs in a power of a sum."""
    return factorial(len(monomial)) // prod(factorial(monomial.count(column)) for column in set(monomial))


def score_terms(case: Case, dtype: Any = np.longdouble) -> Array:
    """Return the terms of every score by columns: (b, h, n, tuples, w)."""
    batch, heads, _, width = case.query.shape
    share = heads // case.keys[0].shape[1]
    found = []
    for b in range(batch):
        for h in range(heads):
            live = [_live_keys(case, t, b, h, h // share) for t in range(len(case.keys))]
            rows = [
                np.where(x[:, None], key[b, h // share], 0).astype(dtype)
                for x, key in zip(live, case.keys, strict=True)
            ]
            tensor, *others = _factors(case, case.query[b, h].astype(dtype), rows, dtype)
            for row in others:
                tensor = tensor[..., None, :] * row
            found.append(tensor.reshape(len(tensor), -1, tensor.shape[-1]))
    stacked = np.stack(found).reshape(batch, heads, *found[0].shape)
    return stacked * np.asarray(case.spec.score_factor(width), dtype)


def kept_powers(terms: Array, monomials: list[Monomial], degree: int) -> list[Array]:
    """Return, for each degree, what is kept of that power of the score: (b, h, n, tuples)."""
    powers = [np.zeros_like(terms[..., 0]) for _ in range(degree + 1)]
    for monomial in monomials:
        term = np.full_like(terms[..., 0], count_of(monomial))
        for column in monomial:
            term = term * terms[..., column]
        powers[len(monomial)] = powers[len(monomial)] + term
    return powers


def dense_pruned(case: Case, plan: Plan, centre: Array, dtype: Any = np.longdouble) -> dict[str, Array]:
    """Return what `oracle_polynomial.dense_polynomial` does, of the monomials that a plan keeps."""
    assert plan.polynomial is not None
    values = np.asarray(plan.polynomial.values, dtype)
    degree, shift = plan.polynomial.degree, centre[..., None].astype(dtype)
    terms, monomials = score_terms(case, dtype), monomials_of(plan)
    bias = dense_scores(case, dtype)[1]
    weights = np.where(bias == -np.inf, 0, np.exp(np.where(bias == -np.inf, 0, bias)))
    centred = _about(kept_powers(terms, monomials, degree), -shift)
    absolute = _about(kept_powers(np.abs(terms), monomials, degree), np.abs(shift))
    output, total = weighted_answer(
        weights * sum(c * x for c, x in zip(values, centred, strict=True)), value_products(case, dtype)
    )
    sizes = (weights * sum(abs(c) * x for c, x in zip(values, absolute, strict=True))).sum(-1)
    count = weights.sum(-1)
    safe, divisor = np.where(count == 0, 1, count), np.where(total == 0, 1, total)
    moments = np.stack([(weights * x).sum(-1) / safe for x in centred], axis=-1)
    lse = np.where(count == 0, -np.inf, centre + np.log(divisor))
    return {"output": output, "lse": lse, "moments": moments, "mean": total / safe, "condition": sizes / divisor}


def _about(powers: list[Array], shift: Array) -> list[Array]:
    """Return the powers of x + shift, given those of x, by the binomial theorem."""
    return [sum(comb(m, s) * shift ** (m - s) * powers[s] for s in range(m + 1)) for m in range(len(powers))]


def decay(rng: np.random.Generator, width: int) -> Array:
    """Return sizes of columns, in random order: flat, 1 / l, 1 / l^2, one dominant, a factor a column, or one zero."""
    place = np.arange(1.0, width + 1.0)
    dominant = np.where(place == 1, 1.0, 10.0 ** -rng.uniform(0.5, 4))
    shapes = (place**0, 1 / place, place**-2, dominant, 10.0 ** -rng.uniform(0, 3, width), (place > 1) / place)
    return rng.permutation(shapes[rng.integers(len(shapes))])


def anisotropic(case: Case, rng: np.random.Generator, reach: float) -> Case:
    """Return a case whose columns are of different sizes, some rows and keys heavy, its largest terms adding to reach.

    Queries and keys share what makes a column small, at random.
    """
    widest, operands = decay(rng, max(x.shape[-1] for x in (case.query, *case.keys))), []
    for x in (case.query, *case.keys):
        sizes = widest[: x.shape[-1]]
        share = float(rng.choice([0.0, 0.3, 1.0]))
        heavy = np.where(rng.random(x.shape[:-1]) < 0.15, 10.0 ** rng.uniform(0, 1.5), 1.0)
        moved = x + rng.choice([0.0, 0.0, 1.0]) * np.sign(x[..., :1, :])
        operands.append(moved * heavy[..., None] * sizes**share)
    case = replace(case, query=operands[0], keys=tuple(operands[1:]))
    terms = np.abs(score_terms(case.with_spec(scale=1.0)))
    largest = float(terms.max(axis=(0, 1, 2, 3), initial=0.0).sum())
    return case.with_spec(scale=float(rng.choice([-1.0, 1.0])) * reach / max(largest, 1e-30))


def with_degree(case: Case, degree: int, **method: Any) -> Case:
    """Return a case under another polynomial."""
    return case.with_spec(method=Polynomial(degree=degree, **method))


def pruned_case(order: int, variant: str, mask: str, *, degree: int = 4, seed: int = 0, **options: Any) -> Case:
    """Return a polynomial case with uneven columns, but for a full weight."""
    case = polynomial_case(order, variant, mask, degree=degree, seed=seed, **options)
    return case if variant == "full_weight" else anisotropic(case, np.random.default_rng(seed), 1.5)
