"""The rows of `korder bench --backend native`: the C++ kernels against the ceiling and against what torch offers.

Counting convention as in `benchmark_rows`. The ceiling is the faster of NumPy's and torch's product of 2048^3 in the
same dtype. Everything takes turns on all cores, with a rest after each turn: threads that wait by spinning would slow
whoever comes next.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from korder.dispatch.prepare import prepare
from korder.dispatch.registry import default_registry
from korder.experiments.benchmark_cases import (
    Case,
    as_numpy,
    make_case,
    require_backward,
    require_forward,
    require_same,
    with_arrays,
)
from korder.experiments.benchmark_figures import (
    CEILING_FLOPS,
    CEILING_SIZE,
    Measured,
    Point,
    Settings,
    median_seconds,
    mib_text,
    on_all_cores,
    run_python,
    time_text,
)
from korder.experiments.benchmark_memory import RETURNS_MEMORY, with_growth
from korder.experiments.machine import usable_cores
from korder.experiments.roofline import Roofs, measured_roofs, point_of
from korder.spec import AttentionSpec, Causal
from korder.spi.operands import KernelOutput, OperandGradients

REST = 0.06
"""Seconds after which OpenBLAS's and OpenMP's threads sleep."""
MIB_A_THREAD = 8
COPIED, QUICK_COPIED = 256 * 2**20, 2**20
"""Bytes that are copied to measure memory; the first is far more than caches hold."""
BFLOAT16_ERROR = 1e-2
"""Of the largest entry: two units of bfloat16."""
_ORDERS = {order: AttentionSpec(order=order) for order in (1, 2, 3)}
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Turn:
    """One size of a row: what it is called, how it did, and what it should do."""

    name: str
    ratio: float
    target: float
    detail: str
    points: tuple[Point, ...] = ()


def turns_of(settings: Settings, *works: Work) -> list[float]:
    """Return the median seconds of works that take turns, with a rest after each."""
    rest: Work = lambda: time.sleep(REST)  # noqa: E731
    return median_seconds(settings.repeats, *(part for work in works for part in (work, rest)))[::2]


def products(dtype: str) -> list[Work]:
    """Return the matrix products of CEILING_FLOPS that are here, NumPy's and torch's."""
    generator = np.random.default_rng(0)
    left, right = (generator.random((CEILING_SIZE, CEILING_SIZE)).astype(dtype) for _ in range(2))
    out = np.empty_like(left)
    found: list[Work] = [lambda: np.matmul(left, right, out=out)]
    if find_spec("torch") is not None:
        torch = import_module("torch")
        factors = torch.from_numpy(left), torch.from_numpy(right)
        of_torch = torch.empty_like(factors[0])
        found.append(lambda: torch.mm(*factors, out=of_torch))
    return found


def measured(turns: list[Turn], unit: str, *, most: bool = False) -> Measured:
    """Return a row of several sizes, each with a target."""
    sign = "<=" if most else ">="
    met = all(turn.ratio <= turn.target if most else turn.ratio >= turn.target for turn in turns)
    return Measured(
        ", ".join(f"{turn.ratio:.2f} at {turn.name}" for turn in turns) + f" {unit}",
        ", ".join(f"{sign} {turn.target:.2f}" for turn in turns),
        met,
        "; ".join(f"{turn.name}: {turn.detail}" for turn in turns),
        {f"ratio {turn.name}": turn.ratio for turn in turns},
        tuple(point for turn in turns for point in turn.points),
    )


@on_all_cores
def roofs(settings: Settings) -> Roofs:
    """Return what this machine's best products and copies in memory reach, on all cores."""
    of_dtype = {dtype: products(dtype) for dtype in ("float32", "float64")}
    return measured_roofs(
        lambda *works: turns_of(settings, *works), of_dtype, QUICK_COPIED if settings.quick else COPIED, usable_cores()
    )


def _against_ceiling(name: str, case: Case, settings: Settings, target: float, *, backward: bool = False) -> Turn:
    dtype = case.plan.problem.dtype
    work, flops = _work(case, backward)
    ours, *ceilings = turns_of(settings, work, *products(dtype))
    ceiling, rate = CEILING_FLOPS / min(ceilings), flops / ours
    detail = f"{time_text(ours)}, {rate / 1e9:.0f} of {ceiling / 1e9:.0f} GF/s"
    return Turn(name, rate / ceiling, target, detail, (point_of(name, case, ours, backward=backward),))


