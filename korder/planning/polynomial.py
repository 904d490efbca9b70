"""Plans of the polynomial method at one degree: coefficients, monomials, blocks under the memory limit, cost.

Pure functions of a Problem.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil, comb, log2, prod

from korder.errors import UnsupportedProblemError
from korder.planning.coefficients import coefficients_of
from korder.planning.cost import live_share, operand_bytes
from korder.planning.explain import size
from korder.planning.plan import Cost, Plan, PolynomialPlan, Pruning
from korder.planning.pruning import kept_monomials, pruning_of
from korder.problem import ITEM_BYTES, Problem
from korder.spec.masks import Window

FEATURE_BUDGET = 2**21
"""Most features of a degree that is chosen for a tolerance."""
HIGHEST_DEGREE = 64
CHUNKS = (1024, 512, 256, 128, 64, 32, 16)
"""Tokens whose features are built at a time, the largest that fits."""
RUNNING_CHUNK = 32
"""The same where rows see some of the keys."""


def feature_count(width: int, degree: int) -> int:
    """Return r = C(width + degree, degree), the monomials of `width` variables up to `degree`."""
    return comb(width + degree, degree)


@lru_cache(maxsize=256)
def polynomial_plan(problem: Problem, degree: int, prune: float | None = None) -> Plan:
    """Return the plan that runs a problem with a polynomial of one degree.

    Args:
        problem: The problem.
        degree: The degree.
        prune: How much the monomials that are left out may add, 0 to leave none out; what the method says when None.

    Raises:
        UnsupportedProblemError: No block of tokens meets the memory limit, a bias that differs between queries,
            minimax coefficients without an interval, or pruning without statistics.
    """
    _refuse_full_biases(problem)
    kind, interval = coefficient_kind(problem)
    values = coefficients_of(kind, degree, interval)
    pruning = pruning_of(problem, kind, values, _prune(problem) if prune is None else prune)
    counts = monomial_counts(problem.score_width, degree, pruning)
    chunk = _chunk(problem, counts, pruning)
    return Plan(
        problem=problem,
        method="polynomial",
        cost=_cost(problem, counts, chunk, pruning),
        polynomial=PolynomialPlan(
            degree=degree,
            coefficients=kind,
            interval=interval,
            values=values,
            features=sum(counts),
            state=problem.order * sum(counts) * (problem.value_width + 1),
            chunk=chunk,
            gradient=_gradient(problem),
            pruning=pruning,
        ),
        notes=_notes(problem, kind, degree, chunk, pruning),
    )


def _prune(problem: Problem) -> float:
    method = problem.spec.polynomial
    return 0.0 if method is None else method.prune or 0.0


def monomial_counts(width: int, degree: int, pruning: Pruning | None = None) -> tuple[int, ...]:
    """Return the monomials of each degree: C(width + m - 1, m), or those that a pruning keeps."""
    kept = None if pruning is None else kept_monomials(pruning)
    return kept.counts if kept is not None else tuple(comb(width + m - 1, m) for m in range(degree + 1))


def _refuse_full_biases(problem: Problem) -> None:
    full = [t for t, kind in enumerate(problem.biases) if kind == "full"]
    if full:
        raise UnsupportedProblemError(
            "the polynomial method cannot take a bias that differs between queries.",
            code="bias-unsupported",
            expected="biases[t] with an axis of 1 in place of the queries: they multiply the features of keys",
            got=f"a full bias in mode {full[0]}",
            hint="use method Exact(), or drop the query axis of the bias.",
        )


def coefficient_kind(problem: Problem) -> tuple[str, float | None]:
    """Return what coefficients the method wants, and their interval if they have one.

    Raises:
        UnsupportedProblemError: An interval is wanted, and neither the method nor statistics have one.
    """
    method = problem.spec.polynomial
    if method is None or method.coefficients == "taylor":
        return "taylor", None
    measured = problem.statistics.half_width if problem.statistics is not None else None
    interval = method.interval if method.interval is not None else measured
    if interval is None:
        raise UnsupportedProblemError(
            "minimax coefficients need an interval.",
            code="interval-missing",
            expected="method.interval, or statistics= of these operands",
            got="neither",
            hint="korder.measure(...) gives statistics; their half_width is then the interval.",
        )
    return "minimax", min(max(interval, 1e-3), 64.0)


def _gradient(problem: Problem) -> str:
    method = problem.spec.polynomial
    return "consistent" if method is None else method.gradient


_GRADIENTS = {
    "consistent": "gradients: of the function that is computed (consistent)",
    "closed_form": "gradients: those of exact attention, with the polynomial's weights (closed_form)",
}


def _notes(problem: Problem, kind: str, degree: int, chunk: int, pruning: Pruning | None) -> tuple[str, ...]:
    works = size(backward_workspace(problem, degree, chunk, pruning))
    notes = [f"backward works in {works}", _GRADIENTS[_gradient(problem)]]
    if kind == "taylor" and degree % 2:
        notes.append(f"degree {degree} is odd: its Taylor polynomial is negative far below a row's mean")
    if pruning is not None:
        notes.append(_pruned(problem, degree, pruning))
    return tuple(notes)


def _pruned(problem: Problem, degree: int, pruning: Pruning) -> str:
    kept = kept_monomials(pruning)
    assert kept is not None
    whole, count = feature_count(problem.score_width, degree), sum(kept.counts)
    return (
        f"pruned: {count} of {whole} monomials, {whole / count:.3g} times fewer; the others add at most "
        f"{kept.dropped:.2g} to the weight of a tuple"
    )


def _item(problem: Problem) -> int:
    return ITEM_BYTES[problem.accumulation]


def forward_workspace(
    problem: Problem, degree: int, chunk: int, pruning: Pruning | None = None, *, in_place: bool = True
) -> int:
    """Return bytes beyond inputs and outputs: key states in float64, the table that is read, one block of features.

    Counts what is alive at the widest point of the passes of a kernel that writes features and running states in place;
    one that does not joins them from parts, and holds the widest of them twice.
    """
    sizes = _BlockSizes(problem, degree, chunk, pruning)
    order, item = problem.order, sizes.item
    sums = 8 * (sizes.state + sizes.features)
    kept = sizes.sums * sums
    if not in_place:
        kept += sizes.run if sizes.moving else sizes.block
    rows = sizes.readings * (degree + 7) + sizes.tokens * problem.score_width * (8 + item)
    if sizes.moving:
        runs = max(order, 2) if sizes.windows else order  # of states at once
        walking = (4 * runs + 7) * sizes.run // 4 + (order + 3) * sizes.run // sizes.channels
        blocks = (sizes.streams + sizes.shared) * sizes.block
        adding = (3 if sizes.windows else order) * sums + sizes.state * item
        if sizes.ordered:  # the block's own sums of every mode wait until all runs are done
            kept += order * sums * item // 8
        return kept + max(walking, adding) + blocks + rows
    reading = 2 * sizes.state * item + min(256, sizes.features) * sizes.tokens * item + rows
    table = int(8 * sizes.state * (2 + 3 * sizes.highest / sizes.features))
    return kept + sizes.block + max(reading, table)


def backward_workspace(problem: Problem, degree: int, chunk: int, pruning: Pruning | None = None) -> int:
    """Return bytes beyond inputs and outputs, all gradients wanted; counted as `forward_workspace`.

    Gradients are collected in blocks, which are joined into arrays one operand after the other: one is there twice.
    """
    keys = problem.batch * problem.groups * sum(problem.lengths)
    rows = 24 * problem.batch * problem.heads * problem.queries
    passes = _backward_passes(problem, degree, chunk, pruning)
    if _windows(problem):  # the gradients of a plane's keys from one walk wait for those from the other
        passes += 2 * sum(problem.lengths) * (2 * problem.score_width * _item(problem) + 8 * (problem.value_width + 1))
    return rows + max(passes, _largest_gradient(problem) + 8 * keys)


def _largest_gradient(problem: Problem) -> int:
    rows = problem.heads * problem.queries * problem.query_width
    keys = (m * max(width, problem.value_width) for m, width in zip(problem.lengths, problem.key_widths, strict=True))
    return problem.batch * max(rows, problem.groups * max(keys)) * ITEM_BYTES[problem.dtype]


def _backward_passes(problem: Problem, degree: int, chunk: int, pruning: Pruning | None) -> int:
    """Return the part of `backward_workspace` that smaller blocks shrink; tokens count by their logarithm at most."""
    closed = _gradient(problem) == "closed_form"
    sizes = _BlockSizes(problem, degree + closed, chunk, pruning)
    order, item, state = problem.order, sizes.item, 8 * sizes.state
    rows = sizes.readings * 5 + 3 * sizes.tokens * problem.score_width * item
    if sizes.moving:
        blocks = (2 * (order + sizes.shared) + sizes.streams - order) * sizes.block
        runs = 2 * order + 2.5 if order > 1 else 1.5 + min(sizes.shared, 2)
        if sizes.windows:
            runs, states = runs + 1.0, sizes.sums + 2 * order
            return blocks + max(states * state + int(runs * sizes.run), (states + 3) * state) + rows
        if sizes.ordered:  # iterated sums before some blocks, as often as these can be halved
            runs = order + 3.5 if order > 1 else runs
            states = (3 + ceil(log2(max(problem.queries, *problem.lengths, sizes.tokens) / sizes.tokens))) * order
            return blocks + states * state + int(runs * sizes.run) + rows
        walking = max(3 * order * state + int(runs * sizes.run), 4 * order * state)
        return blocks + max(walking, 2 * order * state + sizes.block) + rows
    # under the closed form the sums that values and weights get their gradients from stand beside the columns' own
    beside = 8 * _BlockSizes(problem, degree, chunk).state if closed else 0
    # the parts of the features' gradient, what they are joined into, and the features themselves
    return (order + 2) * state + beside + sizes.state * item + 3 * sizes.block + rows


class _BlockSizes:
    """Sizes of what a pass over one block of tokens holds.

    Counts: features, the most of one degree, channels, tokens, query heads that share a key head, key states kept
    in float64, blocks of key features; elements of one mode's key state; bytes of a block of features, of readings in
    float64, and of a run of running states.
    """

    def __init__(self, problem: Problem, degree: int, chunk: int, pruning: Pruning | None = None) -> None:
        counts = monomial_counts(problem.score_width, degree, pruning)
        self.item = _item(problem)
        self.moving = problem.spec.mask.kind != "full"
        self.ordered = problem.spec.mask.kind == "ordered"
        self.windows = _windows(problem)
        chunk = min((chunk, *self.windows))
        self.sums = sum(_window_sums(min(w, m), chunk) for w, m in zip(self.windows, problem.lengths, strict=False))
        self.sums = self.sums or problem.order
        self.streams = problem.order * (2 if self.windows else 1)
        self.features, self.highest = sum(counts), max(counts)
        self.channels = problem.value_width + 1
        self.state = self.features * self.channels
        self.tokens = min(chunk, max(problem.queries, *problem.lengths, 1))
        self.shared = max(problem.heads // max(problem.groups, 1), 1)
        self.block = self.features * self.tokens * self.item
        self.readings = 8 * self.tokens * self.channels
        run = min(self.highest, 256) * self.tokens * self.channels
        self.run = min(RUNNING_ELEMENTS, run) * self.item


def _windows(problem: Problem) -> tuple[int, ...]:
    return problem.spec.mask.sizes if isinstance(problem.spec.mask, Window) else ()


def _window_sums(window: int, step: int) -> int:
    """Return the key states kept for one mode's window: those up to an anchor, the newer one, their sum, and none."""
    return 3 + (0 if window <= step else ceil(log2((window - step) / step)) + 1)


