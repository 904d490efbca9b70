"""The polynomial kernels against the dense polynomial of the same centres: every mask, bias, weight and order."""

from __future__ import annotations

import threading
import tracemalloc
from dataclasses import replace
from typing import Any

import array_api_strict
import numpy as np
import pytest

import korder
from korder.errors import AccuracyError
from korder.methods.certificates import certify
from korder.methods.statistics import measure
from korder.spec import AttentionSpec, Causal, Ordered, Polynomial, Window
from korder.spec.masks import Mask
from korder.spi import NEEDS, PROGRESS, OutputGradients
from tests.oracle_polynomial import dense_exact, dense_polynomial
from tests.polynomial_cases import (
    COMBINATIONS,
    KERNELS,
    assert_sums_agree,
    centre_of,
    plan_of,
    polynomial_case,
    run,
    xp,
)
from tests.problems import Case, random_case

DEGREES = {1: 5, 2: 4, 3: 2}


def assert_agrees(case: Case, output: Any, coefficients: tuple[float, ...]) -> None:
    """Judge output, lse and moments by the ratio rule, its limit grown by the condition of the monomial sum."""
    centre = centre_of(output)
    exact = dense_polynomial(case, coefficients, centre)
    plain = dense_polynomial(case, coefficients, centre, np.dtype(case.dtype))
    assert_sums_agree(case, coefficients, output, exact, plain)


