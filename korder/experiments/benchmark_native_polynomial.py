"""The rows of `korder bench --backend native` about the polynomial method; conventions as in `benchmark_native`.

A forward counts `2 (k + 1) n r (e + 1)` flop, for the products of features with values and of features with the table;
a backward twice as many.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

from korder.experiments import benchmark_native
from korder.experiments.benchmark_cases import Case, make_case, require_forward, require_same
from korder.experiments.benchmark_figures import (
    CEILING_FLOPS,
    Measured,
    Point,
    Settings,
    mib_text,
    on_all_cores,
    run_python,
    time_text,
)
from korder.experiments.benchmark_memory import RETURNS_MEMORY, with_growth
from korder.experiments.benchmark_native import Turn, measured, turns_of
from korder.experiments.machine import usable_cores
from korder.experiments.roofline import moved_bytes
from korder.spec import AttentionSpec, Causal, Polynomial

SCORE_RMS = 0.3
SIZES = ((64, 2), (16, 4))
"""Widths and degrees."""


def _cases(settings: Settings, backend: str = "", *, causal: bool = False) -> list[tuple[str, Case]]:
    n, found = 1024 if settings.quick else 16384, []
    for width, degree in SIZES:
        spec = AttentionSpec(order=2, method=Polynomial(degree=degree))
        spec = spec.model_copy(update={"mask": Causal()}) if causal else spec
        found.append(
            (f"d = {width}, degree {degree}", make_case(spec, n, width, backend or settings.backend, SCORE_RMS))
        )
    return found


def _point(name: str, case: Case, seconds: float, *, backward: bool = False) -> Point:
    flops = (2 if backward else 1) * case.flops
    intensity = flops / moved_bytes(case, backward=backward)
    return Point(name, case.plan.problem.dtype, intensity, flops / seconds)


def forward(settings: Settings) -> Measured:
    """Polynomial order 2, as a fraction of the ceiling."""
    found = []
    for name, case in _cases(settings):
        require_forward(case, rows=1)
        ours, *ceilings = turns_of(settings, case.forward, *benchmark_native.products(case.plan.problem.dtype))
        ceiling, rate = CEILING_FLOPS / min(ceilings), case.flops / ours
        detail = f"{time_text(ours)}, {rate / 1e9:.0f} of {ceiling / 1e9:.0f} GF/s"
        found.append(Turn(name, rate / ceiling, 0.60, detail, (_point(name, case, ours),)))
    return measured(found, "of the ceiling")


def backward(settings: Settings) -> Measured:
    """Polynomial order 2: backward over forward; the flop count makes 2. Gradients are compared with NumPy's."""
    found = []
    for (name, case), (_, other) in zip(_cases(settings), _cases(settings, "numpy"), strict=True):
        saved = case.forward(save=True)
        of_case, of_other = case.backward(saved), other.backward(other.forward(save=True))
        require_same("the query's gradient", of_case.query, of_other.query)
        for mode, key in enumerate(of_case.keys):
            require_same(f"the gradient of keys {mode}", key, of_other.keys[mode])
        of_forward, of_backward = turns_of(settings, case.forward, partial(case.backward, saved))
        detail = f"forward {time_text(of_forward)}, backward {time_text(of_backward)}"
        points = (_point(name, case, of_backward, backward=True),)
        found.append(Turn(name, of_backward / of_forward, 3.0, detail, points))
    return measured(found, "times the forward", most=True)


def causal(settings: Settings) -> Measured:
    """Polynomial order 2 under the causal mask, over the full one; by flop it would be 1.2."""
    found = []
    for (name, full), (_, masked) in zip(_cases(settings), _cases(settings, causal=True), strict=True):
        of_full, of_masked = (case.forward().output[..., -1, :] for case in (full, masked))
        require_same("the last row, which sees everything", of_masked, of_full, 1e-5)
        of_full, of_masked = turns_of(settings, full.forward, masked.forward)
        detail = f"causal {time_text(of_masked)}, full {time_text(of_full)}"
        found.append(Turn(name, of_masked / of_full, 4.0, detail, (_point(name, masked, of_masked),)))
    return measured(found, "times the full mask", most=True)


_MEMORY_PROGRAM = """
import sys
from korder.experiments.benchmark_native_polynomial import print_growth
print_growth(*sys.argv[1:])
"""


def print_growth(backend: str, width: str, degree: str, n: str, mask: str) -> None:
    """Print by how much this process grew over a forward and a backward beyond their results, and what is declared."""
    spec = AttentionSpec(order=2, method=Polynomial(degree=int(degree)), mask={"kind": mask})
    make_case(spec, 64, int(width), backend, SCORE_RMS).forward()
    case = make_case(spec, int(n), int(width), backend, SCORE_RMS)
    found, growth = with_growth(case.forward)
    rows = (found.output, found.lse, found.normaliser, found.moments, found.magnitude)
    saved = case.forward(save=True)
    gradients, of_backward = with_growth(lambda: case.backward(saved))
    print(
        json.dumps(
            [
                growth - _bytes(rows),
                of_backward - _bytes((gradients.query, *gradients.keys, *gradients.values)),
                int(getattr(case.prepared.kernel, "workspace_bytes", 0)),
            ]
        )
    )


def _bytes(arrays: tuple[Any, ...]) -> int:
    return sum(int(x.nbytes) for x in arrays if x is not None)


def memory(settings: Settings) -> Measured:
    """Peak memory beyond operands and results, a thread, in a process of its own; what a forward declares."""
    limit, threads, n = benchmark_native.MIB_A_THREAD, usable_cores(), 1024 if settings.quick else 16384
    if sys.platform == "win32":
        return Measured("-", f"<= {limit}", None, "this system does not tell a process's peak memory")
    found = []
    for width, degree in SIZES:
        for mask in ("full", "causal"):
            arguments = settings.backend, str(width), str(degree), str(n), mask
            growth, back, declared = json.loads(run_python(_MEMORY_PROGRAM, *arguments, environment=RETURNS_MEMORY))
            shown = f"{mib_text(growth)}, {mib_text(declared)} declared"
            found.append(Turn(f"d = {width} {mask}", growth / threads / 2**20, limit, shown))
            found.append(Turn(f"backward d = {width} {mask}", back / threads / 2**20, limit, mib_text(back)))
    return measured(found, f"MiB a thread, {threads} threads", most=True)


ROWS = {
    name: on_all_cores(row)
    for name, row in {
        "polynomial-forward": forward,
        "polynomial-backward": backward,
        "polynomial-causal": causal,
        "polynomial-memory": memory,
    }.items()
}
