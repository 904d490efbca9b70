"""The rows of the benchmark about the polynomial method that take minutes: each is measured only when it is named.

The inputs are seeded normal or uniform tokens, a different array in every place. Exact times are those of a few exact
rows, times n over their number.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from korder import api
from korder.dispatch.choosing import Candidate, Choice, ranked
from korder.dispatch.registry import default_registry
from korder.dispatch.request import make_request
from korder.errors import AccuracyError
from korder.experiments.benchmark_cases import Case, Disagreement, as_numpy, make_case, place_of, placed
from korder.experiments.benchmark_figures import (
    Measured,
    Settings,
    measured_slope,
    median_seconds,
    mib_text,
    run_python,
    time_text,
)
from korder.experiments.inputs import FloatArray, rescaled, score_rms
from korder.result import Result
from korder.spec import AttentionSpec, Auto, Causal, Exact, Polynomial, Split

TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Tokens:
    """Query, keys and values of one problem, in the kind and on the device of a backend."""

    query: Any
    keys: tuple[Any, ...]
    values: tuple[Any, ...]

    def rows(self, count: int) -> Tokens:
        """Return the first queries with all keys."""
        return Tokens(self.query[:count], self.keys, self.values)

    def attend(self, method: Any, backend: str) -> Result:
        """Return the result by a method."""
        spec = AttentionSpec(order=len(self.keys), method=method)
        return api.attend_result(self.query, self.keys, self.values, spec=spec, backend=backend)


def make_tokens(
    backend: str, order: int, n: int, width: int, rms: float, *, heavy: tuple[int, ...] = (), factor: float = 1.0,
    seed: int = 0, uniform: bool = False, dtype: str = "float32",
) -> Tokens:  # fmt: skip
    """Return n tokens with scores of the size `rms`; then `heavy[t]` keys of mode t are made `factor` times larger."""
    generator = np.random.default_rng(seed)

    def draw() -> FloatArray:
        shape = (n, width)
        return (generator.uniform(-1.0, 1.0, shape) if uniform else generator.standard_normal(shape)).astype(dtype)

    query, keys, values = draw(), [draw() for _ in range(order)], [draw() for _ in range(order)]
    present = score_rms(query, tuple(keys), AttentionSpec(order=order).score_factor(width))
    # shared evenly, so that no operand alone decides which keys stand out
    share = (rms / present) ** (1.0 / (order + 1))
    query, keys = rescaled(query, 1.0, share, "rms"), [rescaled(key, 1.0, share, "rms") for key in keys]
    for key, count in zip(keys, heavy, strict=False):
        key[generator.choice(n, count, replace=False)] *= factor
    kind, device = place_of(backend)
    return Tokens(
        placed(query, kind, device),
        tuple(placed(key, kind, device) for key in keys),
        tuple(placed(value, kind, device) for value in values),
    )


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    as_numpy(found.output[:1])  # a device that works behind the caller has finished once a number is here
    return time.perf_counter() - start, found


def _bounds(found: Result) -> FloatArray:
    assert found.certificate is not None
    return as_numpy(found.certificate.bound)


def _against_exact(tokens: Tokens, method: Any, settings: Settings, rows: int, target: float, what: str) -> Measured:
    """Time one call by a method, compare its first rows with exact ones, and its time with theirs times n / rows."""
    n = tokens.query.shape[0]
    tokens.rows(1).attend(Exact(), settings.backend)  # what a first call of a process pays
    seconds, found = _seconds(lambda: tokens.attend(method, settings.backend))
    of_rows, exact = _seconds(lambda: tokens.rows(rows).attend(Exact(), settings.backend))
    exact_seconds = of_rows * n / rows
    error = np.abs(as_numpy(found.output)[:rows] - as_numpy(exact.output)).max(axis=-1)
    bound = _bounds(found)
    if not (error <= bound[:rows]).all():
        raise Disagreement(f"a row is off by {error.max():.2e}, and its certificate says {bound[:rows].min():.2e}")
    spread = float(np.prod([np.ptp(as_numpy(value), axis=0).max() for value in tokens.values]))
    provenance = found.provenance
    assert provenance is not None
    tries = f" after {len(provenance.replanned)} others" if provenance.replanned else ""
    return Measured(
        f"{exact_seconds / seconds:.0f} x faster than exact",
        f">= {target:.0f} x",
        exact_seconds / seconds >= target,
        f"{provenance.backend}, {what}, tolerance {TOLERANCE:g}: {provenance.plan.name}{tries}, {time_text(seconds)}; "
        f"certificate {bound.max():.1e}, error of {rows} rows {error.max():.1e}, values span {spread:.1f}; "
        f"exact by {rows} rows: {time_text(exact_seconds)}",
        {
            "ratio": exact_seconds / seconds, "seconds": seconds, "exact_seconds": exact_seconds,
            "bound": float(bound.max()), "error": float(error.max()), "span": spread,
        },
    )  # fmt: skip


def split(settings: Settings) -> Measured:
    """`Split` where 8 keys stand 20 times above the rest, against the exact method."""
    n = 1024 if settings.quick else 8192
    tokens = make_tokens(settings.backend, 2, n, 16, 0.25, heavy=(8,), factor=20.0)
    what = f"order 2, n = {n}, d = 16, scores of rms 0.25, 8 keys 20 times larger"
    return _against_exact(tokens, Split(tolerance=TOLERANCE), settings, 64, 20.0, what)


def tolerance(settings: Settings) -> Measured:
    """A tolerance for 65536 tokens: the degree found by itself, against the exact method."""
    n = 4096 if settings.quick else 65536
    tokens = make_tokens(settings.backend, 2, n, 16, 0.3, uniform=True)
    what = f"order 2, n = {n}, d = 16, uniform, scores of rms 0.3"
    return _against_exact(tokens, Polynomial(tolerance=TOLERANCE), settings, 4, 1000.0, what)


def causal_slope(settings: Settings) -> Measured:
    """Causal polynomial order 2: exponent of the time in n, and the time over that of the full mask."""
    exponents = (9, 10, 11) if settings.quick else (12, 13, 14, 15, 16)
    everything = AttentionSpec(order=2, method=Polynomial(degree=2))
    spec = everything.model_copy(update={"mask": Causal()})
    times, ratio, case = [], 0.0, None
    for exponent in exponents:
        case = make_case(spec, 2**exponent, 64, settings.backend, 0.3)
        full = make_case(everything, 2**exponent, 64, settings.backend, 0.3)
        if exponent == exponents[0]:
            _require_last_row(case, full)
        of_causal, of_full = median_seconds(min(settings.repeats, 3), case.forward, full.forward)
        times.append(of_causal)
        ratio = of_causal / of_full
    assert case is not None
    backend = case.prepared.selection.backend.name
    workspace = getattr(case.prepared.kernel, "workspace_bytes", case.plan.cost.peak_memory)
    found = measured_slope([2**exponent for exponent in exponents], times, 1.1, f"{backend}, causal, degree 2")
    assert case.plan.polynomial is not None
    states = 8.0 * 2 ** exponents[-1] * 2 * case.plan.polynomial.features * (case.plan.problem.value_width + 1)
    return Measured(
        found.text,
        found.target,
        found.met,
        f"{found.detail}; {ratio:.1f} times the full mask at the largest n; workspace {mib_text(workspace)}, where a "
        f"state for every token would take {mib_text(states)}",
        {**found.values, "over_full": ratio, "workspace_bytes": float(workspace), "states_bytes": states},
    )


def _require_last_row(causal: Case, full: Case) -> None:
    """The last query sees everything under both masks."""
    rows = [as_numpy(case.forward().output)[..., -1, :] for case in (causal, full)]
    gap = float(np.abs(rows[0] - rows[1]).max())
    if not gap <= 1e-5:
        raise Disagreement(f"the last causal row is off the full one by {gap:.1e}")


_LARGE_PROGRAM = """
import json, sys, time
import numpy as np
from korder import AttentionSpec, Exact, Polynomial, attend_result
from korder.experiments.benchmark_cases import as_numpy
from korder.experiments.benchmark_memory import peak_resident
from korder.experiments.benchmark_polynomial import make_tokens
n, backend = int(sys.argv[1]), sys.argv[2]
tokens = make_tokens(backend, 2, n, 64, 0.3)
tokens.rows(8).attend(Polynomial(degree=2), backend)
spec = AttentionSpec(order=2, method=Polynomial(degree=2))
start = time.perf_counter()
found = attend_result(tokens.query, tokens.keys, tokens.values, spec=spec, backend=backend)
row = as_numpy(found.output)[n // 2]
seconds = time.perf_counter() - start
few = tokens.rows(n // 2 + 1)
few = type(tokens)(few.query[n // 2 :], few.keys, few.values)
again = few.attend(Polynomial(degree=2), backend)
gap = float(np.abs(as_numpy(again.output)[0] - row).max())
bound = float(as_numpy(found.certificate.bound).max())
print(json.dumps([seconds, peak_resident(), gap, bound, found.provenance.backend]))
"""


def million(settings: Settings) -> Measured:
    """Degree 2 on 1048576 tokens in a process of its own: its peak memory, with inputs, output and certificate."""
    n, target = 2**14 if settings.quick else 2**20, 3 * 2**30
    seconds, peak, gap, bound, backend = json.loads(run_python(_LARGE_PROGRAM, str(n), settings.backend))
    if not gap <= 1e-5:
        raise Disagreement(f"a row of its own is off by {gap:.1e}")
    return Measured(
        f"{peak / 2**30:.2f} GiB",
        f"<= {target / 2**30:.0f} GiB",
        peak <= target,
        f"{backend}, order 2, degree 2, n = {n}, d = e = 64, float32: {time_text(seconds)} with its certificate, which "
        f"says {bound:.1e}; peak of the process, inputs and output of {mib_text(6 * 4 * 64 * n)} included",
        {"peak_bytes": peak, "seconds": seconds, "bound": bound},
    )


def bound_over_error(settings: Settings) -> Measured:
    """Certificate over true error: medians over rows, degree 2, scores of rms 0.25."""
    medians, target = {}, 100.0
    for order, n, width in itertools.product((1, 2), (8, 64) if settings.quick else (8, 64, 256), (4, 8, 16, 64)):
        ratios = []
        for seed in range(3 if settings.quick else 10):
            tokens = make_tokens(settings.backend, order, n, width, 0.25, seed=seed, dtype="float64")
            found = tokens.attend(Polynomial(degree=2), settings.backend)
            exact = tokens.attend(Exact(), settings.backend)
            error = np.abs(as_numpy(found.output) - as_numpy(exact.output)).max(axis=-1)
            ratio = _bounds(found) / error
            if not (ratio >= 1.0).all():
                raise Disagreement(f"a certificate is {ratio.min():.3f} of the error, order {order}, n = {n}")
            ratios.append(float(np.median(ratio)))
        medians[order, n, width] = statistics.median(ratios)
    worst = max(found for (order, n, width), found in medians.items() if order == 2 and width <= 8 and n <= 16)
    table = "; ".join(f"order {o} n {n} d {d}: {found:.0f}" for (o, n, d), found in medians.items())
    return Measured(
        f"{worst:.0f} for order 2, d <= 8, n <= 16", f"<= {target:.0f}", worst <= target, table,
        {f"order_{o}_n_{n}_d_{d}": found for (o, n, d), found in medians.items()},
    )  # fmt: skip


GRID = ((1, 2), (64, 256, 1024), (4, 16, 32), (0.1, 0.4), (0, 3))
QUICK_GRID = ((2,), (64, 256), (4, 16), (0.1, 0.4), (0, 3))
_WORTH_RUNNING = 8.0
"""A candidate predicted to take more than so many times the choice is not run."""
_CANDIDATES = 6


def auto(settings: Settings) -> Measured:
    """`Auto` over the best of its candidates, on a grid of orders, lengths, widths, sizes of scores and heavy keys."""
    ratios = {}
    for place, (order, n, width, rms, heavy) in enumerate(itertools.product(*(QUICK_GRID if settings.quick else GRID))):
        tokens = make_tokens(settings.backend, order, n, width, rms, heavy=(heavy,) * order, factor=15.0, seed=place)
        ratios[order, n, width, rms, heavy] = _choice_over_best(tokens, settings.backend)
    good = sum(ratio <= 1.5 for ratio, _ in ratios.values())
    problem, (worst, text) = max(ratios.items(), key=lambda pair: pair[1][0])
    middle = statistics.median(ratio for ratio, _ in ratios.values())
    return Measured(
        f"{good} of {len(ratios)} within 1.5 x",
        "all within 1.5 x",
        good == len(ratios),
        f"tolerance 1e-2, float32; median {middle:.2f}, worst {worst:.2f} for order {problem[0]}, n = {problem[1]}, "
        f"d = {problem[2]}, rms {problem[3]}, {problem[4]} heavy keys a mode: {text}",
        {"within": float(good), "problems": float(len(ratios)), "worst": worst, "median": middle},
    )


def _choice_over_best(tokens: Tokens, backend: str) -> tuple[float, str]:
    """Return the time of the choice over that of the best candidate, and which they are."""
    spec = AttentionSpec(order=len(tokens.keys), method=Auto(tolerance=1e-2))
    known = api.measure(tokens.query, tokens.keys, tokens.values, spec=spec)
    _, request = make_request(tokens.query, tokens.keys, tokens.values, spec=spec, backend=backend, statistics=known)
    candidates, rejected = ranked(default_registry(), request.problem, request.array_kind, backend)
    choice = Choice(api.attend_result, request, tuple(candidates), tuple(rejected))
    near = [x for x in candidates if x.seconds < _WORTH_RUNNING * candidates[0].seconds + 2e-3][:_CANDIDATES]
    rounds = [[_time_of(choice, candidate) for candidate in near] for _ in range(3)]  # in turn: a machine has phases
    times = [min(found) for found in zip(*rounds, strict=True)]
    best = min(range(len(near)), key=lambda place: times[place])
    return times[0] / times[best], f"{near[0].plan.name} chosen, {near[best].plan.name} faster"


def _time_of(choice: Choice, candidate: Candidate) -> float:
    """Return the seconds that a candidate takes; what misses the tolerance takes for ever."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _seconds(lambda: choice.run(candidate))[0]
    except AccuracyError:
        return float("inf")


LONG_ROWS: dict[str, Callable[[Settings], Measured]] = {
    "split": split,
    "tolerance": tolerance,
    "causal-slope": causal_slope,
    "million": million,
    "bound-over-error": bound_over_error,
    "auto": auto,
}
"""Rows that are measured only when they are named."""
