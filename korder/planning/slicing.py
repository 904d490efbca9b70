"""How the exact method walks the score tensor: shortest modes folded, longest contracted, blocks under the limit.

A pure function from a Problem to a Tiling. Storing everything is the same walk with one tile per head.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from korder.errors import UnsupportedProblemError
from korder.planning.expression import outer_modes
from korder.planning.memory import backward_workspace, forward_workspace
from korder.planning.plan import Tiling
from korder.problem import Problem
from korder.spec.masks import Full, Window

TILE_SCORES = 2**19
"""Scores in a tile: enough rows for a matrix product to pay, few enough to stay in a cache near the core."""
MAX_KEYS = 1024
"""Contracted keys in a tile; more of them leave too few rows."""
FOLDED_QUERIES = 64
"""Queries in a tile, before the outer keys are spent."""
MASKED_QUERIES = 16
"""Queries in a tile under a mask: a tile reaches as far as its last query sees."""
STORED_MASKED = 2**15
"""Scores of a head that are computed whole although a mask closes some; below it tiles cost more than scores."""


def choose_tiling(problem: Problem, tile_scores: int = TILE_SCORES) -> Tiling:
    """Return the tiling of a problem, with about `tile_scores` scores in a tile.

    Raises:
        UnsupportedProblemError: `memory-limit`, no block size keeps the workspace under the policy's limit.
    """
    contracted = contracted_mode(problem)
    tiling = _preferred(problem, contracted, tile_scores)
    limit = int(problem.spec.policy.memory_limit)
    while _workspace(problem, tiling) > limit:
        smaller = _shrunk(tiling)
        if smaller is None:
            smallest = _workspace(problem, tiling)
            raise UnsupportedProblemError(
                "no block size of the exact method fits the memory limit.",
                code="memory-limit",
                expected=f"policy.memory_limit >= {smallest} bytes, the smallest workspace of {problem.describe()}",
                got=f"policy.memory_limit = {limit} bytes",
                hint="raise the limit, or split the batch, the heads or the queries.",
            )
        tiling = smaller
    return replace(tiling, looped=_looped(problem, tiling))


def contracted_mode(problem: Problem) -> int:
    """Return the mode with the most keys that one query may see, the last of equals."""
    lengths = _seen_lengths(problem, 1)
    return max(range(problem.order), key=lambda t: (lengths[t], t))


def _seen_lengths(problem: Problem, queries: int) -> list[int]:
    """Keys of each mode that a block of queries may see."""
    mask = problem.spec.mask
    if not isinstance(mask, Window):
        return list(problem.lengths)
    return [min(m, size + queries - 1) for m, size in zip(problem.lengths, mask.sizes, strict=True)]


def _preferred(problem: Problem, contracted: int, tile_scores: int) -> Tiling:
    """The tiling that is fastest without a memory limit."""
    masked = not isinstance(problem.spec.mask, Full)
    queries = max(problem.queries, 1)
    block = min(queries, MASKED_QUERIES if masked else FOLDED_QUERIES)
    if queries * max(problem.tuples, 1) <= (STORED_MASKED if masked else tile_scores):
        return _stored(problem, contracted, tile_scores)
    seen = [max(m, 1) for m in _seen_lengths(problem, block)]
    keys = _even(seen[contracted], MAX_KEYS)
    rows = max(tile_scores // keys, 1)
    folded = folded_blocks([seen[t] for t in outer_modes(problem.order, contracted)], rows // block)
    if not masked:
        block = _even(queries, max(rows // prod(folded), 1))
    return Tiling((), contracted, block, folded, keys, 1)


def _stored(problem: Problem, contracted: int, tile_scores: int) -> Tiling:
    """The tiling with one tile for every head, and many heads in a tile."""
    lengths = [max(m, 1) for m in problem.lengths]
    queries = max(problem.queries, 1)
    count = min(max(tile_scores // (queries * prod(lengths)), 1), max(problem.batch * problem.heads, 1))
    folded = tuple(lengths[t] for t in outer_modes(problem.order, contracted))
    return Tiling((), contracted, queries, folded, lengths[contracted], _whole_heads(problem, count))


def folded_blocks(lengths: list[int], count: int) -> tuple[int, ...]:
    """Return even block sizes of about `count` tuples: all of the last modes, pieces of the first that does not fit."""
    sizes = []
    for length in reversed(lengths):
        size = _even(length, max(count, 1))
        sizes.append(size)
        count //= size
    return tuple(reversed(sizes))


def _even(length: int, size: int) -> int:
    """The block size, at most `size`, that cuts `length` into equal pieces."""
    pieces = -(-length // size)
    return -(-length // pieces)


def _whole_heads(problem: Problem, count: int) -> int:
    """The largest number of query heads up to `count` that is whole batches, whole key heads, or part of one."""
    share = max(problem.heads // problem.groups, 1)
    for unit in (problem.heads, share):
        if unit and count >= unit:
            return count // unit * unit
    return max(count, 1)


def _workspace(problem: Problem, tiling: Tiling) -> int:
    return max(forward_workspace(problem, tiling, in_place=False), backward_workspace(problem, tiling, in_place=False))


def _shrunk(tiling: Tiling) -> Tiling | None:
    """The next smaller tiling: fewer heads first, then half of the longest side; None when there is no smaller one."""
    if tiling.heads > 1:
        return replace(tiling, heads=tiling.heads // 2)
    sides = [tiling.queries, tiling.keys, *tiling.folded]
    longest = max(range(len(sides)), key=lambda index: sides[index])
    if sides[longest] == 1:
        return None
    sides[longest] = -(-sides[longest] // 2)
    return replace(tiling, queries=sides[0], keys=sides[1], folded=tuple(sides[2:]))


def _looped(problem: Problem, tiling: Tiling) -> tuple[int, ...]:
    """Folded modes, ascending, unless one tile holds every tuple of a head."""
    outer = outer_modes(problem.order, tiling.contracted)
    whole = tiling.queries >= problem.queries and tiling.keys >= problem.lengths[tiling.contracted]
    whole = whole and all(size >= problem.lengths[t] for t, size in zip(outer, tiling.folded, strict=True))
    return () if whole else outer
