"""The plan of the exact method: a tiling, the steps inside a tile, and the cost."""

from __future__ import annotations

from functools import lru_cache

from korder.planning.cost import exact_cost, live_share
from korder.planning.explain import size
from korder.planning.expression import COLUMNS, MODES
from korder.planning.memory import backward_workspace, contracted_width, fold_steps
from korder.planning.plan import ContractionStep, Plan, Tiling
from korder.planning.slicing import choose_tiling
from korder.problem import Problem


@lru_cache(maxsize=256)
def exact_plan(problem: Problem) -> Plan:
    """Return the plan of the exact method.

    Raises:
        UnsupportedProblemError: No block size fits the memory limit.
    """
    tiling = choose_tiling(problem)
    cost = exact_cost(problem, tiling)
    return Plan(problem, "exact", cost, steps=tile_steps(problem, tiling), tiling=tiling, notes=_notes(problem, tiling))


def tile_steps(problem: Problem, tiling: Tiling) -> tuple[ContractionStep, ...]:
    """Return the pairwise steps of one head of a tile.

    The operands are the contracted values, the contracted keys, the queries (times a full weight), and the outer keys.
    """
    fold = fold_steps(problem, tiling)
    shifted = tuple(
        ContractionStep((step.operands[0] + 2, step.operands[1] + 2), step.subscripts, step.flops, step.size)
        for step in fold
    )
    outer = "".join(MODES[t] for t in range(problem.order) if t != tiling.contracted)
    last = MODES[tiling.contracted]
    column = COLUMNS[tiling.contracted] if problem.weight == "full" else "l"
    rows = tiling.queries
    for count in tiling.folded:
        rows *= count
    scores = rows * tiling.keys
    width, values = contracted_width(problem, tiling), problem.value_width
    return (
        *shifted,
        ContractionStep((1, 2), f"bg{last}{column},bghi{outer}{column}->bghi{outer}{last}", 2 * scores * width, scores),
        ContractionStep((0, 1), f"bg{last}e,bghi{outer}{last}->bghi{outer}e", 2 * scores * values, rows * values),
    )


def _notes(problem: Problem, tiling: Tiling) -> tuple[str, ...]:
    notes = [f"backward works in {size(backward_workspace(problem, tiling, in_place=False))}"]
    if problem.spec.mask.kind != "full":
        notes.append(f"{live_share(problem):.1%} of the tuples are live; tiles without any are skipped")
    return tuple(notes)
