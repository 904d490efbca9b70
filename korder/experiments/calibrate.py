"""Measures what `Split` and `Auto` predict with: how fast the backends of this machine do each kind of work."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from korder import api
from korder.dispatch.rates import Rates, rates_file
from korder.errors import OperandError
from korder.experiments.progress import Progress
from korder.planning.plan import Plan
from korder.spec import AttentionSpec, Causal, Exact, Polynomial

Maker = Callable[[np.ndarray], Any]
REPEATS = 5


def _tensor(array: np.ndarray, device: str = "cpu") -> Any:
    import torch

    return torch.from_numpy(array).to(device)


def _jax_array(array: np.ndarray) -> Any:
    import jax

    return jax.numpy.asarray(array)


MAKERS: dict[str, Maker] = {
    "numpy": lambda array: array,
    "torch": _tensor,
    "native": lambda array: array,
    "cuda": partial(_tensor, device="cuda"),
    "jax": _jax_array,
}
"""How each backend that is measured takes an array; one that cannot run here is left out."""


def calibrate(progress: Progress | None = None) -> dict[str, Rates]:
    """Return the rates of the backends that can run here, two digits each.

    Cost:  some ten seconds a backend.
    """
    progress = progress or Progress()
    usable = {status.name for status in api.backends() if status.available}
    found = {}
    for backend, maker in MAKERS.items():
        if backend in usable:
            progress.stage(f"measuring {backend}")
            found[backend] = _rates(backend, maker)
    return found


def _rates(backend: str, maker: Maker) -> Rates:
    small = AttentionSpec(order=2, method=Polynomial(degree=2), scale=0.1)
    call, _ = _timed(backend, maker, small, n=8, width=4)
    exact_call, _ = _timed(backend, maker, AttentionSpec(order=2, method=Exact()), n=8, width=4)
    exact, exact_plan = _timed(backend, maker, AttentionSpec(order=2, method=Exact()), n=300, width=64)
    row, _ = _timed(backend, maker, AttentionSpec(order=2, method=Exact()), n=300, width=64, rows=1)
    thin, thin_plan = _timed(backend, maker, AttentionSpec(order=2, method=Exact()), n=300, width=1)
    full = AttentionSpec(order=2, method=Polynomial(degree=4), scale=0.1)
    polynomial, polynomial_plan = _timed(backend, maker, full, n=4096, width=16)
    many = AttentionSpec(order=2, method=Polynomial(degree=6), scale=0.1)
    wide, wide_plan = _timed(backend, maker, many, n=512, width=16)
    causal = AttentionSpec(order=2, method=Polynomial(degree=2), scale=0.1, mask=Causal())
    running, running_plan = _timed(backend, maker, causal, n=512, width=16)

    def rate(work: float, seconds: float, overhead: float) -> float:
        return float(f"{work / max(seconds - overhead, 0.1 * seconds):.1e}")

    exponentials = rate(thin_plan.cost.exponentials, thin, exact_call)
    products = max(exact - exact_plan.cost.exponentials / exponentials, 0.2 * exact)
    return Rates(
        exact=rate(exact_plan.cost.flops, products, exact_call),
        exponentials=exponentials,
        polynomial=rate(polynomial_plan.cost.flops, polynomial, call),
        wide=rate(wide_plan.cost.flops, wide, call),
        running=rate(running_plan.cost.flops, running, call),
        rows=max(1.0, float(f"{300 * (row - exact_call) / max(exact - exact_call, 0.1 * exact):.1e}")),
        exact_call=float(f"{exact_call:.1e}"),
        call=float(f"{call:.1e}"),
    )


def _timed(
    backend: str,
    maker: Maker,
    spec: AttentionSpec,
    *,
    n: int,
    width: int,
    rows: int | None = None,
) -> tuple[float, Plan]:
    """Return the median seconds of a call of n tokens, or some rows of it, after a first one, and its plan."""
    rng = np.random.default_rng(0)
    query, *rest = (maker(rng.normal(size=(n, width)).astype("float32")) for _ in range(2 * spec.order + 1))
    operands = (query[:rows], tuple(rest[: spec.order]), tuple(rest[spec.order :]))
    result = api.attend_result(*operands, spec=spec, backend=backend)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        again = api.attend_result(*operands, spec=spec, backend=backend)
        float(again.output[0, 0])  # a device that works behind the caller has finished once a number is here
        seconds.append(time.perf_counter() - start)
    assert result.provenance is not None
    return statistics.median(seconds), result.provenance.plan


def write_rates(rates: dict[str, Rates], path: Path | None = None) -> Path:
    """Write rates where predictions look for them, whole or not at all; return the file.

    Raises:
        OperandError: The file cannot be written.
    """
    path = path or rates_file()
    text = json.dumps({backend: asdict(found) for backend, found in rates.items()}, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except OSError as error:
        raise OperandError(
            f"the rates cannot be written to {path}.",
            code="rates-not-written",
            expected="a directory that can be written to",
            got=f"{type(error).__name__}: {error.strerror or error}",
            hint="KORDER_RATES names another file.",
        ) from None
    return path
