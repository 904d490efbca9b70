"""Picks who runs: plans in rank order, backends in priority order, the first fit; every refusal keeps its reasons."""

from __future__ import annotations

import os
from dataclasses import dataclass

from korder.dispatch.registry import Registry
from korder.errors import BackendUnavailableError, OperandError, SpecError, UnsupportedProblemError
from korder.planning.plan import Plan
from korder.spi import Backend
from korder.spi.capabilities import Reason

_EXTRAS = {
    "torch": "the torch backend takes tensors: pip install 'korder[torch]'; or pass tensor.numpy()",
    "jax": "a JAX backend is a plugin of its own; or pass numpy.asarray(array)",
}


@dataclass(frozen=True, slots=True)
class Rejection:
    """A backend that was turned down for a plan, with all its reasons."""

    backend: str
    priority: int
    plan: str
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.backend} (priority {self.priority}, {self.plan}): {'; '.join(self.reasons)}"


@dataclass(frozen=True, slots=True)
class Selection:
    """Who runs which plan, the position of that plan among the ranked ones, and who was turned down."""

    backend: Backend
    plan: Plan
    rank: int
    rejected: tuple[Rejection, ...]


def select(
    registry: Registry,
    plans: tuple[Plan, ...],
    *,
    array_kind: str,
    requested: str = "auto",
    backward: bool = False,
    state: bool = False,
) -> Selection:
    """Return the first (plan, backend) that fits.

    Args:
        registry: The backends to choose from.
        plans: Ranked plans of one problem.
        array_kind: Kind of the operands, "numpy", "torch", ...
        requested: A backend name, which is then the only one considered, or "auto".
        backward: Whether the kernel's backward will be called.
        state: Whether the kernel's states will be asked for.

    Raises:
        UnknownBackendError: `requested`, `KORDER_BACKEND` or the policy names a backend that does not exist.
        BackendUnavailableError: The requested backend cannot run here.
        UnsupportedProblemError: Nothing fits; the message lists every backend with all its reasons.
    """
    problem = plans[0].problem
    allowed = problem.spec.policy.backends
    named = requested if requested != "auto" else os.environ.get("KORDER_BACKEND") or "auto"
    candidates = _candidates(registry, named, allowed)
    rejected: list[Rejection] = []
    for rank, plan in enumerate(plans):
        for backend in candidates:
            reasons = _reasons(registry, backend, plan, array_kind, (backward, state))
            if not reasons:
                return Selection(backend, plan, rank, tuple(rejected))
            rejected.append(Rejection(backend.name, backend.priority, plan.name, reasons))
    if named != "auto":
        _refuse_named(registry, candidates[0], array_kind)
    raise _nothing_fits(plans[0], array_kind, rejected)


def _candidates(registry: Registry, named: str, allowed: tuple[str, ...] | None) -> tuple[Backend, ...]:
    for name in allowed or ():
        registry.get(name)
    if named == "auto":
        return tuple(b for b in registry.ordered() if allowed is None or b.name in allowed)
    if allowed is not None and named not in allowed:
        raise SpecError(
            f"backend {named!r} is not among those that the policy allows.",
            code="backend-not-allowed",
            expected=f"one of {', '.join(allowed)} (policy.backends)",
            got=repr(named),
        )
    return (registry.get(named),)


def _reasons(
    registry: Registry, backend: Backend, plan: Plan, array_kind: str, wanted: tuple[bool, bool]
) -> tuple[str, ...]:
    """All reasons against a backend; availability is not asked of one that does not take these arrays."""
    if array_kind not in backend.array_kinds:
        return (str(Reason("array kind", array_kind, ", ".join(sorted(backend.array_kinds)))),)
    reasons = _refusals(backend, plan, *wanted)
    answer = registry.availability(backend)
    if not answer.available:
        reasons.insert(0, f"not available: {answer.reason}" + (f"; {answer.remedy}" if answer.remedy else ""))
    return tuple(reasons)


def _refusals(backend: Backend, plan: Plan, backward: bool, state: bool) -> list[str]:
    """All static reasons against a backend; one that cannot be asked about a plan is not asked to run it."""
    try:
        reasons = [str(reason) for reason in backend.unsupported_reasons(plan)]
        support = backend.capabilities().method(plan.method)
    except Exception as error:
        return [f"raised when it was asked about this plan: {type(error).__name__}: {error}"]
    if backward and support is not None and not support.backward:
        reasons.append(str(Reason("pass", "backward", f"forward with method={plan.method}")))
    if state and support is not None and not support.state:
        reasons.append(str(Reason("pass", "decode", f"forward with method={plan.method}")))
    return reasons


def _refuse_named(registry: Registry, backend: Backend, array_kind: str) -> None:
    if array_kind not in backend.array_kinds:
        raise OperandError(
            f"backend {backend.name!r} does not take {array_kind} arrays.",
            code="array-kind-unsupported",
            expected=f"{', '.join(sorted(backend.array_kinds))} arrays",
            got=f"{array_kind} arrays",
            hint=_EXTRAS.get(array_kind),
        )
    answer = registry.availability(backend)
    if not answer.available:
        raise BackendUnavailableError(
            f"backend {backend.name!r} cannot run here.", got=answer.reason, hint=answer.remedy or None
        )


def _nothing_fits(plan: Plan, array_kind: str, rejected: list[Rejection]) -> UnsupportedProblemError:
    lines = "".join(f"\n  {rejection}" for rejection in dict.fromkeys(map(str, rejected)))
    return UnsupportedProblemError(
        f"no backend can run {plan.problem.describe()}, {array_kind} arrays.{lines or ' None is installed.'}",
        hint=_EXTRAS.get(array_kind, "`korder backends` shows what each backend can do."),
    )
