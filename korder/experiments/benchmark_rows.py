"""The rows of the benchmark: each returns a ratio taken side by side in this process, beside its target.

Counting convention: exact forward 2 n m1..mk (d + e) flop, polynomial forward 2 (k + 1) n r (e + 1), exponentials free.
The ceiling is NumPy's 2048^3 matrix product in the same dtype.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from math import log
from typing import Any

import numpy as np

from korder import api
from korder.experiments.benchmark_cases import Case, Disagreement, make_case, require_backward, require_forward
from korder.spec import AttentionSpec, Exact, Polynomial

CEILING_SIZE = 2048
EXACT_ORDER_2 = AttentionSpec(order=2)
DEGREE_2 = AttentionSpec(order=2, method=Polynomial(degree=2))
_SCORE_RMS = 0.3


@dataclass(frozen=True, slots=True)
class Settings:
    """How thorough to be, and who is measured."""

    quick: bool
    repeats: int
    backend: str


@dataclass(frozen=True, slots=True)
class Measured:
    """One figure: what it is, what it should be, and whether it is; `met` is None where it could not be measured."""

    text: str
    target: str
    met: bool | None
    detail: str
    values: dict[str, float] = field(default_factory=dict)


def median_seconds(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Return the median time of each work over `repeats` rounds, after one that is not counted.

    The works take turns, so that a machine whose speed drifts slows them alike.
    """
    for work in works:
        work()
    rounds = [[_seconds(work) for work in works] for _ in range(repeats)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _ceiling_product() -> tuple[Callable[[], object], float]:
    """Return a matrix product to be timed, and its flop."""
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((CEILING_SIZE, CEILING_SIZE), dtype=np.float32) for _ in range(2))
    out = np.empty_like(left)
    return lambda: np.matmul(left, right, out=out), 2.0 * CEILING_SIZE**3


def _against_ceiling(case: Case, settings: Settings, target: float, error: float) -> Measured:
    product, flops = _ceiling_product()
    seconds, of_product = median_seconds(settings.repeats, case.forward, product)
    rate, ceiling = case.flops / seconds, flops / of_product
    return Measured(
        f"{rate / ceiling:.2f} of the ceiling",
        f">= {target:.2f}",
        rate / ceiling >= target,
        f"{_name(case)}: {rate / 1e9:.0f} of {ceiling / 1e9:.0f} GF/s, {_time(seconds)}, error {error:.1e}",
        {"fraction": rate / ceiling, "seconds": seconds, "flop_per_second": rate, "ceiling": ceiling},
    )


def exact_forward(settings: Settings) -> Measured:
    """Exact order 2, as a fraction of the ceiling."""
    case = make_case(EXACT_ORDER_2, 240 if settings.quick else 480, 64, settings.backend)
    return _against_ceiling(case, settings, 0.25, require_forward(case))


def exact_against_torch(settings: Settings) -> Measured:
    """Exact order 2, against torch's attention over the materialised Khatri-Rao keys."""
    target = ">= 0.80 of its speed"
    if find_spec("torch") is None:
        return Measured("-", target, None, "torch is not installed")
    torch: Any = import_module("torch")
    case = make_case(EXACT_ORDER_2, 240 if settings.quick else 480, 64, settings.backend)
    require_forward(case)
    peer = _torch_peer(torch, case)
    gap = float(np.max(np.abs(peer().numpy() - np.asarray(case.forward().output))))
    if not gap <= 1e-4:
        raise Disagreement(f"torch's output differs by {gap:.1e}")
    theirs, ours = median_seconds(settings.repeats, peer, case.forward)
    return Measured(
        f"{theirs / ours:.2f} of its speed",
        target,
        theirs / ours >= 0.8,
        f"{_name(case)}: {_time(ours)} here, {_time(theirs)} torch {torch.__version__}; outputs differ by {gap:.1e}",
        {"ratio": theirs / ours, "seconds": ours, "torch_seconds": theirs},
    )


def _torch_peer(torch: Any, case: Case) -> Callable[[], Any]:
    """What a torch user would write: the m1 m2 Khatri-Rao keys and values, then ordinary attention."""
    query = torch.from_numpy(case.operands.query)
    keys = [torch.from_numpy(key) for key in case.operands.keys]
    values = [torch.from_numpy(value) for value in case.operands.values]
    scale = case.plan.problem.scale

    def attend() -> Any:
        key = (keys[0][:, :, :, None, :] * keys[1][:, :, None, :, :]).flatten(2, 3)
        value = (values[0][:, :, :, None, :] * values[1][:, :, None, :, :]).flatten(2, 3)
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)

    return attend


