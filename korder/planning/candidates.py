"""The ranked plans of a problem: one per method, and for a tolerance one per degree worth trying, lowest first."""

from __future__ import annotations

from functools import lru_cache

from korder.errors import UnsupportedProblemError
from korder.planning.plan import Plan
from korder.problem import Problem


@lru_cache(maxsize=256)
def candidate_plans(problem: Problem) -> tuple[Plan, ...]:
    """Return the plans that may answer a problem, in the order in which they are to be tried.

    Raises:
        UnsupportedProblemError: No block size meets the memory limit, or the method cannot take the problem.
    """
    # Imported here so that a run of one method does not pay for loading the other's planner.
    method = problem.spec.polynomial
    if method is None:
        from korder.planning.exact import exact_plan

        return (exact_plan(problem),)
    from korder.planning.polynomial import polynomial_degrees, polynomial_plan

    plans: tuple[Plan, ...] = ()
    try:
        degrees = (method.degree,) if method.degree is not None else polynomial_degrees(problem)
        plans = tuple(polynomial_plan(problem, degree) for degree in degrees)
    except UnsupportedProblemError as error:
        if method.on_exceed != "exact" or error.code not in ("feature-budget", "memory-limit"):
            raise
    if method.on_exceed == "exact":
        from korder.planning.exact import exact_plan

        plans += (exact_plan(problem),)
    return plans
