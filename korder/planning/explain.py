"""Prints a plan as a table that a person can read."""

from __future__ import annotations

from math import comb

from korder.planning.plan import Plan, PolynomialPlan, SplitPlan, Tiling
from korder.problem import Problem

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def explain_plan(plan: Plan) -> str:
    """Return the text of `Plan.explain`: problem, how it is walked, the steps, the cost."""
    rows = [("problem", plan.problem.describe()), ("method", _method(plan))]
    if plan.tiling is not None:
        rows += _tiling_rows(plan.problem, plan.tiling)
    if plan.polynomial is not None:
        rows += _polynomial_rows(plan.problem, plan.polynomial)
    if plan.split is not None:
        rows += _split_rows(plan, plan.split)
    cost = plan.cost
    rows += [
        (
            "flops",
            f"{count(cost.flops)}" + (f" and {count(cost.exponentials)} exponentials" if cost.exponentials else ""),
        ),
        ("bytes moved", size(cost.bytes_moved)),
        ("peak memory", f"{size(cost.peak_memory)} of {size(plan.problem.spec.policy.memory_limit)} allowed"),
        (
            "largest array",
            f"{count(cost.largest_intermediate)} elements; all scores would be {count(_scores(plan.problem))}",
        ),
    ]
    width = max(len(label) for label, _ in rows)
    lines = [f"{label.rjust(width)}  {text}" for label, text in rows]
    if plan.steps:
        lines += ["", *_step_lines(plan)]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def size(number: float) -> str:
    """Return bytes as text with a binary unit."""
    for unit in _UNITS:
        if number < 1024 or unit == _UNITS[-1]:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError("unreachable: the last unit takes every size")


def count(number: float) -> str:
    """Return a count as text, exact while short."""
    return str(int(number)) if number < 1e6 else f"{number:.3e}"


def _scores(problem: Problem) -> int:
    return problem.batch * problem.heads * problem.queries * problem.tuples


def _method(plan: Plan) -> str:
    if plan.polynomial is not None:
        return f"polynomial, degree {plan.polynomial.degree}, {plan.polynomial.coefficients} coefficients"
    if plan.split is not None:
        return "split, polynomial for most tuples, exact for those of outlying keys and for rows that miss"
    if plan.tiling is not None and not plan.tiling.looped:
        return "exact, stored: every tuple of a head in one tile"
    return "exact, sliced contraction"


def _tiling_rows(problem: Problem, tiling: Tiling) -> list[tuple[str, str]]:
    contracted = f"mode {tiling.contracted + 1} (m = {problem.lengths[tiling.contracted]}), {tiling.keys} keys a tile"
    rows = [("contracted", contracted)]
    if tiling.looped:
        outer = [mode for mode in range(problem.order) if mode != tiling.contracted]
        blocks = dict(zip(outer, tiling.folded, strict=True))
        looped = ", ".join(f"mode {t + 1} (m = {problem.lengths[t]}) by {blocks[t]}" for t in tiling.looped)
        rows.append(("folded", f"{looped}, into the query"))
    rows.append(("tile", f"{tiling.heads} head(s), {tiling.queries} queries"))
    return rows


def _polynomial_rows(problem: Problem, polynomial: PolynomialPlan) -> list[tuple[str, str]]:
    whole = comb(problem.score_width + polynomial.degree, polynomial.degree)
    rows = [("features", count(polynomial.features) + (f" of {count(whole)}" if polynomial.pruning else ""))]
    if polynomial.interval is not None:
        rows.append(("interval", f"+-{polynomial.interval:g} about the centre"))
    rows += [("state", f"{count(polynomial.state)} elements a head"), ("chunk", f"{polynomial.chunk} tokens at a time")]
    return rows


def _split_rows(plan: Plan, split: SplitPlan) -> list[tuple[str, str]]:
    keys = ", ".join(f"{number} keys of mode {t + 1}" for t, number in enumerate(split.keys))
    rows = [("exactly", f"up to {keys}, about {split.rows} rows, a head")]
    return rows + [("part", f"{part.name}, {count(part.cost.flops)} flops") for part in plan.parts]


def _step_lines(plan: Plan) -> list[str]:
    header = f"{'step':>4}  {'operands':<10} {'contraction':<28} {'flops':>10} {'result':>10}"
    lines = [header, "-" * len(header)]
    for index, step in enumerate(plan.steps):
        operands = ", ".join(map(str, step.operands))
        lines.append(f"{index:>4}  {operands:<10} {step.subscripts:<28} {count(step.flops):>10} {count(step.size):>10}")
    return lines
