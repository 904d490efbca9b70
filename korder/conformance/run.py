"""Runs the kit on a backend, in this process or shared out between several."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

from korder import __version__
from korder.conformance.arrays import FromArray, ToArray
from korder.conformance.attempts import Found, Reasons, ask, collect, finish
from korder.conformance.records import KIT_VERSION, Ending, Report
from korder.conformance.workers import Request, check_workers, shared_endings
from korder.spi import Backend


def run_conformance(
    backend: Backend,
    *,
    depth: str = "quick",
    expected_failures: Reasons | None = None,
    only: str | None = None,
    to_array: ToArray | None = None,
    from_array: FromArray | None = None,
    on_item: Callable[[Ending], None] | None = None,
    workers: int = 1,
) -> Report:
    """Run every check on what a backend claims, and return the report.

    Args:
        backend: The backend.
        depth: "quick", or "full" for every claimed combination.
        expected_failures: Ids of items, or of checks, which stand for all of their items, with the reason why they
            fail. One that passes is a failure.
        only: Pattern of the ids to run, for example "value.*", or a level, "core" or "claimed".
        to_array: Makes arrays of the backend's kind: (numpy array, dtype name, device).
        from_array: Reads them back into numpy.
        on_item: Told every ending as it comes.
        workers: Processes that share the items; above 1 the backend must be registered. `seconds` of an item is then
            time beside the others.

    Raises:
        SpecError: An unknown depth, an expected failure that is no item of this backend, or workers that could
            not find it.

    Example:
        >>> from korder.dispatch.registry import default_registry
        >>> run_conformance(default_registry().get("numpy"), only="contract.name").failed
        ()
    """
    check_workers(backend, workers, to_array is not None or from_array is not None)
    started = time.perf_counter()
    found = collect(backend, depth, expected_failures, only=only, to_array=to_array, from_array=from_array)
    if workers == 1:
        endings = _endings(backend, found, on_item)
    else:
        request = Request(backend.name, depth, dict(expected_failures or {}), only)
        endings = shared_endings(found, request, workers, on_item)
    return Report(
        backend=backend.name,
        kit_version=KIT_VERSION,
        korder_version=__version__,
        depth=depth,
        places=tuple(dict.fromkeys(f"{item.subject.arrays.kind} on {item.subject.arrays.device}" for item, _ in found)),
        machine=f"{platform.machine()} {platform.system()}, python {platform.python_version()}",
        seconds=time.perf_counter() - started,
        endings=endings,
    )


def _endings(backend: Backend, found: Found, on_item: Callable[[Ending], None] | None) -> tuple[Ending, ...]:
    answer = ask(backend)
    endings = []
    for item, reason in found:
        endings.append(finish(item, answer, reason))
        if on_item is not None:
            on_item(endings[-1])
    return tuple(endings)