def _backward_ratio(case: Case, settings: Settings, target: float) -> Measured:
    require_forward(case, rows=1)
    saved = case.forward(save=True)
    require_backward(case, saved)
    forward, backward = median_seconds(settings.repeats, case.forward, lambda: case.backward(saved))
    return Measured(
        f"{backward / forward:.2f} x forward",
        f"<= {target:.1f} x",
        backward / forward <= target,
        f"{_name(case)}: forward {_time(forward)}, backward {_time(backward)}",
        {"ratio": backward / forward, "forward_seconds": forward, "backward_seconds": backward},
    )


def exact_backward(settings: Settings) -> Measured:
    """Exact order 2: backward over forward; six products against two make 3."""
    return _backward_ratio(
        make_case(EXACT_ORDER_2, 240 if settings.quick else 480, 64, settings.backend), settings, 4.0
    )


def polynomial_backward(settings: Settings) -> Measured:
    """Polynomial order 2: backward over forward; the flop count makes 2."""
    n = 2048 if settings.quick else 16384
    return _backward_ratio(make_case(DEGREE_2, n, 64, settings.backend, _SCORE_RMS), settings, 4.0)


_MEMORY_PROGRAM = """
import json, resource, sys, tracemalloc
from korder.experiments.benchmark_cases import make_case
from korder.spec import AttentionSpec
n, backend = int(sys.argv[1]), sys.argv[2]
make_case(AttentionSpec(order=2), 64, 64, backend).forward()
case = make_case(AttentionSpec(order=2), n, 64, backend)
resident = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
before = resident()
tracemalloc.start()
output = case.forward()
traced = tracemalloc.get_traced_memory()[1] - output.output.nbytes - output.lse.nbytes
print(json.dumps([traced, resident() - before, case.plan.cost.peak_memory]))
"""


def exact_memory(settings: Settings) -> Measured:
    """Exact order 2: peak workspace of a call in a process of its own, against the plan."""
    n, target = 512 if settings.quick else 2048, 1.2
    if sys.platform == "win32":
        return Measured("-", f"<= {target:.1f} of the plan", None, "this system does not tell a process's peak memory")
    traced, grown, planned = json.loads(_python(_MEMORY_PROGRAM, str(n), settings.backend))
    peak = max(traced, grown)
    return Measured(
        f"{peak / planned:.2f} of the plan",
        f"<= {target:.1f} of the plan",
        peak <= target * planned,
        f"n = {n}, d = e = 64: {_mib(peak)} beyond inputs and outputs, planned {_mib(planned)}; "
        f"all scores would be {_mib(4 * n**3)}",
        {"ratio": peak / planned, "traced_bytes": traced, "resident_growth": grown, "planned_bytes": planned},
    )


def exact_order_3_slope(settings: Settings) -> Measured:
    """Exact order 3: exponent of the time in n; the flop count makes 4."""
    spec = AttentionSpec(order=3, method=Exact())
    sizes = (40, 48, 56) if settings.quick else (64, 72, 80, 88, 96)
    cases = [make_case(spec, n, 64, settings.backend) for n in sizes]
    _require_reduction(cases[0], settings.backend)
    times = median_seconds(settings.repeats, *(case.forward for case in cases))
    return _slope(sizes, times, 4.3, "exact, order 3")


def _require_reduction(case: Case, backend: str) -> None:
    """With keys and values of ones in the last mode, order 3 is order 2: both are run and compared."""
    operands = case.operands
    scale = case.plan.problem.scale
    ones = np.ones_like(operands.keys[2]), np.ones_like(operands.values[2])
    three = api.attend(
        operands.query,
        (*operands.keys[:2], ones[0]),
        (*operands.values[:2], ones[1]),
        spec=AttentionSpec(order=3, scale=scale),
        backend=backend,
    )
    two_case = make_case(AttentionSpec(order=2), case.plan.problem.queries, 64, backend)
    require_forward(two_case)
    two = api.attend(
        operands.query,
        operands.keys[:2],
        operands.values[:2],
        spec=AttentionSpec(order=2, scale=scale),
        backend=backend,
    )
    gap = float(np.max(np.abs(three - two)))
    if not gap <= 1e-5:
        raise Disagreement(f"a mode of ones changes the output by {gap:.1e}")


