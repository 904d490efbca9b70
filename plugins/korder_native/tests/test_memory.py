"""Memory: what is declared, what a limit leaves, and that results do not depend on it."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from reference import ISAS, assert_backward, assert_forward, random_case
from test_backward import RATIO

import korder
from korder_native import exact
from korder_native.exact import NativeExactKernel


def threads_are(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(exact, "thread_count", lambda: number)


def kernel_of(n: int, lengths: tuple[int, ...], heads: tuple[int, int] = (1, 1), limit: int = 2**27) -> Any:
    """A kernel for shapes alone, d = e = 64. Plans refuse limits that are too low for the generic kernel."""
    spec = korder.AttentionSpec(order=len(lengths), policy=korder.Policy(memory_limit=2**32))
    keys = [(1, heads[1], m, 64) for m in lengths]
    kernel = NativeExactKernel(
        korder.plan(spec, query=(1, heads[0], n, 64), keys=keys, values=keys, dtype="float32")[0]
    )
    kernel.limit = limit
    return kernel


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@pytest.mark.parametrize("heads", [(1, 1), (8, 4)])
@pytest.mark.parametrize("lengths", [(100_000,), (50, 70_000)])
def test_kernels_keep_to_the_limit(
    threads: int, heads: tuple[int, int], lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads_are(monkeypatch, threads)
    for limit in (2**20, 2**22, 2**24, 2**27):
        kernel = kernel_of(4096, lengths, heads, limit)
        assert 0 < kernel.forward_bytes <= limit
        assert 0 < kernel.backward_bytes <= limit
        assert kernel.workspace_bytes == max(kernel.forward_bytes, kernel.backward_bytes)


def test_one_thread_holds_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    threads_are(monkeypatch, 1)
    sizes = [kernel_of(64, (m, m)).backward_bytes for m in (10_000, 40_000)]
    assert max(sizes) < 8 * 2**20
    assert abs(sizes[1] - sizes[0]) < 2**20  # the chunks are not quite of one size


def test_threads_beside_each_other_hold_a_chunk_of_the_contracted_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    threads_are(monkeypatch, 2)
    sizes = [kernel_of(4096, (m,)).backward_bytes for m in (40_000, 400_000)]
    assert abs(sizes[1] - sizes[0]) < 2**20


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("limit", [2**19, 2**20])
def test_results_under_a_limit_are_right(limit: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    threads_are(monkeypatch, 3)
    options: dict[str, Any] = {"width": 40, "value_width": 24, "batch": 1, "key_masks": True, "mask": korder.Causal()}
    wide = random_case(70, (1200,), biases=("key",), heads=(2, 1), query_offset=1150, **options)
    case = wide.cast("float32")
    kernel = case.kernel(isa)
    assert kernel.backward_bytes > limit
    kernel.limit = limit
    assert kernel.backward_bytes <= limit
    assert_forward(case, kernel.forward(case.operands, save=False))
    assert_backward(case, kernel, RATIO)


def test_a_limit_too_small_for_the_kernels_is_the_generic_kernel_s(monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(7, (3, 11)).cast("float32")
    kernel = case.kernel()
    kernel.limit = 2**14
    assert kernel.forward_bytes > 2**14
    assert kernel.workspace_bytes == 2**14
    monkeypatch.setattr(exact, "new", None)  # the results of the C++ kernels
    assert_forward(case, kernel.forward(case.operands, save=False))


_GROWTH = """
import json, sys
import numpy as np
from korder.experiments.benchmark_cases import make_case
from korder.experiments.benchmark_memory import with_growth
from korder.spec import AttentionSpec
n, backward = int(sys.argv[1]), sys.argv[2] == "backward"
small, case = (make_case(AttentionSpec(order=1), size, 64, "native") for size in (64, n))
small.backward(small.forward(save=True))
kernel, saved = case.prepared.kernel, case.forward(save=True)
found, growth = with_growth(lambda: case.backward(saved) if backward else case.forward())
results = [found.query, *found.keys, *found.values] if backward else [found.output, found.lse]
declared = kernel.backward_bytes if backward else kernel.forward_bytes
print(json.dumps([growth - sum(x.nbytes for x in results), declared]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how far a process grew")
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_what_is_declared_is_what_a_process_grows_by(direction: str) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _GROWTH, "3000", direction], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    grown, declared = json.loads(run.stdout)
    assert declared / 3 < grown <= 1.2 * declared
