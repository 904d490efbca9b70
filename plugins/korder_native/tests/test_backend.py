"""What the backend claims and refuses, which instruction set it takes, and that arrays are read where they lie."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from reference import ALL_ISAS, ISAS, random_case

import korder
from korder.errors import BackendUnavailableError, UnsupportedProblemError
from korder_native import _native
from korder_native.backend import NativeBackend

CASE = random_case(7, (3, 11))


def attend(case=CASE, **options):
    operands = case.operands
    return korder.attend_result(operands.query, operands.keys, operands.values, spec=case.spec, **options)


def test_it_comes_before_the_framework_backends_on_the_cpu() -> None:
    assert attend().provenance.backend == "native"
    torch = pytest.importorskip("torch")
    x = [torch.randn(1, 2, n, 4) for n in (7, 3, 11, 3, 11)]
    found = korder.attend_result(x[0], (x[1], x[2]), (x[3], x[4]))
    assert found.provenance.backend == "native"
    assert isinstance(found.output, torch.Tensor)


def test_tensors_are_differentiable_through_it() -> None:
    torch = pytest.importorskip("torch")
    x = [torch.randn(1, 2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 3, 6, 3, 6)]
    attend = lambda q, a, b, c, d: korder.attend(q, (a, b), (c, d), backend="native")  # noqa: E731
    assert torch.autograd.gradcheck(attend, x)


def test_claims_load_neither_kernels_nor_a_framework() -> None:
    program = (
        "import sys, korder_native\n"
        "(backend,) = korder_native.korder_backends()\n"
        "assert backend.availability().available\n"
        "assert 'float32' in backend.capabilities().dtypes\n"
        "print({'torch', 'jax', 'korder_native._native'} & set(sys.modules))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "KORDER_NATIVE_ISA"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=environment)
    assert (run.returncode, run.stdout.strip()) == (0, "set()"), run.stderr


def test_kernels_load_no_framework() -> None:
    program = (
        "import sys, numpy as np, korder\n"
        "x = np.ones((3, 2), 'f4')\n"
        "assert korder.attend_result(x, (x, x), (x, x)).provenance.backend == 'native'\n"
        "print('torch' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout.strip()) == (0, "False"), run.stderr


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_the_variable_forces_an_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORDER_NATIVE_ISA", isa)
    assert NativeBackend().availability().available
    assert NativeBackend().compile(CASE.plan).kernels.name == isa


def test_the_best_instruction_set_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KORDER_NATIVE_ISA", raising=False)
    best = NativeBackend().compile(CASE.plan).kernels.name
    assert best == next(isa for isa in ALL_ISAS if isa != "avx512_bf16" or is_amd())
    assert ISAS[-1] == "baseline"


def is_amd() -> bool:
    """Products of pairs are slow elsewhere, and taken only where they are asked for."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as facts:
        return "AuthenticAMD" in facts.read()
    return False


def test_an_unknown_instruction_set_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORDER_NATIVE_ISA", "avx9")
    answer = NativeBackend().availability()
    assert not answer.available
    assert answer.reason == "KORDER_NATIVE_ISA=avx9: no kernels are compiled for it"
    assert answer.remedy == f"unset it, or set it to one of {', '.join(ALL_ISAS)}"
    with pytest.raises(ValueError, match="no kernels for instruction set 'avx9' can run here"):
        _native.kernels("avx9")


def test_one_that_the_processor_lacks_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "known_names", lambda: ["wide", "baseline"])
    monkeypatch.setattr(_native, "runs_here", lambda isa: isa == "baseline")
    monkeypatch.setenv("KORDER_NATIVE_ISA", "wide")
    answer = NativeBackend().availability()
    assert answer.reason == "KORDER_NATIVE_ISA=wide: this processor does not have it"
    assert answer.remedy == "unset it, or set it to one of baseline"


def test_a_user_is_told_so() -> None:
    program = "import numpy as np, korder; x = np.ones((3, 2)); korder.attend(x, (x,), (x,), backend='native')"
    environment = {**os.environ, "KORDER_NATIVE_ISA": "avx9"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60)
    assert BackendUnavailableError.__name__ in run.stderr
    assert "KORDER_NATIVE_ISA=avx9: no kernels are compiled for it" in run.stderr


def test_what_it_does_not_do_is_refused_with_reasons() -> None:
    x = np.ones((3, 2))
    with pytest.raises(UnsupportedProblemError, match=r"order=5 \(supported: 1, 2, 3, 4\)"):
        korder.attend(x, (x,) * 5, (x,) * 5, backend="native")
    spec = korder.AttentionSpec(order=1, score="kronecker")
    with pytest.raises(UnsupportedProblemError, match=r"weight=full \(supported: none"):
        korder.attend(x, (x,), (x,), spec=spec, weight=np.eye(2), backend="native")


@pytest.mark.parametrize(
    "change",
    [lambda x: x[..., ::-1, :], lambda x: x[..., ::-1], np.asfortranarray],
    ids=["rows", "columns", "fortran"],
)
def test_strides_are_followed(change) -> None:
    operands = CASE.operands
    kernel = CASE.kernel()
    turned = replace(
        operands,
        query=change(change(operands.query).copy()),
        keys=tuple(change(change(x).copy()) for x in operands.keys),
        values=tuple(change(change(x).copy()) for x in operands.values),
    )
    found, wanted = (kernel.forward(x, save=False) for x in (turned, operands))
    assert np.array_equal(found.output, wanted.output)


def test_a_field_of_records_is_copied_because_its_strides_are_no_elements() -> None:
    query = np.zeros(CASE.query.shape, np.dtype([("x", "f8"), ("tag", "u1")]))
    query["x"] = CASE.query
    found = CASE.kernel().forward(replace(CASE.operands, query=query["x"]), save=False)
    assert np.array_equal(found.output, CASE.kernel().forward(CASE.operands, save=False).output)


def test_numbers_that_could_overflow_take_korder_s_own_kernel() -> None:
    for spoil in (np.nan, np.inf, 1e300):
        query = CASE.query.copy()
        query[0, 0, 2] = spoil
        spoiled = replace(CASE.operands, query=query)
        found = CASE.kernel().forward(spoiled, save=False).output
        clean = CASE.kernel().forward(CASE.operands, save=False).output
        others = np.ones(clean.shape[:3], bool)
        others[0, 0, 2] = False
        assert np.allclose(found[others], clean[others])