def polynomial_forward(settings: Settings) -> Measured:
    """Polynomial order 2, degree 2, as a fraction of the ceiling."""
    case = make_case(DEGREE_2, 4096 if settings.quick else 16384, 64, settings.backend, _SCORE_RMS)
    return _against_ceiling(case, settings, 0.25, require_forward(case, rows=1))


def polynomial_slope(settings: Settings) -> Measured:
    """Polynomial order 2: exponent of the time in n; the flop count makes 1."""
    exponents = (12, 13, 14) if settings.quick else (14, 15, 16, 17, 18)
    times = []
    for exponent in exponents:
        case = make_case(DEGREE_2, 2**exponent, 64, settings.backend, _SCORE_RMS)
        if exponent == exponents[0]:
            require_forward(case, rows=1)
        # One size after the other: together they would take too much memory.
        times += median_seconds(min(settings.repeats, 3), case.forward)
    return _slope([2**exponent for exponent in exponents], times, 1.1, "polynomial degree 2")


def _slope(sizes: Any, times: list[float], target: float, name: str) -> Measured:
    slope = float(np.polyfit([log(n) for n in sizes], [log(t) for t in times], 1)[0])
    shown = ", ".join(f"{n}: {_time(t)}" for n, t in zip(sizes, times, strict=True))
    values = {"slope": slope, **{f"seconds_{n}": t for n, t in zip(sizes, times, strict=True)}}
    return Measured(f"n^{slope:.2f}", f"<= n^{target:.1f}", slope <= target, f"{name}, d = e = 64; {shown}", values)


_IMPORT_PROGRAM = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import korder
imported = time.perf_counter() - start
modules = sorted(set(sys.modules) - before)
korder.attend
print(json.dumps([imported, time.perf_counter() - start, modules, sorted(set(sys.modules) - before)]))
"""
_LARGE = ("numpy", "pydantic", "torch", "jax", "opt_einsum", "matplotlib")


def import_time(settings: Settings) -> Measured:
    """`import korder` in a fresh interpreter, and what it loads; then what `korder.attend` loads."""
    runs = [json.loads(_python(_IMPORT_PROGRAM)) for _ in range(settings.repeats)]
    seconds, ready = (statistics.median(run[place] for run in runs) for place in (0, 1))
    modules, later = runs[0][2], runs[0][3]
    target = 0.25
    return Measured(
        _time(seconds),
        f"<= {_time(target)}",
        seconds <= target,
        f"loads {len(modules)} modules, of the large ones {_large(modules)}; "
        f"with `korder.attend` {_time(ready)}, {len(later)} modules, {_large(later)}",
        {"seconds": seconds, "modules": float(len(modules)), "attend_seconds": ready, "attend_modules": len(later)},
    )


def _large(modules: list[str]) -> str:
    return ", ".join(name for name in _LARGE if name in modules) or "none"


def overhead(settings: Settings) -> Measured:
    """What `attend` adds to a direct call of its kernel, on 16 x 16 operands."""
    case = make_case(EXACT_ORDER_2, 16, 16, settings.backend)
    operands = case.operands
    require_forward(case)

    def through_api() -> Any:
        return api.attend(operands.query, operands.keys, operands.values, backend=settings.backend)

    if not np.array_equal(np.asarray(through_api()), np.asarray(case.forward().output)):
        raise Disagreement("attend and its kernel give different outputs")
    calls = 50 if settings.quick else 400
    direct, whole = median_seconds(calls, case.forward, through_api)
    added, target = whole - direct, 150e-6
    return Measured(
        _time(added),
        f"<= {_time(target)}",
        added <= target,
        f"attend {_time(whole)}, kernel {_time(direct)}, medians of {calls} calls",
        {"seconds": added, "attend_seconds": whole, "kernel_seconds": direct},
    )


def _python(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _name(case: Case) -> str:
    problem = case.plan.problem
    method = case.plan.method if case.plan.polynomial is None else f"degree {case.plan.polynomial.degree}"
    backend = case.prepared.selection.backend.name
    return f"{backend}, {method}, order {problem.order}, n = {problem.queries}, d = e = {problem.query_width}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


ROWS: dict[str, Callable[[Settings], Measured]] = {
    "exact-forward": exact_forward,
    "exact-against-torch": exact_against_torch,
    "exact-backward": exact_backward,
    "exact-memory": exact_memory,
    "exact-order-3-slope": exact_order_3_slope,
    "polynomial-forward": polynomial_forward,
    "polynomial-slope": polynomial_slope,
    "polynomial-backward": polynomial_backward,
    "import-time": import_time,
    "overhead": overhead,
}
