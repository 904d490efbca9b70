"""Runs a prepared kernel, certifies its result, and goes up in degree until a tolerance is met."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from korder.dispatch.arrays import namespace_of_kind
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


def run(registry: Registry, request: Request, *, save: bool = False, certify: bool = False) -> Outcome:
    """Run a request, by the first plan whose certificate meets the tolerance.

    Args:
        registry: The backends to choose from.
        request: What to run.
        save: Whether backward will be called on the output.
        certify: Whether to certify even without a tolerance.

    Raises:
        AccuracyError: No plan meets the tolerance and the method says to raise.
    """
    notes: list[str] = []
    rejected: list[Rejection] = []
    first = 0
    while True:
        prepared = prepare(registry, request.problem, request.array_kind, request.backend, first=first, backward=save)
        chosen = prepared.selection
        rejected += chosen.rejected
        output = prepared.kernel.forward(request.operands, save=save)
        certificate, miss = _judge(request, prepared, output, certify)
        first += chosen.rank + 1
        if miss is None or first >= len(prepared.plans):
            break
        notes.append(f"{chosen.plan.name}: {miss}; next {prepared.plans[first].name}")
    if miss is not None:
        _exceeded(request.problem, chosen.plan, miss)
    provenance = Provenance(chosen.backend.name, chosen.plan, tuple(rejected), tuple(notes))
    return Outcome(output, certificate, provenance, prepared)


def _judge(
    request: Request, prepared: Prepared, output: KernelOutput, certify: bool
) -> tuple[Certificate | None, str | None]:
    """Return the certificate, if one is due, and by how much it misses the tolerance, if it does."""
    plan = prepared.selection.plan
    method = request.problem.spec.polynomial
    if plan.method == "exact" or method is None or (method.tolerance is None and not certify):
        return None, None
    from korder.methods import certificates

    unit = getattr(prepared.kernel, "rounding_unit", None)
    if output.normaliser is None or output.moments is None or output.magnitude is None or unit is None:
        raise KernelError(
            f"backend {prepared.selection.backend.name!r} returned nothing to certify its result with.",
            expected="normaliser, moments and magnitude in the kernel output, and kernel.rounding_unit",
            got="at least one of them missing",
        )
    xp = namespace_of_kind(request.array_kind)
    certificate = certificates.certify(xp, plan, request.operands, output, rounding_unit=unit)
    if method.tolerance is None:
        return certificate, None
    return certificate, certificates.tolerance_miss(xp, certificate, request.operands, method.tolerance)


def _exceeded(problem: Problem, plan: Plan, miss: str) -> None:
    """Raise or warn: the last plan missed the tolerance."""
    method = problem.spec.method
    assert isinstance(method, Polynomial)
    if method.on_exceed == "warn":
        warnings.warn(f"the polynomial method misses its tolerance: {plan.name}: {miss}", AccuracyWarning, stacklevel=4)
        return
    statistics = problem.statistics
    width = f"; the scores reach {statistics.half_width:g} from their row's centre" if statistics else ""
    raise AccuracyError(
        f"no degree of the polynomial method that is worth its cost meets tolerance {method.tolerance:g}.",
        expected=f"approximation and rounding within {method.tolerance:g} of the value range",
        got=f"{plan.name}: {miss}{width}",
        hint='use method Exact(), on_exceed="exact", a smaller scale, or a larger tolerance.',
    )
