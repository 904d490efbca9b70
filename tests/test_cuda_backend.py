"""The CUDA backend: chosen for CUDA tensors, refused for others, and the same numbers where there is a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
import korder.torch  # noqa: E402
from korder import Auto, Causal, Ordered, Polynomial, Split, Window  # noqa: E402
from korder.dispatch.registry import default_registry  # noqa: E402
from korder.dispatch.request import make_request  # noqa: E402
from korder.planning.candidates import candidate_plans  # noqa: E402
from tests.limits import assert_agree, assert_within_ratio  # noqa: E402
from tests.problems import random_case  # noqa: E402
from tests.test_api import arguments  # noqa: E402
from tests.test_torch import CASES, tensor_arguments  # noqa: E402

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs an NVIDIA GPU")


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


def test_its_status_says_whether_it_can_run() -> None:
    status = next(line for line in korder.backends() if line.name == "cuda")
    assert status.available == HAS_GPU
    assert HAS_GPU or status.remedy == "install an NVIDIA driver and a CUDA build of torch"


@pytest.mark.skipif(HAS_GPU, reason="a GPU is here")
def test_without_a_gpu_it_is_refused_with_the_reason() -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(korder.BackendUnavailableError, match=r"no (CUDA device|NVIDIA driver)|finds no CUDA device"):
        korder.attend(x, (x,), (x,), backend="cuda")


def on_gpu(x: Any) -> Any:
    """Leaves on the GPU of the tensors in a tree; what is no tensor stays."""
    if isinstance(x, torch.Tensor):
        return x.detach().cuda().requires_grad_(x.requires_grad)
    return tuple(map(on_gpu, x)) if isinstance(x, tuple) else x


def leaves(x: Any) -> list[Any]:
    if isinstance(x, torch.Tensor):
        return [x] if x.requires_grad else []
    return [leaf for item in x for leaf in leaves(item)] if isinstance(x, tuple) else []


def derivatives(given: dict[str, Any], spec: Any) -> tuple[Any, ...]:
    """Result, and the gradients of one function of output and lse for every operand."""
    result = korder.attend_result(**given, spec=spec)
    lse = torch.where(result.lse.isfinite(), result.lse, 0.0)
    return result, torch.autograd.grad(result.output.sin().sum() + lse.sin().sum(), leaves(tuple(given.values())))


@needs_gpu
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_numbers_on_a_gpu(options: dict[str, Any], dtype: str) -> None:
    case = random_case(**options, seed=4, dtype=dtype)
    output, lse = case.oracle()
    plain, plain_lse = case.plain()
    found = korder.attend_result(**{name: on_gpu(x) for name, x in tensor_arguments(case).items()}, spec=case.spec)
    assert found.provenance is not None
    assert found.provenance.backend == "cuda"
    assert found.output.is_cuda
    if dtype == "float64":
        assert_agree(found.output.cpu().numpy(), output, dtype=dtype)
    else:
        assert_within_ratio(found.output.cpu().numpy(), plain, output, dtype=dtype)
        assert_within_ratio(found.lse.cpu().numpy(), plain_lse, lse, dtype="float32")


POLYNOMIALS = {
    "polynomial": {"method": Polynomial(degree=4), "spread": 0.5},
    "causal polynomial": {"method": Polynomial(degree=4), "spread": 0.5, "mask": Causal(), "query_offset": 4},
    "window polynomial": {
        "method": Polynomial(degree=4),
        "spread": 0.5,
        "mask": Window(sizes=(3, 4)),
        "query_offset": 4,
    },
    "ordered polynomial": {"method": Polynomial(degree=4), "spread": 0.5, "mask": Ordered(), "query_offset": 4},
    "closed form": {"method": Polynomial(degree=4, gradient="closed_form"), "spread": 0.5},
}


@needs_gpu
@pytest.mark.parametrize("options", (CASES | POLYNOMIALS).values(), ids=CASES | POLYNOMIALS)
def test_gradients_on_a_gpu_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    case = random_case(**options, seed=5)
    given = tensor_arguments(case, gradient=True)
    expected, gradients = derivatives(given, case.spec)
    found, found_gradients = derivatives({name: on_gpu(x) for name, x in given.items()}, case.spec)
    assert_agree(found.output.detach().cpu().numpy(), expected.output.detach().numpy(), dtype="float64")
    for one, other in zip(found_gradients, gradients, strict=True):
        assert_agree(one.cpu().numpy(), other.numpy(), dtype="float64")
    again = derivatives({name: on_gpu(x) for name, x in given.items()}, case.spec)[1]
    assert all(torch.equal(one, other) for one, other in zip(found_gradients, again, strict=True))


@needs_gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_transforms_on_a_gpu() -> None:
    given = [torch.randn(2, 2, n, 4, device="cuda", dtype=torch.float64) for n in (5, 6, 7, 6, 7)]

    def attend(query: Any, *others: Any) -> Any:
        return korder.attend(query, others[:2], others[2:])

    plain = attend(*given)
    torch.testing.assert_close(torch.compile(attend, fullgraph=True)(*given), plain)
    torch.testing.assert_close(torch.func.vmap(attend)(*given), plain)
    direction = torch.randn_like(given[0])
    _, tangent = torch.func.jvp(lambda query: attend(query, *given[1:]), (given[0],), (direction,))
    step = 1e-6 * direction
    difference = (attend(given[0] + step, *given[1:]) - attend(given[0] - step, *given[1:])) / 2e-6
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)
    small = [x[:1, :1, :3, :2].clone().requires_grad_() for x in given]
    assert torch.autograd.gradgradcheck(attend, small)


@needs_gpu
def test_a_module_trains_on_a_gpu_under_autocast() -> None:
    torch.manual_seed(0)
    module = korder.torch.OrderKTransformerBlock(32, heads=2, order=2).cuda()
    x = torch.randn(4, 10, 32, device="cuda")
    target = x.roll(1, dims=1)
    optimiser = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (module(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@needs_gpu
@pytest.mark.parametrize("method", [Split(tolerance=1e-3), Auto(tolerance=1e-3)], ids=["split", "auto"])
@pytest.mark.parametrize("mask", [korder.Full(), Causal()], ids=["full", "causal"])
def test_methods_that_choose_are_certified_on_a_gpu(method: Any, mask: Any) -> None:
    torch.manual_seed(3)
    query, *rest = (0.5 * torch.randn(2, 300, 4, device="cuda", dtype=torch.float64) for _ in range(5))
    keys, values = tuple(rest[:2]), tuple(rest[2:])
    keys[0][:, 7] *= 20.0
    spec = korder.AttentionSpec(order=2, mask=mask, method=method)
    found = korder.attend_result(query, keys, values, spec=spec)
    exact = korder.attend_result(query, keys, values, spec=korder.AttentionSpec(order=2, mask=mask))
    assert found.output.is_cuda
    error = (found.output - exact.output).abs().amax(-1)
    bound = 1e-12 if found.certificate is None else found.certificate.bound  # none where it chose the exact method
    assert bool((error <= bound).all())


@needs_gpu
@pytest.mark.parametrize("method", [korder.Exact(), Polynomial(degree=4)], ids=["exact", "polynomial"])
def test_decoding_on_a_gpu(method: Any) -> None:
    torch.manual_seed(3)
    query, *rest = (0.5 * torch.randn(2, 30, 4, device="cuda", dtype=torch.float64) for _ in range(5))
    keys, values = tuple(rest[:2]), tuple(rest[2:])
    spec = korder.AttentionSpec(order=2, mask=Causal(), method=method)
    expected = korder.attend(query, keys, values, spec=spec)
    state = korder.prefill([x[:, :20] for x in keys], [x[:, :20] for x in values], spec)
    for i in range(20, 30):
        state = state.append([x[:, i : i + 1] for x in keys], [x[:, i : i + 1] for x in values])
        torch.testing.assert_close(
            korder.decode(query[:, i : i + 1], state), expected[:, i : i + 1], rtol=1e-9, atol=1e-12
        )
