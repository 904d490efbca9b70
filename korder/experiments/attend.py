"""One `kind = "attend"` run: operands, attention, measured rows, the checks that decide the exit status."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

import korder
from korder import api
from korder.dispatch import rows
from korder.dispatch.arrays import read_operands, to_kernel_layout
from korder.dispatch.registry import default_registry
from korder.dispatch.run import PROGRESS, Request
from korder.errors import AccuracyError, AccuracyWarning, UnsupportedProblemError
from korder.experiments import set_cards
from korder.experiments.data import build_inputs, check_problem, names_in, outline
from korder.experiments.inputs import FloatArray, Inputs
from korder.experiments.machine import matmul_rate, one_blas_thread
from korder.experiments.placement import Placement, place, placement_for, to_numpy
from korder.experiments.progress import Progress
from korder.planning.candidates import candidate_plans
from korder.planning.plan import Plan
from korder.result import Result
from korder.spec import AttentionSpec, Exact
from korder.spec.runs import ArraysData, AttendRun, SetCardsData

_LONG_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that had to hold, and whether it did."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True, slots=True)
class ExactNeed:
    """What the exact method would have needed, by its plan and the rate of a matrix product measured here."""

    plan: Plan
    flop_per_second: float

    @property
    def seconds(self) -> float:
        """At the full rate of a matrix product, exponentials free: less than it would really take."""
        return self.plan.cost.flops / self.flop_per_second


@dataclass(frozen=True, slots=True)
class MeasuredRows:
    """Rows computed exactly as well: positions in the flattened (b, h, n) rows, and the largest error of each."""

    positions: tuple[int, ...]
    errors: FloatArray
    bounds: FloatArray
    seconds: float


@dataclass(slots=True)
class Report:
    """Everything that a run found out."""

    run: AttendRun
    result: Result
    timings: dict[str, float]
    checks: list[Check] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    verdict: set_cards.Verdict | None = None
    exact_need: ExactNeed | None = None
    measured: MeasuredRows | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every check held."""
        return all(check.passed for check in self.checks)

    @property
    def plan(self) -> Plan:
        """The plan that was run."""
        assert self.result.provenance is not None
        return self.result.provenance.plan


def plans_of(run: AttendRun, placement: Placement) -> tuple[Plan, ...]:
    """Return the ranked plans of a run; arrays are made only where the method has to look at them."""
    if not run.attention.measured:
        known, statistics = outline(run), None
    else:
        inputs = build_inputs(run)
        known = inputs.outline()
        with names_in(run):
            statistics = api.measure(inputs.query, inputs.keys, inputs.values, spec=run.attention, **inputs.optional())
    return candidate_plans(replace(check_problem(run, known), device=placement.device, statistics=statistics))


def run_attend(run: AttendRun, progress: Progress | None = None) -> Report:
    """Compute what a run file describes and check it; nothing is written.

    Raises:
        KorderError: Anything wrong with the data, the spec or the machine; `AccuracyError` where a tolerance is missed
            or an output is not finite.
    """
    progress = progress or Progress()
    placement = placement_for(run.backend)  # a name that nothing has is told before any operand is made
    timings: dict[str, float] = {}
    progress.stage("making the operands")
    with _timed(timings, "data_seconds"):
        inputs = place(build_inputs(run), placement)
    progress.stage("attending")
    with _timed(timings, "attend_seconds"), _heard_by(progress), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AccuracyWarning)
        # Rows to be measured are left for later, so that this time is that of the attention alone.
        with names_in(run):
            result = api.attend_result(
                inputs.query,
                inputs.keys,
                inputs.values,
                spec=_without_estimate(run.attention),
                backend=run.backend,
                **inputs.optional(),
            )
    report = Report(run, result, timings)
    _note_warnings(report, caught)
    _check_output(report)
    _note_empty_queries(report)
    if run.attention.polynomial is not None:
        _measure_against_exact(report, inputs, progress)
    if isinstance(run.data, SetCardsData):
        progress.stage("looking for SETs")
        with _timed(timings, "answer_seconds"):
            _answer_set_cards(report, run.data, inputs)
    return report


