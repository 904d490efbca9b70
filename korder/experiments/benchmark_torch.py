"""The rows of `korder bench --backend torch`, and `cuda`: against what a PyTorch user would write, on all cores.

Counting convention as in `benchmark_rows`. The ceiling is `torch.mm` of 2048^3 in float32 on the backend's device;
NumPy's stands beside it. Targets were set for the CPU; on a GPU they are the same ratios.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module, metadata
from typing import Any

import numpy as np

from korder import api
from korder.dispatch.prepare import prepare
from korder.dispatch.registry import default_registry
from korder.experiments import benchmark_rows
from korder.experiments.benchmark_cases import (
    Case,
    Disagreement,
    as_numpy,
    make_case,
    require_forward,
    require_gradients,
    require_output,
    require_same,
    with_arrays,
)
from korder.experiments.benchmark_figures import (
    CEILING_FLOPS,
    CEILING_SIZE,
    Measured,
    Settings,
    case_text,
    measured_slope,
    median_seconds,
    mib_text,
    numpy_product,
    on_all_cores,
    run_python,
    time_text,
)
from korder.experiments.benchmark_memory import with_growth
from korder.experiments.benchmark_rows import DEGREE_2, EXACT_ORDER_2, SCORE_RMS
from korder.experiments.machine import usable_cores
from korder.spec import AttentionSpec, Causal, Window
from korder.spi.operands import OperandGradients

Attend = Callable[[Any, tuple[Any, ...], tuple[Any, ...]], Any]
_SIMPLICIAL = "simplicial-attention==0.1.6"
_SIMPLICIAL_REPEATS = 3  # one round takes many seconds


def _torch() -> Any:
    return import_module("torch")


def _torch_product(case: Case) -> Callable[[], object]:
    """Return torch's matrix product of CEILING_FLOPS, on the device of a case, to be timed."""
    torch, device = _torch(), case.operands.query.device
    factors = np.random.default_rng(0).random((2, CEILING_SIZE, CEILING_SIZE), "f4")
    left, right = (torch.from_numpy(x).to(device) for x in factors)
    out = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=out)


def _ceilings(of_torch: float, of_numpy: float) -> tuple[str, dict[str, float]]:
    """Return both ceilings as text and as values, from the seconds of the products."""
    values = {"torch_ceiling": CEILING_FLOPS / of_torch, "numpy_ceiling": CEILING_FLOPS / of_numpy}
    rates = [f"{rate / 1e9:.0f} GF/s" for rate in values.values()]
    return f"torch.mm {rates[0]}, NumPy's product {rates[1]}, {_torch().get_num_threads()} threads", values


def _seconds_of_numpy(settings: Settings) -> float:
    """Time NumPy's product on its own: its threads wait by spinning, which would slow what torch does next."""
    return median_seconds(settings.repeats, numpy_product())[0]


def _khatri_rao(arrays: tuple[Any, ...]) -> Any:
    """The m1 m2 elementwise products of two modes."""
    return (arrays[0][:, :, :, None, :] * arrays[1][:, :, None, :, :]).flatten(2, 3)


def _materialised(query: Any, keys: tuple[Any, ...], values: tuple[Any, ...]) -> Any:
    """Order 2 as torch's own attention: the default scale of both is d ** -0.5."""
    return _torch().nn.functional.scaled_dot_product_attention(query, _khatri_rao(keys), _khatri_rao(values))


def sdpa_forward(settings: Settings) -> Measured:
    """Exact order 2 against torch's attention over Khatri-Rao keys and values that were built beforehand."""
    ratios, parts, gaps = [], [], []
    values: dict[str, float] = {}
    for n in (48, 96, 144) if settings.quick else (240, 480, 960):
        case = make_case(EXACT_ORDER_2, n, 64, settings.backend)
        require_forward(case)
        peer = _prebuilt(case)
        gaps.append(require_same("torch's output", peer(), case.forward().output))
        theirs, ours = median_seconds(settings.repeats, peer, case.forward)
        ratios.append((theirs / ours, n))
        rates = f"{case.flops / ours / 1e9:.0f} against {case.flops / theirs / 1e9:.0f} GF/s"
        parts.append(f"n = {n}: {time_text(ours)} here, {time_text(theirs)} torch, {rates}")
        values |= {f"ratio_{n}": theirs / ours, f"seconds_{n}": ours, f"torch_seconds_{n}": theirs}
    of_torch = median_seconds(settings.repeats, _torch_product(case))[0]
    ceilings, rates_of_products = _ceilings(of_torch, _seconds_of_numpy(settings))
    return Measured(
        _ratios_text(ratios),
        ">= 1.00 x each",
        all(ratio >= 1.0 for ratio, _ in ratios),
        f"{'; '.join(parts)}; outputs differ by {max(gaps):.1e} of the largest; {ceilings}",
        values | rates_of_products,
    )


