"""By how much a piece of work makes this process grow; for programs that the benchmark starts to measure one thing.

On Linux the peak is read from /proc and not from getrusage, whose figure a process inherits from the one that
started it: a small program under a large parent would never seem to grow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
RETURNS_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Environment in which glibc keeps no large block that was freed, so that growth is what was asked for at one time."""
_PROCESS = Path("/proc/self")


def with_growth(work: Callable[[], T]) -> tuple[T, int]:
    """Return what `work` returns, and the bytes by which resident memory peaked above where it stood.

    Numerics: memory that the process had freed and kept is used again uncounted; on macOS an earlier, higher peak
        hides growth.
    """
    with suppress(OSError):  # where this is not allowed the peak since the start counts, which is no less
        (_PROCESS / "clear_refs").write_text("5")
    before = _resident("VmRSS")
    result = work()
    return result, _resident("VmHWM") - before


def peak_resident() -> int:
    """Return the most resident memory that this process ever had, in bytes."""
    return _resident("VmHWM")


def _resident(field: str) -> int:
    """Bytes of a field of the process's status; elsewhere than on Linux, of its peak."""
    if sys.platform == "linux":
        lines = (_PROCESS / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    from importlib import import_module

    resource: Any = import_module("resource")
    peak = int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return peak if sys.platform == "darwin" else peak * 1024
