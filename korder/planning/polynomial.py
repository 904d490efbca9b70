"""Plans of the polynomial method: coefficients, degrees worth trying for a tolerance, blocks under the memory limit.

Pure functions of a Problem. Statistics choose the degree; certificates, made after running, decide if it was right.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import takewhile
from math import ceil, comb, inf, log2, prod

from korder.errors import UnsupportedProblemError
from korder.planning.coefficients import (
    Coefficients,
    coefficients_of,
    ratio_range,
    shift_bound,
    taylor_remainder,
)
from korder.planning.cost import live_share, operand_bytes
from korder.planning.explain import size
from korder.planning.plan import Cost, Plan, PolynomialPlan
from korder.problem import ITEM_BYTES, Problem
from korder.spec.masks import Window

FEATURE_BUDGET = 2**21
"""Most features of a degree that is chosen for a tolerance."""
HIGHEST_DEGREE = 64
QUICK_FLOPS = 2**30
"""Cost below which a degree is tried even where the exact method costs less."""
MEAN_ALLOWANCE = 8.0
"""How far the mean of the polynomial over a row may stand above 1 in the estimate that skips hopeless degrees."""
CHUNKS = (1024, 512, 256, 128, 64, 32, 16)
"""Tokens whose features are built at a time, the largest that fits."""
RUNNING_CHUNK = 32
"""The same where rows see some of the keys."""


def feature_count(width: int, degree: int) -> int:
    """Return r = C(width + degree, degree), the monomials of `width` variables up to `degree`."""
    return comb(width + degree, degree)


@lru_cache(maxsize=256)
def polynomial_plan(problem: Problem, degree: int) -> Plan:
    """Return the plan that runs a problem with a polynomial of one degree.

    Raises:
        UnsupportedProblemError: No block of tokens meets the memory limit, a bias that differs between queries, or
            minimax coefficients without an interval.
    """
    _refuse_full_biases(problem)
    kind, interval = _coefficient_kind(problem)
    features = feature_count(problem.score_width, degree)
    chunk = _chunk(problem, degree, features)
    state = problem.order * features * (problem.value_width + 1)
    return Plan(
        problem=problem,
        method="polynomial",
        cost=_cost(problem, degree, features, chunk),
        polynomial=PolynomialPlan(
            degree=degree,
            coefficients=kind,
            interval=interval,
            values=coefficients_of(kind, degree, interval),
            features=features,
            state=state,
            chunk=chunk,
            gradient=_gradient(problem),
        ),
        notes=_notes(problem, kind, degree, chunk),
    )


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


def _coefficient_kind(problem: Problem) -> tuple[str, float | None]:
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


def _notes(problem: Problem, kind: str, degree: int, chunk: int) -> tuple[str, ...]:
    notes = [f"backward works in {size(backward_workspace(problem, degree, chunk))}", _GRADIENTS[_gradient(problem)]]
    if kind == "taylor" and degree % 2:
        notes.append(f"degree {degree} is odd: its Taylor polynomial is negative far below a row's mean")
    return tuple(notes)


def _item(problem: Problem) -> int:
    return ITEM_BYTES[problem.accumulation]


def forward_workspace(problem: Problem, degree: int, chunk: int, *, in_place: bool = True) -> int:
    """Return bytes beyond inputs and outputs: key states in float64, the table that is read, one block of features.

    Counts what is alive at the widest point of the passes of a kernel that writes features and running states in place;
    one that does not joins them from parts, and holds the widest of them twice.
    """
    sizes = _BlockSizes(problem, degree, chunk)
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


def backward_workspace(problem: Problem, degree: int, chunk: int) -> int:
    """Return bytes beyond inputs and outputs, all gradients wanted; counted as `forward_workspace`.

    Gradients are collected in blocks, which live next to the arrays that they are joined into: as large as these are.
    """
    keys = problem.batch * problem.groups * sum(problem.lengths)
    rows = 24 * problem.batch * problem.heads * problem.queries
    passes = _backward_passes(problem, degree, chunk)
    if _windows(problem):  # the gradients of a plane's keys from one walk wait for those from the other
        passes += 2 * sum(problem.lengths) * (2 * problem.score_width * _item(problem) + 8 * (problem.value_width + 1))
    return rows + max(passes, operand_bytes(problem) + 8 * keys)


def _backward_passes(problem: Problem, degree: int, chunk: int) -> int:
    """Return the part of `backward_workspace` that smaller blocks shrink; tokens count by their logarithm at most."""
    closed = _gradient(problem) == "closed_form"
    sizes = _BlockSizes(problem, degree + closed, chunk)
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

    Counts: features, those of the highest degree, channels, tokens, query heads that share a key head, key states kept
    in float64, blocks of key features; elements of one mode's key state; bytes of a block of features, of readings in
    float64, and of a run of running states.
    """

    def __init__(self, problem: Problem, degree: int, chunk: int) -> None:
        width = problem.score_width
        self.item = _item(problem)
        self.moving = problem.spec.mask.kind != "full"
        self.ordered = problem.spec.mask.kind == "ordered"
        self.windows = _windows(problem)
        chunk = min((chunk, *self.windows))
        self.sums = sum(_window_sums(min(w, m), chunk) for w, m in zip(self.windows, problem.lengths, strict=False))
        self.sums = self.sums or problem.order
        self.streams = problem.order * (2 if self.windows else 1)
        self.features = feature_count(width, degree)
        self.highest = feature_count(width - 1, degree)
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