@pytest.mark.parametrize(("order", "variant", "mask"), COMBINATIONS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_is_the_dense_polynomial(order: int, variant: str, mask: str, kernel: str) -> None:
    case = polynomial_case(order, variant, mask, degree=DEGREES[order], seed=order)
    plan, output = run(case, kernel=kernel, chunk=4)
    assert plan.polynomial is not None
    assert_agrees(case, output, plan.polynomial.values)


@pytest.mark.parametrize("variant", ["plain", "biases", "cp"])
@pytest.mark.parametrize("mask", ["full", "causal_offsets", "window_offsets", "ordered_offsets"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_float32(variant: str, mask: str, kernel: str) -> None:
    case = polynomial_case(2, variant, mask, degree=4, dtype="float32")
    plan, output = run(case, kernel=kernel)
    assert plan.polynomial is not None
    assert output.output.dtype == np.float32
    assert_agrees(case, output, plan.polynomial.values)


@pytest.mark.parametrize("order", [4, 5, 6])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "ordered"])
def test_high_orders(order: int, mask: str) -> None:
    options = {"query_offset": 4, "key_offsets": tuple(range(order))} if mask == "ordered" else {}
    case = polynomial_case(
        order, "plain", mask, degree=3, queries=5, query_width=2, value_width=3, scale=0.1, **options
    )
    plan, output = run(case)
    assert plan.polynomial is not None
    assert_agrees(case, output, plan.polynomial.values)


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_minimax_is_centred_on_the_range(mask: str) -> None:
    case = polynomial_case(2, "plain", mask, degree=3).with_spec(
        method=Polynomial(degree=3, coefficients="minimax", interval=2.0)
    )
    plan, output = run(case)
    assert plan.polynomial is not None
    assert plan.polynomial.coefficients == "minimax"
    assert_agrees(case, output, plan.polynomial.values)


def test_a_wider_policy_makes_float32_operands_as_exact_as_float64() -> None:
    narrow = polynomial_case(2, "biases", "causal", degree=4, dtype="float32", policy={"precision": "float64"})
    _, output = run(narrow)
    exact = dense_polynomial(narrow, plan_of(narrow).polynomial.values, centre_of(output))  # type: ignore[union-attr]
    assert output.output.dtype == np.float32
    np.testing.assert_allclose(output.lse, exact["lse"].astype(float), rtol=1e-13)
    np.testing.assert_allclose(output.output, exact["output"].astype(float), atol=2e-7)


def test_float16_operands_are_computed_in_float32() -> None:
    case = polynomial_case(2, "key_masks", "full", degree=4, dtype="float16")
    plan, output = run(case)
    assert plan.problem.accumulation == "float32"
    exact = dense_polynomial(case, plan.polynomial.values, centre_of(output))["output"]  # type: ignore[union-attr]
    assert output.output.dtype == np.float16
    limit = np.spacing(np.abs(exact).max().astype(np.float16)).astype(float)
    assert np.abs(output.output - exact.astype(float)).max() <= limit


@pytest.mark.parametrize("mask", ["full", "causal_offsets", "window_offsets", "ordered_offsets"])
def test_masked_keys_never_leak(mask: str) -> None:
    case = polynomial_case(2, "masks_and_shared_bias", mask, degree=3)
    _, clean = run(case)
    masks = [m if m.ndim == 3 else np.repeat(m[:, None], 2, axis=1) for m in case.key_masks]  # type: ignore[union-attr]
    for poison in (np.nan, np.inf, 1e30):
        spoilt = replace(
            case,
            keys=tuple(np.where(m[..., None], x, poison) for x, m in zip(case.keys, masks, strict=True)),
            values=tuple(np.where(m[..., None], x, poison) for x, m in zip(case.values, masks, strict=True)),
        )
        plan, output = run(spoilt)
        np.testing.assert_array_equal(output.output, clean.output)
        np.testing.assert_array_equal(output.lse, clean.lse)
        bound = certify(xp, plan, spoilt.operands(), output, rounding_unit=1e-14).bound
        assert np.all(np.isfinite(bound))
        gradients = KERNELS["numpy"](xp, plan).backward(
            spoilt.operands(),
            output,
            OutputGradients(np.ones_like(output.output), np.ones_like(output.lse)),
            needs=NEEDS,
        )
        for array, live in zip(gradients.keys, masks, strict=True):
            assert np.all(array[~live] == 0)
            assert np.all(np.isfinite(array[live]))


def test_a_nan_reaches_only_the_rows_that_see_it() -> None:
    case = polynomial_case(2, "plain", "causal", degree=2, lengths=(11, 11))
    _, clean = run(case)
    keys = case.keys[1].copy()
    keys[:, :, 6] = np.nan
    _, output = run(replace(case, keys=(case.keys[0], keys)))
    assert np.all(np.isnan(output.output[:, :, 6:]))
    np.testing.assert_array_equal(output.output[:, :, :6], clean.output[:, :, :6])


def test_a_nan_that_has_left_a_window_leaves_nothing_behind() -> None:
    case = polynomial_case(2, "plain", "window", degree=2, lengths=(11, 11), sizes=(4, 3))
    _, clean = run(case, chunk=3)
    keys = case.keys[1].copy()
    keys[:, :, 4] = np.nan
    spoilt = replace(case, keys=(case.keys[0], keys))
    plan, output = run(spoilt, chunk=3)
    assert np.all(np.isnan(output.output[:, :, 4:7]))
    for rows in (slice(0, 4), slice(7, None)):
        np.testing.assert_array_equal(output.output[:, :, rows], clean.output[:, :, rows])
        bound = certify(xp, plan, spoilt.operands(), output, rounding_unit=1e-14).bound
        assert np.all(np.isfinite(bound[:, :, rows]))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_keys_that_no_ordered_tuple_holds_may_be_anything(poison: float) -> None:
    case = polynomial_case(2, "plain", "ordered", degree=2, lengths=(7, 5))
    _, clean = run(case, chunk=3)
    keys, values = ([x.copy() for x in group] for group in (case.keys, case.values))
    for group in (keys, values):
        group[0][:, :, 4:] = poison  # no key of the second mode comes after them
        group[1][:, :, 0] = poison  # no key of the first mode comes before it
    spoilt = replace(case, keys=tuple(keys), values=tuple(values))
    for kernel in KERNELS:
        _, output = run(spoilt, kernel=kernel, chunk=3)
        np.testing.assert_allclose(output.output, clean.output, rtol=1e-13)
        np.testing.assert_allclose(output.lse, clean.lse, rtol=1e-13)


def test_keys_far_before_the_first_row_cost_no_walk_over_the_gap() -> None:
    case = polynomial_case(2, "plain", "ordered", degree=2, query_offset=10**9, key_offsets=(-(10**9), 10**6))
    plan, output = run(case)
    assert plan.polynomial is not None
    assert_agrees(case, output, plan.polynomial.values)


def test_a_huge_key_that_has_left_a_window_costs_no_digits() -> None:
    case = polynomial_case(1, "plain", "window", degree=4, lengths=(200,), queries=200, sizes=(40,), batch=1)
    keys = case.keys[0].copy()
    keys[:, :, 70] *= 1e6
    case = replace(case, keys=(keys,)).with_spec(scale=1e-7)
    plan, output = run(case)
    assert plan.polynomial is not None
    exact = dense_polynomial(case, plan.polynomial.values, centre_of(output))["output"]
    error = np.abs(output.output - exact).max(axis=(0, 1, 3))
    assert error[110:].max() <= 1e-13
    certificate = certify(xp, plan, case.operands(), output, rounding_unit=KERNELS["numpy"](xp, plan).rounding_unit)
    assert np.max(certificate.rounding[:, :, 110:]) <= 1e-10


def test_rows_without_a_live_tuple() -> None:
    case = polynomial_case(2, "plain", "causal", degree=2, key_offsets=(4, 2))
    plan, output = run(case)
    assert np.all(output.output[:, :, :4] == 0)
    assert np.all(output.lse[:, :, :4] == -np.inf)
    assert np.all(np.isfinite(output.lse[:, :, 4:]))
    certificate = certify(xp, plan, case.operands(), output, rounding_unit=1e-14)
    assert np.all(certificate.bound[:, :, :4] == 0)
    assert np.all(certificate.bound[:, :, 4:] > 0)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "ordered"])
