"""The ranked plans of a problem: one per method, and for a tolerance those of each degree worth trying."""

from __future__ import annotations

from functools import lru_cache

from korder.errors import AccuracyError, UnsupportedProblemError
from korder.planning.plan import Plan
from korder.problem import Problem
from korder.spec import Polynomial


@lru_cache(maxsize=256)
def candidate_plans(problem: Problem) -> tuple[Plan, ...]:
    """Return the plans that may answer a problem, in the order in which they are to be tried.

    Raises:
        UnsupportedProblemError: No block size meets the memory limit, or the method cannot take the problem.
        AccuracyError: No degree can meet the tolerance at a cost that is worth it.
    """
    # Imported here so that a run of one method does not pay for loading the other's planner.
    if problem.spec.chooses:
        from korder.planning.choices import choice_plans

        return choice_plans(problem)
    method = problem.spec.polynomial
    if method is None:
        from korder.planning.exact import exact_plan

        return (exact_plan(problem),)
    if method.on_exceed == "exact":
        return _or_exact(problem, method)
    plans = _polynomial_plans(problem, method)
    if not plans:
        raise _no_degree(problem, method)
    return plans


def _polynomial_plans(problem: Problem, method: Polynomial) -> tuple[Plan, ...]:
    """The plan of the method's degree, or those worth trying for its tolerance."""
    from korder.planning.degrees import tolerance_plans
    from korder.planning.polynomial import polynomial_plan

    if method.degree is not None:
        return (polynomial_plan(problem, method.degree),)
    return tolerance_plans(problem, method)


def _or_exact(problem: Problem, method: Polynomial) -> tuple[Plan, ...]:
    """The polynomial plans, then the exact one; what does not fit the memory limit is left out while one plan does."""
    from korder.planning.exact import exact_plan

    plans: tuple[Plan, ...] = ()
    try:
        plans = _polynomial_plans(problem, method)
    except UnsupportedProblemError as error:
        if error.code != "memory-limit":
            raise
    try:
        return (*plans, exact_plan(problem))
    except UnsupportedProblemError:
        if not plans:
            raise
        return plans


def _no_degree(problem: Problem, method: Polynomial) -> AccuracyError:
    statistics = problem.statistics
    reach = (
        f"scores reach {statistics.half_width:g} from their row's centre, rms {statistics.rms:g}" if statistics else ""
    )
    return AccuracyError(
        f"no degree of the polynomial method that is worth its cost can meet tolerance {method.tolerance:g}.",
        code="no-degree",
        expected="scores closer to their row's mean, or a larger tolerance",
        got=reach or "no statistics",
        hint='use method Exact(), on_exceed="exact", a smaller scale, or fewer columns: features grow as C(d + g, g).',
    )
