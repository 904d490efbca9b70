"""Polynomial states: certificates that hold, keys of any size in any order, one plan for every token, tolerances."""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import korder
from korder.decoding.degrees import score_spread
from korder.decoding.factor_cache import padded_length
from korder.decoding.tokens import TokenLayout
from korder.planning.coefficients import taylor_coefficients
from korder.spec import Causal, Exact, Polynomial, Window
from korder.spi import Capabilities
from korder_numpy.backend import NumpyBackend
from tests.decode_cases import decode_case, fed, own_registry, spec_of, stretched, with_method
from tests.limits import assert_agree
from tests.oracle_polynomial import dense_exact, dense_polynomial, dense_scores
from tests.problems import Case

Array = Any


def polynomial_of(case: Case) -> Array:
    """The output of the polynomial about each row's mean score, all keys live and seen."""
    scores, _ = dense_scores(case)
    centre = np.asarray(scores.mean(-1), dtype=np.float64)
    return dense_polynomial(case, taylor_coefficients(case.spec.method.degree), centre)["output"]


def assert_holds(case: Case, **options: Any) -> korder.Certificate:
    """Assert that the certificate of a decoded case holds, each part for its own error; return it."""
    result = korder.decode_result(case.query, fed(case, **options))
    found = result.certificate
    assert found is not None
    output, lse = dense_exact(case)
    assert np.all(np.abs(result.output - output).max(-1) <= found.bound)
    np.testing.assert_array_equal(found.bound, found.approximation + found.rounding)
    live = np.isfinite(lse)
    assert np.all(np.abs(result.lse[live] - lse[live]) <= found.lse_bound[live])
    scores, bias = dense_scores(case)
    dead = bias == -np.inf
    assert np.all(np.where(dead, np.inf, scores).min(-1) >= np.where(live, found.score_range[..., 0], -np.inf))
    assert np.all(np.where(dead, -np.inf, scores).max(-1) <= np.where(live, found.score_range[..., 1], np.inf))
    if case.key_masks == () and case.spec.method.coefficients == "taylor":
        error = np.abs(result.output - polynomial_of(case)).max(-1)
        assert np.all(error <= found.rounding + 1e-18)
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("degree", [2, 5])
def test_certificates_hold(order: int, dtype: str, masked: bool, degree: int) -> None:
    masks = {"key_masks": (True, False, True)[:order]} if masked else {}
    case = decode_case(order, seed=order, dtype=dtype, scale=0.25, method=Polynomial(degree=degree), **masks)
    found = assert_holds(case)
    attended = korder.attend_result(
        case.query, case.keys, case.values, spec=case.spec, key_masks=case.key_masks or None
    ).certificate
    assert attended is not None
    # the same bounds but for one norm, whose weights are those of the first keys
    assert np.all(found.approximation <= 2.0 * attended.approximation + 1e-15)


@pytest.mark.parametrize("interval", [0.7, 3.0])
def test_certificates_hold_for_minimax(interval: float) -> None:
    method = Polynomial(degree=3, coefficients="minimax", interval=interval)
    assert_holds(decode_case(2, seed=2, scale=0.1, method=method))