@pytest.mark.parametrize(("queries", "lengths"), [(0, (3, 2)), (1, (1, 1)), (3, (0, 2)), (1, (5, 3))])
def test_short_and_empty_lengths(queries: int, lengths: tuple[int, ...], mask: str) -> None:
    case = polynomial_case(2, "plain", mask, degree=2, queries=queries, lengths=lengths)
    plan, output = run(case)
    assert output.output.shape == case.query.shape[:3] + (3,)[:0] + case.values[0].shape[3:]
    if queries and min(lengths):
        assert plan.polynomial is not None
        assert_agrees(case, output, plan.polynomial.values)
    else:
        assert np.all(output.output == 0)
        assert np.all(output.lse == -np.inf)
    gradients = KERNELS["numpy"](xp, plan).backward(
        case.operands(), output, OutputGradients(np.ones_like(output.output)), needs=NEEDS
    )
    assert gradients.query is not None
    assert gradients.query.shape == case.query.shape
    assert all(g.shape == k.shape for g, k in zip(gradients.keys, case.keys, strict=True))


def test_an_empty_batch() -> None:
    case = polynomial_case(2, "plain", "full", degree=2, batch=0)
    plan, output = run(case)
    assert output.output.shape == (0, 4, 11, case.values[0].shape[3])
    certificate = certify(xp, plan, case.operands(), output, rounding_unit=1e-14)
    assert certificate.bound.shape == (0, 4, 11)
    found = KERNELS["numpy"](xp, plan).backward(case.operands(), output, OutputGradients(output.output), needs=NEEDS)
    assert found.query is not None
    assert found.query.shape == case.query.shape
    assert measure(xp, plan.problem, case.operands()).half_width == 0.0


