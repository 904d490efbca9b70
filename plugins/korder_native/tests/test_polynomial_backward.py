"""The polynomial method's backward against the gradient of its definition, by PyTorch in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from korder_numpy.backend import NumpyBackend
from polynomial_reference import PolynomialCase, assert_alike, dense, every_array, mapped, random_polynomial
from reference import ISAS
from test_polynomial_forward import COMBINATIONS, EPS, isa, problem_by_chance, pruned_case, variant_of

from korder.spi import NEEDS, KernelOutput, OperandGradients, OutputGradients
from korder_native.backend import NativeBackend

torch = pytest.importorskip("torch")
Array = Any
LIMIT = {"float32": 1e-5, "float64": 1e-11}
"""Error of a gradient relative to the largest entry: one in float32 sums terms that cancel."""
LEAST = 0.1
"""Gradients of this size belong to the made-up ones of size 1; where all terms cancel, rounding is relative to it."""
__all__ = ["isa"]


def upstream(case: PolynomialCase, *, lse: bool = True) -> OutputGradients:
    """Made-up gradients of output and lse; none of lse where a row sees nothing."""
    rng, x = np.random.default_rng(9), case.operands
    shape, dtype = x.query.shape[:3], x.query.dtype
    output = rng.standard_normal((*shape, x.values[0].shape[-1])).astype(dtype)
    return OutputGradients(output, rng.standard_normal(shape) if lse else None)


def backward(
    case: PolynomialCase, grads: OutputGradients, backend: Any = None
) -> tuple[KernelOutput, OperandGradients]:
    kernel = (backend or NativeBackend()).compile(case.plan)
    saved = kernel.forward(case.operands, save=True)
    return saved, kernel.backward(case.operands, saved, grads, needs=NEEDS)


def truth(case: PolynomialCase, grads: OutputGradients, centre: Array) -> OperandGradients:
    """The gradient of the definition by PyTorch in float64, the centre held constant.

    The closed form is the gradient of a function whose weights are constants P(x) where they meet values, and in which
    a score x counts as P(x) / sum P times what it does to the loss.
    """
    polynomial, scale = case.plan.polynomial, case.plan.problem.scale
    leaves = mapped(case.operands, lambda x: torch.tensor(x, dtype=torch.float64, requires_grad=True))
    masks = tuple(None if mask is None else torch.from_numpy(mask) for mask in case.operands.key_masks)
    leaves, centre = replace(leaves, key_masks=masks), torch.from_numpy(centre)
    of_output, of_lse = torch.from_numpy(grads.output).double(), torch.zeros(())
    if grads.lse is not None:
        of_lse = torch.from_numpy(grads.lse)

    def loss(coefficients: Any, operands: Any) -> Any:
        found = dense(operands, scale, coefficients, centre, torch)
        live = torch.isfinite(found["lse"])
        lse = torch.where(live, found["lse"], 0.0)
        return (of_output * found["output"]).sum() + (of_lse * lse).sum()

    if polynomial.gradient == "consistent":
        loss(polynomial.values, leaves).backward()
    else:
        held = replace(leaves, query=leaves.query.detach(), keys=tuple(key.detach() for key in leaves.keys))
        assert leaves.weight is None
        loss(polynomial.values, held).backward()
        _closed_form(case, leaves, (of_output, of_lse), centre)

    def gradient(x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(gradient, x))
        return None if x is None else (torch.zeros_like(x) if x.grad is None else x.grad).numpy()

    return OperandGradients(
        *(gradient(getattr(leaves, name)) for name in ("query", "keys", "values", "biases", "weight"))
    )


def _closed_form(case: PolynomialCase, leaves: Any, grads: tuple[Any, Any], centre: Any) -> None:
    """Add the closed form's gradients of query and keys: order 2, no masks, one head a group."""
    query, (one, two), (first, second) = leaves.query, leaves.keys, leaves.values
    scores = case.plan.problem.scale * torch.einsum("bhiz,bhpz,bhqz->bhipq", query, one, two)
    weights = torch.zeros_like(scores)
    for coefficient in reversed(case.plan.polynomial.values):
        weights = weights * (scores - centre[..., None, None]) + coefficient
    weights = weights / weights.sum((-2, -1), keepdim=True)
    inner = torch.einsum("bhiz,bhpz,bhqz->bhipq", grads[0], first, second)
    delta = (weights * inner).sum((-2, -1)) - grads[1]
    ((weights * (inner - delta[..., None, None])).detach() * scores).sum().backward()


def assert_right(case: PolynomialCase, *, lse: bool = True) -> None:
    for dtype in ("float32", "float64"):
        narrow = case.cast(dtype)
        grads = upstream(narrow, lse=lse)
        saved, found = backward(narrow, grads)
        assert found.query.dtype == dtype
        assert_alike(found, truth(narrow, grads, np.asarray(saved.residuals["centre"])), LIMIT[dtype], LEAST)


@pytest.mark.parametrize(("variant", "order"), COMBINATIONS)
def test_every_variant(variant: str, order: int, isa: str) -> None:
    assert_right(variant_of(variant, order))


