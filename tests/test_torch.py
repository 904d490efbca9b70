"""The PyTorch backend and door: the same numbers as elsewhere, and every derivative that is offered is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
import korder.torch as door  # noqa: E402
from korder import Causal, Ordered, Polynomial, Window  # noqa: E402
from tests.limits import assert_agree, assert_within_ratio  # noqa: E402
from tests.problems import Case, random_case  # noqa: E402
from tests.test_api import arguments  # noqa: E402

CASES: dict[str, dict[str, Any]] = {
    "order 1": {"order": 1},
    "order 2": {"order": 2},
    "order 3": {"order": 3, "queries": 5},
    "causal": {"mask": Causal(), "query_offset": 2, "key_offsets": (1, 3)},
    "window": {"mask": Window(sizes=(3, 5)), "query_offset": 1},
    "ordered": {"mask": Ordered(), "query_offset": 3},
    "masks and biases": {"key_masks": (True, True), "biases": ("key", "full")},
    "cp weight": {"weight": "cp"},
    "full weight": {"weight": "full"},
}
SMALL = {"queries": 3, "lengths": (4, 3), "query_width": 3, "value_width": 2, "batch": 1, "heads": 2, "groups": 1}


def tensors(x: Any, *, gradient: bool = False) -> Any:
    if isinstance(x, np.ndarray):
        tensor = torch.from_numpy(x.copy())
        return tensor.requires_grad_() if gradient and tensor.is_floating_point() else tensor
    return tuple(tensors(item, gradient=gradient) for item in x) if isinstance(x, tuple) else x


def tensor_arguments(case: Case, *, gradient: bool = False) -> dict[str, Any]:
    return {name: tensors(value, gradient=gradient) for name, value in arguments(case).items()}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_tensors_give_the_oracles_numbers(options: dict[str, Any], dtype: str) -> None:
    case = random_case(**options, seed=40, dtype=dtype)
    output, lse = case.oracle()
    plain, plain_lse = case.plain()
    result = korder.attend_result(**tensor_arguments(case), spec=case.spec)
    assert result.provenance is not None
    assert result.provenance.backend == "torch"
    assert str(result.output.dtype) == f"torch.{dtype}"
    if dtype == "float64":  # the oracle's own width: it is no closer to the truth than a plain evaluation
        assert_agree(result.output.numpy(), output, dtype=dtype)
        assert_agree(result.lse.numpy(), lse, dtype=dtype)
    else:
        assert_within_ratio(result.output.numpy(), plain, output, dtype=dtype)
        assert_within_ratio(result.lse.numpy(), plain_lse, lse, dtype="float32")


def test_bfloat16_is_summed_in_float32() -> None:
    case = random_case(2, seed=41, dtype="float32")
    given = tensor_arguments(case)
    rounded = {
        name: tuple(x.bfloat16() for x in value) if isinstance(value, tuple) else value.bfloat16()
        for name, value in given.items()
        if name in ("query", "keys", "values")
    }
    found = korder.attend(**rounded)
    exact = korder.attend(
        rounded["query"].float(), [x.float() for x in rounded["keys"]], [x.float() for x in rounded["values"]]
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mask", [korder.Full(), Causal()], ids=lambda mask: mask.kind)
def test_polynomial_on_tensors_equals_numpy_and_its_certificate_holds(mask: Any) -> None:
    case = random_case(2, seed=42, spread=0.5, mask=mask, query_offset=4, method=Polynomial(degree=4))
    ours = korder.attend_result(**tensor_arguments(case), spec=case.spec)
    theirs = korder.attend_result(**arguments(case), spec=case.spec)
    assert ours.certificate is not None
    assert theirs.certificate is not None
    np.testing.assert_allclose(ours.output.numpy(), theirs.output, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(ours.certificate.bound.numpy(), theirs.certificate.bound, rtol=1e-3)
    exact, _ = case.oracle()
    assert (np.abs(ours.output.numpy() - exact).max(axis=-1) <= ours.certificate.bound.numpy()).all()


def test_order_1_is_torchs_own_attention() -> None:
    query, key, value = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    ours = korder.attend(query, (key,), (value,))
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad((ours * weights).sum(), (query, key, value)),
        torch.autograd.grad((theirs * weights).sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def differentiable(case: Case) -> tuple[Any, tuple[Any, ...]]:
    """A function of every operand that may carry a gradient, to output and finite lse, and the operands."""
    given = tensor_arguments(case, gradient=True)
    flat: list[Any] = []
    for name in ("query", "keys", "values", "biases", "weight"):
        value = given[name]
        flat += [x for x in (value if isinstance(value, tuple) else (value,)) if x is not None]

    def function(*operands: Any) -> tuple[Any, Any]:
        remaining = iter(operands)
        rebuilt = dict(given)
        for name in ("query", "keys", "values", "biases", "weight"):
            value = given[name]
            if isinstance(value, tuple):
                rebuilt[name] = tuple(None if x is None else next(remaining) for x in value)
            elif value is not None:
                rebuilt[name] = next(remaining)
        result = door.attend_result(**rebuilt, spec=case.spec)
        return result.output, torch.where(torch.isfinite(result.lse), result.lse, 0.0)

    return function, tuple(flat)


def small(options: dict[str, Any]) -> Case:
    sizes = dict(SMALL)
    order = options.get("order", 2)
    sizes["lengths"] = (4, 3, 2)[:order]
    return random_case(**{**sizes, **options, "queries": 3}, seed=43)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_first_derivatives(options: dict[str, Any]) -> None:
    function, operands = differentiable(small(options))
    assert torch.autograd.gradcheck(function, operands, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "name", ["order 1", "order 2", "causal", "ordered", "masks and biases", "cp weight", "full weight"]
)
def test_second_derivatives(name: str) -> None:
    function, operands = differentiable(small(CASES[name]))
    assert torch.autograd.gradgradcheck(function, operands, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", ["order 1", "order 2", "causal", "ordered", "cp weight"])
def test_forward_mode(name: str) -> None:
    function, operands = differentiable(small(CASES[name]))
    assert torch.autograd.gradcheck(function, operands, check_forward_ad=True, check_backward_ad=False, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_tangent_is_not_silently_zero() -> None:
    x = torch.randn(4, 3, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(korder.attend(dual, (x, x), (x, x))).tangent
    step = 1e-6
    expected = (korder.attend(x + step, (x, x), (x, x)) - korder.attend(x - step, (x, x), (x, x))) / (2 * step)
    assert tangent.abs().max() > 1e-3
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


def test_one_tensor_in_every_place() -> None:
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: korder.attend(x, (x, x), (x, x)), (x,))
    assert torch.autograd.gradgradcheck(lambda x: korder.attend(x, (x, x), (x, x)), (x,))


@pytest.mark.parametrize("mask", [korder.Full(), Causal()], ids=lambda mask: mask.kind)
def test_the_polynomials_gradient_is_the_kernels_of_numpy(mask: Any) -> None:
    from korder.dispatch.registry import default_registry
    from korder.dispatch.request import make_request
    from korder.dispatch.run import run
    from korder.spi import NEEDS, OutputGradients

    case = random_case(
        2, seed=44, spread=0.5, mask=mask, query_offset=4, method=Polynomial(degree=4), biases=("key", None)
    )
    given = tensor_arguments(case, gradient=True)
    output = korder.attend(**given, spec=case.spec)
    weights = torch.randn_like(output)
    (output * weights).sum().backward()
    _, request = make_request(**arguments(case), spec=case.spec)
    outcome = run(default_registry(), request, save=True)
    kernel = outcome.prepared.kernel
    gradients = OutputGradients(weights.numpy(), None)
    expected = kernel.backward(request.operands, outcome.output, gradients, needs=NEEDS)
    pairs = [(given["query"], expected.query), (given["biases"][0], expected.biases[0])]
    pairs += list(zip(given["keys"], expected.keys, strict=True)) + list(
        zip(given["values"], expected.values, strict=True)
    )
    for tensor, gradient in pairs:
        np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-9, atol=1e-11)


def test_only_what_wants_a_gradient_gets_one_and_nothing_is_kept_otherwise() -> None:
    case = random_case(2, seed=45)
    given = tensor_arguments(case)
    assert korder.attend(**given, spec=case.spec).grad_fn is None
    given["keys"][1].requires_grad_()
    korder.attend(**given, spec=case.spec).sum().backward()
    assert given["keys"][1].grad is not None
    assert given["query"].grad is None
    with torch.inference_mode():
        assert not korder.attend(**given, spec=case.spec).requires_grad


def test_changing_an_operand_before_backward_is_an_error() -> None:
    case = random_case(2, seed=46)
    given = tensor_arguments(case, gradient=True)
    key = given["keys"][0].clone()
    output = korder.attend(**{**given, "keys": (key, given["keys"][1])}, spec=case.spec)
    with torch.no_grad():
        key.add_(1.0)
    with pytest.raises(korder.KernelError, match=r"keys\[0\] was changed in place"):
        output.sum().backward()


def test_two_runs_are_bit_equal_and_inputs_unchanged() -> None:
    case = random_case(2, seed=47, dtype="float32", queries=61, lengths=(53, 47))
    given = tensor_arguments(case)
    copies = [x.clone() for x in (given["query"], *given["keys"], *given["values"])]
    first, second = (korder.attend(**given, spec=case.spec) for _ in range(2))
    assert torch.equal(first, second)
    for tensor, copy in zip((given["query"], *given["keys"], *given["values"]), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_merge_marginals_and_top_tuples_take_tensors() -> None:
    case = random_case(2, seed=48)
    given = tensor_arguments(case)
    halves = [
        korder.attend_result(given["query"], (key, given["keys"][1]), (value, given["values"][1]))
        for key, value in zip(given["keys"][0].split(4, dim=2), given["values"][0].split(4, dim=2), strict=True)
    ]
    whole = korder.attend(given["query"], given["keys"], given["values"])
    torch.testing.assert_close(korder.merge(halves).output, whole, rtol=1e-12, atol=1e-13)
    ours, theirs = korder.marginals(given["query"], given["keys"]), korder.marginals(case.query, case.keys)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-13)
    indices, _ = korder.top_tuples(given["query"], given["keys"], count=3)
    np.testing.assert_array_equal(indices.numpy(), korder.top_tuples(case.query, case.keys, count=3)[0])


def test_a_tensor_among_arrays_is_named() -> None:
    case = replace(random_case(1, seed=49))
    with pytest.raises(korder.OperandError, match=r"keys\[0\] has another array kind"):
        korder.attend(torch.from_numpy(case.query), case.keys, case.values)


def test_tensors_without_numbers_give_shapes() -> None:
    case = random_case(2, seed=51)
    given = tensor_arguments(case)
    result = korder.attend_result(**given, spec=case.spec)
    shadow = {
        name: tuple(x.to("meta") for x in value) if isinstance(value, tuple) and name in ("keys", "values") else value
        for name, value in given.items()
    }
    found = korder.attend_result(**{**shadow, "query": given["query"].to("meta")}, spec=case.spec)
    assert found.output.device.type == "meta"
    assert (found.output.shape, found.lse.shape) == (result.output.shape, result.lse.shape)
    assert (found.output.dtype, found.lse.dtype) == (result.output.dtype, result.lse.dtype)


def test_a_graph_that_is_dropped_is_freed_at_once() -> None:
    import gc
    import weakref

    case = random_case(2, seed=50)
    gc.collect()
    gc.disable()
    try:
        output = korder.attend(**tensor_arguments(case, gradient=True), spec=case.spec)
        alive = weakref.ref(output)
        del output
        assert alive() is None
    finally:
        gc.enable()
