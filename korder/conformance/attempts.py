"""The items of a backend, and how each ends: in one status, and what a check raises never stops the others."""

from __future__ import annotations

import time
from collections.abc import Mapping
from fnmatch import fnmatchcase

from korder.conformance.arrays import FromArray, ToArray
from korder.conformance.levels import CHECKS, DEPTHS, Item, items, subjects
from korder.conformance.records import Check, Ending, RefusedError, UnverifiedError
from korder.errors import ConformanceFailure, SpecError
from korder.spi import Availability, Backend

Reasons = Mapping[str, str]
Found = list[tuple[Item, str | None]]
"""Items, each with the reason why it is expected to fail, None where it is not."""


def collect(
    backend: Backend,
    depth: str,
    expected_failures: Reasons | None,
    *,
    only: str | None = None,
    checks: tuple[Check, ...] = CHECKS,
    to_array: ToArray | None = None,
    from_array: FromArray | None = None,
) -> Found:
    """Return the items of a backend that a run asks for.

    Raises:
        SpecError: As `run_conformance`.
    """
    if depth not in DEPTHS:
        raise SpecError("unknown depth of the conformance kit.", expected=" or ".join(DEPTHS), got=repr(depth))
    expected = dict(expected_failures or {})
    places = subjects(backend, depth, to_array=to_array, from_array=from_array)
    found = [(item, expected.get(item.id, expected.get(item.check.id))) for item in items(places, checks)]
    known = {item.id for item, _ in found} | {item.check.id for item, _ in found}
    unknown = sorted(set(expected) - known)
    if unknown:
        raise SpecError(
            "an expected failure is none of the checks of this backend.",
            code="expected-failure-unknown",
            expected="ids as the report prints them, or ids of checks",
            got=", ".join(unknown),
        )
    silent = sorted(name for name, reason in expected.items() if not reason)
    if silent:
        raise SpecError("an expected failure needs its reason.", expected="a reason", got=f"none for {silent[0]!r}")
    return [pair for pair in found if only is None or _chosen(pair[0], only)]


def _chosen(item: Item, only: str) -> bool:
    return only == item.check.level or fnmatchcase(item.check.id, only) or item.id == only


def ask(backend: Backend) -> Availability:
    """Return what a backend says of its availability; one that raises is not available."""
    try:
        return backend.availability()
    except Exception as error:
        return Availability.no(f"availability() raised {type(error).__name__}: {error}")


def attempt(item: Item, answer: Availability) -> tuple[str, str]:
    """Return the status of an item, as if nothing were expected of it, and the message."""
    try:
        if not item.check.static and not answer.available:
            raise UnverifiedError(f"not available: {answer.reason}")
        item.run()
    except UnverifiedError as reason:
        return "unverified", str(reason)
    except RefusedError as reason:
        return "refused", str(reason)
    except ConformanceFailure as failure:
        return "failed", str(failure)
    except Exception as error:  # a kernel that raises fails its check, and no other
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""


def finish(item: Item, answer: Availability, reason: str | None = None) -> Ending:
    """Run one item; a reason makes its failure expected, and its passing a failure."""
    started = time.perf_counter()
    status, message = attempt(item, answer)
    if reason is not None and status == "failed":
        status, message = "expected", f"{reason} ({message.splitlines()[0]})"
    elif reason is not None and status in ("passed", "refused"):
        status, message = "failed", f"passes, but was expected to fail: {reason}"
    seconds = time.perf_counter() - started
    check = item.check
    return Ending(item.id, check.number, check.level, status, seconds, message, check.static)