def test_a_negative_sum_raises_and_names_the_row() -> None:
    method = Polynomial(degree=1, coefficients="minimax", interval=0.5)
    case = polynomial_case(1, "plain", "full", degree=1, scale=1.0, lengths=(2,), queries=7).with_spec(method=method)
    query = np.zeros_like(case.query)
    query[1, 2, 3] = 40.0 * (case.keys[0][1, 1, 1] - case.keys[0][1, 1, 0])  # its score is lowest at key 0
    favoured = np.asarray([[[[6.0, -6.0]]]])
    with pytest.raises(AccuracyError, match=r"batch 1, head 2, row 3") as caught:
        run(replace(case, query=query, biases=(favoured,)))
    assert caught.value.code == "normaliser-not-positive"
    assert "even degree" in str(caught.value)


def test_residuals_fix_the_statistics() -> None:
    case = polynomial_case(2, "biases", "causal", degree=2)
    plan, saved = run(case)
    moved = replace(case, keys=(case.keys[0] * 1.1, case.keys[1]))
    kernel = KERNELS["numpy"](xp, plan)
    output = kernel.forward(moved.operands(), save=True, residuals=saved.residuals)
    np.testing.assert_array_equal(centre_of(output), centre_of(saved))
    assert_agrees(moved, output, plan.polynomial.values)  # type: ignore[union-attr]
    assert np.abs(centre_of(run(moved)[1]) - centre_of(saved)).max() > 1e-4


def test_a_mode_of_ones_reduces_the_order() -> None:
    case = polynomial_case(2, "plain", "full", degree=3)
    third = (np.ones_like(case.keys[1][:, :, :3]), np.ones_like(case.values[1][:, :, :3]))
    spec = AttentionSpec(order=3, scale=0.15, method=Polynomial(degree=3))
    wider = replace(case, spec=spec, keys=(*case.keys, third[0]), values=(*case.values, third[1]))
    (_, two), (_, three) = run(case), run(wider)
    np.testing.assert_allclose(three.output, two.output, rtol=1e-12)
    np.testing.assert_allclose(three.lse, two.lse + np.log(3), rtol=1e-12)


@pytest.mark.parametrize("mask", ["full", "causal", "window", "ordered"])
def test_generic_code_runs_on_the_strict_standard(mask: str) -> None:
    strict = array_api_strict
    case = polynomial_case(2, "masks_and_shared_bias", mask, degree=2, batch=1, groups=1)
    plan = plan_of(case, chunk=4)
    kernel = KERNELS["generic"](strict, plan)
    operands = case.operands(strict.asarray)
    output = kernel.forward(operands, save=True)
    _, expected = run(case, chunk=4)
    np.testing.assert_allclose(np.asarray(output.output), expected.output, rtol=1e-12)
    grads = OutputGradients(strict.ones_like(output.output))
    found = kernel.backward(operands, output, grads, needs=NEEDS)
    wanted = KERNELS["numpy"](xp, plan).backward(
        case.operands(), expected, OutputGradients(np.ones_like(expected.output)), needs=NEEDS
    )
    for a, b in zip(
        (found.query, *found.keys, *found.values), (wanted.query, *wanted.keys, *wanted.values), strict=True
    ):
        np.testing.assert_allclose(np.asarray(a), b, rtol=1e-9, atol=1e-12)
    certificate = certify(strict, plan, operands, output, rounding_unit=kernel.rounding_unit)
    exact, _ = dense_exact(case)
    assert np.all(np.abs(np.asarray(output.output) - exact).max(-1) <= np.asarray(certificate.bound))
    assert measure(strict, plan.problem, operands) == measure(xp, plan.problem, case.operands())


def test_progress_goes_to_one() -> None:
    case = polynomial_case(2, "plain", "causal", degree=2, queries=40, lengths=(37, 29))
    kernel = KERNELS["numpy"](xp, plan_of(case, chunk=8))
    seen: list[float] = []
    token = PROGRESS.set(seen.append)
    try:
        kernel.forward(case.operands(), save=False)
    finally:
        PROGRESS.reset(token)
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert seen[-1] == 1.0
    assert 0.7 < seen[-2] <= 1.0