def _work(case: Case, backward: bool) -> tuple[Work, float]:
    """Return what is timed, and its flop: six products backward, two forward."""
    if not backward:
        return case.forward, case.flops
    saved = case.forward(save=True)
    return lambda: case.backward(saved), 3 * case.flops


def forward(settings: Settings) -> Measured:
    """Exact order 2 at three lengths, as fractions of the ceiling."""
    sizes = ((48, 0.75), (96, 0.82)) if settings.quick else ((240, 0.75), (480, 0.82), (960, 0.85))
    return _of_ceiling(settings, [(f"n = {n}", make_case(_ORDERS[2], n, 64, settings.backend), t) for n, t in sizes])


def widths(settings: Settings) -> Measured:
    """The same at other widths."""
    n = 96 if settings.quick else 480
    return _of_ceiling(
        settings, [(f"d = e = {d}", make_case(_ORDERS[2], n, d, settings.backend), 0.65) for d in (32, 80, 128)]
    )


def _of_ceiling(settings: Settings, cases: list[tuple[str, Case, float]]) -> Measured:
    turns = []
    for name, case, target in cases:
        require_forward(case)
        turns.append(_against_ceiling(name, case, settings, target))
    return measured(turns, "of the ceiling")


def order_3(settings: Settings) -> Measured:
    """Exact order 3, as a fraction of the ceiling."""
    n = 24 if settings.quick else 96
    case, other = (make_case(_ORDERS[3], n, 64, backend) for backend in (settings.backend, "numpy"))
    require_same("the output", case.forward().output, other.forward().output)
    return measured([_against_ceiling(f"n = {n}", case, settings, 0.70)], "of the ceiling")


def float64(settings: Settings) -> Measured:
    """Exact order 2 in float64, forward and backward, as fractions of the ceiling in float64."""
    n = 96 if settings.quick else 480
    case, other = (make_case(_ORDERS[2], n, 64, backend, dtype="float64") for backend in (settings.backend, "numpy"))
    saved, its = case.forward(save=True), other.forward(save=True)
    require_same("the output", saved.output, its.output, 1e-12)
    require_same("the query's gradient", case.backward(saved).query, other.backward(its).query, 1e-12)
    turns = [
        _against_ceiling(name, case, settings, 0.65, backward=name == "backward") for name in ("forward", "backward")
    ]
    return measured(turns, f"of the ceiling, n = {n}")


def bfloat16(settings: Settings) -> Measured:
    """Forward of bfloat16 against that of the same numbers in float32; the way back, which widens, is told beside it.

    The target is judged where the processor multiplies bfloat16; elsewhere the row says what widening costs.
    """
    missing = _no_torch(">= 1.50")
    if missing is not None:
        return missing
    torch, n = import_module("torch"), 96 if settings.quick else 480
    case = make_case(_ORDERS[2], n, 64, settings.backend)
    half = with_arrays(case.operands, lambda x: torch.from_numpy(np.asarray(x)).bfloat16())
    cotangent = torch.from_numpy(np.asarray(case.cotangent)).bfloat16()
    wide = replace(case, operands=with_arrays(half, as_numpy), cotangent=as_numpy(cotangent))
    problem = replace(case.plan.problem, dtype="bfloat16")
    narrow = Case(half, prepare(default_registry(), problem, "torch", settings.backend), cotangent)
    saved, its = narrow.forward(save=True), wide.forward(save=True)
    require_forward(wide)
    require_same("the output", saved.output, its.output, BFLOAT16_ERROR)
    require_same("the query's gradient", narrow.backward(saved).query, wide.backward(its).query, BFLOAT16_ERROR)
    ours, of_wide, back, back_of_wide = turns_of(
        settings, narrow.forward, wide.forward, lambda: narrow.backward(saved), lambda: wide.backward(its)
    )
    detail = f"{time_text(ours)}, float32 {time_text(of_wide)}"
    found = measured(
        [Turn("forward", of_wide / ours, 1.5, detail, (point_of("forward", narrow, ours, backward=False),))],
        f"x float32, n = {n}",
    )
    beside = f"{found.detail}; backward, widened, {back_of_wide / back:.2f} x"
    if multiplies_bfloat16(narrow):
        return replace(found, detail=beside)
    return replace(found, met=None, detail=f"widened, nothing here multiplies bfloat16; {beside}")


def multiplies_bfloat16(case: Case) -> bool:
    """Return whether the kernel of a case runs an instruction set with products of bfloat16."""
    kernels = getattr(case.prepared.kernel, "kernels", None)
    return bool(getattr(kernels, "narrows", False))


