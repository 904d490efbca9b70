"""Plans for methods that choose by predicted cost: exact, polynomial, and split at each measured level of outliers.

Pure functions of a Problem and its statistics. A prediction decides what is tried; certificates decide if it is right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

from korder.errors import UnsupportedProblemError
from korder.planning.degrees import PRUNED_GAIN, PRUNED_SHARE
from korder.planning.exact import exact_plan
from korder.planning.plan import Cost, Plan, SplitPlan
from korder.planning.polynomial import FEATURE_BUDGET, feature_count, polynomial_plan
from korder.problem import OutlierLevel, Problem
from korder.spec import Exact

SPLIT_MASKS = ("full", "causal")
HIGHEST_TRIED = 12
POLYNOMIAL_SHARE = 0.8
"""Share of the tolerance that a polynomial part is given; joined to exact parts its error grows by a quarter or so."""


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
        for degree, rows in zip(tried_degrees(problem.score_width), level.missing, strict=False):
            if rows < problem.queries:
                makers.append(partial(split_plan, problem, level, degree, rows))
                if pays(problem, level, degree):
                    makers.append(partial(split_plan, problem, level, degree, rows, allowed_mass(problem)))
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


def allowed_mass(problem: Problem) -> float:
    """Return how much the monomials that are left out may add: a share of what the polynomial part is given."""
    return PRUNED_SHARE * POLYNOMIAL_SHARE * (problem.spec.tolerance or 0.0)


def pays(problem: Problem, level: OutlierLevel, degree: int) -> bool:
    """Return whether pruning is expected to pay where no key is set aside; columns are measured with all keys."""
    if any(level.keys) or problem.statistics is None or not problem.statistics.columns:
        return False
    try:
        whole, pruned = (polynomial_plan(problem, degree, mass) for mass in (0.0, allowed_mass(problem)))
    except UnsupportedProblemError:
        return False
    return whole.cost.flops >= PRUNED_GAIN * pruned.cost.flops


def split_plan(problem: Problem, level: OutlierLevel, degree: int, rows: int, prune: float = 0.0) -> Plan:
    """Return the plan that runs the tuples without an outlier by a polynomial, the others and some rows exactly.

    Args:
        problem: The problem, with its statistics.
        level: Which keys are outliers.
        degree: Of the polynomial.
        rows: Rows that are expected to be computed exactly.
        prune: How much the monomials that the polynomial leaves out may add.

    Raises:
        UnsupportedProblemError: A part does not fit the memory limit.
    """
    masked = replace(problem, key_masks=(True,) * problem.order) if any(level.keys) else problem
    parts = (polynomial_plan(masked, degree, prune), *map(exact_plan, exact_parts(problem, level.keys, rows)))
    return Plan(
        problem=problem,
        method="split",
        cost=_joined(parts),
        split=SplitPlan(level.threshold, level.keys, rows, degree, prune),
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
