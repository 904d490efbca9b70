"""The polynomial method on several threads: the same bits from any number, kernels that are shared, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from polynomial_reference import every_array, random_polynomial

from korder.spi import NEEDS, Kernel, OutputGradients
from korder_native import polynomial

CASE = random_polynomial(
    2,
    rows=230,
    lengths=(210, 190),
    width=6,
    value_width=19,
    batch=1,
    heads=(2, 1),
    key_masks="group",
    biases=("key", None),
).cast("float32")


def results(kernel: Kernel, case: Any = CASE) -> dict[str, Any]:
    saved = kernel.forward(case.operands, save=True)
    grads = OutputGradients(np.cos(saved.output), np.sin(saved.lse))
    found = kernel.backward(case.operands, saved, grads, needs=NEEDS)
    return {**every_array(saved), **every_array(found)}


def assert_same_bits(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, array in one.items():
        assert np.array_equal(array, other[name]), name


def test_any_number_of_threads_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share features or tokens, and each sum has one owner."""
    kernel, found = CASE.kernel(), []
    for threads in (1, 2, 5):
        monkeypatch.setattr(polynomial, "thread_count", lambda threads=threads: threads)
        found += [results(kernel), results(kernel)]
    for other in found[1:]:
        assert_same_bits(found[0], other)


def test_python_threads_may_share_a_kernel() -> None:
    kernel = CASE.kernel()
    wanted = results(kernel)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: results(kernel), range(8)):
            assert_same_bits(wanted, found)


MEASURE = """
import sys
import numpy as np
from polynomial_reference import random_polynomial
from korder.experiments.benchmark_memory import with_growth
options = {options}
for rows, degree in ((64, 2), ({rows}, {degree})):
    case = random_polynomial(rows=rows, batch=1, heads=(2, 1), degree=degree, scale=0.01, **options).cast("{dtype}")
    kernel = case.kernel()
    found, growth = with_growth(lambda: kernel.forward(case.operands, save=False))
arrays = (found.output, found.lse, found.normaliser, found.moments, found.magnitude)
print(kernel.workspace_bytes, growth - sum(x.nbytes for x in arrays))
"""
SIZES = {
    "rows": (60000, 2, "float32", {"order": 2, "width": 4, "value_width": 8, "lengths": (900, 1100)}),
    "features": (300, 4, "float32", {"order": 1, "width": 24, "value_width": 32, "lengths": (200,)}),
    "features_of_modes": (300, 4, "float64", {"order": 3, "width": 16, "value_width": 16, "lengths": (99, 80, 70)}),
    "tokens": (9000, 3, "float32", {"order": 2, "width": 12, "value_width": 64, "lengths": (8000, 9000)}),
    "weight": (
        9000,
        4,
        "float64",
        {"order": 3, "width": 8, "value_width": 24, "lengths": (800, 900, 700), "weight": "full"},
    ),
}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("name", SIZES)
def test_memory_is_what_is_said(name: str) -> None:
    """Declared is at most a fifth too little, and not twice too much."""
    from korder.experiments.benchmark_memory import RETURNS_MEMORY

    rows, degree, dtype, options = SIZES[name]
    program = MEASURE.format(rows=rows, degree=degree, dtype=dtype, options=options)
    here = os.path.dirname(__file__)
    path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **RETURNS_MEMORY, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.returncode == 0, run.stderr
    declared, measured = map(int, run.stdout.split())
    assert measured <= 1.2 * declared, f"{measured} bytes measured, {declared} declared"
    assert declared <= 2 * measured, f"{measured} bytes measured, {declared} declared"
