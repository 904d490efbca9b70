"""The closed-form gradient of the polynomial method against explicit tuples, and against the other option."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import array_api_compat.torch as compat_torch
import array_api_strict
import numpy as np
import pytest

import korder
from korder.errors import SpecError, UnsupportedProblemError
from korder.planning.explain import size
from korder.planning.polynomial import backward_workspace
from korder.spec import AttentionSpec, Causal, Polynomial
from korder.spi import NEEDS, MethodSupport, NamespaceBackend, Operands, OutputGradients
from korder_torch.polynomial import TorchPolynomialKernel
from tests.kernels import flat
from tests.limits import GRADIENT_LIMIT, GRADIENT_STEP, RATIO, error, unit
from tests.oracle_polynomial import dense_gradients, dense_polynomial
from tests.polynomial_cases import KERNELS, VARIANTS, centre_of, plan_of, polynomial_case, xp
from tests.problems import Case

Array = Any
DEGREES = {1: 4, 2: 3, 3: 2}
ALL = {**KERNELS, "strict": KERNELS["generic"], "torch": TorchPolynomialKernel}
NAMESPACES = {"strict": array_api_strict, "torch": compat_torch}


def closed(case: Case, **changes: Any) -> Case:
    """The same problem with the closed form of the gradient."""
    method = case.spec.polynomial
    assert method is not None
    return case.with_spec(method=method.model_copy(update={"gradient": "closed_form", **changes}))


def closed_case(order: int, variant: str = "plain", *, degree: int | None = None, **options: Any) -> Case:
    return closed(polynomial_case(order, variant, "full", degree=degree or DEGREES[order], **options))


def upstream(case: Case, seed: int = 1) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    rows = case.query.shape[:3]
    return rng.normal(size=(*rows, case.values[0].shape[3])).astype(case.dtype), rng.normal(size=rows)


def differentiated(
    case: Case,
    grads: tuple[Array, Array | None],
    kernel: str = "numpy",
    *,
    chunk: int | None = 4,
    needs: frozenset[str] = NEEDS,
) -> tuple[dict[str, Array], Array]:
    """Return a kernel's gradients by operand, and the centres that it used."""
    namespace = NAMESPACES.get(kernel, xp)
    made = ALL[kernel](namespace, plan_of(case, chunk))

    def asarray(x: Array) -> Array:
        return x if namespace is xp else namespace.asarray(x)

    operands = case.operands(asarray)
    saved = made.forward(operands, save=True)
    given = OutputGradients(*(None if x is None else asarray(x) for x in grads))
    return flat(made.backward(operands, saved, given, needs=needs)), centre_of(saved)


def polynomial(case: Case) -> tuple[tuple[float, ...], Any]:
    """Return the coefficients of a case's plan and their polynomial as a function."""
    plan = plan_of(case).polynomial
    assert plan is not None
    return plan.values, lambda x: np.polynomial.polynomial.polyval(x, np.asarray(plan.values, x.dtype))


def assert_closed_form(case: Case, kernel: str, grads: tuple[Array, Array | None] | None = None) -> None:
    """Judge every gradient by the ratio rule, the limit grown by the condition of the monomial sum."""
    grads = grads or upstream(case)
    found, centre = differentiated(case, grads, kernel)
    values, weight = polynomial(case)
    condition = max(1.0, float(np.max(dense_polynomial(case, values, centre)["condition"])))
    exact = dense_gradients(case, weight, weight, centre, grads)
    plain = dense_gradients(case, weight, weight, centre, grads, np.dtype(case.dtype))
    assert found.keys() == exact.keys()
    for name, wanted in exact.items():
        largest = float(np.max(np.abs(wanted), initial=0.0))
        allowed = error(plain[name], wanted) + unit(case.dtype, largest)
        assert found[name].dtype == case.dtype, name
        assert error(found[name], wanted) <= RATIO * condition * allowed, name


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_are_the_closed_form(order: int, variant: str) -> None:
    assert_closed_form(closed_case(order, variant, seed=order), "numpy")


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [
        *(("generic", variant) for variant in VARIANTS),
        *(("strict", variant) for variant in ("masks_and_shared_bias", "full_weight")),
        ("torch", "cp"),
    ],
)
def test_every_kernel_has_it(kernel: str, variant: str) -> None:
    assert_closed_form(closed_case(2, variant, batch=1), kernel)


@pytest.mark.parametrize("degree", [0, 1, 5])
def test_other_degrees_and_a_negative_scale(degree: int) -> None:
    assert_closed_form(closed(polynomial_case(2, "biases", "full", degree=degree, scale=-0.2)), "numpy")


