"""Pruned features: which monomials are kept, kernels against explicit monomials, gradients, plans that prune."""

from __future__ import annotations

from dataclasses import replace
from math import factorial
from typing import Any

import array_api_compat.torch as torch_xp
import array_api_strict
import numpy as np
import pytest

from korder.methods.features import feature_adjoint, multinomials, polynomial_features, pruned_table
from korder.planning.plan import Pruning
from korder.planning.pruning import kept_monomials
from korder.spi import NEEDS, OutputGradients
from korder_torch.polynomial import TorchPolynomialKernel
from tests.kernels import flat
from tests.limits import GRADIENT_LIMIT, GRADIENT_STEP
from tests.polynomial_cases import COMBINATIONS, KERNELS, assert_sums_agree, centre_of, xp
from tests.problems import Case
from tests.pruned_cases import (
    Monomial,
    all_monomials,
    count_of,
    dense_pruned,
    kept_by,
    pruned_case,
    pruned_plan,
)

Array = Any
TAYLOR = tuple(1.0 / factorial(m) for m in range(11))


def pruning(sizes: Any, degree: int, mass: float, reach: float = 1.0) -> Pruning:
    sizes = np.asarray(sizes, dtype=float)
    return Pruning(tuple(float(x) for x in sizes * reach / sizes.sum()), TAYLOR[: degree + 1], mass)


def mass_of(given: Pruning, monomial: Monomial) -> float:
    return given.weights[len(monomial)] * count_of(monomial) * float(np.prod([given.bounds[c] for c in monomial]))