RUNNING_ELEMENTS = 2**17
"""Elements of a block of running states, features by tokens by channels, that stays in cache."""


def _chunk(problem: Problem, counts: tuple[int, ...], pruning: Pruning | None) -> int:
    limit, degree, features = int(problem.spec.policy.memory_limit), len(counts) - 1, sum(counts)
    needed = 0
    for chunk in CHUNKS:
        if problem.spec.mask.kind != "full" and chunk > RUNNING_CHUNK:
            continue
        sizes = (problem, degree, chunk, pruning)
        needed = max(forward_workspace(*sizes), _backward_passes(*sizes))
        if needed <= limit:
            return chunk
    raise UnsupportedProblemError(
        f"the polynomial method of degree {degree} needs more memory than the policy allows.",
        code="memory-limit",
        expected=f"at most {limit} bytes of workspace",
        got=f"{needed} bytes: {features} features of {problem.value_width + 1} channels in {problem.order} modes",
        hint="raise policy.memory_limit, lower the degree, or use method Exact().",
    )


def _cost(problem: Problem, counts: tuple[int, ...], chunk: int, pruning: Pruning | None) -> Cost:
    item, features, channels = _item(problem), sum(counts), problem.value_width + 1
    queries = problem.batch * problem.heads * problem.queries
    keys = problem.batch * problem.groups * sum(problem.lengths)
    products = 2 * features * channels * (queries + keys)
    if problem.spec.mask.kind != "full":  # per token: k state updates, k products of states, one reading
        products += features * channels * problem.order * queries
    for window in _windows(problem):  # the keys that leave, and sums of those in between, halved again and again
        visits = 2 + max(log2(window / min(window, chunk)), 0) / 2
        products += round(2 * features * channels * (queries + visits * keys / problem.order))
    return Cost(
        flops=products + features * (queries + keys),
        bytes_moved=operand_bytes(problem) + item * features * (queries + keys),
        peak_memory=forward_workspace(problem, len(counts) - 1, chunk, pruning),
        largest_intermediate=max(features * min(chunk, max(problem.queries, *problem.lengths, 1)), features * channels),
    )


def exact_flops(problem: Problem) -> int:
    """Return what the exact method would cost: 2 n m1 .. mk (d + e), times the share of tuples that a mask leaves."""
    rows = problem.batch * problem.heads * problem.queries
    flops = 2 * rows * prod(problem.lengths) * (problem.score_width + problem.value_width)
    return round(flops * live_share(problem))