def _prebuilt(case: Case) -> Callable[[], Any]:
    key, value = _khatri_rao(case.operands.keys), _khatri_rao(case.operands.values)
    attention = _torch().nn.functional.scaled_dot_product_attention
    return lambda: attention(case.operands.query, key, value, scale=case.plan.problem.scale)


def _ratios_text(ratios: list[tuple[float, int]]) -> str:
    return ", ".join(f"{ratio:.2f} x at n = {n}" for ratio, n in ratios)


def exact_forward(settings: Settings) -> Measured:
    """Exact order 2, as a fraction of torch's own matrix product."""
    case = make_case(EXACT_ORDER_2, 96 if settings.quick else 480, 64, settings.backend)
    return _against_product(case, settings, 0.25, require_forward(case))


def _against_product(case: Case, settings: Settings, target: float, error: float) -> Measured:
    seconds, of_torch = median_seconds(settings.repeats, case.forward, _torch_product(case))
    ceilings, rates_of_products = _ceilings(of_torch, _seconds_of_numpy(settings))
    rate = case.flops / seconds
    fraction = rate * of_torch / CEILING_FLOPS
    return Measured(
        f"{fraction:.2f} of torch.mm",
        f">= {target:.2f}",
        fraction >= target,
        f"{case_text(case)}: {rate / 1e9:.0f} GF/s, {time_text(seconds)}, error {error:.1e}; {ceilings}",
        {"fraction": fraction, "seconds": seconds, **rates_of_products},
    )


_MEMORY_PROGRAM = """
import sys
from korder.experiments.benchmark_torch import print_growth
print_growth(*sys.argv[1:])
"""


def print_growth(which: str, n: str, backend: str) -> None:
    """Print the growth of this process over one call, and a few entries of the output; `which` is ours or theirs."""
    _torch().set_num_threads(usable_cores())
    small, case = (make_case(EXACT_ORDER_2, size, 64, backend) for size in (64, int(n)))
    attend: Attend = _through_api(case, backend) if which == "ours" else _materialised
    call: Callable[[Case], Any] = lambda c: attend(c.operands.query, c.operands.keys, c.operands.values)  # noqa: E731
    call(small)
    measure = _with_cuda_growth if case.operands.query.is_cuda else with_growth
    output, growth = measure(lambda: call(case))
    print(json.dumps([growth, as_numpy(output).ravel()[:: int(n) + 1].tolist()]))


def _with_cuda_growth(work: Callable[[], Any]) -> tuple[Any, int]:
    """Return what `work` returns, and the bytes by which its tensors on the GPU peaked above those before."""
    cuda = _torch().cuda
    cuda.reset_peak_memory_stats()
    before = cuda.memory_allocated()
    result = work()
    cuda.synchronize()
    return result, cuda.max_memory_allocated() - before


def sdpa_memory(settings: Settings) -> Measured:
    """Peak memory of one call above its process, against torch's attention with what it materialises."""
    n, target = 240 if settings.quick else 480, 0.25
    if sys.platform == "win32":
        return Measured("-", f"<= {target:.2f}", None, "this system does not tell a process's peak memory")
    found = [json.loads(run_python(_MEMORY_PROGRAM, which, str(n), settings.backend)) for which in ("theirs", "ours")]
    (theirs, expected), (ours, output) = found
    require_same("the sampled output", np.asarray(output), np.asarray(expected))
    return Measured(
        f"{ours / theirs:.2f} of its memory",
        f"<= {target:.2f}",
        ours <= target * theirs,
        f"n = {n}, d = e = 64: {mib_text(ours)} here, {mib_text(theirs)} torch with Khatri-Rao keys and values; "
        "each above its process",
        {"ratio": ours / theirs, "bytes": ours, "torch_bytes": theirs},
    )


def _through_api(case: Case, backend: str) -> Attend:
    spec = case.plan.problem.spec
    return lambda query, keys, values: api.attend(query, keys, values, spec=spec, backend=backend)