@pytest.mark.parametrize("rows", [1, 2, 63, 97])
def test_lengths_around_blocks(rows: int, isa: str) -> None:
    assert_right(random_polynomial(2, rows=rows, lengths=(300 - rows, 1), batch=1, heads=(1, 1), scale=0.1))


def test_without_a_gradient_of_lse(isa: str) -> None:
    assert_right(random_polynomial(2, key_masks="group", biases=("key", "closed")), lse=False)


@pytest.mark.parametrize("degree", [1, 2, 4])
def test_the_closed_form(degree: int, isa: str) -> None:
    assert_right(random_polynomial(2, heads=(2, 2), degree=degree, scale=0.1, gradient="closed_form"))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", ["pruned", "closed_form", "closed_form_with_everything"])
def test_it_returns_what_the_numpy_kernel_does(variant: str, dtype: str, isa: str) -> None:
    everything = {"key_masks": "group", "biases": ("key", "closed")}
    options = everything if variant.endswith("everything") else {}
    case = pruned_case(**everything) if variant == "pruned" else random_polynomial(2, gradient="closed_form", **options)
    case = case.cast(dtype)
    found, wanted = (backward(case, upstream(case), backend)[1] for backend in (NativeBackend(), NumpyBackend()))
    assert_alike(found, wanted, 10 * EPS[dtype])


def test_only_what_is_wanted_comes_back(isa: str) -> None:
    case = random_polynomial(2, weight="cp", key_masks="group", biases=("key", "shared"))
    kernel, grads = case.kernel(), upstream(case)
    saved = kernel.forward(case.operands, save=True)
    everything = every_array(kernel.backward(case.operands, saved, grads, needs=NEEDS))
    for needs in ({"query"}, {"keys"}, {"values", "biases"}, {"weight", "query"}, {"biases"}):
        found = every_array(kernel.backward(case.operands, saved, grads, needs=frozenset(needs)))
        assert found.keys() == {name for name in everything if name.partition("[")[0] in needs}
        for name, array in found.items():
            assert np.array_equal(array, everything[name]), name


def test_what_is_masked_gets_zeros_and_is_never_looked_at(isa: str) -> None:
    case = random_polynomial(2, key_masks="group", biases=("key", None))
    grads, x = upstream(case), case.operands
    clean = backward(case, grads)[1]
    closed = [~mask for mask in x.key_masks]
    keys, values = (
        tuple(np.where(c[..., None], np.nan, y) for c, y in zip(closed, arrays, strict=True))
        for arrays in (x.keys, x.values)
    )
    found = backward(case.changed(keys=keys, values=values), grads)[1]
    for name, array in every_array(clean).items():
        assert np.array_equal(every_array(found)[name], array), name
    for arrays in (found.keys, found.values):
        assert all(not array[c].any() for array, c in zip(arrays, closed, strict=True))


@pytest.mark.parametrize("lengths", [(6, 0), (0, 5), (1, 1)])
@pytest.mark.parametrize("rows", [0, 1])
def test_short_lengths(rows: int, lengths: tuple[int, int], isa: str) -> None:
    case = random_polynomial(2, rows=rows, lengths=lengths)
    _, found = backward(case, upstream(case))
    x = case.operands
    for gradient, like in zip((found.query, *found.keys, *found.values), (x.query, *x.keys, *x.values), strict=True):
        assert gradient.shape == like.shape
        assert np.isfinite(gradient).all()
        if rows == 0 or 0 in lengths:
            assert not gradient.any()


def test_tensors_are_differentiable_to_second_order() -> None:
    """Centres and scales are held constant; they do not depend on values."""
    import korder.torch

    case = random_polynomial(2, rows=2, lengths=(3, 2), batch=1, heads=(2, 1), degree=2, value_width=2)
    x = case.operands
    fixed = torch.from_numpy(x.query), tuple(map(torch.from_numpy, x.keys))
    values = [torch.tensor(y, requires_grad=True) for y in x.values]

    def attend(*values: Any) -> Any:
        return korder.torch.attend(*fixed, values, spec=case.spec, backend="native")

    assert torch.autograd.gradcheck(attend, values)
    assert torch.autograd.gradgradcheck(attend, values)


def test_tensors_get_the_gradients_of_arrays(isa: str) -> None:
    import korder.torch

    case = random_polynomial(2, key_masks="group", biases=("key", None))
    grads = upstream(case, lse=False)
    wanted = backward(case, grads)[1]
    leaves = mapped(case.operands, lambda x: torch.from_numpy(x).requires_grad_())
    arguments = {
        **case.arguments,
        "biases": leaves.biases,
        "key_masks": tuple(map(torch.from_numpy, case.operands.key_masks)),
    }
    korder.torch.attend(leaves.query, leaves.keys, leaves.values, **arguments, backend="native").backward(
        torch.from_numpy(grads.output)
    )
    pairs = zip(
        (leaves.query, *leaves.keys, *leaves.values, leaves.biases[0]), every_array(wanted).values(), strict=True
    )
    for leaf, array in pairs:
        assert np.allclose(leaf.grad, array, rtol=0, atol=1e-12 * np.max(np.abs(array)))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_problems_by_chance(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KORDER_NATIVE_ISA", data.draw(st.sampled_from(ISAS)))
        assert_right(problem_by_chance(data, 1))
