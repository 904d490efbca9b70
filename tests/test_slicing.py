"""The exact plan: which mode is contracted, blocks under the memory limit, flops, live shares, and what it prints."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest

from korder.errors import UnsupportedProblemError
from korder.planning.cost import live_share
from korder.planning.exact import exact_plan
from korder.planning.memory import CONVERSION_BUFFERS, backward_workspace, forward_workspace
from korder.planning.slicing import TILE_SCORES
from korder.problem import Problem, Shapes, make_problem
from korder.spec import AttentionSpec, Causal, Ordered, Policy, Window
from tests.kernels import GENERIC, NUMPY
from tests.limits import assert_agree
from tests.oracle import live
from tests.problems import random_case


def problem_of(n: int, lengths: tuple[int, ...], *, heads: int = 1, d: int = 64, e: int = 64, **spec: Any) -> Problem:
    shapes = Shapes(
        query=(1, heads, n, d),
        keys=tuple((1, heads, m, d) for m in lengths),
        values=tuple((1, heads, m, e) for m in lengths),
        offsets_given=getattr(spec.get("mask"), "align", None) is None,
    )
    return make_problem(AttentionSpec(order=len(lengths), **spec), shapes, "float32")


@pytest.mark.parametrize(
    ("lengths", "contracted"),
    [((700,), 0), ((700, 300), 0), ((300, 700), 1), ((500, 500), 1), ((100, 700, 700), 2), ((700, 100, 300), 0)],
)
def test_the_longest_mode_is_contracted_the_last_of_equals(lengths: tuple[int, ...], contracted: int) -> None:
    tiling = exact_plan(problem_of(600, lengths)).tiling
    assert tiling is not None
    assert tiling.contracted == contracted
    assert tiling.looped == tuple(t for t in range(len(lengths)) if t != contracted)
    assert len(tiling.folded) == len(lengths) - 1


def test_a_window_counts_as_long_as_it_is() -> None:
    tiling = exact_plan(problem_of(900, (900, 900), mask=Window(sizes=(64, 8)))).tiling
    assert tiling is not None
    assert tiling.contracted == 0
    assert tiling.folded[0] <= 8 + tiling.queries
    assert tiling.keys <= 64 + tiling.queries


@pytest.mark.parametrize(("n", "lengths"), [(16, (16, 16)), (5, (7, 3, 11)), (300, (400,))])
def test_small_problems_are_stored(n: int, lengths: tuple[int, ...]) -> None:
    plan = exact_plan(problem_of(n, lengths, heads=6))
    tiling = plan.tiling
    assert tiling is not None
    assert tiling.looped == ()
    assert tiling.queries == n
    assert prod(tiling.folded) * tiling.keys == prod(lengths)
    assert tiling.heads == min(6, max(TILE_SCORES // (n * prod(lengths)), 1))
    assert "stored" in plan.explain()


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_a_tile_is_never_larger_than_meant(order: int) -> None:
    length = {1: 40000, 2: 3000, 3: 300, 4: 60, 5: 24, 6: 12}[order]
    plan = exact_plan(problem_of(length, (length,) * order))
    tiling = plan.tiling
    assert tiling is not None
    tile = tiling.queries * prod(tiling.folded) * tiling.keys * tiling.heads
    assert TILE_SCORES // 8 <= tile <= 1.2 * TILE_SCORES
    assert plan.cost.largest_intermediate < length * prod((length,) * order)
    assert plan.cost.peak_memory < 64 * 2**20


@pytest.mark.parametrize("limit", [2**17, 2**19, 2**21, 2**23])
def test_blocks_shrink_to_the_memory_limit(limit: int) -> None:
    problem = problem_of(113, (211, 223), d=16, e=12, heads=2, policy=Policy(memory_limit=limit))
    tiling = exact_plan(problem).tiling
    assert tiling is not None
    for workspace in (forward_workspace, backward_workspace):
        for in_place in (False, True):
            fixed = CONVERSION_BUFFERS if in_place else 0
            assert workspace(problem, tiling, in_place=in_place) <= limit + fixed


def test_small_blocks_compute_the_same() -> None:
    wide = random_case(3, queries=13, lengths=(11, 7, 5))
    tight = wide.with_spec(policy=Policy(memory_limit=20_000))
    tiling = exact_plan(tight.problem()).tiling
    assert tiling is not None
    assert tiling.looped
    for subject in (NUMPY, GENERIC):
        assert_agree(subject.forward(tight).output, subject.forward(wide).output, dtype="float64")


def test_a_limit_below_the_smallest_workspace_is_an_error_with_both_numbers() -> None:
    with pytest.raises(UnsupportedProblemError) as caught:
        exact_plan(problem_of(1000, (1000, 1000), policy=Policy(memory_limit=1000)))
    error = caught.value
    assert error.code == "memory-limit"
    assert "1000" in str(error.got)
    smallest = int("".join(c for c in str(error.expected).split(" bytes")[0].split(">=")[1] if c.isdigit()))
    assert smallest > 1000
    exact_plan(problem_of(1000, (1000, 1000), policy=Policy(memory_limit=smallest)))
    with pytest.raises(UnsupportedProblemError):
        exact_plan(problem_of(1000, (1000, 1000), policy=Policy(memory_limit=smallest - 1)))


def test_flops_and_exponentials() -> None:
    cost = exact_plan(problem_of(37, (41, 43), d=16, e=12, heads=3)).cost
    assert cost.exponentials == 3 * 37 * 41 * 43
    assert cost.flops == 2 * 3 * 37 * 41 * 43 * (16 + 12)
    assert cost.bytes_moved == 4 * 3 * (37 * (16 + 12) + (41 + 43) * (16 + 12) + 37)


def test_steps_are_those_of_a_tile() -> None:
    plan = exact_plan(problem_of(600, (100, 200, 500), d=16, e=12))
    assert plan.tiling is not None
    assert [step.subscripts for step in plan.steps] == [
        "bgjl,bgkl->bgjkl",
        "bghil,bgjkl->bghijkl",
        "bgml,bghijkl->bghijkm",
        "bgme,bghijkm->bghijke",
    ]
    rows = plan.tiling.queries * prod(plan.tiling.folded)
    assert plan.steps[2].size == rows * plan.tiling.keys
    assert plan.steps[2].flops == 2 * rows * plan.tiling.keys * 16
    assert plan.steps[3].flops == 2 * rows * plan.tiling.keys * 12


@pytest.mark.parametrize(
    "mask", [Causal(align="start"), Causal(align="end"), Window(sizes=(3, 5), align="end"), Ordered(align="start")]
)
def test_live_share_counts_the_mask(mask: Any) -> None:
    n, lengths = (11, (7, 13)) if not isinstance(mask, Ordered) else (11, (11, 11))
    problem = problem_of(n, lengths, mask=mask)
    offsets = [n - m if mask.align == "end" else 0 for m in lengths]
    cells = product(range(n), *(range(m) for m in lengths))
    counted = [live(mask, i, [j + o for j, o in zip(js, offsets, strict=True)]) for i, *js in cells]
    assert live_share(problem) == pytest.approx(np.mean(counted), rel=1e-12)
    assert exact_plan(problem).cost.exponentials == sum(counted)


def test_planning_is_a_pure_function() -> None:
    problem = problem_of(300, (200, 100))
    assert exact_plan(problem) is exact_plan(problem_of(300, (200, 100)))
    assert hash(exact_plan(problem)) == hash(exact_plan(problem))