PLACES = np.arange(1.0, 7.0)
SHAPES = {
    "flat": PLACES**0,
    "1/l": 1 / PLACES,
    "1/l^2": PLACES[::-1] ** -2,
    "dominant": np.where(PLACES == 3, 5.0, 0.01),
    "zeros": np.where(PLACES > 4, 0.0, PLACES),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reach", [0.3, 1.0, 5.0])
def test_what_is_left_out_is_small_and_no_monomial_more_could_be(shape: str, reach: float) -> None:
    given = pruning(SHAPES[shape], 4, 0.02 * max(reach, 1.0), reach)
    kept, every = kept_by(given), all_monomials(6, 4)
    assert len(set(kept)) == len(kept) < len(every)
    rest = sum(mass_of(given, m) for m in every if m not in set(kept))
    found = kept_monomials(given)
    assert found is not None
    assert found.counts == tuple(sum(len(m) == s for m in kept) for s in range(5))
    assert rest <= found.dropped <= given.mass
    assert found.dropped == pytest.approx(rest, rel=1e-6, abs=1e-10)
    # every monomial has its parent: itself without its least important column
    rank = {column: place for place, column in enumerate(found.columns)}
    for m in kept:
        assert not m or tuple(sorted(sorted(m, key=rank.__getitem__)[1:])) in set(kept)
    # the powers of the most important column apart, which make sure that no degree is empty
    leaves = [m for m in kept if m and set(m) != {found.columns[-1]} and not _has_child(m, kept, rank)]
    assert all(rest + mass_of(given, m) > given.mass * (1 - 1e-9) for m in leaves)


def _has_child(monomial: Monomial, kept: list[Monomial], rank: dict[int, int]) -> bool:
    return any(
        len(m) == len(monomial) + 1 and tuple(sorted(sorted(m, key=rank.__getitem__)[1:])) == monomial for m in kept
    )


def test_counts_are_those_of_the_theory() -> None:
    """theory.md 1.5 (v), where the degree is as high as it has to be, and ours keep a few powers more."""
    place = np.arange(1.0, 17.0)
    for sizes, wanted in ((place**0, 4813), (1 / place, 2543), (place**-2, 374)):
        kept = kept_monomials(pruning(sizes, 10, 1e-2))
        assert kept is not None
        assert wanted <= sum(kept.counts) <= wanted + 10
    tail = np.exp(2) - sum(2**m * c for m, c in enumerate(TAYLOR))  # of the degrees above
    wide = kept_monomials(pruning(np.arange(1.0, 33.0) ** -2, 10, 1e-2 - tail, 2.0))
    assert wide is not None
    assert 17587 <= sum(wide.counts) <= 17597


def test_nothing_is_pruned_where_nothing_may_be() -> None:
    assert kept_monomials(pruning(np.ones(3), 2, 1e-9)) is None
    assert kept_monomials(pruning(np.ones(60), 8, 1e-9, 40.0)) is None  # too many to look at


def uneven(width: int, degree: int, mass: float) -> Pruning:
    return pruning(np.random.default_rng(width).permutation(np.arange(1.0, width + 1.0) ** -1.5), degree, mass)


@pytest.mark.parametrize(
    ("width", "degree", "mass"), [(1, 4, 0.05), (2, 3, 0.1), (4, 4, 0.01), (6, 5, 0.003), (5, 1, 0.2)]
)
@pytest.mark.parametrize("namespace", ["numpy", "strict", "torch"])
def test_pruned_tables_hold_their_monomials(width: int, degree: int, mass: float, namespace: str) -> None:
    given = uneven(width, degree, mass) if width > 1 else pruning([0.0, 1.0], degree, mass)
    width = len(given.bounds)
    table, kept, rng = pruned_table(given), kept_by(given), np.random.default_rng(2)
    columns, gradient = rng.normal(size=(width, 3)), rng.normal(size=(len(kept), 3))
    space = {"numpy": xp, "strict": array_api_strict, "torch": torch_xp}[namespace]
    features = polynomial_features(space, table, space.asarray(columns))
    expected = np.asarray([np.prod(columns[list(m)], axis=0) for m in kept])
    np.testing.assert_allclose(np.asarray(features), expected, rtol=1e-13)
    np.testing.assert_array_equal(multinomials(table), [count_of(m) for m in kept])
    assert [table.rows(s) for s in range(degree + 1)] == [
        slice(sum(len(m) < s for m in kept), sum(len(m) <= s for m in kept)) for s in range(degree + 1)
    ]
    adjoint = np.zeros_like(columns)
    for row, m in enumerate(kept):
        for place, column in enumerate(m):
            adjoint[column] += gradient[row] * np.prod(columns[list(m[:place] + m[place + 1 :])], axis=0)
    found = feature_adjoint(space, table, space.asarray(columns), features, space.asarray(gradient))
    np.testing.assert_allclose(np.asarray(found), adjoint, rtol=1e-12, atol=1e-12)


def assert_agrees(case: Case, plan: Any, output: Any) -> None:
    """Judge output, lse and moments by the ratio rule, its limit grown by the condition of the monomial sum."""
    centre = centre_of(output)
    exact, plain = (dense_pruned(case, plan, centre, dtype) for dtype in (np.longdouble, np.dtype(case.dtype)))
    assert_sums_agree(case, plan.polynomial.values, output, exact, plain)


@pytest.mark.parametrize(("order", "variant", "mask"), [x for x in COMBINATIONS[::5] if x[:2] != (1, "full_weight")])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_the_sum_of_the_kept_monomials(order: int, variant: str, mask: str, kernel: str) -> None:
    case = pruned_case(order, variant, mask, seed=order, dtype="float32" if order == 2 else "float64")
    plan = pruned_plan(case, 0.3 if variant == "full_weight" else 0.02, chunk=4)
    assert plan.polynomial is not None
    assert plan.polynomial.pruning is not None
    assert_agrees(case, plan, KERNELS[kernel](xp, plan).forward(case.operands(), save=True))


@pytest.mark.parametrize("mask", ["full", "causal", "window", "ordered"])
@pytest.mark.parametrize("namespace", ["strict", "torch", "torch_generic"])
def test_kernels_of_other_namespaces(mask: str, namespace: str) -> None:
    case = pruned_case(2, "key_masks", mask, seed=5)
    plan = pruned_plan(case, 0.02)
    assert plan.polynomial is not None
    assert plan.polynomial.pruning is not None
    kernel, space = {
        "strict": (KERNELS["generic"], array_api_strict),
        "torch": (TorchPolynomialKernel, torch_xp),
        "torch_generic": (KERNELS["generic"], torch_xp),
    }[namespace]
    found = kernel(space, plan).forward(case.operands(space.asarray), save=True)
    arrays = {name: np.asarray(getattr(found, name)) for name in ("output", "lse", "moments", "magnitude")}
    assert_agrees(case, plan, replace(found, **arrays))


@pytest.mark.parametrize(("order", "variant", "mask"), [
    (1, "biases", "full"), (2, "masks_and_shared_bias", "full"), (3, "one_group", "full"), (2, "cp", "full"),
    (2, "full_weight", "full"), (2, "key_masks", "causal_offsets"), (2, "biases", "window"), (2, "plain", "ordered"),
])  # fmt: skip
@pytest.mark.parametrize("kernel", ["generic", "numpy", "torch"])
def test_gradients_are_those_of_the_kept_monomials(order: int, variant: str, mask: str, kernel: str) -> None:
    case = pruned_case(order, variant, mask, seed=order, batch=1, queries=4, query_width=3, value_width=2)
    plan = pruned_plan(case, 0.05, chunk=3)
    assert plan.polynomial is not None
    assert plan.polynomial.pruning is not None
    rng = np.random.default_rng(7)
    grads = OutputGradients(rng.normal(size=(*case.query.shape[:3], 2)), rng.normal(size=case.query.shape[:3]))
    space, made = (torch_xp, TorchPolynomialKernel) if kernel == "torch" else (xp, KERNELS[kernel])
    compiled, operands = made(space, plan), case.operands(space.asarray)
    saved = compiled.forward(operands, save=True)
    upstream = OutputGradients(*(space.asarray(x) for x in (grads.output, grads.lse)))
    found = flat(compiled.backward(operands, saved, upstream, needs=NEEDS))
    centre = centre_of(replace(saved, residuals={"centre": np.asarray(saved.residuals["centre"])}))  # type: ignore[index]
    live = np.isfinite(np.asarray(saved.lse))

    def loss(moved: Case) -> float:
        made = dense_pruned(moved, plan, centre)
        lse = np.where(live, made["lse"], 0)
        return (made["output"] * grads.output).sum() + (lse * grads.lse).sum()

    names = {name: x for name, x in flat(case).items() if not name.startswith("key_masks")}
    assert set(names) == set(found)
    for name, x in names.items():
        direction = rng.normal(size=x.shape)
        ends = [loss(_moved(case, name, sign * GRADIENT_STEP * direction)) for sign in (1, -1)]
        slope = float((ends[0] - ends[1]) / (2 * GRADIENT_STEP))
        # a masked key has no gradient, and the oracle does not look at it
        assert abs(float((found[name] * direction).sum()) - slope) <= GRADIENT_LIMIT * max(
            1.0, float(np.abs(found[name]).max()) * np.sqrt(x.size)
        ), name


def _moved(case: Case, name: str, step: Array) -> Case:
    group, _, place = name.partition("[")
    value = getattr(case, group)
    if not place:
        return replace(case, **{group: value + step})
    index = int(place[:-1])
    return replace(case, **{group: (*value[:index], value[index] + step, *value[index + 1 :])})
