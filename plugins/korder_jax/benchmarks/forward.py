"""Speed and memory of the exact forward of order 2 against `jax.jit` of the plain einsum form; each in its own process.

    python benchmarks/forward.py [n]

Prints no speed unless the outputs agree. Memory is the peak of the resident set during a call, above that before it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 64
CALLS = 7
AGREE = 1e-5
Array = Any


def operands(n: int) -> list[Array]:
    """Return query, keys and values, (n, 64) each, float32."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, WIDTH)).astype("float32") for _ in range(5)]


def plain(query: Array, first: Array, second: Array, one: Array, two: Array) -> Array:
    """Return the output by its definition."""
    import jax
    import jax.numpy as jnp

    scores = jnp.einsum("id,jd,kd->ijk", query * WIDTH**-0.5, first, second)
    weights = jax.nn.softmax(scores.reshape(len(query), -1), axis=-1).reshape(scores.shape)
    return jnp.einsum("ijk,je,ke->ie", weights, one, two)


def tiled(query: Array, first: Array, second: Array, one: Array, two: Array) -> Array:
    """Return the output by korder."""
    import korder

    return korder.attend(query, (first, second), (one, two), backend="jax")


def resident(name: str) -> int:
    """Return VmRSS or VmHWM of this process in bytes; Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def measure(which: str, n: int, path: str) -> None:
    """Print the seconds of the first and of the best later call, and the bytes of a call; save the output."""
    import jax

    function: Callable[..., Array] = jax.jit({"plain": plain, "tiled": tiled}[which])
    given = [jax.numpy.asarray(x) for x in operands(n)]
    start = time.perf_counter()
    compiled = function.lower(*given).compile()
    compiling = time.perf_counter() - start
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    np.save(path, np.asarray(compiled(*given)))
    peak = resident("VmHWM") - before
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        compiled(*given).block_until_ready()
        seconds.append(time.perf_counter() - start)
    print(compiling, min(seconds), peak)


def main(n: int) -> int:
    """Run both and print their ratios."""
    found, outputs = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for which in ("plain", "tiled"):
            path = f"{folder}/{which}.npy"
            command = [sys.executable, __file__, which, str(n), path]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[which] = [float(word) for word in run.stdout.split()]
            outputs.append(np.load(path))
    error = float(np.max(np.abs(outputs[0] - outputs[1])))
    if not error <= AGREE * float(np.max(np.abs(outputs[0]))):
        print(f"the outputs differ by {error:.1e}: no speed to speak of")
        return 1
    print(f"order 2, n = {n}, d = e = {WIDTH}, float32; outputs agree to {error:.1e}")
    for which, (compiling, seconds, peak) in found.items():
        print(f"{which}: {1e3 * seconds:8.1f} ms   {peak / 2**20:8.1f} MiB   compiled in {compiling:.1f} s")
    speed, memory = (found["plain"][index] / max(found["tiled"][index], 1e-9) for index in (1, 2))
    print(f"speed ratio {speed:.2f}, memory ratio {memory:.1f}")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 2:
        measure(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) == 2 else 480))