@contextmanager
def _timed(timings: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    timings[name] = time.perf_counter() - start


@contextmanager
def _heard_by(progress: Progress) -> Iterator[None]:
    """Let a kernel that knows how far it is tell the progress; one that does not leaves the stage without steps."""
    listening = PROGRESS.set(progress.share)
    try:
        yield
    finally:
        PROGRESS.reset(listening)


def _without_estimate(spec: AttentionSpec) -> AttentionSpec:
    if spec.polynomial is None:
        return spec
    return spec.model_copy(update={"method": spec.polynomial.model_copy(update={"estimate_rows": 0})})


def _note_warnings(report: Report, caught: list[warnings.WarningMessage]) -> None:
    for warning in caught:
        if issubclass(warning.category, AccuracyWarning):
            report.warnings.append(str(warning.message))
            report.checks.append(Check("accuracy", False, str(warning.message)))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _note_empty_queries(report: Report) -> None:
    lse = to_numpy(report.result.lse)
    if lse.size and np.isneginf(lse).all():
        report.warnings.append(
            f"{lse.size} of {lse.size} queries see no tuple, so every output is 0: see attention.mask, the lengths of "
            "the modes, key masks and biases"
        )


def _check_output(report: Report) -> None:
    """A NaN in the output is an error unless the data were allowed to hold one."""
    output = to_numpy(report.result.output)
    wrong = ~np.isfinite(output)
    if not wrong.any():
        report.checks.append(Check("finite", True, f"all {output.size} outputs are finite"))
        return
    index = tuple(int(i) for i in np.argwhere(wrong)[0])
    text = f"{int(wrong.any(axis=-1).sum())} of {wrong[..., 0].size} rows are not finite, the first at {index[:-1]}"
    data = report.run.data
    if isinstance(data, ArraysData) and data.allow_nonfinite:
        report.warnings.append(text + " (data.allow_nonfinite = true)")
        return
    raise AccuracyError(
        "the output is not finite.",
        code="output-nonfinite",
        expected="finite outputs from finite operands",
        got=text,
        hint=_overflow_hint(report),
    )


def _overflow_hint(report: Report) -> str:
    lse, dtype = to_numpy(report.result.lse), report.plan.problem.accumulation
    if np.isfinite(lse).all():
        return f"the products of values overflow in {dtype}: scale the values down, or use a wider dtype."
    run = report.run
    keys = [f"attention.scale = {run.attention.scale}"]
    for name in ("score_rms", "score_bound"):
        wanted = getattr(run.data, name, None)
        keys += [f"data.{name} = {wanted:g}"] if wanted is not None else []
    return f"the scores overflow in {dtype}: choose smaller numbers than {' and '.join(keys)}, or a wider dtype."


def _measure_against_exact(report: Report, inputs: Inputs, progress: Progress) -> None:
    spec = report.run.attention
    problem = report.plan.problem
    assert spec.polynomial is not None
    if report.result.certificate is None:
        if spec.polynomial.estimate_rows:
            report.warnings.append("the exact method ran; nothing to estimate")
        return
    try:
        plan = candidate_plans(replace(problem, spec=spec.model_copy(update={"method": Exact()}), statistics=None))[0]
    except UnsupportedProblemError as error:
        report.warnings.append(f"the exact method cannot be planned for this problem: {error.message}")
        return
    progress.stage("measuring this machine")
    report.exact_need = ExactNeed(plan, matmul_rate(problem.accumulation))
    if spec.polynomial.estimate_rows and problem.batch * problem.heads * problem.queries:
        with _timed(report.timings, "measured_rows_seconds"):
            share = min(1.0, spec.polynomial.estimate_rows / (problem.batch * problem.heads * problem.queries))
            if report.exact_need.seconds * share > _LONG_SECONDS:
                progress.note(
                    f"checking {spec.polynomial.estimate_rows} rows against the exact method, at least "
                    f"{report.exact_need.seconds * share:.0f} s"
                )
            report.measured = _measure_rows(report, inputs, spec.polynomial.estimate_rows, progress)
        report.checks.append(_certificate_holds(report.measured))


def _measure_rows(report: Report, inputs: Inputs, count: int, progress: Progress) -> MeasuredRows:
    """Compute a few rows exactly, each on its own, so that the progress is seen."""
    given = read_operands(inputs.query, inputs.keys, inputs.values, **inputs.optional())
    problem = report.plan.problem
    request = Request(problem, to_kernel_layout(given, report.run.attention), given.kind, report.run.backend)
    positions = rows.sampled_rows(problem, count)
    output = to_numpy(report.result.output).reshape(-1, problem.value_width)
    assert report.result.certificate is not None
    bounds = to_numpy(report.result.certificate.bound).reshape(-1)
    progress.stage("computing sampled rows exactly", total=len(positions))

    errors = []
    start = time.perf_counter()
    with one_blas_thread():
        for position in positions:
            exact = to_numpy(rows.exact_rows(default_registry(), request, (position,))[0])
            errors.append(float(np.max(np.abs(output[position].astype(np.float64) - exact))))
            progress.advance()
    seconds = time.perf_counter() - start
    return MeasuredRows(positions, np.asarray(errors), bounds[list(positions)].astype(np.float64), seconds)


def _certificate_holds(measured: MeasuredRows) -> Check:
    held = bool(np.all(measured.errors <= measured.bounds))
    detail = (
        f"largest error {measured.errors.max():.2e} in {len(measured.positions)} rows computed exactly, "
        f"certified {measured.bounds[measured.errors.argmax()]:.2e} for that row"
    )
    return Check("certificate", held, detail)


def _answer_set_cards(report: Report, data: SetCardsData, inputs: Inputs) -> None:
    cards = set_cards.deal(data)
    lse = to_numpy(report.result.lse)
    count = int(max(set_cards.matches(lse).max(), 0)) + 1
    # The method that ran is judged by its lse; only the exact method can name the tuples.
    exact = report.run.attention.model_copy(update={"method": Exact()})
    tuples, _ = korder.top_tuples(inputs.query, inputs.keys, spec=exact, count=count)
    found, truth = set_cards.verdict(lse, to_numpy(tuples)), set_cards.brute_force(cards)
    report.verdict = found
    report.answer += [f"{i + 1:>3}  {set_cards.describe(card)}" for i, card in enumerate(cards)]
    numbered = sorted(tuple(sorted(i + 1 for i in three)) for three in found.sets)
    report.answer.append(
        f"{len(numbered)} SETs: " + ("; ".join(" ".join(map(str, three)) for three in numbered) or "none")
    )
    taking_part = [str(i + 1) for i, inside in enumerate(found.in_a_set) if inside]
    report.answer.append("cards that take part in one: " + (" ".join(taking_part) or "none"))
    wrong_cards = sum(a != b for a, b in zip(found.in_a_set, truth.in_a_set, strict=True))
    report.checks.append(
        Check("cards", wrong_cards == 0, f"{len(cards) - wrong_cards} of {len(cards)} cards decided as by brute force")
    )
    spurious = len(found.sets - truth.sets)
    detail = f"{len(found.sets & truth.sets)} of {len(truth.sets)} SETs found, {spurious} that are none"
    report.checks.append(Check("sets", found.sets == truth.sets, detail))