@pytest.mark.parametrize("degree", [2, 3])
def test_minimax(degree: int) -> None:
    case = polynomial_case(2, "masks_and_shared_bias", "full", degree=degree)
    assert_closed_form(closed(case, coefficients="minimax", interval=1.5), "numpy")


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [*((kernel, variant) for kernel in KERNELS for variant in ("plain", "biases", "cp")), ("torch", "biases")],
)
def test_float32(kernel: str, variant: str) -> None:
    assert_closed_form(closed_case(2, variant, dtype="float32", batch=1), kernel)


def test_offsets_do_not_matter_to_the_full_mask() -> None:
    case = closed_case(2)
    moved = replace(case, query_offset=5, key_offsets=(3, 1))
    found, wanted = (differentiated(x, upstream(case))[0] for x in (moved, case))
    for name, gradient in wanted.items():
        np.testing.assert_array_equal(found[name], gradient)


@pytest.mark.parametrize("which", ["output", "lse"])
def test_through_output_and_through_lse_alone(which: str) -> None:
    case = closed_case(2, "biases")
    output, lse = upstream(case)
    assert_closed_form(case, "numpy", (output, None) if which == "output" else (0 * output, lse))


def test_each_group_alone_is_what_it_is_among_all() -> None:
    case = closed_case(2, "cp")
    whole, _ = differentiated(case, upstream(case))
    for need in NEEDS:
        part, _ = differentiated(case, upstream(case), needs=frozenset({need}))
        assert part.keys() == {name for name in whole if name.split("[")[0] == need}
        for name, gradient in part.items():
            np.testing.assert_array_equal(gradient, whole[name])


def test_masked_nan_and_heads_without_a_key() -> None:
    case = closed_case(2, "key_masks")
    masks = tuple(mask if mask.ndim == 3 else mask[:, None, :].repeat(2, axis=1) for mask in case.key_masks)
    masks[0][1, 0] = False  # two query heads of a batch entry see nothing
    spoilt = [
        tuple(np.where(mask[..., None], x, np.nan) for mask, x in zip(masks, arrays, strict=True))
        for arrays in (case.keys, case.values)
    ]
    case = replace(case, key_masks=masks, keys=spoilt[0], values=spoilt[1])
    assert_closed_form(case, "numpy")
    found, _ = differentiated(case, upstream(case))
    assert np.all(found["query"][1, :2] == 0)
    assert np.any(found["query"][1, 2:] != 0)


@pytest.mark.parametrize("lengths", [(1, 1), (1, 5), (0, 5)])
@pytest.mark.parametrize("queries", [0, 1, 11])
def test_lengths_of_zero_and_one(lengths: tuple[int, ...], queries: int) -> None:
    case = closed_case(2, lengths=lengths, queries=queries)
    found, _ = differentiated(case, upstream(case))
    assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in flat(case.operands()).items()}
    if 0 in lengths or queries == 0:
        assert not any(np.any(x) for x in found.values())
    else:
        assert_closed_form(case, "numpy")


def relative(got: Array, wanted: Array) -> float:
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize(("coefficients", "interval"), [("taylor", None), ("minimax", 2.0)])
def test_each_option_is_what_it_is_called(coefficients: str, interval: float | None) -> None:
    plain = polynomial_case(2, "cp", "full", degree=2)
    case = closed(plain, coefficients=coefficients, interval=interval)
    grads = upstream(case)
    values, weight = polynomial(case)
    derivative = np.polynomial.Polynomial(values).deriv()
    slopes = {"closed_form": weight, "consistent": lambda x: derivative(x.astype(float))}
    for option in slopes:
        found, centre = differentiated(closed(case, gradient=option), grads)
        for other, slope in slopes.items():
            wanted = dense_gradients(case, weight, slope, centre, grads)
            for name in ("query", "keys[0]", "keys[1]", "weight[0]", "weight[2]"):
                off = relative(found[name], wanted[name])
                assert off < 1e-12 if other == option else off > 1e-3, (option, other, name)
            for name in ("values[0]", "values[1]"):  # no derivative of a weight is in them
                assert relative(found[name], wanted[name]) < 1e-12