def backward(settings: Settings) -> Measured:
    """Exact backward of order 2, counted as six products, as a fraction of the ceiling."""
    case = make_case(_ORDERS[2], 96 if settings.quick else 480, 64, settings.backend)
    require_backward(case, case.forward(save=True))
    turn = _against_ceiling(f"n = {case.plan.problem.queries}", case, settings, 0.78, backward=True)
    return measured([turn], "of the ceiling")


def causal(settings: Settings) -> Measured:
    """The causal mask, which leaves a third of the tuples, over the full one."""
    n = 144 if settings.quick else 960
    full, masked = (
        make_case(spec, n, 64, settings.backend) for spec in (_ORDERS[2], AttentionSpec(order=2, mask=Causal()))
    )
    for case in (full, masked):
        require_forward(case)
    of_full, of_masked = turns_of(settings, full.forward, masked.forward)
    detail = f"causal {time_text(of_masked)}, full {time_text(of_full)}"
    points = point_of("full", full, of_full), point_of("causal", masked, of_masked)
    return measured([Turn(f"n = {n}", of_masked / of_full, 0.40, detail, points)], "of the full time", most=True)


def _no_torch(target: str) -> Measured | None:
    if find_spec("torch") is not None:
        return None
    return Measured("-", target, None, "torch is not installed")


def _tensors(case: Case) -> tuple[Any, list[Any], list[Any]]:
    """Query, keys and values as tensors in the same memory."""
    make: Callable[[Any], Any] = lambda x: import_module("torch").from_numpy(np.asarray(x))  # noqa: E731
    return make(case.operands.query), [*map(make, case.operands.keys)], [*map(make, case.operands.values)]


def _peer(case: Case, *, causal: bool = False) -> tuple[Callable[[], Any], tuple[Any, ...]]:
    """Return torch's attention of a case, over Khatri-Rao products built beforehand at order 2, and its operands."""
    query, keys, values = _tensors(case)
    if len(keys) == 2:
        keys, values = ([(x[:, :, :, None] * y[:, :, None]).flatten(2, 3)] for x, y in (keys, values))
    attention = import_module("torch").nn.functional.scaled_dot_product_attention
    scale = case.plan.problem.scale
    operands = (query, keys[0], values[0])
    return lambda: attention(*operands, is_causal=causal, scale=scale), operands


def sdpa_forward(settings: Settings) -> Measured:
    """Exact order 2 against torch's attention over Khatri-Rao keys and values that were built beforehand."""
    missing = _no_torch(">= 2.30, >= 2.60, >= 2.60")
    if missing is not None:
        return missing
    turns = []
    for n, target in ((48, 2.3), (96, 2.6)) if settings.quick else ((240, 2.3), (480, 2.6), (960, 2.6)):
        case = make_case(_ORDERS[2], n, 64, settings.backend)
        require_forward(case)
        turns.append(_against_peer(f"n = {n}", case, _peer(case)[0], settings, target))
    return measured(turns, "x its speed")


def order_1(settings: Settings) -> Measured:
    """Order 1, full and causal, against torch's own attention."""
    missing = _no_torch(">= 2.00, >= 2.00")
    if missing is not None:
        return missing
    n, turns = 512 if settings.quick else 4096, []
    for name, spec in (("full", _ORDERS[1]), ("causal", AttentionSpec(order=1, mask=Causal()))):
        case = make_case(spec, n, 64, settings.backend)
        turns.append(_against_peer(name, case, _peer(case, causal=name == "causal")[0], settings, 2.0))
    return measured(turns, f"x its speed, n = {n}")


def _against_peer(name: str, case: Case, peer: Callable[[], Any], settings: Settings, target: float) -> Turn:
    with import_module("torch").no_grad():
        require_same("torch's output", peer(), case.forward().output)
        ours, theirs = turns_of(settings, case.forward, peer)
    detail = f"{time_text(ours)} here, {time_text(theirs)} torch"
    return Turn(name, theirs / ours, target, detail, (point_of(name, case, ours),))


