"""Threads: how many, the same bits from the same number, several Python threads at once, and processes that fork."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from reference import assert_backward, every_gradient, random_case, upstream

import korder
from korder.spi import NEEDS, OutputGradients
from korder_native import arrays, exact


def results(case: Any) -> list[Any]:
    kernel = case.kernel()
    saved = kernel.forward(case.operands, save=True)
    found = kernel.backward(case.operands, saved, OutputGradients(*upstream(case)), needs=NEEDS)
    return [saved.output, saved.lse, *every_gradient(found)]


@pytest.mark.parametrize("heads", [(1, 1), (8, 4)])
def test_the_same_threads_give_the_same_bits_and_others_the_same_numbers(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = random_case(90, (40, 90), width=32, value_width=24, heads=heads, mask=korder.Causal()).cast("float32")
    by_threads = {}
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(exact, "thread_count", lambda threads=threads: threads)
        first, again = results(case), results(case)
        assert all(np.array_equal(x, y) for x, y in zip(first, again, strict=True))
        by_threads[threads] = first
    for found in by_threads.values():
        for got, wanted in zip(found, by_threads[1], strict=True):
            assert np.allclose(got, wanted, rtol=0, atol=2e-5 * np.max(np.abs(wanted)))


def test_python_threads_may_share_a_kernel() -> None:
    case = random_case(40, (20, 40), width=16, value_width=16).cast("float32")
    kernel = case.kernel()
    wanted = kernel.forward(case.operands, save=False).output
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: kernel.forward(case.operands, save=False).output, range(24)):
            assert np.array_equal(found, wanted)


def test_other_python_threads_run_meanwhile() -> None:
    case = random_case(400, (200, 400), width=32, value_width=32, batch=1, heads=(1, 1)).cast("float32")
    kernel, stop, seen = case.kernel(), threading.Event(), []

    def count() -> None:
        while not stop.is_set():
            seen.append(time.perf_counter())
            time.sleep(1e-3)

    other = threading.Thread(target=count)
    other.start()
    start = time.perf_counter()
    kernel.forward(case.operands, save=False)
    end = time.perf_counter()
    stop.set()
    other.join()
    assert sum(start < moment < end for moment in seen) >= 3


@pytest.mark.parametrize("number", [1, 2])
def test_openmp_s_variable_sets_the_threads(number: int) -> None:
    program = "from korder_native.arrays import thread_count; print(thread_count())"
    environment = {**os.environ, "OMP_NUM_THREADS": str(number)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert int(run.stdout) == min(number, len(os.sched_getaffinity(0)))


def test_pytorch_s_number_counts_where_it_is_loaded() -> None:
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert arrays.thread_count() == 1
    finally:
        torch.set_num_threads(before)


def test_a_worker_of_a_data_loader_may_attend() -> None:
    pytest.importorskip("torch")
    program = """
import numpy as np, torch, korder
x = torch.randn(5, 1, 2, 120, 32)
class Rows(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return korder.attend(x[0], (x[1], x[2]), (x[3], x[4]), backend="native")
wanted = Rows()[0]  # the parent has its threads before it forks
for found in torch.utils.data.DataLoader(Rows(), num_workers=2, batch_size=None, multiprocessing_context="fork"):
    assert torch.allclose(found, wanted, atol=1e-5)
print("done")
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "done", run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_threads_that_it_has_not() -> None:
    program = """
import os, numpy as np
from reference import random_case
from korder_native import arrays, exact
threads, exact.thread_count = exact.thread_count, lambda: 3  # so that there are threads to be missed
case = random_case(90, (40, 90), width=32, value_width=24).cast("float32")
wanted = case.kernel().forward(case.operands, save=False).output
exact.thread_count = threads
if os.fork() == 0:
    found = case.kernel().forward(case.operands, save=False).output
    os._exit(0 if arrays.thread_count() == 1 and np.allclose(found, wanted, atol=1e-5) else 1)
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-W", "ignore", "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert run.stdout.strip() == "0", run.stderr


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "lengths"),
    [(1, (24007,)), (12, (1501,)), (50, (701,)), (1, (61, 401)), (12, (11, 151)), (50, (7, 101)), (5, (5, 13, 37))],
)
def test_rows_are_shared_out_to_threads_and_come_out_right(
    rows: int, lengths: tuple[int, ...], masked: bool, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are parted by keys, so that threads add to the same queries and biases; many are not."""
    kinds = (("full", "key", "shared") if heads == (1, 1) else ("shared", "full", "key"))[-len(lengths) :]
    mask = korder.Causal() if masked else None
    options = {"width": 61, "value_width": 64, "batch": 1, "heads": heads, "key_masks": True, "biases": kinds}
    wide = random_case(rows, lengths, mask=mask, query_offset=lengths[-1] - rows if masked else 0, **options)
    case = wide.cast("float64")
    by_threads = []
    for number in (1, 3):
        monkeypatch.setattr(exact, "thread_count", lambda number=number: number)
        by_threads.append(results(case))
    assert all(np.array_equal(x, y) for x, y in zip(by_threads[1], results(case), strict=True))
    for got, wanted in zip(*by_threads, strict=True):
        assert np.allclose(got, wanted, rtol=0, atol=1e-12 * max(1.0, np.max(np.abs(wanted))))
    if rows < 50:
        assert_backward(case, case.kernel(), 16.0)
