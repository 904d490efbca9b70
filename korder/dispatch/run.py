"""Runs a prepared kernel, certifies its result, and goes up in degree until a tolerance is met."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from korder.dispatch.arrays import on_host
from korder.dispatch.prepare import Prepared, prepare
from korder.dispatch.registry import Registry
from korder.dispatch.select import Rejection
from korder.errors import AccuracyError, AccuracyWarning, KernelError
from korder.planning.plan import Plan
from korder.problem import Problem
from korder.result import Certificate, Provenance
from korder.spec import Polynomial
from korder.spi.operands import KernelOutput, Operands
from korder.spi.progress import PROGRESS

NARROW_MISS = 1.5
"""Times the tolerance up to which what a pruned polynomial leaves out may be the reason that it is missed."""

if TYPE_CHECKING:
    from korder.methods.tolerances import ToleranceCheck

__all__ = ["PROGRESS", "Outcome", "Request", "run"]


@dataclass(frozen=True, slots=True)
class Request:
    """One call, ready to run: the problem, its operands in the kernel layout, and who was asked for."""

    problem: Problem
    operands: Operands
    array_kind: str
    backend: str = "auto"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a request came to; `prepared` holds the kernel that its backward goes through."""

    output: KernelOutput
    certificate: Certificate | None
    provenance: Provenance
    prepared: Prepared


Forward = Callable[[Prepared, Request, bool], KernelOutput]
"""Calls a prepared kernel's forward on a request's operands; the last argument is whether to save for a backward."""


def call_kernel(prepared: Prepared, request: Request, save: bool) -> KernelOutput:
    """Call the kernel itself."""
    output: object = prepared.kernel.forward(request.operands, save=save)
    if isinstance(output, KernelOutput):
        return output
    raise KernelError(
        f"the kernel of backend {prepared.selection.backend.name!r} returned no output.",
        expected="a korder.spi.KernelOutput from forward",
        got=f"{output!r} of type {type(output).__name__}",
    )


def run(
    registry: Registry, request: Request, *, save: bool = False, certify: bool = False, forward: Forward = call_kernel
) -> Outcome:
    """Run a request, by the first plan whose certificate meets the tolerance.

    Args:
        registry: The backends to choose from.
        request: What to run.
        save: Whether backward will be called on the output.
        certify: Whether to certify even without a tolerance.
        forward: How a kernel is called; a framework that records its calls has a way of its own.

    Raises:
        AccuracyError: No plan meets the tolerance and the method says to raise.
    """
    notes: list[str] = []
    rejected: list[Rejection] = []
    best: _Attempt | None = None
    first = 0
    while True:
        prepared = prepare(registry, request.problem, request.array_kind, request.backend, first=first, backward=save)
        rejected += prepared.selection.rejected
        try:
            attempt = _attempt(request, prepared, forward(prepared, request, save), certify=certify)
        except AccuracyError as error:  # a normaliser that is not positive: unusable, unless another plan is left
            first += prepared.selection.rank + 1
            if first >= len(prepared.plans):
                if best is None:
                    raise
                break
            notes.append(f"{prepared.selection.plan.name}: {error.message} next {prepared.plans[first].name}")
            continue
        best = attempt if best is None or attempt.ratio < best.ratio else best
        first = _next_plan(prepared, first, attempt)
        if attempt.met or first >= len(prepared.plans):
            break
        notes.append(f"{attempt.plan.name}: {attempt.check}; next {prepared.plans[first].name}")
    if not best.met:
        _exceeded(request.problem, best)
    selection = best.prepared.selection
    provenance = Provenance(selection.backend.name, selection.plan, tuple(rejected), tuple(notes))
    return Outcome(best.output, best.certificate, provenance, best.prepared)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One plan's result, and how it stands against the tolerance; `check` is None where there is none to meet."""

    prepared: Prepared
    output: KernelOutput
    certificate: Certificate | None
    check: ToleranceCheck | None

    @property
    def plan(self) -> Plan:
        return self.prepared.selection.plan

    @property
    def met(self) -> bool:
        return self.check is None or self.check.met

    @property
    def ratio(self) -> float:
        return 0.0 if self.check is None else self.check.ratio


