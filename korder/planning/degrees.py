"""The degrees, with all monomials or pruned, that are worth trying for a tolerance.

Statistics choose them; certificates, made after running, decide if the choice was right.
"""

from __future__ import annotations

from math import inf

from korder.errors import UnsupportedProblemError
from korder.planning.coefficients import Coefficients, coefficients_of, ratio_range, shift_bound, taylor_remainder
from korder.planning.plan import Plan
from korder.planning.polynomial import (
    FEATURE_BUDGET,
    HIGHEST_DEGREE,
    coefficient_kind,
    exact_flops,
    feature_count,
    polynomial_plan,
)
from korder.problem import Problem
from korder.spec import Polynomial

QUICK_FLOPS = 2**30
"""Cost below which a degree is tried even where the exact method costs less."""
MEAN_ALLOWANCE = 8.0
"""How far the mean of the polynomial over a row may stand above 1 in the estimate that skips hopeless degrees."""
PRUNED_SHARE = 0.25
"""Share of the tolerance that the monomials which are left out may use up."""
PRUNED_GAIN = 1.5
"""How many times fewer flop pruning must leave to be tried: a gathered feature takes about a quarter longer."""


def lowest_error(problem: Problem, coefficients: Coefficients, kind: str) -> float:
    """Return the least error that the certificate can show, relative to the value range; 0 without statistics.

    The sup bound on the measured half-width, or for Taylor of even degree the moment bound with the least moment that
    the measured rms allows, on the least range that it allows. A lower bound up to the mean of the polynomial, for
    which a factor stands.
    """
    statistics = problem.statistics
    if statistics is None:
        return 0.0
    width = min(statistics.half_width, 300.0)
    sup = shift_bound(*ratio_range(coefficients, -width, width))
    degree = len(coefficients) - 1
    if kind != "taylor" or degree % 2:
        return sup
    rms = min(statistics.rms, width)
    return min(sup, taylor_remainder(degree, rms) * rms**degree / MEAN_ALLOWANCE)


def tolerance_plans(problem: Problem, method: Polynomial) -> tuple[Plan, ...]:
    """Return the plans worth trying for the method's tolerance, cheapest first, even degrees only for Taylor.

    From the lowest degree that may meet it by the statistics, while features stay within the budget and the cost within
    that of the exact method, or within a second's work where exact is cheaper still. Where pruning pays, a degree has
    two plans, for the error of what is left out may be what misses. None if there is no such degree; under
    `on_exceed="warn"` then the highest that is affordable.

    Raises:
        UnsupportedProblemError: Not even the lowest degree fits the memory limit.
    """
    kind, interval = coefficient_kind(problem)
    step, tolerance = 2 if kind == "taylor" else 1, inf if method.tolerance is None else method.tolerance
    affordable: list[Plan] = []
    promising: list[Plan] = []
    for degree in range(step, HIGHEST_DEGREE + 1, step):
        found = _plans_of(problem, method, degree)
        if not found:
            break
        affordable += found
        if lowest_error(problem, coefficients_of(kind, degree, interval), kind) <= tolerance:
            promising += found
    if not affordable:
        polynomial_plan(problem, step, 0.0)  # raises if nothing fits the memory limit
    if not promising and method.on_exceed == "warn":
        return tuple(affordable[-1:])
    return tuple(sorted(promising, key=lambda plan: plan.cost.flops))


def _plans_of(problem: Problem, method: Polynomial, degree: int) -> list[Plan]:
    """Return the affordable plans of a degree, the pruned one first; none that would hardly gain by pruning."""
    whole = None
    if feature_count(problem.score_width, degree) <= FEATURE_BUDGET:
        whole = _affordable(problem, degree, 0.0)
    pruned = _affordable(problem, degree, pruned_mass(problem, method))
    if pruned is not None and (pruned.polynomial is None or pruned.polynomial.pruning is None):
        pruned = None
    if pruned is not None and whole is not None and method.prune is None:
        pruned = pruned if whole.cost.flops >= PRUNED_GAIN * pruned.cost.flops else None
    return [plan for plan in (pruned, whole) if plan is not None]


def pruned_mass(problem: Problem, method: Polynomial) -> float:
    """Return how much the monomials that are left out may add: what the method says, or a share of its tolerance."""
    if method.prune is not None or method.tolerance is None:
        return method.prune or 0.0
    measured = problem.statistics is not None and bool(problem.statistics.columns)
    return PRUNED_SHARE * method.tolerance if measured and method.gradient == "consistent" else 0.0


def _affordable(problem: Problem, degree: int, prune: float) -> Plan | None:
    try:
        plan = polynomial_plan(problem, degree, prune)
    except UnsupportedProblemError as error:
        if error.code == "needs-statistics":
            raise
        return None
    return plan if plan.cost.flops < max(exact_flops(problem), QUICK_FLOPS) else None
