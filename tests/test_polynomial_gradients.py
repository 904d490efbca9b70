"""Gradients of the polynomial kernels against central differences in float64, statistics fixed by the residuals."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from korder.planning.explain import size
from korder.planning.polynomial import backward_workspace
from korder.spec import Policy, Polynomial
from korder.spi import NEEDS, KernelOutput, OperandGradients, Operands, OutputGradients
from tests.limits import GRADIENT_LIMIT, GRADIENT_STEP
from tests.polynomial_cases import COMBINATIONS, KERNELS, MASKS, plan_of, polynomial_case, run, xp
from tests.problems import Case

Array = Any
Replace = Callable[[Array], Operands]


def places(operands: Operands, gradients: OperandGradients) -> list[tuple[str, Array, Array, Replace]]:
    """Return (name, operand, gradient, how to replace the operand) for everything that has a gradient."""
    found: list[tuple[str, Array, Array, Replace]] = [
        ("query", operands.query, gradients.query, lambda x: replace(operands, query=x))
    ]
    groups: dict[str, tuple[tuple[Array, ...], tuple[Array, ...]]] = {
        name: (getattr(operands, name), getattr(gradients, name)) for name in ("keys", "values", "biases")
    }
    if isinstance(operands.weight, tuple):
        assert isinstance(gradients.weight, tuple)
        groups["weight"] = (operands.weight, gradients.weight)
    elif operands.weight is not None:
        found.append(("weight", operands.weight, gradients.weight, lambda x: replace(operands, weight=x)))
    for name, (arrays, parts) in groups.items():
        for t, (array, part) in enumerate(zip(arrays, parts, strict=True)):
            if array is None:
                assert part is None
                continue
            found.append((f"{name}[{t}]", array, part, replacing(operands, name, arrays, t)))
    return found


def replacing(operands: Operands, name: str, arrays: tuple[Array, ...], t: int) -> Replace:
    return lambda x: replace(operands, **{name: (*arrays[:t], x, *arrays[t + 1 :])})


def check_gradients(case: Case, kernel: str, *, seed: int = 0, chunk: int = 4) -> None:
    """Compare every gradient with central differences along two random directions each."""
    rng = np.random.default_rng(seed)
    plan, saved = run(case, kernel=kernel, chunk=chunk)
    compiled, operands = KERNELS[kernel](xp, plan), case.operands()
    grads = OutputGradients(rng.normal(size=saved.output.shape), rng.normal(size=saved.lse.shape))
    live = np.isfinite(saved.lse)

    def loss(changed: Operands) -> float:
        output = compiled.forward(changed, save=False, residuals=saved.residuals)
        return float(np.sum(output.output * grads.output) + np.sum(output.lse[live] * np.asarray(grads.lse)[live]))

    gradients = compiled.backward(operands, saved, grads, needs=NEEDS)
    for name, array, gradient, put in places(operands, gradients):
        assert gradient.shape == array.shape, name
        for _ in range(2):
            direction = rng.normal(size=array.shape)
            step = GRADIENT_STEP / np.abs(direction).max()
            measured = (loss(put(array + step * direction)) - loss(put(array - step * direction))) / (2 * step)
            size = np.sqrt(np.sum((gradient * direction) ** 2)) + 1e-6
            assert abs(measured - np.sum(gradient * direction)) <= 10 * GRADIENT_LIMIT * size, name


@pytest.mark.parametrize(
    ("order", "variant", "mask"),
    [
        each
        for each in COMBINATIONS
        if (each[0] < 3 or each[2] in ("full", "causal_offsets")) and each[2] not in ("window", "ordered")
    ],
)
def test_gradients(order: int, variant: str, mask: str) -> None:
    check_gradients(polynomial_case(order, variant, mask, degree=3 if order < 3 else 2, scale=0.2), "numpy", seed=order)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask not in ("window", "window_long", "ordered")])
@pytest.mark.parametrize("variant", ["masks_and_shared_bias", "cp"])
def test_gradients_of_the_generic_kernel(variant: str, mask: str) -> None:
    check_gradients(polynomial_case(2, variant, mask, degree=2, scale=0.2), "generic")


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_gradients_of_minimax(mask: str) -> None:
    case = polynomial_case(2, "biases", mask, degree=3)
    check_gradients(case.with_spec(method=Polynomial(degree=3, coefficients="minimax", interval=1.5)), "numpy")


@pytest.mark.parametrize("mask", ["full", "causal_late", "window_offsets", "ordered_late"])
def test_float32_gradients_are_those_of_float64(mask: str) -> None:
    wide = polynomial_case(2, "masks_and_shared_bias", mask, degree=3)
    results = []
    for dtype in ("float32", "float64"):
        case = wide.astype("float32").astype(dtype)
        plan, saved = run(case)
        ones = OutputGradients(np.ones_like(saved.output), np.ones_like(saved.lse))
        results.append(KERNELS["numpy"](xp, plan).backward(case.operands(), saved, ones, needs=NEEDS))
    narrow, wide_gradients = results
    for a, b in zip(
        (narrow.query, *narrow.keys, *narrow.values),
        (wide_gradients.query, *wide_gradients.keys, *wide_gradients.values),
        strict=True,
    ):
        assert a.dtype == np.float32
        assert np.abs(a - b).max() <= 3e-5 * np.abs(b).max()


def gradients_of(case: Case, saved: KernelOutput, needs: frozenset[str]) -> OperandGradients:
    grads = OutputGradients(np.ones_like(saved.output))
    return KERNELS["numpy"](xp, plan_of(case)).backward(case.operands(), saved, grads, needs=needs)


def test_only_what_is_needed_comes_back() -> None:
    case = polynomial_case(2, "cp", "full", degree=2)
    _, saved = run(case)
    found = gradients_of(case, saved, frozenset({"query"}))
    assert found.query is not None
    assert found.keys == found.values == found.biases == (None, None)
    assert found.weight is None
    everything = gradients_of(case, saved, NEEDS)
    np.testing.assert_array_equal(found.query, everything.query)


@pytest.mark.parametrize("order", [1, 2])
def test_rows_and_keys_that_nobody_sees_have_zero_gradients(order: int) -> None:
    case = polynomial_case(order, "plain", "causal", degree=2, query_offset=-3, lengths=(13, 13)[:order], queries=11)
    _, saved = run(case)
    found = gradients_of(case, saved, NEEDS)
    assert found.query is not None
    assert np.all(found.query[:, :, :3] == 0)
    assert np.any(found.query[:, :, 4] != 0)
    for gradient in (*found.keys, *found.values):
        assert gradient is not None
        assert np.all(gradient[:, :, 8:] == 0)
        assert np.all(np.any(gradient[:, :, :8] != 0, axis=-1))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("mask", ["full", "causal", "window_long", "ordered"])
def test_planned_memory_holds_for_backward(order: int, mask: str) -> None:
    case = polynomial_case(
        order, "plain", mask, degree=4, dtype="float32", batch=1, heads=2, groups=1, queries=151,
        lengths=(149, 157, 151)[:order], query_width=12, value_width=20, scale=0.02,
    )  # fmt: skip
    plan, saved = run(case)
    assert plan.polynomial is not None
    planned = backward_workspace(plan.problem, plan.polynomial.degree, plan.polynomial.chunk)
    assert f"backward works in {size(planned)}" in plan.explain()
    grads, operands = OutputGradients(np.ones_like(saved.output), np.ones_like(saved.lse)), case.operands()
    kernel = KERNELS["numpy"](xp, plan)
    kernel.backward(operands, saved, grads, needs=NEEDS)
    tracemalloc.start()
    found = kernel.backward(operands, saved, grads, needs=NEEDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    used = peak - sum(x.nbytes for x in (found.query, *found.keys, *found.values))
    assert 0.8 * planned <= used <= 1.2 * planned, (used, planned)


def test_the_memory_limit_holds_for_backward() -> None:
    options = {"queries": 151, "lengths": (149, 157), "query_width": 12, "value_width": 20}
    for limit in (5 * 2**19, 2**22, 2**23):
        case = polynomial_case(2, "plain", "full", degree=4, policy=Policy(memory_limit=limit), **options)
        plan = plan_of(case)
        assert plan.polynomial is not None
        assert plan.cost.peak_memory <= limit
        assert backward_workspace(plan.problem, 4, plan.polynomial.chunk) <= limit


@pytest.mark.parametrize("needs", ["query", "keys", "values", "everything"])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_gradients_are_not_held_twice(mask: str, needs: str) -> None:
    """Blocks are let go of as they are joined, and only of what is wanted; with few features they are most of all."""
    case = polynomial_case(
        2, "plain", mask, degree=1, dtype="float32", batch=1, heads=4, groups=4, queries=1025,
        lengths=(1021, 1031), query_width=24, value_width=23, scale=0.02,
    )  # fmt: skip
    plan, saved = run(case)
    assert plan.polynomial is not None
    planned = backward_workspace(plan.problem, 1, plan.polynomial.chunk)
    kernel, grads = KERNELS["numpy"](xp, plan), OutputGradients(np.ones_like(saved.output), np.ones_like(saved.lse))
    operands = case.operands()
    wanted = NEEDS if needs == "everything" else frozenset({needs})
    kernel.backward(operands, saved, grads, needs=wanted)
    tracemalloc.start()
    found = kernel.backward(operands, saved, grads, needs=wanted)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    given = sum(x.nbytes for x in (found.query, *found.keys, *found.values) if x is not None)
    assert peak - given <= 1.2 * planned, (peak - given, planned, given)