def _training(case: Case, attend: Attend) -> Callable[[], tuple[Any, tuple[Any, ...]]]:
    """Return forward and backward by autograd: the output, and the gradients of query, keys and values."""
    torch, order = _torch(), case.plan.problem.order
    operands = case.operands
    leaves = [x.clone().requires_grad_() for x in (operands.query, *operands.keys, *operands.values)]

    def work() -> tuple[Any, tuple[Any, ...]]:
        output = attend(leaves[0], tuple(leaves[1 : order + 1]), tuple(leaves[order + 1 :]))
        return output, torch.autograd.grad(output, leaves, case.cotangent)

    return work


def _require_training(case: Case, work: Callable[[], tuple[Any, tuple[Any, ...]]]) -> tuple[Any, ...]:
    """Check output and gradients of one run, and return them."""
    output, gradients = work()
    order = case.plan.problem.order
    require_output(case, output, rows=1)
    found = OperandGradients(gradients[0], gradients[1 : order + 1], gradients[order + 1 :], (None,) * order)
    require_gradients(case, output, found)
    return (output, *gradients)


def _against_peer(case: Case, settings: Settings, peer: Attend, who: str) -> tuple[float, float, float]:
    """Return the seconds of a peer's forward and backward, of ours, and how far they are apart."""
    ours, theirs = _training(case, _through_api(case, settings.backend)), _training(case, peer)
    got, (output, gradients) = _require_training(case, ours), theirs()
    gap = max(require_same(f"{who}'s result", *pair) for pair in zip((output, *gradients), got, strict=True))
    del got, output, gradients
    of_theirs, of_ours = median_seconds(settings.repeats, theirs, ours)
    return of_theirs, of_ours, gap


def sdpa_gradients(settings: Settings) -> Measured:
    """Forward and backward by autograd, against the same through torch's attention and its Khatri-Rao products."""
    ratios, parts, gaps = [], [], []
    values: dict[str, float] = {}
    for n in (48, 96) if settings.quick else (240, 480):
        case = make_case(EXACT_ORDER_2, n, 64, settings.backend)
        theirs, ours, gap = _against_peer(case, settings, _materialised, "torch")
        gaps.append(gap)
        ratios.append((theirs / ours, n))
        parts.append(f"n = {n}: {time_text(ours)} here, {time_text(theirs)} torch")
        values |= {f"ratio_{n}": theirs / ours, f"seconds_{n}": ours, f"torch_seconds_{n}": theirs}
    return Measured(
        _ratios_text(ratios),
        ">= 1.20 x each",
        all(ratio >= 1.2 for ratio, _ in ratios),
        f"{'; '.join(parts)}; outputs and gradients differ by {max(gaps):.1e} of the largest",
        values,
    )


def simplicial_gradients(settings: Settings) -> Measured:
    """Forward and backward by autograd, against the plain order-2 function of the package simplicial-attention."""
    target = ">= 5.00 x its speed"
    try:
        peer: Attend = import_module("simplicial_attention").naive_two_simplicial_attend
    except ImportError as error:
        return Measured("-", target, None, f"{error}: pip install {_SIMPLICIAL}")
    case = make_case(EXACT_ORDER_2, 64 if settings.quick else 480, 64, settings.backend)
    fewer = replace(settings, repeats=min(settings.repeats, _SIMPLICIAL_REPEATS))
    theirs, ours, gap = _against_peer(case, fewer, peer, "simplicial-attention")
    return Measured(
        f"{theirs / ours:.2f} x its speed",
        target,
        theirs / ours >= 5.0,
        f"{case_text(case)}: {time_text(ours)} here, {time_text(theirs)} naive; outputs and gradients differ by "
        f"{gap:.1e} of the largest; installed: {_versions('simplicial-attention', 'einops', 'opt_einsum')}",
        {"ratio": theirs / ours, "seconds": ours, "simplicial_seconds": theirs},
    )


def _versions(*packages: str) -> str:
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            found.append(f"{package} of unknown version")
    return ", ".join(found)


def bfloat16_forward(settings: Settings) -> Measured:
    """Exact order 2 in bfloat16, against the same numbers in float32."""
    case = make_case(EXACT_ORDER_2, 96 if settings.quick else 480, 64, settings.backend)
    half = with_arrays(case.operands, lambda x: x.bfloat16())
    wide = replace(case, operands=with_arrays(half, lambda x: x.float()))
    problem = replace(case.plan.problem, dtype="bfloat16")
    narrow = Case(half, prepare(default_registry(), problem, "torch", settings.backend), case.cotangent)
    require_forward(wide)
    expected, got = (as_numpy(c.forward().output).astype(np.float64) for c in (wide, narrow))
    error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
    if not error < 1e-2:
        raise Disagreement(f"the relative error of bfloat16 is {error:.1e}, allowed 1e-02")
    of_wide, of_narrow = median_seconds(settings.repeats, wide.forward, narrow.forward)
    return Measured(
        f"{of_wide / of_narrow:.2f} x float32",
        ">= 1.00 x",
        of_wide >= of_narrow,
        f"{case_text(narrow)}: {time_text(of_narrow)}, float32 {time_text(of_wide)}; relative error {error:.1e}, "
        "below 1e-02",
        {"ratio": of_wide / of_narrow, "seconds": of_narrow, "float32_seconds": of_wide, "error": error},
    )


