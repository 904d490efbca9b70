"""The polynomial method's forward against its definition: orders, masks, biases, weights, sizes of numbers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from korder_numpy.backend import NumpyBackend
from polynomial_reference import (
    PolynomialCase,
    assert_alike,
    assert_forward,
    dense,
    every_array,
    mapped,
    random_polynomial,
)
from reference import ISAS

import korder
from korder.spi import Operands
from korder_native import polynomial
from korder_native.backend import NativeBackend

Array = Any
EPS = {"float32": 1e-5, "float64": 1e-12}
"""How far kernels that sum in different orders may be apart, relative to the largest entry of an array."""


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set in turn, by the variable that names it."""
    name = str(request.param)
    monkeypatch.setenv("KORDER_NATIVE_ISA", name)
    return name


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not zeros is made of NaN, so that what is not written is seen."""
    right = polynomial.new

    def new(like: Any, shape: Any, dtype: str, *, zeros: bool = False) -> Any:
        found = right(like, shape, dtype, zeros=zeros)
        if not zeros:
            found[...] = np.nan
        return found

    monkeypatch.setattr(polynomial, "new", new)


def assert_right(case: PolynomialCase) -> None:
    for dtype in ("float32", "float64"):
        narrow = case.cast(dtype)
        found = narrow.kernel().forward(narrow.operands, save=True)
        assert found.output.dtype == dtype
        assert_forward(narrow, found)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masks": {"key_masks": "group"},
    "shared_masks_and_biases": {"key_masks": "shared", "biases": ("shared", None, "shared", "shared")},
    "biases": {"biases": ("key", "closed", "shared", None), "heads": (6, 2)},
    "one_group": {"heads": (3, 1), "key_masks": "group", "biases": (None, "key", "key", "closed")},
    "cp": {"weight": "cp", "key_masks": "group"},
    "full_weight": {"weight": "full", "biases": ("key", None, "shared", None)},
    "negative": {"scale": -0.2},
    "odd": {"degree": 3, "scale": 0.05},
    "minimax": {"coefficients": "minimax", "interval": 2.0, "scale": 0.1},
    "constant": {"degree": 0},
    "many_channels": {"value_width": 37, "width": 7, "degree": 3, "scale": 0.05},
}
COMBINATIONS = [
    (variant, order)
    for number, variant in enumerate(VARIANTS)
    for order in (1, 2, 3, 4)
    if order == 2 or (number + order) % 2 == 0
]
"""Every variant at order 2, and every second one at the other orders."""


def variant_of(variant: str, order: int) -> PolynomialCase:
    """A problem of a variant, smaller at order 4."""
    smaller = {"rows": 5, "lengths": (7, 5, 3, 4), "batch": 1} if order == 4 else {}
    return random_polynomial(order, seed=order, **VARIANTS[variant], **smaller)


@pytest.mark.parametrize(("variant", "order"), COMBINATIONS)
def test_every_variant(variant: str, order: int, isa: str) -> None:
    assert_right(variant_of(variant, order))


@pytest.mark.parametrize("rows", [1, 2, 63, 97])
def test_lengths_around_blocks(rows: int, isa: str) -> None:
    assert_right(random_polynomial(2, rows=rows, lengths=(300 - rows, 1), batch=1, heads=(1, 1), scale=0.1))


def test_more_tokens_than_a_block(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_polynomial(2, rows=130, lengths=(111, 3), batch=1, heads=(2, 1), key_masks="group", degree=2)
    small = replace(case.plan, polynomial=replace(case.plan.polynomial, chunk=16))
    whole = case.kernel().forward(case.operands, save=True)
    monkeypatch.setattr(polynomial, "LONGEST_BLOCK", 50)
    found = NativeBackend().compile(small).forward(case.operands, save=True)
    assert_forward(case, found)
    assert_alike(found, whole, EPS["float64"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("variant", [*VARIANTS, "pruned"])
def test_it_returns_what_the_numpy_kernel_does(variant: str, dtype: str, isa: str) -> None:
    """Normaliser, moments, magnitude and residuals are those that certificates are made of."""
    case = pruned_case() if variant == "pruned" else random_polynomial(2, seed=5, **VARIANTS[variant])
    case = case.cast(dtype)
    assert (variant == "pruned") == (case.plan.polynomial.pruning is not None)
    found, wanted = (
        backend.compile(case.plan).forward(case.operands, save=True) for backend in (NativeBackend(), NumpyBackend())
    )
    assert_alike(found, wanted, EPS[dtype])
    assert found.residuals.keys() == wanted.residuals.keys()
    for name, array in wanted.residuals.items():
        assert np.allclose(found.residuals[name], array, rtol=0, atol=EPS[dtype] * np.max(np.abs(array))), name
    shapes = case.kernel().residual_shapes(case.operands)
    every = {
        **found.residuals,
        **{name: getattr(found, name) for name in ("lse", "normaliser", "moments", "magnitude")},
    }
    assert {name: (array.shape, str(array.dtype)) for name, array in every.items()} == shapes


def pruned_case(order: int = 2, **options: Any) -> PolynomialCase:
    """A problem with columns of unlike sizes, most of whose monomials are left out."""
    case = random_polynomial(order, seed=8, width=7, scale=0.05, prune=1e-3, **options)
    sizes = np.array([0.3, 2.0, 0.02, 1.0, 0.1, 0.5, 0.05])
    return case.changed(query=case.operands.query * sizes, keys=tuple(key * sizes for key in case.operands.keys))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_what_is_pruned_is_little(order: int, isa: str) -> None:
    case = pruned_case(order, key_masks="group", biases=("key", None, "shared"))
    kept = case.plan.polynomial
    assert kept.features < 330 // 2
    found = case.kernel().forward(case.operands, save=True)
    wanted = case.dense(found.residuals["centre"])
    assert 0 < np.max(np.abs(found.output - wanted["output"])) < 1e-2


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_of_any_size(dtype: str, isa: str) -> None:
    """One column is denormal, one huge, one zero in the queries, one zero in a mode; scores are of size 1."""
    case = random_polynomial(2, seed=3, width=6, scale=0.3)
    small, large = (1e-300, 1e300) if dtype == "float64" else (1e-38, 1e37)
    denormal = 1e-310 if dtype == "float64" else 1e-41
    sizes = np.array([[small, large, 1, 0, 1, denormal], [large, small, 1, 1, 0, 1], [1, 1, 1, 1, 1, 1]])
    query, *keys = (x * size for x, size in zip((case.operands.query, *case.operands.keys), sizes, strict=True))
    case = case.changed(query=query, keys=tuple(keys)).cast(dtype)
    found = case.kernel().forward(case.operands, save=True)
    wanted = case.dense(found.residuals["centre"])
    for name in ("output", "lse", "moments"):
        assert np.allclose(getattr(found, name), wanted[name].astype(float), rtol=EPS[dtype], atol=EPS[dtype]), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_scales_of_any_size(size: float, dtype: str, isa: str) -> None:
    case = random_polynomial(2, seed=4, scale=0.2 / size)
    case = case.changed(query=case.operands.query * size).cast(dtype)
    assert_forward(case, case.kernel().forward(case.operands, save=True))


def test_a_row_of_nan_or_of_a_size_that_overflows_spoils_itself_alone(isa: str) -> None:
    for spoil in (np.nan, np.inf):
        case = random_polynomial(2, key_masks="group", biases=("key", None))
        clean = case.kernel().forward(case.operands, save=False)
        query = case.operands.query.copy()
        query[0, 2, 4, 1] = spoil
        found = case.kernel().forward(replace(case.operands, query=query), save=False)
        assert np.isnan(found.output[0, 2, 4]).all()
        assert np.isnan(found.lse[0, 2, 4])
        others = np.ones(clean.lse.shape, bool)
        others[0, 2, 4] = False
        for name in ("output", "lse", "normaliser", "moments", "magnitude"):
            assert np.allclose(getattr(found, name)[others], getattr(clean, name)[others], rtol=1e-12), name


def test_what_is_masked_is_never_looked_at(isa: str) -> None:
    case = random_polynomial(2, key_masks="group", biases=("closed", None))
    clean = case.kernel().forward(case.operands, save=False)
    x = case.operands
    closed = [~mask for mask in x.key_masks]
    keys, values = (
        tuple(np.where(c[..., None], spoil, y) for c, y in zip(closed, arrays, strict=True))
        for arrays, spoil in ((x.keys, np.nan), (x.values, np.inf))
    )
    bias = np.where(np.repeat(closed[0], 2, axis=1)[:, :, None], np.nan, x.biases[0])
    spoiled = replace(x, keys=keys, values=values, biases=(bias, None))
    assert all(np.isnan(key).any() for key in keys)
    found = case.kernel().forward(spoiled, save=False)
    for name, array in every_array(clean).items():
        assert np.array_equal(every_array(found)[name], array), name


def test_rows_with_nothing_to_see_are_zeros(isa: str) -> None:
    for kind in ("mask", "bias", "length"):
        lengths = (6, 0) if kind == "length" else (6, 5)
        case = random_polynomial(2, lengths=lengths, key_masks="group", biases=("key", "closed"))
        x = case.operands
        if kind == "mask":
            case = case.changed(key_masks=(x.key_masks[0], np.zeros_like(x.key_masks[1])))
        if kind == "bias":
            case = case.changed(biases=(np.full_like(x.biases[0], -np.inf), x.biases[1]))
        found = case.kernel().forward(case.operands, save=True)
        for array in (found.output, found.normaliser, found.moments, found.magnitude):
            assert not array.any()
        assert np.all(found.lse == -np.inf)


@pytest.mark.parametrize(("batch", "rows"), [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(batch: int, rows: int, isa: str) -> None:
    case = random_polynomial(2, batch=batch, rows=rows)
    found = case.kernel().forward(case.operands, save=True)
    assert found.output.shape == (batch, 4, rows, 3)
    assert found.lse.shape == (batch, 4, rows)
    assert found.moments.shape == (batch, 4, rows, 5)


def test_strides_are_followed(isa: str) -> None:
    case = random_polynomial(2, key_masks="group", biases=("key", "shared"))
    wanted = case.kernel().forward(case.operands, save=True)
    backwards = lambda x: x[..., ::-1, ::-1].copy()[..., ::-1, ::-1]  # noqa: E731
    spread = lambda x: np.repeat(np.repeat(x, 3, axis=-2), 2, axis=-1)[..., ::3, ::2]  # noqa: E731
    records = lambda x: np.rec.fromarrays([x, x > 0], names="x,tag")["x"]  # noqa: E731
    for change in (backwards, spread, records, np.asfortranarray):
        turned = case.mapped(change)
        masks = tuple(np.repeat(mask, 2, axis=-1)[..., ::2] for mask in turned.key_masks)
        found = case.kernel().forward(replace(turned, key_masks=masks), save=True)
        assert np.array_equal(found.output, wanted.output)
        assert np.array_equal(found.magnitude, wanted.magnitude)


def test_offsets_mean_nothing_where_every_key_is_seen(isa: str) -> None:
    case = random_polynomial(2)
    moved = replace(case.operands, query_offset=7, key_offsets=(-3, 40))
    found, wanted = (case.kernel().forward(x, save=False) for x in (moved, case.operands))
    assert np.array_equal(found.output, wanted.output)


def test_given_statistics_are_kept(isa: str) -> None:
    """With the residuals of one call, another computes the same polynomial about the same centres."""
    case = random_polynomial(2, key_masks="group", biases=("key", None), degree=2)
    kernel = case.kernel()
    kept = kernel.forward(case.operands, save=True).residuals
    moved = replace(case, operands=replace(case.operands, query=1.1 * case.operands.query))
    found = kernel.forward(moved.operands, save=True, residuals=kept)
    assert np.array_equal(found.residuals["centre"], kept["centre"])
    assert np.array_equal(found.residuals["scales"], kept["scales"])
    assert_forward(moved, found)


def test_a_normaliser_that_is_not_positive_is_an_error(isa: str) -> None:
    case = random_polynomial(1, degree=3, scale=9.0)
    with pytest.raises(korder.errors.AccuracyError, match="sums to a number that is not positive"):
        case.kernel().forward(case.operands, save=False)


def test_bfloat16_is_summed_in_float32(isa: str) -> None:
    torch = pytest.importorskip("torch")
    for options in ({}, {"key_masks": "group", "biases": ("key", None)}, {"weight": "cp"}, {"weight": "full"}):
        case = random_polynomial(2, seed=2, **options)
        halves = mapped(case.operands, lambda x: torch.from_numpy(x).to(torch.bfloat16))
        case = replace(case, operands=mapped(halves, lambda x: x.to(torch.float32).numpy()))
        masks = tuple(None if mask is None else torch.from_numpy(mask) for mask in case.operands.key_masks)
        kernel = NativeBackend().compile(case.plan_in("bfloat16"))
        found = kernel.forward(replace(halves, key_masks=masks), save=True)
        assert found.output.dtype == torch.bfloat16
        assert_forward(case, replace(found, output=found.output.float()), unit=2.0**-8)


def test_tensors_are_read_where_they_lie(isa: str) -> None:
    torch = pytest.importorskip("torch")
    case = random_polynomial(2, key_masks="group", biases=("key", None))
    wanted = korder.attend(
        case.operands.query, case.operands.keys, case.operands.values, **case.arguments, backend="native"
    )
    turned = mapped(case.operands, lambda x: torch.from_numpy(x.swapaxes(-1, -2).copy()).transpose(-1, -2))
    turned = replace(turned, key_masks=tuple(map(torch.from_numpy, case.operands.key_masks)))
    arguments = {**case.arguments, "biases": turned.biases, "key_masks": turned.key_masks, "backend": "native"}
    for wants in (False, True):
        query = turned.query.detach().requires_grad_(wants)
        found = korder.torch.attend(query, turned.keys, turned.values, **arguments)
        assert found.requires_grad == wants
        assert np.allclose(found.detach(), wanted, rtol=0, atol=1e-13)
        with torch.no_grad():
            again = korder.torch.attend(query, turned.keys, turned.values, **arguments)
        assert not again.requires_grad
        assert torch.equal(again, found)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data())
def test_problems_by_chance(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KORDER_NATIVE_ISA", data.draw(st.sampled_from(ISAS)))
        assert_right(problem_by_chance(data, 0))


def problem_by_chance(data: st.DataObject, least: int) -> PolynomialCase:
    """Draw a problem of any order and form, lengths from `least` on."""
    order = data.draw(st.integers(1, 4))
    most = (60, 14, 7, 4)[order - 1]
    groups, share = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    weight = data.draw(st.sampled_from([None, None, "cp", "full"])) if order < 4 else None
    return random_polynomial(
        order,
        seed=data.draw(st.integers(0, 99)),
        degree=data.draw(st.sampled_from([0, 2, 4, 6] if order < 3 else [0, 2, 4])),
        rows=data.draw(st.integers(least, 20)),
        lengths=tuple(data.draw(st.lists(st.integers(least, most), min_size=order, max_size=order))),
        width=data.draw(st.integers(1, 5)),
        value_width=data.draw(st.integers(1, 20)),
        batch=data.draw(st.integers(1, 2)),
        heads=(groups * share, groups),
        key_masks=data.draw(st.sampled_from([None, "group", "shared"])),
        biases=tuple(data.draw(st.sampled_from(["key", "shared", "closed", None])) for _ in range(order)),
        weight=weight,
        scale=data.draw(st.sampled_from([0.1, -0.1, 0.3])),
    )


def test_the_definition_is_that_of_attention() -> None:
    """At a degree where nothing is left of the difference, the definition here is exact attention."""
    case = random_polynomial(2, degree=14, scale=0.05, key_masks="group", biases=("key", "closed"))
    centre = np.zeros(case.operands.query.shape[:3])
    polynomial_ = case.plan.polynomial
    found = dense(case.operands, 0.05, polynomial_.values, centre, np)
    exact = korder.attend_result(
        case.operands.query,
        case.operands.keys,
        case.operands.values,
        **{**case.arguments, "spec": korder.AttentionSpec(order=2, scale=0.05)},
        backend="numpy",
    )
    assert np.allclose(found["output"], exact.output, rtol=0, atol=1e-10)
    assert np.allclose(found["lse"], exact.lse, rtol=0, atol=1e-10)
    assert isinstance(case.operands, Operands)
