"""Every check in the order of its number, and the items that a backend's claims make of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from korder.conformance import (
    checks_call,
    checks_contract,
    checks_edge,
    checks_gradient,
    checks_polynomial,
    checks_pruned,
    checks_relation,
    checks_state,
    checks_value,
)
from korder.conformance.arrays import ArrayKind, FromArray, ToArray
from korder.conformance.cases import Case
from korder.conformance.claims import Claims
from korder.conformance.records import Check
from korder.conformance.subject import Subject
from korder.spi import Backend

CHECKS: tuple[Check, ...] = (
    *checks_contract.CHECKS,
    *checks_call.CHECKS,
    *checks_value.CHECKS,
    *checks_relation.CHECKS,
    *checks_gradient.CHECKS,
    *checks_polynomial.CHECKS,
    *checks_state.CHECKS,
    *checks_pruned.CHECKS,
    *checks_edge.CHECKS,
)
DEPTHS = ("quick", "full")


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """A check of one subject in one case, by an id that no other item of a run has."""

    id: str
    check: Check
    subject: Subject
    case: Case | None

    def run(self) -> None:
        """Run the check; raises whatever it raises."""
        self.check.run(self.subject, self.case)


def subjects(
    backend: Backend,
    depth: str,
    *,
    to_array: ToArray | None = None,
    from_array: FromArray | None = None,
) -> tuple[Subject, ...]:
    """Return a subject for every array kind on every claimed device.

    Args:
        backend: The backend; its methods `to_array` and `from_array`, if it has them, come before the kind's usual way.
        depth: Of `DEPTHS`.
        to_array: Makes arrays of its kind from numpy's: (array, dtype name, device).
        from_array: Reads them back.
    """
    facts = backend.capabilities()
    write: Any = to_array or getattr(backend, "to_array", None)
    read: Any = from_array or getattr(backend, "from_array", None)
    return tuple(
        Subject(backend, Claims(facts, device, full=depth == "full"), ArrayKind(kind, device, write, read))
        for kind in sorted(backend.array_kinds)
        for device in sorted(facts.devices) or ("cpu",)
    )


def items(places: tuple[Subject, ...], checks: tuple[Check, ...] = CHECKS) -> Iterator[Item]:
    """Yield every item; what needs no arrays is looked at once, not for every array kind and device."""
    taken: dict[str, int] = {}
    for check in checks:
        for subject in places[:1] if check.static else places:
            label = f", {subject.arrays.kind}" if len({place.arrays.kind for place in places}) > 1 else ""
            for case in check.cases(subject.claims):
                name = check.id if case is None else f"{check.id}[{case.name}{label}]"
                taken[name] = taken.get(name, 0) + 1
                if taken[name] == 1:
                    yield Item(name, check, subject, case)
