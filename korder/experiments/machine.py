"""What a figure was measured on: cores, instruction set, versions, BLAS kernel, and the rate of a matrix product."""

from __future__ import annotations

import os
import platform
import time
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata
from typing import Any

import numpy as np

PACKAGES = ("korder", "numpy", "pydantic", "opt_einsum", "torch", "jax")
_MISLEADING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def describe_machine() -> dict[str, Any]:
    """Return cores, instruction set, library versions and the BLAS kernel, as plain values."""
    return {
        "cores": usable_cores(),
        "machine": platform.machine(),
        "instruction_set": instruction_set(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "blas": blas_kernel(),
        "warnings": misleading_settings(),
    }


def usable_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def instruction_set() -> str:
    """Return the SIMD extensions that NumPy found on this processor, widest last."""
    found: Any = np.show_config(mode="dicts")
    simd = found.get("SIMD Extensions", {})
    return " ".join([*simd.get("baseline", ()), *simd.get("found", ())]) or "unknown"


def blas_kernel() -> str:
    """Return which BLAS NumPy multiplies with, its kernel and threads; less where threadpoolctl is not installed."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return "unknown (threadpoolctl is not installed)"
    pools = [pool for pool in threadpool_info() if pool.get("user_api") == "blas"]
    parts = (
        f"{p['internal_api']} {p.get('version')} {p.get('architecture', '')}, {p['num_threads']} threads" for p in pools
    )
    return "; ".join(parts) or "unknown"


def one_blas_thread() -> AbstractContextManager[object]:
    """Keep NumPy's products to one thread, where threadpoolctl is installed; else do nothing.

    Thin products gain nothing from threads that wait for each other: measured 6 times slower on two busy cores.
    """
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return nullcontext()
    limits: AbstractContextManager[object] = threadpool_limits(limits=1, user_api="blas")
    return limits


def misleading_settings() -> list[str]:
    """Return one sentence per environment variable that changes how fast NumPy multiplies."""
    return [
        f"{name}={os.environ[name]} is set and changes the speed of NumPy's matrix products; unset it to measure."
        for name in _MISLEADING
        if os.environ.get(name)
    ]


def matmul_rate(dtype: str, size: int = 1024, repeats: int = 3) -> float:
    """Return the best rate of a size^3 matrix product in flop per second, by NumPy in this process."""
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal((size, size)).astype(dtype) for _ in range(2))
    out = left @ right
    best = min(_seconds_of_product(left, right, out) for _ in range(repeats))
    return 2.0 * size**3 / best


def busy_warning() -> list[str]:
    """Return a sentence if other processes want the cores at this moment, which makes every figure too low."""
    if not hasattr(os, "getloadavg"):
        return []
    load, cores = os.getloadavg()[0], usable_cores()
    if load <= 0.5 * cores:
        return []
    return [f"other processes are busy (load {load:.1f} on {cores} cores); measure again on a quiet machine."]


def _seconds_of_product(left: Any, right: Any, out: Any) -> float:
    start = time.perf_counter()
    np.matmul(left, right, out=out)
    return time.perf_counter() - start


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