def sdpa_backward(settings: Settings) -> Measured:
    """The backward of order 2 against that of torch's attention down to its Khatri-Rao products, and no further."""
    missing = _no_torch(">= 2.60")
    if missing is not None:
        return missing
    torch, n = import_module("torch"), 96 if settings.quick else 480
    case = make_case(_ORDERS[2], n, 64, settings.backend)
    saved = case.forward(save=True)
    require_backward(case, saved)
    peer, operands = _peer(case)
    for operand in operands:
        operand.requires_grad_()
    output, cotangent = peer(), torch.from_numpy(np.asarray(case.cotangent))
    work: Callable[[], Any] = lambda: torch.autograd.grad(output, operands, cotangent, retain_graph=True)  # noqa: E731
    require_same("torch's gradient of the query", work()[0], case.backward(saved).query)
    ours, theirs = turns_of(settings, lambda: case.backward(saved), work)
    detail = f"{time_text(ours)} here, {time_text(theirs)} torch"
    points = (point_of(f"n = {n}", case, ours, backward=True),)
    return measured([Turn(f"n = {n}", theirs / ours, 2.6, detail, points)], "x its speed")


def torch_backend(settings: Settings) -> Measured:
    """Forward and backward of order 2 against korder's torch backend on the same numbers."""
    missing = _no_torch(">= 1.00, >= 1.00")
    if missing is not None:
        return missing
    n = 96 if settings.quick else 480
    case, other = (make_case(_ORDERS[2], n, 64, backend) for backend in (settings.backend, "torch"))
    saved, its = case.forward(save=True), other.forward(save=True)
    require_same("the torch backend's output", its.output, saved.output)
    seconds = turns_of(settings, case.forward, other.forward, lambda: case.backward(saved), lambda: other.backward(its))
    turns = []
    for name, (ours, theirs) in zip(("forward", "backward"), (seconds[:2], seconds[2:]), strict=True):
        detail = f"{time_text(ours)} here, {time_text(theirs)} there"
        points = (point_of(name, case, ours, backward=name == "backward"),)
        turns.append(Turn(name, theirs / ours, 1.0, detail, points))
    return measured(turns, f"x its speed, n = {n}")


_MEMORY_PROGRAM = """
import sys
from korder.experiments.benchmark_native import print_growth
print_growth(*sys.argv[1:])
"""


def print_growth(backend: str, order: str, n: str, direction: str) -> None:
    """Print by how much this process grew over one call beyond its results, what the kernel declares, and a result."""
    small, case = (make_case(_ORDERS[int(order)], size, 64, backend) for size in (64 // int(order), int(n)))
    for_small = small.forward(save=True)
    small.backward(for_small)
    kernel: Any = case.prepared.kernel
    work: Callable[[], tuple[Any, ...]]
    if direction == "forward":
        work = lambda: _results(case.forward())  # noqa: E731
    else:
        saved = case.forward(save=True)
        work = lambda: _gradients(case.backward(saved))  # noqa: E731
    arrays, growth = with_growth(work)
    sample = as_numpy(arrays[0]).ravel()[:: int(n) + 1].tolist()
    print(json.dumps([growth - sum(int(x.nbytes) for x in arrays), int(kernel.workspace_bytes), sample]))


def _results(found: KernelOutput) -> tuple[Any, ...]:
    return found.output, found.lse


def _gradients(found: OperandGradients) -> tuple[Any, ...]:
    return (found.query, *found.keys, *found.values)


def memory(settings: Settings) -> Measured:
    """Peak memory beyond operands and results, a thread, in a process of its own; and what is declared of a call."""
    if sys.platform == "win32":
        return Measured("-", f"<= {MIB_A_THREAD}", None, "this system does not tell a process's peak memory")
    turns, threads = [], usable_cores()
    sizes = ((1, 512), (2, 96)) if settings.quick else ((1, 4096), (2, 960))
    for order, n in sizes:
        for direction in ("forward", "backward"):
            arguments = settings.backend, str(order), str(n), direction
            growth, declared, sample = json.loads(run_python(_MEMORY_PROGRAM, *arguments, environment=RETURNS_MEMORY))
            if direction == "forward":
                case = make_case(_ORDERS[order], n, 64, settings.backend)
                require_same(
                    "the sampled output", np.asarray(sample), as_numpy(case.forward().output).ravel()[:: n + 1]
                )
            shown = f"{mib_text(growth)}, {mib_text(declared)} declared"
            turns.append(Turn(f"order {order} {direction}", growth / threads / 2**20, MIB_A_THREAD, shown))
    return measured(turns, f"MiB a thread, {threads} threads", most=True)


ROWS = {
    name: on_all_cores(row)
    for name, row in {
        "forward": forward,
        "sdpa-forward": sdpa_forward,
        "widths": widths,
        "order-1": order_1,
        "order-3": order_3,
        "float64": float64,
        "bfloat16": bfloat16,
        "backward": backward,
        "sdpa-backward": sdpa_backward,
        "causal": causal,
        "torch-backend": torch_backend,
        "memory": memory,
    }.items()
}