def test_threads_share_a_kernel() -> None:
    cases = [
        polynomial_case(2, "plain", "full", degree=4, seed=seed, queries=50, lengths=(47, 43)) for seed in range(4)
    ]
    kernel = KERNELS["numpy"](xp, plan_of(cases[0], chunk=16))
    expected = [kernel.forward(case.operands(), save=False).output for case in cases]
    found: dict[int, Any] = {}

    def work(place: int) -> None:
        for _ in range(5):
            found[place] = kernel.forward(cases[place].operands(), save=False).output

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, output in enumerate(expected):
        np.testing.assert_array_equal(found[place], output)


@pytest.mark.parametrize("mask", [Window(sizes=(9, 20), align="end"), Ordered(align="start")], ids=lambda m: m.kind)
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_tolerance_is_met_under_windows_and_ordered_masks(mask: Mask, backend: str) -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(n, 5)) for n in (19, 17, 23, 17, 23)]
    query, *others = arrays if backend == "numpy" else map(torch.from_numpy, arrays)
    spec = AttentionSpec(order=2, mask=mask, scale=0.1, method=Polynomial(tolerance=1e-2))
    exact = AttentionSpec(order=2, mask=mask, scale=0.1)
    result = korder.attend_result(query, others[:2], others[2:], spec=spec, backend=backend)
    wanted = korder.attend(query, others[:2], others[2:], spec=exact, backend=backend)
    assert result.provenance is not None
    assert result.provenance.plan.method == "polynomial"
    error = np.abs(np.asarray(result.output) - np.asarray(wanted)).max(-1)
    bound = np.asarray(result.certificate.bound)  # type: ignore[union-attr]
    assert np.all(error <= bound + 1e-14)
    first, second = (np.abs(x).max() for x in arrays[3:])
    assert bound.max() <= 2.1e-2 * 2 * first * second


def test_calls_leave_no_memory_behind() -> None:
    rng = np.random.default_rng(0)
    spec = AttentionSpec(order=2, method=Polynomial(degree=4))

    def call(n: int) -> None:
        query, *keys_and_values = (rng.normal(size=(n, 8)).astype(np.float32) * 0.1 for _ in range(5))
        korder.attend(query, keys_and_values[:2], keys_and_values[2:], spec=spec, backend="numpy")

    call(300)
    tracemalloc.start()
    call(301)
    base, peak = tracemalloc.get_traced_memory()
    for n in range(302, 312):
        call(n)
    left = tracemalloc.get_traced_memory()[0] - base
    tracemalloc.stop()
    assert peak > 500_000
    assert left < 0.2 * peak  # ten plans and kernels, but not the block of features of any


@pytest.mark.parametrize("mask", [None, Causal(), Window(sizes=(64, 300)), Ordered()])
def test_planned_memory_is_true(mask: Mask | None) -> None:
    options = {} if mask is None else {"mask": mask}
    case = random_case(
        2, dtype="float32", batch=1, heads=1, groups=1, queries=601, lengths=(599, 607), query_width=12,
        value_width=20, scale=0.02, method=Polynomial(degree=4), **options,
    )  # fmt: skip
    plan = plan_of(case)
    operands = case.operands()
    KERNELS["numpy"](xp, plan).forward(operands, save=False)
    kernel = KERNELS["numpy"](xp, plan)
    tracemalloc.start()
    output = kernel.forward(operands, save=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    results = (output.output, output.lse, output.normaliser, output.moments, output.magnitude)
    used = peak - sum(np.asarray(x).nbytes for x in results)
    assert 0.8 * plan.cost.peak_memory <= used <= 1.2 * plan.cost.peak_memory, (used, plan.cost.peak_memory)