def _chunk(problem: Problem, degree: int, features: int) -> int:
    limit = int(problem.spec.policy.memory_limit)
    needed = 0
    for chunk in CHUNKS:
        if problem.spec.mask.kind != "full" and chunk > RUNNING_CHUNK:
            continue
        needed = max(forward_workspace(problem, degree, chunk), _backward_passes(problem, degree, chunk))
        if needed <= limit:
            return chunk
    raise UnsupportedProblemError(
        f"the polynomial method of degree {degree} needs more memory than the policy allows.",
        code="memory-limit",
        expected=f"at most {limit} bytes of workspace",
        got=f"{needed} bytes: {features} features of {problem.value_width + 1} channels in {problem.order} modes",
        hint="raise policy.memory_limit, lower the degree, or use method Exact().",
    )


def _cost(problem: Problem, degree: int, features: int, chunk: int) -> Cost:
    item, channels = _item(problem), problem.value_width + 1
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
        peak_memory=forward_workspace(problem, degree, chunk),
        largest_intermediate=max(features * min(chunk, max(problem.queries, *problem.lengths, 1)), features * channels),
    )


def exact_flops(problem: Problem) -> int:
    """Return what the exact method would cost: 2 n m1 .. mk (d + e), times the share of tuples that a mask leaves."""
    rows = problem.batch * problem.heads * problem.queries
    flops = 2 * rows * prod(problem.lengths) * (problem.score_width + problem.value_width)
    return round(flops * live_share(problem))


def lowest_error(problem: Problem, coefficients: Coefficients, kind: str) -> float:
    """Return the least error that the certificate can show, relative to the value range; 0 without statistics.

    The sup bound on the measured half-width, or for Taylor of even degree the moment bound with the least moment that
    the measured rms allows, on the least range that it allows. A lower bound up to the mean of the polynomial, for
    which a factor stands.
    """
    statistics = problem.statistics
    if statistics is None:
        return 0.0
    width = min(statistics.half_width, 300.0)
    sup = shift_bound(*ratio_range(coefficients, -width, width))
    degree = len(coefficients) - 1
    if kind != "taylor" or degree % 2:
        return sup
    rms = min(statistics.rms, width)
    return min(sup, taylor_remainder(degree, rms) * rms**degree / MEAN_ALLOWANCE)


def polynomial_degrees(problem: Problem) -> tuple[int, ...]:
    """Return the degrees worth trying for the method's tolerance, lowest first, even ones only for Taylor.

    From the lowest that may meet it by the statistics, while features stay within the budget and the cost within that
    of the exact method, or within a second's work where exact is cheaper still. None if there is no such degree; under
    `on_exceed="warn"` then the highest that is affordable.

    Raises:
        UnsupportedProblemError: Not even the lowest degree fits the memory limit.
    """
    kind, interval = _coefficient_kind(problem)
    method = problem.spec.polynomial
    tolerance = method.tolerance if method is not None and method.tolerance is not None else inf
    step = 2 if kind == "taylor" else 1
    polynomial_plan(problem, step)  # raises if nothing fits the memory limit
    affordable = list(takewhile(lambda degree: _affordable(problem, degree), range(step, HIGHEST_DEGREE + 1, step)))
    promising = tuple(
        degree
        for degree in affordable
        if lowest_error(problem, coefficients_of(kind, degree, interval), kind) <= tolerance
    )
    warns = method is not None and method.on_exceed == "warn"
    return promising or (tuple(affordable[-1:]) if warns else ())


def _affordable(problem: Problem, degree: int) -> bool:
    if feature_count(problem.score_width, degree) > FEATURE_BUDGET:
        return False
    try:
        return polynomial_plan(problem, degree).cost.flops < max(exact_flops(problem), QUICK_FLOPS)
    except UnsupportedProblemError:
        return False
