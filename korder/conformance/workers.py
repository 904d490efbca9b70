"""The items of a run shared out between processes, each with its part of the cores."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import ClassVar

from korder.conformance.attempts import Found, ask, collect, finish
from korder.conformance.levels import Item
from korder.conformance.records import Ending
from korder.errors import SpecError
from korder.spi import Backend

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_SHARES = 24
"""Shares a worker takes: small enough that none waits long for the last."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker needs to make the items that its parent made."""

    backend: str
    depth: str
    expected_failures: dict[str, str]
    only: str | None


class _Worker:
    """The items of this process, made once."""

    found: ClassVar[Found] = []


def check_workers(backend: Backend, workers: int, own_arrays: bool) -> None:
    """Raise where the work cannot be shared out.

    Raises:
        SpecError: No whole number of workers from 1, a backend that no other process would find, or conversions that
            cannot be sent.
    """
    from korder.dispatch.registry import default_registry

    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise SpecError("the number of workers is wrong.", expected="a whole number from 1", got=repr(workers))
    if workers == 1:
        return
    if own_arrays or not any(known is backend for known in default_registry().ordered()):
        raise SpecError(
            "these checks cannot be shared out between processes.",
            code="workers-backend",
            expected="a backend that is registered by an entry point, and its own conversions of arrays",
            got=f"{workers} workers for a {type(backend).__name__} of this process",
            hint="leave workers at 1",
        )


def shared_endings(
    found: Found, request: Request, workers: int, on_item: Callable[[Ending], None] | None
) -> tuple[Ending, ...]:
    """Run items in several processes; return their endings in the order of the items."""
    endings: dict[int, Ending] = {}
    with (
        _one_part_of_the_cores(workers),
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start, initargs=(request,)) as pool,
    ):
        for future in as_completed([pool.submit(_run, share) for share in _shares(found, workers)]):
            try:
                done = future.result()
            except BrokenProcessPool:
                continue
            endings |= done
            if on_item is not None:
                for ending in done.values():
                    on_item(ending)
    return tuple(endings.get(i) or _lost(item) for i, (item, _) in enumerate(found))


def _shares(found: Found, workers: int) -> Iterator[list[int]]:
    """Yield the numbers of items that run together: those of a case in one process, which keeps its results."""
    cases: dict[str, list[int]] = {}
    for i, (item, _) in enumerate(found):
        cases.setdefault(item.id if item.case is None else item.case.name, []).append(i)
    size = max(1, len(found) // (workers * _SHARES))
    share: list[int] = []
    for numbers in cases.values():
        share += numbers
        if len(share) >= size:
            yield share
            share = []
    if share:
        yield share


def _start(request: Request) -> None:
    from korder.dispatch.registry import default_registry

    backend = default_registry().get(request.backend)
    _Worker.found = collect(backend, request.depth, request.expected_failures, only=request.only)


def _run(share: list[int]) -> dict[int, Ending]:
    backend = _Worker.found[share[0]][0].subject.backend
    answer = ask(backend)
    return {i: finish(_Worker.found[i][0], answer, _Worker.found[i][1]) for i in sorted(share)}


def _lost(item: Item) -> Ending:
    message = "the process that was to run it ended before: a crash of native code, or killed; run it with one worker"
    return Ending(item.id, item.check.number, item.check.level, "failed", message=message, static=item.check.static)


@contextmanager
def _one_part_of_the_cores(workers: int) -> Iterator[None]:
    """Give the libraries of a worker as many threads as it has cores, unless the environment says how many."""
    threads = str(max(1, len(os.sched_getaffinity(0)) // workers)) if hasattr(os, "sched_getaffinity") else "1"
    unset = [name for name in _THREADS if name not in os.environ]
    os.environ |= dict.fromkeys(unset, threads)
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]