def _next_plan(prepared: Prepared, first: int, attempt: _Attempt) -> int:
    """Return the rank of the plan to try next.

    No degree is tried again but with all monomials, where the share of those that were left out may have been too much.
    Higher degrees are passed over where rounding alone misses; the best that can be had, for a warning, is where
    rounding is the larger part.
    """
    following = first + prepared.selection.rank + 1
    check, method = attempt.check, attempt.plan.problem.spec.polynomial
    warns = method is not None and method.on_exceed == "warn"
    if check is not None and check.rounding_alone and (check.part == "rounding" or not warns):
        while following < len(prepared.plans) and prepared.plans[following].polynomial is not None:
            following += 1
    while following < len(prepared.plans) and _is_hopeless(prepared.plans[following], attempt):
        following += 1
    return following


def _is_hopeless(plan: Plan, attempt: _Attempt) -> bool:
    """Whether a plan will miss as well, because the attempt did."""
    tried = attempt.plan.polynomial
    if plan.polynomial is None or tried is None or attempt.check is None:
        return False
    if plan.polynomial.degree != tried.degree:
        return plan.polynomial.degree < tried.degree
    return plan.polynomial.pruning is not None or tried.pruning is None or attempt.check.ratio > NARROW_MISS


def _attempt(request: Request, prepared: Prepared, output: KernelOutput, *, certify: bool) -> _Attempt:
    """Certify the result of one plan if that is due, and check it against the tolerance."""
    plan = prepared.selection.plan
    method = request.problem.spec.polynomial
    if plan.method == "exact" or method is None or (method.tolerance is None and not certify):
        return _Attempt(prepared, output, None, None)
    from korder.methods import certificates

    unit = getattr(prepared.kernel, "rounding_unit", None)
    if output.normaliser is None or output.moments is None or output.magnitude is None or unit is None:
        raise KernelError(
            f"backend {prepared.selection.backend.name!r} returned nothing to certify its result with.",
            expected="normaliser, moments and magnitude in the kernel output, and kernel.rounding_unit",
            got="at least one of them missing",
        )
    xp, (operands, found) = on_host(request.array_kind, request.operands, output)
    certificate = certificates.certify(xp, plan, operands, found, rounding_unit=unit)
    check = None
    if method.tolerance is not None:
        check = certificates.meets_tolerance(xp, certificate, operands, method.tolerance)
    return _Attempt(prepared, output, certificate, check)


def _exceeded(problem: Problem, best: _Attempt) -> None:
    """Raise or warn: no plan met the tolerance."""
    method = problem.spec.method
    assert isinstance(method, Polynomial)
    assert best.check is not None
    if method.on_exceed == "warn":
        text = f"the polynomial method misses its tolerance: {best.plan.name}: {best.check}"
        warnings.warn(text, AccuracyWarning, stacklevel=4)
        return
    statistics = problem.statistics
    width = f"; the scores reach {statistics.half_width:g} from their row's centre" if statistics else ""
    raise AccuracyError(
        f"no degree of the polynomial method that is worth its cost meets tolerance {method.tolerance:g}.",
        expected=f"approximation and rounding within {method.tolerance:g} of the value range",
        got=f"{best.plan.name}: {best.check}{width}",
        hint=accuracy_hint(problem, best.check),
    )


def accuracy_hint(problem: Problem, check: ToleranceCheck) -> str:
    """Return what to do about a tolerance that was missed."""
    hint = 'use method Exact(), on_exceed="exact", a smaller scale, or a larger tolerance.'
    if check.rounding_alone:
        return f'rounding in {problem.accumulation} alone misses it: use policy precision="float64", or ' + hint[4:]
    return hint
