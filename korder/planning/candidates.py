"""The ranked plans of a problem: one per method, and for a tolerance one per degree worth trying, lowest first."""

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
    from korder.planning.polynomial import polynomial_degrees, polynomial_plan

    if method.on_exceed == "exact":
        return _or_exact(problem, method)
    degrees = (method.degree,) if method.degree is not None else polynomial_degrees(problem)
    plans = tuple(polynomial_plan(problem, degree) for degree in degrees)
    if not plans:
        raise _no_degree(problem, method)
    return plans


def _or_exact(problem: Problem, method: Polynomial) -> tuple[Plan, ...]:
    """The polynomial plans, then the exact one; what does not fit the memory limit is left out while one plan does."""
    from korder.planning.exact import exact_plan
    from korder.planning.polynomial import polynomial_degrees, polynomial_plan

    plans: tuple[Plan, ...] = ()
    try:
        degrees = (method.degree,) if method.degree is not None else polynomial_degrees(problem)
        plans = tuple(polynomial_plan(problem, degree) for degree in degrees)
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
