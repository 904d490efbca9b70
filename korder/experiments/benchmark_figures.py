"""What every row of the benchmark is made with: settings, a measured figure, turns of timing, ceilings, and texts."""

from __future__ import annotations

import functools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from math import log
from typing import Any, TypeVar

import numpy as np

from korder.experiments.benchmark_cases import Case
from korder.experiments.machine import usable_cores

T = TypeVar("T")
CEILING_SIZE = 2048
CEILING_FLOPS = 2.0 * CEILING_SIZE**3


@dataclass(frozen=True, slots=True)
class Settings:
    """How thorough to be, and who is measured."""

    quick: bool
    repeats: int
    backend: str


@dataclass(frozen=True, slots=True)
class Point:
    """What a roofline shows of a timing: flop for each byte that has to move, and flop per second."""

    name: str
    dtype: str
    intensity: float
    rate: float


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure: what it is, what it should be, and whether it is; `met` is None where that was not judged."""

    text: str
    target: str
    met: bool | None
    detail: str
    values: dict[str, float] = field(default_factory=dict)
    points: tuple[Point, ...] = ()


def median_seconds(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Return the median time of each work over `repeats` rounds, after one that is not counted.

    The works take turns, so that a machine whose speed drifts slows them alike.
    """
    for work in works:
        work()
    rounds = [[_seconds(work) for work in works] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _seconds(work: Callable[[], object]) -> float:
    _settle()
    start = time.perf_counter()
    work()
    _settle()
    return time.perf_counter() - start


def _settle() -> None:
    """Wait for what a GPU still has to do; its calls return before their work is done."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def numpy_product() -> Callable[[], object]:
    """Return NumPy's matrix product of CEILING_FLOPS, to be timed."""
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((CEILING_SIZE, CEILING_SIZE), dtype=np.float32) for _ in range(2))
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out)


def measured_slope(sizes: Sequence[int], times: list[float], target: float, name: str) -> Measured:
    """Return the exponent of the time in n."""
    slope = float(np.polyfit([log(n) for n in sizes], [log(t) for t in times], 1)[0])
    shown = ", ".join(f"{n}: {time_text(t)}" for n, t in zip(sizes, times, strict=True))
    values = {"slope": slope, **{f"seconds_{n}": t for n, t in zip(sizes, times, strict=True)}}
    return Measured(f"n^{slope:.2f}", f"<= n^{target:g}", slope <= target, f"{name}, d = e = 64; {shown}", values)


def run_python(program: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run a program in a process of its own, with more in its environment if given, and return what it prints."""
    command = [sys.executable, "-c", program, *arguments]
    variables = os.environ | (environment or {})
    return subprocess.run(command, check=True, capture_output=True, text=True, env=variables).stdout


def on_all_cores(measure: Callable[[Settings], T]) -> Callable[[Settings], T]:
    """Return what is measured on all usable cores by PyTorch too, where it is installed."""

    @functools.wraps(measure)
    def measured(settings: Settings) -> T:
        if find_spec("torch") is None:
            return measure(settings)
        torch: Any = import_module("torch")
        before = torch.get_num_threads()
        torch.set_num_threads(usable_cores())
        try:
            return measure(settings)
        finally:
            torch.set_num_threads(before)

    return measured


def case_text(case: Case) -> str:
    """Return who runs what, and how large it is."""
    problem = case.plan.problem
    method = case.plan.method if case.plan.polynomial is None else f"degree {case.plan.polynomial.degree}"
    backend = case.prepared.selection.backend.name
    return f"{backend}, {method}, order {problem.order}, n = {problem.queries}, d = e = {problem.query_width}"


def time_text(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def mib_text(size: float) -> str:
    """Return a size in MiB."""
    return f"{size / 2**20:.1f} MiB"
