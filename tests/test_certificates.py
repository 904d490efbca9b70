"""Certificates: never below the true error, whatever the operands; sharp where they claim it; tolerances relative."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from korder.errors import AccuracyError
from korder.methods.certificates import certify, meets_tolerance
from korder.result import Certificate
from korder.spec import AttentionSpec, Causal, Full, Ordered, Polynomial, Window
from korder.spec.masks import Mask
from korder.spi import KernelOutput, Plan
from tests.limits import unit
from tests.oracle_polynomial import dense_exact, dense_polynomial, value_products
from tests.polynomial_cases import COMBINATIONS, KERNELS, centre_of, judge_many, plan_of, polynomial_case, run, xp
from tests.problems import Case, random_case

Array = Any


def certificate_of(case: Case, plan: Plan, output: KernelOutput, kernel: str = "numpy") -> Certificate:
    compiled = KERNELS[kernel](xp, plan)
    return certify(xp, plan, case.operands(), output, rounding_unit=compiled.rounding_unit)


def without_dropped_keys(case: Case) -> Case:
    """Return the case without the keys whose biases are so far below the largest that kernels leave them out."""

    def closed(t: int, bias: Array | None) -> Array | None:
        if bias is None:
            return None
        batch, heads, _, _ = case.query.shape
        mask = case.key_masks[t] if case.key_masks else None
        shown = np.broadcast_to(bias, (batch, heads, 1, bias.shape[-1]))
        if mask is not None:
            mask = mask[:, None, :] if mask.ndim == 2 else np.repeat(mask, heads // mask.shape[1], axis=1)
            shown = np.where(mask[:, :, None, :], shown, -np.inf)
        largest = shown.max(axis=-1, keepdims=True, initial=-np.inf)
        return np.where(shown - largest < -69.3, -np.inf, shown).astype(bias.dtype)

    with np.errstate(invalid="ignore"):  # no key at all: -inf less -inf
        return replace(case, biases=tuple(closed(t, bias) for t, bias in enumerate(case.biases)))


def assert_holds(case: Case, plan: Plan, output: KernelOutput, kernel: str = "numpy") -> float:
    """Assert that bounds hold for output and lse, and each part for its own error; return the largest error / bound."""
    found = certificate_of(case, plan, output, kernel)
    assert plan.polynomial is not None
    exact, lse = dense_exact(case)
    polynomial = dense_polynomial(case, plan.polynomial.values, centre_of(output))["output"]
    error = np.abs(output.output - exact).max(-1)
    assert np.all(error <= found.bound)
    # the approximation is about the keys that are not dropped: what these may weigh is part of the rounding
    kept = without_dropped_keys(case)
    summed = dense_polynomial(kept, plan.polynomial.values, centre_of(output))["output"]
    assert np.all(np.abs(summed - dense_exact(kept)[0]).max(-1) <= found.approximation + 1e-3 * found.rounding)
    assert np.all(np.abs(output.output - polynomial).max(-1) <= found.rounding)
    live = np.isfinite(lse)
    assert np.all(np.abs(output.lse[live] - lse[live]) <= found.lse_bound[live])
    np.testing.assert_array_equal(found.bound, found.approximation + found.rounding)
    bounded = found.bound > 0
    return float(np.max(error[bounded] / found.bound[bounded], initial=0.0))


@pytest.mark.parametrize(("order", "variant", "mask"), COMBINATIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold_on_random_problems(order: int, variant: str, mask: str, dtype: str) -> None:
    case = polynomial_case(order, variant, mask, degree=4, dtype=dtype, scale=0.25)
    assert_holds(case, *run(case, chunk=4))


@pytest.mark.parametrize("degree", [1, 2, 3, 6])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_bounds_hold_for_minimax_and_odd_degrees(degree: int, mask: str) -> None:
    for interval in (None, 0.7, 3.0):
        method = {} if interval is None else {"coefficients": "minimax", "interval": interval}
        case = polynomial_case(2, "biases", mask, degree=degree, scale=0.05)
        assert_holds(*(lambda c: (c, *run(c)))(case.with_spec(method=Polynomial(degree=degree, **method))))


def heavy(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_t(1.5, size=shape)


def spiked(rng: np.random.Generator, *shape: int) -> Array:
    x = rng.normal(size=shape) * 10.0 ** -rng.integers(0, 4)
    x[tuple(rng.integers(0, size) for size in shape)] = 10.0 ** rng.integers(0, 6)
    return x


def signed(rng: np.random.Generator, *shape: int) -> Array:
    return rng.choice([-1.0, 1.0], size=shape) * 10.0 ** rng.uniform(-1, 1, size=shape[-1:])


def tied(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(size=(*shape[:-2], 1, shape[-1])) + 1e-4 * rng.normal(size=shape)


def offset(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(size=shape) + 10.0 ** rng.uniform(-1, 2)


def sparse(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(size=shape) * (rng.random(shape) < 0.3)


SOURCES = (heavy, spiked, signed, tied, offset, sparse)


def adversarial_mask(rng: np.random.Generator, order: int) -> Mask:
    window = Window(sizes=tuple(int(x) for x in rng.integers(1, 7, order)))
    return (Full(), Causal(), window, Ordered())[rng.integers(0, 4)]


def adversarial_problem(rng: np.random.Generator, seed: int, order: int, *, widest: int, weighted: float) -> Case:
    """Return a small problem of every mask and form; `weighted` is the share of those with a weight."""
    options: dict[str, Any] = {"mask": adversarial_mask(rng, order)}
    if options["mask"].kind != "full" and rng.random() < 0.5:
        options |= {
            "query_offset": int(rng.integers(-1, 4)),
            "key_offsets": tuple(int(x) for x in rng.integers(0, 3, order)),
        }
    return random_case(
        order, seed=seed, dtype="float64", batch=1, heads=2, groups=int(rng.integers(1, 3)), queries=5,
        lengths=tuple(int(x) for x in rng.integers(1, 8 if order < 3 else 5, order)),
        query_width=int(rng.integers(1, widest + 1)), value_width=int(rng.integers(1, 4)),
        biases=(rng.choice(["key", "shared"]),) * order if rng.random() < 0.3 else None,
        key_masks=(True,) * order if rng.random() < 0.3 else None,
        weight="cp" if rng.random() < weighted else None, **options,
    )  # fmt: skip


def adversarial_case(seed: int, dtype: str) -> Case:
    """Return a small hard problem: any source for any operand, scores bounded by 0.1 to 12, every mask and form."""
    rng = np.random.default_rng(seed)
    order = int(rng.integers(1, 4))
    coefficients: dict[str, Any] = {}
    if rng.random() < 0.3:
        coefficients = {"coefficients": "minimax", "interval": float(rng.uniform(0.2, 12.0))}
    case = adversarial_problem(rng, seed, order, widest=4, weighted=0.2)
    case = case.with_spec(method=Polynomial(degree=int(rng.integers(1, 9)), **coefficients))

    def draw(like: Array) -> Array:
        return SOURCES[rng.integers(len(SOURCES))](rng, *like.shape)

    case = replace(
        case, query=draw(case.query), keys=tuple(map(draw, case.keys)), values=tuple(map(draw, case.values)),
        biases=tuple(None if x is None else x * rng.choice([1.0, 20.0, 80.0]) for x in case.biases),
    ).astype(dtype)  # fmt: skip
    largest = float(np.abs(np.asarray(dense_scores_of(case))).max())
    scale = float(10 ** rng.uniform(-1, np.log10(12.0))) / max(largest, 1e-30)
    return case.with_spec(scale=float(rng.choice([-1, 1])) * min(max(scale, 1e-30), 1e30))


def dense_scores_of(case: Case) -> Array:
    from tests.oracle_polynomial import dense_scores

    return dense_scores(case.with_spec(scale=1.0))[0]


def judge(seed: int, dtype: str) -> str:
    """Run one adversarial case; return what came of it."""
    case = adversarial_case(seed, dtype)
    try:
        plan, output = run(case, chunk=int(1 + seed % 5))
    except AccuracyError:
        return "refused"
    assert_holds(case, plan, output)
    found = certificate_of(case, plan, output)
    return "useful" if np.all(found.bound < np.inf) else "hopeless"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold_on_adversarial_problems(dtype: str) -> None:
    counts = judge_many(judge, range(300), dtype)
    assert counts["useful"] > 150, counts


@pytest.mark.heavy
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold_on_many_adversarial_problems(dtype: str) -> None:
    counts = judge_many(judge, range(1000, 21000), dtype)
    assert counts["useful"] > 10000, counts


def test_two_atoms_attain_the_sup_bound() -> None:
    half, degree = 1.2, 2
    method = Polynomial(degree=degree, coefficients="minimax", interval=0.4)
    case = Case(
        spec=AttentionSpec(order=1, scale=1.0, method=method),
        query=np.full((1, 1, 1, 1), half),
        keys=(np.asarray([[[[1.0], [-1.0]]]]),),
        values=(np.asarray([[[[3.0], [-2.0]]]]),),
        biases=(np.zeros((1, 1, 1, 2)),),
    )
    values = plan_of(case).polynomial.values  # type: ignore[union-attr]
    ratios = [np.polynomial.polynomial.polyval(x, values) * np.exp(-x) for x in (half, -half)]
    # the exact probabilities that the shift is largest at: sqrt of the other atom's ratio
    odds = np.log(np.sqrt(ratios[1]) / np.sqrt(ratios[0]))
    case = replace(case, biases=(np.asarray([[[[odds - 2 * half, 0.0]]]]),))
    plan, output = run(case)
    found = certificate_of(case, plan, output)
    assert found.kind == "sup"
    error = float(np.abs(output.output - dense_exact(case)[0]).max())
    assert 0.999 <= error / found.approximation[0, 0, 0] <= 1.0


def test_moment_bound_is_much_sharper_than_sup_where_scores_concentrate() -> None:
    case = random_case(
        2, seed=1, batch=1, heads=1, groups=1, queries=17, lengths=(31, 29), query_width=8, value_width=4,
        method=Polynomial(degree=4), scale=0.23 / 8**0.5,
    )  # fmt: skip
    plan, output = run(case)
    found = certificate_of(case, plan, output)
    products = value_products(case)
    spread = float((products.max(-2) - products.min(-2)).max())
    assert found.kind == "moment"
    assert np.median(found.approximation) < 1e-3 * spread
    width = np.abs(found.score_range).max(-1)
    sup = np.tanh(0.25 * np.log1p(width**5 / 120 * np.exp(2 * width))) * spread
    assert np.median(sup / found.approximation) > 20


def test_float16_bound_leaves_out_the_final_cast() -> None:
    case = polynomial_case(2, "plain", "full", degree=4, dtype="float16")
    plan, output = run(case)
    found = certificate_of(case, plan, output)
    exact, _ = dense_exact(case)
    cast = 0.5 * unit("float16", float(np.abs(exact).max()))
    assert np.all(np.abs(output.output.astype(float) - exact).max(-1) <= found.bound + cast)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_tolerance_is_relative_to_the_heads_value_range(mask: str) -> None:
    case = polynomial_case(2, "key_masks", mask, degree=4)
    plan, output = run(case)
    found = certificate_of(case, plan, output)
    products = value_products(case)
    live = np.any(products != 0, axis=-1)
    low = np.where(live[..., None], products, np.inf).min(-2)
    high = np.where(live[..., None], products, -np.inf).max(-2)
    spread = (high - low).max(-1).astype(float)
    needed = float((found.approximation / spread[..., None]).max())
    passing = meets_tolerance(xp, found, case.operands(), needed * 1.001)
    missing = meets_tolerance(xp, found, case.operands(), needed * 0.999)
    assert passing.met
    assert not missing.met
    assert missing.part == "approximation"
    place = np.unravel_index(np.argmax(found.approximation / spread[..., None]), found.bound.shape)
    assert (missing.batch, missing.head, missing.row) == tuple(int(x) for x in place)
    assert missing.ratio == pytest.approx(1 / 0.999, rel=1e-6)
    text = str(meets_tolerance(xp, found, case.operands(), needed * 0.999))
    assert f"row {missing.row}" in text
    assert meets_tolerance(xp, found, case.operands(), needed * 1.001).met


def test_rounding_is_held_against_the_largest_value_product() -> None:
    case = polynomial_case(2, "plain", "full", degree=8, dtype="float32", scale=0.01)
    plan, output = run(case)
    found = certificate_of(case, plan, output)
    largest = np.abs(value_products(case)).max((-1, -2)).astype(float)
    needed = float((found.rounding / largest[..., None]).max())
    check = meets_tolerance(xp, found, case.operands(), needed * 0.9)
    assert not check.met
    assert check.part == "rounding"
    assert meets_tolerance(xp, found, case.operands(), needed * 1.001).met


def test_rows_with_nan_are_exempt() -> None:
    case = polynomial_case(2, "plain", "full", degree=4)
    query = case.query.copy()
    query[0, 1, 2] = np.nan
    spoilt = replace(case, query=query)
    plan, output = run(spoilt)
    found = certificate_of(spoilt, plan, output)
    assert np.isnan(found.bound[0, 1, 2])
    assert np.isnan(found.bound).sum() == 1
    assert meets_tolerance(xp, found, spoilt.operands(), 0.5).met