def causal_forward(settings: Settings) -> Measured:
    """Exact order 2: the causal mask, which leaves a third of the tuples, against the full one."""
    n, target = 144 if settings.quick else 960, 0.55
    full, causal = (
        make_case(spec, n, 64, settings.backend) for spec in (EXACT_ORDER_2, AttentionSpec(order=2, mask=Causal()))
    )
    require_forward(full)
    require_forward(causal)
    of_full, of_causal = median_seconds(settings.repeats, full.forward, causal.forward)
    return Measured(
        f"{of_causal / of_full:.2f} of full",
        f"<= {target:.2f}",
        of_causal <= target * of_full,
        f"{case_text(causal)}: causal {time_text(of_causal)}, full {time_text(of_full)}",
        {"ratio": of_causal / of_full, "seconds": of_causal, "full_seconds": of_full},
    )


def window_slope(settings: Settings) -> Measured:
    """Exact order 2 in windows of 64: exponent of the time in n; the count of operations makes 1."""
    sizes = (256, 384, 512) if settings.quick else (1024, 1448, 2048, 2896, 4096)
    spec = AttentionSpec(order=2, mask=Window(sizes=(64, 64)))
    cases = [make_case(spec, n, 64, settings.backend) for n in sizes]
    for case in cases:
        require_forward(case)
    times = median_seconds(settings.repeats, *(case.forward for case in cases))
    return measured_slope(sizes, times, 1.15, "exact, order 2, windows of 64 and 64")


def polynomial_forward(settings: Settings) -> Measured:
    """Polynomial order 2, degree 2, as a fraction of torch's own matrix product."""
    case = make_case(DEGREE_2, 2048 if settings.quick else 16384, 64, settings.backend, SCORE_RMS)
    return _against_product(case, settings, 0.45, require_forward(case, rows=1))


def polynomial_gradients(settings: Settings) -> Measured:
    """Polynomial order 2, degree 2: forward and backward by autograd, over the forward alone."""
    case = make_case(DEGREE_2, 2048 if settings.quick else 16384, 64, settings.backend, SCORE_RMS)
    attend, target, operands = _through_api(case, settings.backend), 4.0, case.operands
    both = _training(case, attend)
    _require_training(case, both)
    forward, whole = median_seconds(
        settings.repeats, lambda: attend(operands.query, operands.keys, operands.values), both
    )
    return Measured(
        f"{whole / forward:.2f} x forward",
        f"<= {target:.1f} x",
        whole <= target * forward,
        f"{case_text(case)}: forward {time_text(forward)}, forward and backward {time_text(whole)}",
        {"ratio": whole / forward, "forward_seconds": forward, "seconds": whole},
    )


def overhead(settings: Settings) -> Measured:
    """What `attend` adds on tensors to a direct call of its kernel, on 16 x 16 operands."""
    return benchmark_rows.overhead(settings, target=200e-6)


_OWN: dict[str, Callable[[Settings], Measured]] = {
    "sdpa-forward": sdpa_forward,
    "sdpa-memory": sdpa_memory,
    "sdpa-gradients": sdpa_gradients,
    "simplicial-gradients": simplicial_gradients,
    "bfloat16-forward": bfloat16_forward,
    "causal-forward": causal_forward,
    "window-slope": window_slope,
    "polynomial-forward": polynomial_forward,
    "polynomial-gradients": polynomial_gradients,
    "exact-forward": exact_forward,
    "overhead": overhead,
}
_NOT_HERE = ("exact-against-torch", "plugins")
_SHARED = {name: row for name, row in benchmark_rows.ROWS.items() if name not in (*_OWN, *_NOT_HERE)}
ROWS = {name: on_all_cores(row) for name, row in (_OWN | _SHARED).items()}
_OF_THE_PROCESS = ("exact-memory", "import-time")
CUDA_ROWS = {name: row for name, row in ROWS.items() if name not in _OF_THE_PROCESS}