def test_it_is_nearer_to_the_exact_gradient_and_no_gradient_of_the_loss() -> None:
    plain = polynomial_case(2, "plain", "full", degree=4, scale=0.04)
    grads = upstream(plain)
    exact = dense_gradients(plain, np.exp, np.exp, np.zeros(plain.query.shape[:3]), grads)
    consistent, _ = differentiated(closed(plain, gradient="consistent"), grads)
    found, _ = differentiated(closed(plain), grads)
    for name in ("query", "keys[0]", "keys[1]"):
        assert 4 * relative(found[name], exact[name]) < relative(consistent[name], exact[name]) < 0.01, name
    made, operands = KERNELS["numpy"](xp, plan_of(plain)), plain.operands()
    fixed = made.forward(operands, save=True).residuals

    def loss(changed: Operands) -> float:
        output = made.forward(changed, save=False, residuals=fixed)
        return float(np.sum(output.output * grads[0]) + np.sum(output.lse * grads[1]))

    turn = np.random.default_rng(3).normal(size=plain.query.shape)
    ends = [loss(replace(operands, query=plain.query + sign * GRADIENT_STEP * turn)) for sign in (1, -1)]
    measured = (ends[0] - ends[1]) / (2 * GRADIENT_STEP)
    size_of = float(np.sqrt(np.sum((found["query"] * turn) ** 2)))
    assert abs(measured - np.sum(consistent["query"] * turn)) < 10 * GRADIENT_LIMIT * size_of
    assert abs(measured - np.sum(found["query"] * turn)) > 100 * GRADIENT_LIMIT * size_of


def test_forward_does_not_know_which_gradient_follows() -> None:
    case = polynomial_case(2, "biases", "full", degree=3)
    first, second = (KERNELS["numpy"](xp, plan_of(x)).forward(x.operands(), save=True) for x in (case, closed(case)))
    for name in ("output", "lse", "normaliser", "moments", "magnitude"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def memory_case(order: int, **options: Any) -> Case:
    widths = {"query_width": {1: 12, 2: 10, 3: 8}[order], "value_width": 20, "scale": 0.02}
    return closed_case(order, degree=4, batch=1, heads=2, groups=1, queries=151,
                       lengths=(149, 157, 151)[:order], **widths, **options)  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3])
def test_planned_memory_holds_for_backward(order: int) -> None:
    case = memory_case(order, dtype="float32")
    plan, operands = plan_of(case), case.operands()
    assert plan.polynomial is not None
    planned = backward_workspace(plan.problem, plan.polynomial.degree, plan.polynomial.chunk)
    assert f"backward works in {size(planned)}" in plan.explain()
    made = KERNELS["numpy"](xp, plan)
    saved = made.forward(operands, save=True)
    grads = OutputGradients(np.ones_like(saved.output), np.ones_like(saved.lse))
    made.backward(operands, saved, grads, needs=NEEDS)
    tracemalloc.start()
    found = made.backward(operands, saved, grads, needs=NEEDS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    used = peak - sum(x.nbytes for x in flat(found).values())
    assert 0.8 * planned <= used <= 1.2 * planned, (used, planned)


def test_the_memory_limit_holds_for_backward() -> None:
    for limit in (2**23, 2**24):
        case = memory_case(2, policy={"memory_limit": limit})
        plan = plan_of(case)
        assert plan.polynomial is not None
        assert plan.cost.peak_memory <= backward_workspace(plan.problem, 4, plan.polynomial.chunk) <= limit
        assert plan.polynomial.chunk <= plan_of(closed(case, gradient="consistent")).polynomial.chunk  # type: ignore[union-attr]


def test_the_plan_says_which_gradient_it_will_be() -> None:
    case = closed_case(2)
    plan = plan_of(case)
    assert plan.polynomial is not None
    assert plan.polynomial.gradient == "closed_form"
    assert "gradients: those of exact attention, with the polynomial's weights (closed_form)" in plan.explain()
    other = plan_of(closed(case, gradient="consistent"))
    assert "gradients: of the function that is computed (consistent)" in other.explain()
    assert AttentionSpec(method=Polynomial(degree=2), order=1).polynomial.gradient == "consistent"  # type: ignore[union-attr]


def test_other_masks_are_refused_with_the_reason() -> None:
    case = closed_case(2).with_spec(mask=Causal(align="start"))
    with pytest.raises(UnsupportedProblemError, match="no backend can run") as caught:
        korder.attend(case.query, case.keys, case.values, spec=case.spec)
    assert "numpy (priority 0, polynomial of degree 3): gradient=closed_form (supported: consistent; closed_form with mask=full)" in str(caught.value)  # fmt: skip # noqa: E501
    with pytest.raises(SpecError, match="gradient"):
        Polynomial(degree=2, gradient="exact")  # type: ignore[arg-type]


def test_a_backend_that_does_not_know_the_option_refuses_it() -> None:
    plan = plan_of(closed_case(2))
    generic = NamespaceBackend().capabilities()
    assert not generic.refuse(plan)
    assert MethodSupport("polynomial").closed_form == frozenset()
    older = replace(generic, methods=tuple(replace(x, closed_form=frozenset()) for x in generic.methods))
    (reason,) = older.refuse(plan)
    assert str(reason) == "gradient=closed_form (supported: consistent)"
    assert not older.refuse(plan_of(closed(closed_case(2), gradient="consistent")))
