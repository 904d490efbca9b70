"""The records of the kit: a check with its numbered behaviour, an item (a check on one case), and how an item ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from korder.conformance.cases import Case
    from korder.conformance.claims import Claims
    from korder.conformance.subject import Subject

KIT_VERSION = "1.2"
"""Version of the numbered behaviours; a report names it."""

LEVELS = ("core", "claimed")
"""Core is asked of every backend; the rest of what it claims to do."""
STATUSES = ("passed", "failed", "expected", "unverified", "refused")


class UnverifiedError(Exception):
    """What is claimed cannot be looked at here: no such device, or nothing to measure with."""


class RefusedError(Exception):
    """What is not claimed was refused with reasons, as it must be."""


def no_case(claims: Claims) -> Iterable[Case | None]:
    """Return the one item of a check that needs no case."""
    return (None,)


@dataclass(frozen=True, slots=True)
class Check:
    """One numbered behaviour and the function that checks it.

    Args:
        number: Number in docs/backends/conformance.md.
        id: Dotted name.
        behaviour: The sentence that the docs print.
        run: Raises `ConformanceFailure` where a subject does not behave so in a case.
        cases: The cases that claims give rise to; None stands for a check without arrays.
        level: Of `LEVELS`.
        static: Whether it can be checked where the backend cannot run.
    """

    number: str
    id: str
    behaviour: str
    run: Callable[[Subject, Any], None]
    cases: Callable[[Claims], Iterable[Case | None]] = no_case
    level: str = "claimed"
    static: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """How one item ended.

    Args:
        id: The check's id, with the case in brackets.
        number: Number of the behaviour.
        level: Of `LEVELS`.
        status: Of `STATUSES`.
        seconds: Time that it took.
        message: Why it is not simply passed.
        static: Whether it looked at what the backend says, and not at a kernel.
    """

    id: str
    number: str
    level: str
    status: str
    seconds: float = 0.0
    message: str = ""
    static: bool = False


@dataclass(frozen=True, slots=True)
class Report:
    """What the kit found about a backend.

    Args:
        backend: Its name.
        kit_version: Version of the behaviours.
        korder_version: Version of korder.
        depth: "quick" or "full".
        places: Array kinds and devices that were asked for.
        machine: The machine, in words.
        seconds: Time of the whole run.
        endings: One per item.
    """

    backend: str
    kit_version: str
    korder_version: str
    depth: str
    places: tuple[str, ...]
    machine: str
    seconds: float
    endings: tuple[Ending, ...] = field(default=())

    @property
    def failed(self) -> tuple[Ending, ...]:
        """The items that failed."""
        return tuple(ending for ending in self.endings if ending.status == "failed")

    @property
    def verified(self) -> bool:
        """Whether a kernel was looked at, where any was to be."""
        kernels = [ending.status for ending in self.endings if not ending.static]
        return not kernels or any(status != "unverified" for status in kernels)

    def counts(self) -> dict[str, dict[str, int]]:
        """Return how many items of each level ended in each status."""
        return {
            level: {
                status: sum(ending.level == level and ending.status == status for ending in self.endings)
                for status in STATUSES
            }
            for level in LEVELS
        }
