"""Workspace of the exact method in bytes beyond inputs and outputs: what a tile and the laid-out operands take."""

from __future__ import annotations

from math import prod

from korder.planning.expression import fold_subscripts, gate_subscripts, outer_modes
from korder.planning.path import contraction_steps
from korder.planning.plan import ContractionStep, Tiling
from korder.problem import ITEM_BYTES, Problem

CONVERSION_BUFFERS = 2**16
"""Bytes allowed for what an array library takes for itself while it converts or broadcasts."""


def forward_workspace(problem: Problem, tiling: Tiling, *, in_place: bool) -> int:
    """Return the workspace of a forward.

    Args:
        problem: The problem.
        tiling: Its tiling.
        in_place: Whether the kernel lets the weights overwrite the scores. Plans are made for kernels that do not,
            where several arrays of that size live at once: what holds for them holds for the others.
    """
    tile = _TileSizes(problem, tiling)
    elements = tile.scores if in_place else 3 * tile.scores + tile.sums + tile.folding
    elements += tile.query + tile.inner_side + tile.masks + tile.gates + tile.sums + 3 * tile.outputs
    if _has_more_tiles(problem, tiling):  # the next fold finds the buffers of the tile before
        elements += tile.folding
    narrow_output = _rows(problem) * problem.value_width if _narrow(problem) else 0
    fixed = CONVERSION_BUFFERS if in_place else 0
    return fixed + _item(problem) * (elements + laid_out(problem) + narrow_output)


def backward_workspace(problem: Problem, tiling: Tiling, *, in_place: bool) -> int:
    """Return the workspace of a backward, all gradients wanted; arguments as `forward_workspace`."""
    tile = _TileSizes(problem, tiling)
    elements = 2 * tile.scores if in_place else 6 * tile.scores
    elements += tile.query + tile.masks + tile.gates + 2 * tile.sums + 3 * tile.outputs
    elements += 2 * tile.folding + 2 * tile.inner_side + laid_out(problem) + _rows(problem)
    if _narrow(problem):  # sums of the gradients before they are narrowed, and the widened gradient of the output
        elements += _rows(problem) * (problem.query_width + 2 * problem.value_width) + _key_elements(problem)
    return _item(problem) * elements


def _has_more_tiles(problem: Problem, tiling: Tiling) -> bool:
    return bool(tiling.looped) or tiling.heads < problem.batch * problem.heads or tiling.queries < problem.queries


def laid_out(problem: Problem) -> int:
    """Return the elements of the operands that are copied: scaled, widened, projected, or with masked keys zeroed."""
    width = problem.weight_rank if problem.weight == "cp" else problem.query_width
    total = _rows(problem) * width
    per_key = problem.batch * problem.groups
    masks = problem.key_masks or (False,) * problem.order
    for length, key_width, masked in zip(problem.lengths, problem.key_widths, masks, strict=True):
        copied = key_width + problem.value_width if masked or _narrow(problem) else 0
        projected = problem.weight_rank if problem.weight == "cp" else 0
        total += per_key * length * (copied + projected)
    return total


def fold_steps(problem: Problem, tiling: Tiling) -> tuple[ContractionStep, ...]:
    """Return the steps that fold the outer keys of a tile into one head's queries."""
    outer = outer_modes(problem.order, tiling.contracted)
    full = problem.weight == "full"
    columns = problem.key_widths if full else (problem.score_width,)
    shapes = [(1, 1, 1, tiling.queries, *columns)]
    shapes += [(1, 1, size, columns[t] if full else columns[0]) for t, size in zip(outer, tiling.folded, strict=True)]
    return contraction_steps(fold_subscripts(problem.order, tiling.contracted, full_weight=full), tuple(shapes))


def gate_steps(problem: Problem, tiling: Tiling) -> tuple[ContractionStep, ...]:
    """Return the steps that multiply the outer values of a tile; none below order 3."""
    if problem.order < 3:
        return ()
    shapes = tuple((1, 1, size, problem.value_width) for size in tiling.folded)
    return contraction_steps(gate_subscripts(problem.order, tiling.contracted), shapes)


class _TileSizes:
    """Elements of the arrays of one tile, all of its heads together."""

    def __init__(self, problem: Problem, tiling: Tiling) -> None:
        share = max(problem.heads // problem.groups, 1)
        key_heads = max(tiling.heads // share, 1)
        outer, queries = prod(tiling.folded), tiling.heads * tiling.queries
        rows, width, value_width = queries * outer, contracted_width(problem, tiling), problem.value_width
        self.scores = rows * tiling.keys
        self.query = rows * (width + 2)
        self.sums = rows * (value_width + 1)
        self.outputs = queries * (value_width + 1)
        self.folding = sum(step.size for step in fold_steps(problem, tiling)) * tiling.heads
        if problem.weight == "full":
            self.folding += queries * prod(problem.key_widths)
        self.gates = key_heads * outer * (value_width + 1) * (2 if problem.order > 2 else 1)
        self.inner_side = key_heads * max(problem.lengths[tiling.contracted], 1) * (width + value_width + 3)
        self.masks = 2 * tiling.queries * (tiling.keys + outer) if problem.spec.mask.kind != "full" else 0
        if problem.spec.mask.kind == "ordered":
            self.masks += outer * tiling.keys
        if problem.biases and problem.biases[tiling.contracted] == "full":
            self.inner_side += 2 * queries * tiling.keys


def contracted_width(problem: Problem, tiling: Tiling) -> int:
    """Return the columns that the score product of a tile sums over."""
    return problem.key_widths[tiling.contracted] if problem.weight == "full" else problem.score_width


def _item(problem: Problem) -> int:
    return ITEM_BYTES[problem.accumulation]


def _narrow(problem: Problem) -> bool:
    """Whether the operands are narrower than the sums."""
    return problem.dtype != problem.accumulation


def _rows(problem: Problem) -> int:
    return problem.batch * problem.heads * problem.queries


def _key_elements(problem: Problem) -> int:
    widths = (width + problem.value_width for width in problem.key_widths)
    return problem.batch * problem.groups * sum(m * width for m, width in zip(problem.lengths, widths, strict=True))
