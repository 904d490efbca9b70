"""From a problem to a kernel that is ready to run, cached so that a repeated call costs one look-up."""

from __future__ import annotations

import os
from dataclasses import dataclass

from korder.dispatch.registry import Registry
from korder.dispatch.select import Selection, select
from korder.planning.candidates import candidate_plans
from korder.planning.plan import Plan
from korder.problem import Problem
from korder.spi import Kernel


@dataclass(frozen=True, slots=True)
class Prepared:
    """The ranked plans of a problem, the chosen one with its backend, and the compiled kernel."""

    plans: tuple[Plan, ...]
    selection: Selection
    kernel: Kernel


def prepare(
    registry: Registry,
    problem: Problem,
    array_kind: str,
    requested: str = "auto",
    *,
    first: int = 0,
    backward: bool = False,
    state: bool = False,
) -> Prepared:
    """Plan, select and compile, starting at the plan of rank `first`; `backward` and `state` ask for kernels with one.

    Raises:
        UnknownBackendError, BackendUnavailableError, UnsupportedProblemError: As `select`.
    """
    key = (
        problem,
        array_kind,
        requested,
        first,
        backward,
        state,
        os.environ.get("KORDER_BACKEND"),
        registry.generation,
    )
    prepared = registry.prepared.get(key)
    if prepared is None:
        plans = candidate_plans(problem)
        selection = select(
            registry, plans[first:], array_kind=array_kind, requested=requested, backward=backward, state=state
        )
        prepared = Prepared(plans, selection, selection.backend.compile(selection.plan))
        registry.prepared.put(key, prepared)
    return prepared
