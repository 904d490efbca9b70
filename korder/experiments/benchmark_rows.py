"""The rows of the benchmark: each returns a ratio taken side by side in this process, beside its target.

Counting convention: exact forward 2 n m1..mk (d + e) flop, polynomial forward 2 (k + 1) n r (e + 1), exponentials free.
The ceiling is NumPy's 2048^3 matrix product in the same dtype.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from korder import api
from korder.dispatch.arrays import array_kind, namespace_of_kind
from korder.experiments.benchmark_cases import (
    Case,
    Disagreement,
    as_numpy,
    make_case,
    require_backward,
    require_forward,
)
from korder.experiments.benchmark_decode import decode_token
from korder.experiments.benchmark_figures import (
    CEILING_FLOPS,
    Measured,
    Settings,
    case_text,
    measured_slope,
    median_seconds,
    mib_text,
    numpy_product,
    run_python,
    time_text,
)
from korder.experiments.benchmark_memory import RETURNS_MEMORY
from korder.experiments.benchmark_plugins import plugins
from korder.spec import AttentionSpec, Exact, Polynomial

EXACT_ORDER_2 = AttentionSpec(order=2)
DEGREE_2 = AttentionSpec(order=2, method=Polynomial(degree=2))
SCORE_RMS = 0.3


def _against_ceiling(case: Case, settings: Settings, target: float, error: float) -> Measured:
    seconds, of_product = median_seconds(settings.repeats, case.forward, numpy_product())
    rate, ceiling = case.flops / seconds, CEILING_FLOPS / of_product
    return Measured(
        f"{rate / ceiling:.2f} of the ceiling",
        f">= {target:.2f}",
        rate / ceiling >= target,
        f"{case_text(case)}: {rate / 1e9:.0f} of {ceiling / 1e9:.0f} GF/s, {time_text(seconds)}, error {error:.1e}",
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
    gap = float(np.max(np.abs(peer().numpy() - as_numpy(case.forward().output))))
    if not gap <= 1e-4:
        raise Disagreement(f"torch's output differs by {gap:.1e}")
    theirs, ours = median_seconds(settings.repeats, peer, case.forward)
    return Measured(
        f"{theirs / ours:.2f} of its speed",
        target,
        theirs / ours >= 0.8,
        f"{case_text(case)}: {time_text(ours)} here, {time_text(theirs)} torch {torch.__version__}; "
        f"outputs differ by {gap:.1e}",
        {"ratio": theirs / ours, "seconds": ours, "torch_seconds": theirs},
    )


def _torch_peer(torch: Any, case: Case) -> Callable[[], Any]:
    """What a torch user would write: the m1 m2 Khatri-Rao keys and values, then ordinary attention."""
    query = torch.as_tensor(case.operands.query)
    keys = [torch.as_tensor(key) for key in case.operands.keys]
    values = [torch.as_tensor(value) for value in case.operands.values]
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
        f"{case_text(case)}: forward {time_text(forward)}, backward {time_text(backward)}",
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
    return _backward_ratio(make_case(DEGREE_2, n, 64, settings.backend, SCORE_RMS), settings, 4.0)


_MEMORY_PROGRAM = """
import json, sys, tracemalloc
from korder.experiments.benchmark_cases import make_case
from korder.experiments.benchmark_memory import with_growth
from korder.spec import AttentionSpec
n, backend = int(sys.argv[1]), sys.argv[2]
make_case(AttentionSpec(order=2), 64, 64, backend).forward()
case = make_case(AttentionSpec(order=2), n, 64, backend)
tracemalloc.start()
output, grown = with_growth(case.forward)
given = output.output.nbytes + output.lse.nbytes
planned = max(case.plan.cost.peak_memory, getattr(case.prepared.kernel, "workspace_bytes", 0))
print(json.dumps([tracemalloc.get_traced_memory()[1] - given, grown - given, planned]))
"""


def exact_memory(settings: Settings) -> Measured:
    """Exact order 2: peak workspace of a call in a process of its own, against the plan."""
    n, target = 512 if settings.quick else 2048, 1.2
    if sys.platform == "win32":
        return Measured("-", f"<= {target:.1f} of the plan", None, "this system does not tell a process's peak memory")
    traced, grown, planned = json.loads(
        run_python(_MEMORY_PROGRAM, str(n), settings.backend, environment=RETURNS_MEMORY)
    )
    peak = max(traced, grown)
    return Measured(
        f"{peak / planned:.2f} of the plan",
        f"<= {target:.1f} of the plan",
        peak <= target * planned,
        f"n = {n}, d = e = 64: {mib_text(peak)} beyond inputs and outputs, planned {mib_text(planned)}; "
        f"all scores would be {mib_text(4 * n**3)}",
        {"ratio": peak / planned, "traced_bytes": traced, "resident_growth": grown, "planned_bytes": planned},
    )


def exact_order_3_slope(settings: Settings) -> Measured:
    """Exact order 3: exponent of the time in n; the flop count makes 4."""
    spec = AttentionSpec(order=3, method=Exact())
    sizes = (40, 48, 56) if settings.quick else (64, 72, 80, 88, 96)
    cases = [make_case(spec, n, 64, settings.backend) for n in sizes]
    _require_reduction(cases[0], settings.backend)
    times = median_seconds(settings.repeats, *(case.forward for case in cases))
    return measured_slope(sizes, times, 4.3, "exact, order 3")


def _require_reduction(case: Case, backend: str) -> None:
    """With keys and values of ones in the last mode, order 3 is order 2: both are run and compared."""
    operands = case.operands
    scale = case.plan.problem.scale
    xp = namespace_of_kind(array_kind(operands.query))
    ones = xp.ones_like(operands.keys[2]), xp.ones_like(operands.values[2])
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
    gap = float(np.max(np.abs(as_numpy(three) - as_numpy(two))))
    if not gap <= 1e-5:
        raise Disagreement(f"a mode of ones changes the output by {gap:.1e}")


def polynomial_forward(settings: Settings) -> Measured:
    """Polynomial order 2, degree 2, as a fraction of the ceiling."""
    case = make_case(DEGREE_2, 4096 if settings.quick else 16384, 64, settings.backend, SCORE_RMS)
    return _against_ceiling(case, settings, 0.25, require_forward(case, rows=1))


def polynomial_slope(settings: Settings) -> Measured:
    """Polynomial order 2: exponent of the time in n; the flop count makes 1."""
    exponents = (12, 13, 14) if settings.quick else (14, 15, 16, 17, 18)
    times = []
    for exponent in exponents:
        case = make_case(DEGREE_2, 2**exponent, 64, settings.backend, SCORE_RMS)
        if exponent == exponents[0]:
            require_forward(case, rows=1)
        # One size after the other: together they would take too much memory.
        times += median_seconds(min(settings.repeats, 3), case.forward)
    return measured_slope([2**exponent for exponent in exponents], times, 1.1, "polynomial degree 2")


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
    runs = [json.loads(run_python(_IMPORT_PROGRAM)) for _ in range(settings.repeats)]
    seconds, ready = (statistics.median(run[place] for run in runs) for place in (0, 1))
    modules, later = runs[0][2], runs[0][3]
    target = 0.25
    return Measured(
        time_text(seconds),
        f"<= {time_text(target)}",
        seconds <= target,
        f"loads {len(modules)} modules, of the large ones {_large(modules)}; "
        f"with `korder.attend` {time_text(ready)}, {len(later)} modules, {_large(later)}",
        {"seconds": seconds, "modules": float(len(modules)), "attend_seconds": ready, "attend_modules": len(later)},
    )


def _large(modules: list[str]) -> str:
    return ", ".join(name for name in _LARGE if name in modules) or "none"


def overhead(settings: Settings, target: float = 150e-6) -> Measured:
    """What `attend` adds to a direct call of its kernel, on 16 x 16 operands."""
    case = make_case(EXACT_ORDER_2, 16, 16, settings.backend)
    operands = case.operands
    require_forward(case)

    def through_api() -> Any:
        return api.attend(operands.query, operands.keys, operands.values, backend=settings.backend)

    if not np.array_equal(as_numpy(through_api()), as_numpy(case.forward().output)):
        raise Disagreement("attend and its kernel give different outputs")
    calls = 50 if settings.quick else 400
    direct, whole = median_seconds(calls, case.forward, through_api)
    added = whole - direct
    return Measured(
        time_text(added),
        f"<= {time_text(target)}",
        added <= target,
        f"attend {time_text(whole)}, kernel {time_text(direct)}, medians of {calls} calls",
        {"seconds": added, "attend_seconds": whole, "kernel_seconds": direct},
    )


ROWS: dict[str, Callable[[Settings], Measured]] = {
    "exact-forward": exact_forward,
    "exact-against-torch": exact_against_torch,
    "exact-backward": exact_backward,
    "exact-memory": exact_memory,
    "exact-order-3-slope": exact_order_3_slope,
    "polynomial-forward": polynomial_forward,
    "polynomial-slope": polynomial_slope,
    "polynomial-backward": polynomial_backward,
    "decode": decode_token,
    "import-time": import_time,
    "plugins": plugins,
    "overhead": overhead,
}
