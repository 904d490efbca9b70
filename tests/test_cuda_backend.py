"""The CUDA backend: chosen for CUDA tensors, refused for others, honest about never having run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
from korder import Causal, Polynomial  # noqa: E402
from korder.dispatch.registry import default_registry  # noqa: E402
from korder.dispatch.request import make_request  # noqa: E402
from korder.planning.candidates import candidate_plans  # noqa: E402
from tests.limits import assert_within_ratio  # noqa: E402
from tests.problems import random_case  # noqa: E402
from tests.test_api import arguments  # noqa: E402
from tests.test_torch import tensor_arguments  # noqa: E402

HAS_GPU = torch.cuda.is_available()


def plan_on(device: str, **options: Any) -> Any:
    case = random_case(**{"order": 2, **options}, seed=3)
    _, request = make_request(**arguments(case), spec=case.spec)
    return candidate_plans(replace(request.problem, device=device))[0]


@pytest.mark.parametrize("options", [{}, {"mask": Causal(), "query_offset": 4}, {"method": Polynomial(degree=2)}])
def test_it_takes_cuda_tensors_and_the_cpu_backend_does_not(options: dict[str, Any]) -> None:
    cuda, cpu = (default_registry().get(name) for name in ("cuda", "torch"))
    assert cuda.unsupported_reasons(plan_on("cuda:0", **options)) == ()
    assert [str(reason) for reason in cpu.unsupported_reasons(plan_on("cuda:0", **options))] == [
        "device=cuda (supported: cpu)"
    ]
    assert [reason.what for reason in cuda.unsupported_reasons(plan_on("cpu", **options))] == ["device"]
    assert cuda.priority > cpu.priority


def test_its_kernels_are_those_of_the_cpu() -> None:
    cuda, cpu = (default_registry().get(name) for name in ("cuda", "torch"))
    for options in ({}, {"method": Polynomial(degree=2)}):
        plan = plan_on("cuda:0", **options)
        assert type(cuda.compile(plan)) is type(cpu.compile(plan))


def test_its_status_says_that_nobody_has_run_it() -> None:
    status = next(line for line in korder.backends() if line.name == "cuda")
    assert "unverified: never run on a GPU by its authors" in status.reason


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
def test_without_a_gpu_it_is_refused_with_the_reason() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(korder.BackendUnavailableError, match=r"no (CUDA device|NVIDIA driver)|finds no CUDA device"):
        korder.attend(x, (x,), (x,), backend="cuda")


@pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_numbers_on_a_gpu(order: int, dtype: str) -> None:
    case = random_case(order, seed=4, dtype=dtype)
    output, _ = case.oracle()
    plain, _ = case.plain()
    given = {
        name: tuple(x.cuda() for x in value) if name in ("keys", "values") else value.cuda()
        for name, value in tensor_arguments(case).items()
        if name in ("query", "keys", "values")
    }
    found = korder.attend_result(**given, spec=case.spec)
    assert found.provenance is not None
    assert found.provenance.backend == "cuda"
    assert_within_ratio(np.asarray(found.output.cpu()), plain, output, dtype=dtype)
