"""Plans for methods that choose by predicted cost: exact, polynomial, and split at each measured level of outliers.

Pure functions of a Problem and its statistics. A prediction decides what is tried; certificates decide if it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

from korder.errors import UnsupportedProblemError
from korder.planning.exact import exact_plan
from korder.planning.plan import Cost, Plan, SplitPlan
from korder.planning.polynomial import FEATURE_BUDGET, feature_count, polynomial_plan
from korder.problem import OutlierLevel, Problem
from korder.spec import Exact

SPLIT_MASKS = ("full", "causal")
HIGHEST_TRIED = 12
POLYNOMIAL_SHARE = 0.6
"""Share of the tolerance that the polynomial part is given; joined to exact parts its error may grow by a half."""


def tried_degrees(width: int) -> tuple[int, ...]:
    """Return the even degrees whose features are few enough to be considered for a score width."""
    degrees = range(2, HIGHEST_TRIED + 1, 2)
    return tuple(degree for degree in degrees if feature_count(width, degree) <= FEATURE_BUDGET)


@lru_cache(maxsize=64)
def choice_plans(problem: Problem) -> tuple[Plan, ...]:
    """Return the plans that `Split` and `Auto` choose from, by predicted flop, fewest first; dispatch ranks by time.

    Raises:
        UnsupportedProblemError: No statistics, or nothing that fits the problem and its memory limit.
    """
    _require_statistics(problem)
    assert problem.statistics is not None
    levels = problem.statistics.levels if problem.spec.mask.kind in SPLIT_MASKS else ()
    makers: list[Callable[[], Plan]] = [partial(exact_plan, problem)]
    for level in levels:
        degrees = zip(tried_degrees(problem.score_width), level.missing, strict=False)
        makers += [
            partial(split_plan, problem, level, degree, rows) for degree, rows in degrees if rows < problem.queries
        ]
    refusals: list[UnsupportedProblemError] = []
    plans: list[Plan] = []
    for make in makers:
        try:
            plans.append(make())
        except UnsupportedProblemError as error:
            refusals.append(error)
    if not plans:
        raise refusals[0]
    return tuple(sorted(plans, key=lambda plan: plan.cost.flops))


def _require_statistics(problem: Problem) -> None:
    if problem.statistics is None:
        raise UnsupportedProblemError(
            f"method {type(problem.spec.method).__name__} chooses by what is measured of the operands.",
            code="needs-statistics",
            expected="statistics= of such operands",
            got="none",
            hint="korder.measure(query, keys, values, spec=spec) gives them; attend measures by itself.",
        )


def split_plan(problem: Problem, level: OutlierLevel, degree: int, rows: int) -> Plan:
    """Return the plan that runs the tuples without an outlier by a polynomial, the others and some rows exactly.

    Raises:
        UnsupportedProblemError: A part does not fit the memory limit.
    """
    masked = replace(problem, key_masks=(True,) * problem.order) if any(level.keys) else problem
    parts = (polynomial_plan(masked, degree), *map(exact_plan, exact_parts(problem, level.keys, rows)))
    return Plan(
        problem=problem,
        method="split",
        cost=_joined(parts),
        split=SplitPlan(level.threshold, level.keys, rows, degree),
        parts=parts,
    )


def exact_parts(problem: Problem, keys: tuple[int, ...], rows: int) -> tuple[Problem, ...]:
    """Return the exact problems of a split: one per mode that has outlying keys, then one for rows."""
    spec = problem.spec.model_copy(update={"method": Exact()})
    plain = replace(problem, spec=spec, statistics=None)
    parts = []
    for t, count in enumerate(keys):
        if count:
            lengths = tuple(count if s == t else m for s, m in enumerate(problem.lengths))
            parts.append(replace(plain, lengths=lengths, key_masks=(True,) * problem.order))
    return (*parts, *([replace(plain, queries=rows)] if rows else []))


def _joined(parts: tuple[Plan, ...]) -> Cost:
    costs = [part.cost for part in parts]
    return Cost(
        flops=sum(cost.flops for cost in costs),
        bytes_moved=sum(cost.bytes_moved for cost in costs),
        peak_memory=max(cost.peak_memory for cost in costs),
        largest_intermediate=max(cost.largest_intermediate for cost in costs),
        exponentials=sum(cost.exponentials for cost in costs),
    )