SIZES = {
    "a million times larger": np.array([1, 1, 1, 1, 1, 1e6, 1]),
    "growing": 8.0 ** np.arange(7),
    "shrinking": 8.0 ** -np.arange(7),
    "tiny": np.full(7, 1e-30),
    "zero, then tiny, then ordinary": np.array([0, 0, 1e-30, 1e-18, 1e-6, 1, 1]),
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("degree", [2, 6])
def test_keys_of_any_size_in_any_order(sizes: str, dtype: str, degree: int) -> None:
    case = decode_case(2, seed=15, dtype=dtype, scale=0.2, method=Polynomial(degree=degree))
    case = stretched(case, 0, SIZES[sizes])
    one_by_one = tuple(range(7))
    assert_holds(case, cuts=one_by_one)
    result = korder.decode_result(case.query, fed(case, cuts=one_by_one))
    wide = case.astype("float64")
    whole = korder.attend_result(wide.query, wide.keys, wide.values, spec=wide.spec)
    assert result.certificate is not None
    error = np.abs(result.output - whole.output).max(-1)
    assert np.all(error <= result.certificate.rounding + whole.certificate.rounding)  # type: ignore[union-attr]
    # no worse for having come one by one: rescaling is exact
    cast = np.spacing(np.abs(whole.output).max().astype(dtype))
    assert np.all(result.certificate.rounding <= 2.0 * whole.certificate.rounding + 2.0 * cast)  # type: ignore[union-attr]


def test_a_column_may_be_zero_for_long() -> None:
    case = decode_case(2, seed=16, method=Polynomial(degree=4))
    factors = np.ones((7, 6))
    factors[:5, 2] = 0.0
    factors[5:, 2] = 1e-40
    factors[:, 4] = 0.0
    case = stretched(case, 0, factors)
    expected = korder.attend(case.query, case.keys, case.values, spec=case.spec)
    assert_agree(korder.decode(case.query, fed(case, cuts=tuple(range(7)))), expected, dtype="float64")


def test_the_size_of_a_state_does_not_depend_on_its_keys() -> None:
    case = decode_case(2, method=Polynomial(degree=4))
    states = [fed(case, cuts=()), fed(case)]
    features, channels, planes = 210, 5, 4
    assert {state.nbytes for state in states} == {2 * planes * 8 * (features * (channels + 1) + 6 * 3 + 21 + 8)}
    grown = states[1].append(case.keys, case.values)
    assert grown.nbytes == states[0].nbytes
    assert grown.lengths == (14, 10)


class CountingBackend(NumpyBackend):
    """Counts what it compiles."""

    name = "counting"
    priority = 1000

    def __init__(self) -> None:
        self.compiled = 0

    def compile(self, plan: Any) -> Any:
        self.compiled += 1
        return super().compile(plan)


@pytest.mark.parametrize(
    ("method", "mask", "most"),
    [(Polynomial(degree=2), Causal(), 1), (Exact(), Causal(), 6), (Exact(), Window(sizes=(20, 9)), 3)],
)
def test_no_plan_per_token(method: Any, mask: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CountingBackend()
    registry = own_registry(monkeypatch, backend)
    rng = np.random.default_rng(17)
    token: Any = lambda: tuple(rng.standard_normal((2, 1, 3)) for _ in range(2))  # noqa: E731
    empty = tuple(np.zeros((2, 0, 3)) for _ in range(2))
    state = korder.prefill(empty, empty, spec_of(2, method, mask=mask))
    for _ in range(70):
        state = state.append(token(), token())
        result = korder.decode_result(rng.standard_normal((4, 1, 3)), state)
        assert result.provenance is not None
        assert result.provenance.backend == "counting"
    assert 0 < backend.compiled <= most
    assert len(registry.prepared) == backend.compiled


def test_threads_may_extend_one_state() -> None:
    rng = np.random.default_rng(26)
    token: Any = lambda: tuple(rng.standard_normal((1, 3)) for _ in range(2))  # noqa: E731
    base = korder.prefill(token(), token(), None, capacity=1000)
    tokens = [[(token(), token()) for _ in range(20)] for _ in range(8)]
    query, found = rng.standard_normal((1, 3)), {}

    def work(index: int) -> None:
        state = base
        for keys, values in tokens[index]:
            state = state.append(keys, values)
        found[index] = korder.decode(query, state)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(tokens))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, own in enumerate(tokens):
        state = base
        for keys, values in own:
            state = state.append(keys, values)
        np.testing.assert_allclose(found[index], korder.decode(query, state), rtol=1e-13)


@pytest.mark.parametrize("capacity", [None, 0, 100])
def test_an_exact_cache_moves_its_keys_seldom(capacity: int | None) -> None:
    token = tuple(np.ones((1, 3)) for _ in range(2))
    state: Any = korder.prefill(token, token, None, capacity=capacity)
    buffers = {id(state.modes[0].buffer): state}
    for _ in range(99):
        state = state.append(token, token)
        buffers[id(state.modes[0].buffer)] = state
    assert len(buffers) == (1 if capacity == 100 else 3)
    assert state.lengths == (100, 100)


def test_padding_is_at_most_an_eighth() -> None:
    sizes = {length: padded_length(length) for length in range(5000)}
    assert all(length <= size <= max(16, length + max(length // 8, 15)) for length, size in sizes.items())
    assert len(set(sizes.values())) < 8 * 13


def test_a_tolerance_is_checked_at_every_query() -> None:
    case = decode_case(2, seed=18, scale=0.05, method=Polynomial(degree=4, tolerance=1e-2))
    state = fed(case.with_spec(mask=Causal()))
    exact, _ = dense_exact(case)
    ranges = np.stack([np.ptp(case.values[0][..., None, :] * case.values[1][..., None, :, :], axis=(2, 3))])
    error = np.abs(korder.decode(case.query, state) - exact).max(axis=(2, 3))
    assert np.all(error <= 1e-2 * np.repeat(ranges[0].max(-1), 2, axis=1))
    with pytest.raises(korder.AccuracyError, match=r"degree 4 misses the tolerance 0\.01") as caught:
        korder.decode(30.0 * case.query, state)
    assert "where" in str(caught.value.got)
    larger = state.append(tuple(100.0 * key for key in case.keys), case.values)
    with pytest.raises(korder.AccuracyError):
        korder.decode(case.query, larger)
    warning = fed(with_method(case, Polynomial(degree=4, tolerance=1e-2, on_exceed="warn")))
    with pytest.warns(korder.AccuracyWarning, match="misses the tolerance"):
        korder.decode(30.0 * case.query, warning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        korder.decode(case.query, warning)


def test_a_query_bound_chooses_a_degree_that_keeps_the_tolerance() -> None:
    case = decode_case(2, seed=19, scale=0.02, method=Polynomial(tolerance=1e-3))
    bound = float(np.abs(case.query).max())
    state = fed(case, cuts=(), query_bound=bound)
    degree = state.method.degree
    found = korder.decode_result(case.query, state).certificate
    assert found is not None
    assert degree % 2 == 0
    output, _ = dense_exact(case)
    assert np.all(np.abs(korder.decode(case.query, state) - output).max(-1) <= found.bound)
    # a larger bound asks for more, a smaller one for less
    wide, narrow = (fed(case, cuts=(), query_bound=factor * bound).method.degree for factor in (1.6, 0.3))
    assert narrow < degree < wide
    with pytest.raises(korder.AccuracyError, match="no degree meets tolerance"):
        fed(case, cuts=(), query_bound=1e4)


def test_the_spread_of_scores_is_never_below_the_truth() -> None:
    case = decode_case(2, seed=20, scale=0.3, key_masks=(True, True), groups=4)
    layout = TokenLayout.of(case.keys, case.values)
    tokens = layout.read(case.keys, case.values, case.key_masks, "keys[0]")
    bound = 0.7
    corner = case.query.copy()
    corner[...] = bound * np.sign(corner)
    scores, bias = dense_scores(replace(case, query=corner))
    live = bias == 0
    ranges = np.where(live, scores, -np.inf).max(-1) - np.where(live, scores, np.inf).min(-1)
    assert np.max(ranges) <= score_spread(case.spec, layout, tokens, bound) <= 20 * np.max(ranges)


def test_minimax_takes_its_interval_from_the_query_bound() -> None:
    method = Polynomial(degree=3, coefficients="minimax")
    case = decode_case(2, seed=21, scale=0.05, method=method)
    state = fed(case, query_bound=1.0, cuts=())
    assert 0.0 < state.method.interval < 64.0
    with pytest.raises(korder.SpecError, match="minimax coefficients need an interval"):
        fed(case)


def test_a_sum_that_is_not_positive_raises() -> None:
    # the mean of 1 + x + x^2 / 2 + x^3 / 6 over scores that are seldom, but then far, below their mean
    keys = np.array([[1.0]] * 9 + [[-9.0]])
    state = korder.prefill((keys,), (keys,), spec_of(1, Polynomial(degree=3), scale=1.0))
    with pytest.raises(korder.AccuracyError, match="not positive in batch 0, head 0, row 1"):
        korder.decode(np.array([[0.1], [1.0]]), state)
    korder.decode(np.array([[0.1], [-1.0]]), state)


def test_nan_reaches_the_rows_that_see_it_and_exempts_them_from_a_tolerance() -> None:
    case = decode_case(2, seed=23, scale=0.01, method=Polynomial(degree=2, tolerance=0.1))
    keys = [x.copy() for x in case.keys]
    keys[0][1, 0, 3, 2] = np.nan
    state = korder.prefill(keys, case.values, case.spec)
    output = korder.decode(case.query, state)
    assert np.isnan(output[1, :2]).all()
    assert np.isfinite(output[0]).all()
    assert np.isfinite(output[1, 2:]).all()


class Forgetful(NumpyBackend):
    """Claims no state."""

    name = "forgetful"

    def capabilities(self) -> Capabilities:
        facts = super().capabilities()
        return replace(facts, methods=tuple(replace(method, state=False) for method in facts.methods))


def test_a_backend_without_states_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    own_registry(monkeypatch, Forgetful())
    case = decode_case(2, method=Polynomial(degree=2), policy={"backends": ("forgetful",)})
    with pytest.raises(korder.UnsupportedProblemError, match="pass=decode"):
        fed(case)


@pytest.mark.parametrize("method", [Exact(), Polynomial(degree=2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_in_sixteen_bits_out(method: Any, dtype: Any) -> None:
    case = with_method(decode_case(2, seed=24, dtype="float32", scale=0.1), method)
    narrow: Any = lambda x: torch.as_tensor(x).to(dtype)  # noqa: E731
    result = korder.decode_result(narrow(case.query), fed(case, asarray=narrow))
    assert result.output.dtype == dtype
    assert result.lse.dtype in (torch.float32, torch.float64)
    widened = [tuple(narrow(x).double().numpy() for x in arrays) for arrays in ((case.query,), case.keys, case.values)]
    wide = korder.attend(widened[0][0], *widened[1:], spec=case.spec)
    error = np.abs(result.output.double().numpy() - wide).max()
    assert error <= torch.finfo(dtype).eps * np.abs(wide).max()


@pytest.mark.parametrize("method", [Exact(), Polynomial(degree=2)])
def test_tensors_record_nothing_and_autocast_changes_nothing(method: Any) -> None:
    case = with_method(decode_case(2, seed=25, dtype="float32", scale=0.1), method)
    query = torch.as_tensor(case.query)
    expected = korder.decode(query, fed(case, asarray=torch.as_tensor))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = korder.decode(query, fed(case, asarray=torch.as_tensor))
    assert torch.equal(expected, cast)
    asked = query.clone().requires_grad_()
    with pytest.raises(korder.OperandError, match="records no gradient"):
        korder.decode(asked, fed(case, asarray=torch.as_tensor))
    with pytest.raises(korder.OperandError, match="records no gradient"):
        fed(case, asarray=lambda x: torch.as_tensor(x).requires_grad_())
    with torch.no_grad():
        quiet = korder.decode(asked, fed(case, asarray=lambda x: torch.as_tensor(x).requires_grad_()))
    assert torch.equal(quiet, expected)
    assert not quiet.requires_grad
