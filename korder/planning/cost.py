"""What a plan costs, counted and not timed: flops, bytes, memory, and the share of tuples that a mask leaves live."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import comb, factorial, prod

from korder.planning.memory import contracted_width, fold_steps, forward_workspace, laid_out
from korder.planning.plan import Cost, Tiling
from korder.problem import ITEM_BYTES, Problem
from korder.spec.masks import Causal, Full, Ordered, Window

COUNTED_QUERIES = 2048
"""Queries whose live tuples are counted one by one; of more, this many evenly spaced ones."""


def exact_cost(problem: Problem, tiling: Tiling) -> Cost:
    """Return the cost of the exact method: 2 n m1..mk (d + e) flop a head, times the live share of the tuples."""
    scores = problem.batch * problem.heads * problem.queries * problem.tuples
    live = scores * live_share(problem)
    width = contracted_width(problem, tiling)
    steps = fold_steps(problem, tiling)
    tile = tiling.heads * tiling.queries * prod(tiling.folded)
    return Cost(
        flops=round(2 * live * (width + problem.value_width)) + _projection_flops(problem),
        bytes_moved=operand_bytes(problem),
        peak_memory=forward_workspace(problem, tiling, in_place=False),
        largest_intermediate=max(tile * tiling.keys, laid_out(problem), *(tiling.heads * step.size for step in steps)),
        exponentials=round(live),
    )


def operand_bytes(problem: Problem) -> int:
    """Return the bytes of all operands and of the output and lse."""
    rows = problem.batch * problem.heads * problem.queries
    keys = (
        problem.batch
        * problem.groups
        * sum(m * (width + problem.value_width) for m, width in zip(problem.lengths, problem.key_widths, strict=True))
    )
    item = ITEM_BYTES[problem.dtype]
    weight = 0
    if problem.weight == "full":
        weight = problem.query_width * prod(problem.key_widths)
    elif problem.weight == "cp":
        weight = problem.weight_rank * (problem.query_width + sum(problem.key_widths))
    biases = sum(
        problem.batch * problem.heads * (problem.queries if kind == "full" else 1) * m
        for kind, m in zip(problem.biases or (), problem.lengths, strict=False)
        if kind is not None
    )
    elements = rows * (problem.query_width + problem.value_width) + keys + weight + biases
    return item * elements + ITEM_BYTES[problem.accumulation] * rows


def _projection_flops(problem: Problem) -> int:
    """Multiplying the query, and for CP factors the keys, by the weight."""
    rows = problem.batch * problem.heads * problem.queries
    if problem.weight == "full":
        return 2 * rows * problem.query_width * prod(problem.key_widths)
    keys = problem.batch * problem.groups * sum(m * d for m, d in zip(problem.lengths, problem.key_widths, strict=True))
    return 2 * problem.weight_rank * (rows * problem.query_width + keys)


@lru_cache(maxsize=256)
def live_share(problem: Problem) -> float:
    """Return the share of (query, tuple) pairs that the mask leaves live, positions as the mask aligns them.

    Numerics: exact up to `COUNTED_QUERIES` queries, except for ordered masks over unequal lengths, where 1 / k! of the
    tuples of the causal mask are counted.
    """
    mask = problem.spec.mask
    if isinstance(mask, Full) or not problem.queries or not problem.tuples:
        return 1.0
    step = max(problem.queries // COUNTED_QUERIES, 1)
    chosen = range(step // 2, problem.queries, step)
    end = mask.align == "end"
    offsets = [problem.queries - m if end else 0 for m in problem.lengths]
    return sum(_live_tuples(problem, i, offsets) for i in chosen) / (len(chosen) * problem.tuples)


def _live_tuples(problem: Problem, position: int, offsets: Sequence[int]) -> float:
    mask = problem.spec.mask
    seen = [min(max(position + 1 - offset, 0), m) for offset, m in zip(offsets, problem.lengths, strict=True)]
    if isinstance(mask, Window):
        before = [position + 1 - w - offset for w, offset in zip(mask.sizes, offsets, strict=True)]
        hidden = [min(max(first, 0), m) for first, m in zip(before, problem.lengths, strict=True)]
        return prod(max(last - first, 0) for last, first in zip(seen, hidden, strict=True))
    if isinstance(mask, Ordered):
        if len(set(seen)) == 1 and len(set(offsets)) == 1:
            return comb(seen[0], problem.order)
        return prod(seen) / factorial(problem.order)
    assert isinstance(mask, Causal)
    return prod(seen)
