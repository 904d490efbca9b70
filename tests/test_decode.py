"""Decoding equals the full result row by row, whatever the method, the mask and the way that tokens came."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import array_api_strict
import numpy as np
import pytest
import torch

import korder
from korder.spec import Causal, Exact, Full, Ordered, Polynomial, Window
from korder.spi import NamespaceBackend
from tests.decode_cases import decode_case, fed, own_registry, spec_of, with_method
from tests.limits import assert_agree, assert_within_ratio
from tests.oracle import oracle_attention
from tests.oracle_polynomial import dense_polynomial, dense_scores
from tests.problems import Case, random_case

Array = Any
METHODS = {"exact": Exact(), "polynomial": Polynomial(degree=4), "odd": Polynomial(degree=3)}
AHEAD = (0, 2, 1)
"""How many keys of each mode stand before the first query's own."""


class StrictBackend(NamespaceBackend):
    """The generic methods on array_api_strict."""

    name: ClassVar[str] = "strict"
    array_kinds: ClassVar[frozenset[str]] = frozenset({"array_api_strict"})

    def namespace(self) -> Any:
        return array_api_strict


KINDS = {"numpy": np.asarray, "torch": torch.as_tensor, "strict": array_api_strict.asarray}


def grown(case: Case, state: Any, row: int, asarray: Any) -> Any:
    """The state with the keys that a row sees and the one before it does not."""
    ends = [min(row + 1 + ahead, key.shape[2]) for ahead, key in zip(AHEAD, case.keys, strict=False)]
    new = [slice(min(had, end), end) for had, end in zip(state.lengths, ends, strict=True)]
    masks = case.key_masks or (None,) * len(case.keys)
    return state.append(
        tuple(asarray(x[:, :, at]) for x, at in zip(case.keys, new, strict=True)),
        tuple(asarray(x[:, :, at]) for x, at in zip(case.values, new, strict=True)),
        key_masks=tuple(None if m is None else asarray(m[..., at]) for m, at in zip(masks, new, strict=True)),
    )


def rows_of(case: Case, asarray: Any) -> tuple[Array, Array]:
    """Output and lse of the case, decoded query by query under the causal mask with `AHEAD`."""
    empty = [tuple(asarray(x[:, :, :0]) for x in arrays) for arrays in (case.keys, case.values)]
    state = korder.prefill(*empty, case.spec)
    found = []
    for row in range(case.query.shape[2]):
        state = grown(case, state, row, asarray)
        found.append(korder.decode_result(asarray(case.query[:, :, row : row + 1]), state))
    return tuple(np.concatenate([np.asarray(getattr(x, name)) for x in found], axis=2) for name in ("output", "lse"))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_causal_result(
    order: int, method: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_registry(monkeypatch, StrictBackend())
    case = decode_case(
        order, seed=order, queries=5 if kind == "strict" else 9, key_masks=(True,) * order, mask=Causal()
    )
    case = with_method(case, METHODS[method])
    output, lse = rows_of(case, KINDS[kind])
    whole = korder.attend_result(
        case.query, case.keys, case.values, spec=case.spec, key_masks=case.key_masks,
        query_offset=0, key_offsets=tuple(-ahead for ahead in AHEAD[:order]), backend="numpy",
    )  # fmt: skip
    assert_agree(output, whole.output, dtype="float64")
    live = np.isfinite(whole.lse)
    np.testing.assert_array_equal(np.isfinite(lse), live)
    assert_agree(lse[live], whole.lse[live], dtype="float64")


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_exact_method_is_the_oracle(order: int, kind: str) -> None:
    case = decode_case(order, seed=7, key_masks=(True, False, True)[:order], dtype="float32", scale=0.9)
    state = fed(case, asarray=KINDS[kind])
    result = korder.decode_result(KINDS[kind](case.query), state)
    (output, lse), (plain, plain_lse) = case.oracle(), case.plain()
    assert_within_ratio(result.output, plain, output, dtype="float32")
    assert_within_ratio(result.lse, plain_lse, lse, dtype="float32")
    assert result.certificate is None


def truth(case: Case, dtype: Any = np.longdouble) -> dict[str, Array]:
    """The polynomial of the case's degree about each row's mean score, all keys seen, by its definition."""
    scores, bias = dense_scores(case)
    weights = (bias == 0.0).astype(np.longdouble)
    count = weights.sum(-1)
    centre = (np.where(weights > 0, scores, 0) * weights).sum(-1) / np.where(count == 0, 1, count)
    coefficients = korder.planning.coefficients.taylor_coefficients(case.spec.method.degree)
    return dense_polynomial(case, coefficients, np.asarray(centre, dtype=np.float64), dtype)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_polynomial_is_that_of_its_definition(order: int, dtype: str, kind: str) -> None:
    case = decode_case(order, seed=3, dtype=dtype, key_masks=(False, True, True)[:order], method=Polynomial(degree=4))
    result = korder.decode_result(KINDS[kind](case.query), fed(case, asarray=KINDS[kind]))
    exact, plain = truth(case), truth(case, np.dtype(dtype))
    assert np.asarray(result.output).dtype == dtype
    assert_within_ratio(result.output, plain["output"], exact["output"], dtype=dtype)
    assert_within_ratio(result.lse, plain["lse"], exact["lse"], dtype=dtype)


@pytest.mark.parametrize("sizes", [(3,), (3, 5), (9, 1)])
def test_a_window_keeps_the_last_keys(sizes: tuple[int, ...]) -> None:
    order, n = len(sizes), 12
    case = random_case(order, queries=n, lengths=(n,) * order, mask=Window(sizes=sizes), seed=4)
    exact, _ = case.oracle()
    state = korder.prefill(*([x[:, :, :2] for x in arrays] for arrays in (case.keys, case.values)), case.spec)
    for start, stop in [(2, 3), (3, 4), (4, 9), *((i, i + 1) for i in range(9, n))]:
        state = state.append(*([x[:, :, start:stop] for x in arrays] for arrays in (case.keys, case.values)))
        got = korder.decode(case.query[:, :, stop - 1 : stop], state)
        assert_agree(got, exact[:, :, stop - 1 : stop], dtype="float64")
        assert state.lengths == tuple(min(size, stop) for size in sizes)
    assert max(mode.buffer.capacity for mode in state.modes) <= 32


@pytest.mark.parametrize("order", [2, 3])
def test_ordered_tuples(order: int) -> None:
    n = 6
    case = random_case(order, queries=n, lengths=(n,) * order, mask=Ordered(), seed=5)
    exact, lse = case.oracle()
    state = korder.prefill(*([x[:, :, :0] for x in arrays] for arrays in (case.keys, case.values)), case.spec)
    for row in range(n):
        state = state.append(*([x[:, :, row : row + 1] for x in arrays] for arrays in (case.keys, case.values)))
        got = korder.decode_result(case.query[:, :, row : row + 1], state)
        assert_agree(got.output, exact[:, :, row : row + 1], dtype="float64")
        np.testing.assert_allclose(got.lse, lse[:, :, row : row + 1], rtol=1e-13)


def test_ordered_modes_of_unequal_lengths_line_up_at_their_ends_or_not_at_all() -> None:
    case = random_case(2, queries=1, lengths=(7, 5), mask=Ordered(align="end"), seed=6)
    offsets = tuple(1 - key.shape[2] for key in case.keys)
    exact, _ = oracle_attention(
        case.query, case.keys, case.values, scale=6**-0.5, mask=case.spec.mask, key_offsets=offsets
    )
    assert_agree(korder.decode(case.query, fed(case)), exact, dtype="float64")
    with pytest.raises(korder.ShapeError, match="unequal lengths"):
        fed(case.with_spec(mask=Ordered()))


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_states_are_values(method: str) -> None:
    case = with_method(decode_case(2, seed=8), METHODS[method])
    split = [[x[:, :, :3] for x in arrays] for arrays in (case.keys, case.values)]
    rest = [[x[:, :, 3:] for x in arrays] for arrays in (case.keys, case.values)]
    other = [[2.0 * x + 0.25 for x in arrays] for arrays in rest]
    base = korder.prefill(*split, case.spec, capacity=64)
    before = korder.decode(case.query, base)
    one, two = base.append(*rest), base.append(*other)
    np.testing.assert_array_equal(korder.decode(case.query, base), before)
    for state, tail in ((one, rest), (two, other)):
        alone = korder.prefill(*split, case.spec).append(*tail)
        np.testing.assert_array_equal(korder.decode(case.query, state), korder.decode(case.query, alone))
    longer = one.append(*other)
    np.testing.assert_array_equal(korder.decode(case.query, one), korder.decode(case.query, base.append(*rest)))
    assert longer.lengths == tuple(3 + 2 * (key.shape[2] - 3) for key in case.keys)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_what_a_caller_does_to_his_arrays_later_does_not_matter(method: str) -> None:
    case = with_method(decode_case(2, seed=9), METHODS[method])
    own = replace(case, keys=tuple(x.copy() for x in case.keys), values=tuple(x.copy() for x in case.values))
    state = fed(own)
    for array in (*own.keys, *own.values):
        array[...] = np.nan
    np.testing.assert_array_equal(korder.decode(case.query, state), korder.decode(case.query, fed(case)))


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("kind", KINDS)
def test_masked_keys_never_leak(method: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own_registry(monkeypatch, StrictBackend())
    case = with_method(decode_case(2, seed=10, key_masks=(True, True)), METHODS[method])
    masks = [m if m.ndim == 3 else np.repeat(m[:, None], 2, axis=1) for m in case.key_masks]  # type: ignore[union-attr]
    clean = np.asarray(korder.decode(KINDS[kind](case.query), fed(case, asarray=KINDS[kind])))
    for poison in (np.nan, np.inf, 1e200):
        keys, values = (
            tuple(np.where(m[..., None], x, poison) for x, m in zip(arrays, masks, strict=True))
            for arrays in (case.keys, case.values)
        )
        spoilt = fed(replace(case, keys=keys, values=values), asarray=KINDS[kind])
        np.testing.assert_array_equal(np.asarray(korder.decode(KINDS[kind](case.query), spoilt)), clean)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_a_mask_may_come_with_any_token(method: str) -> None:
    case = with_method(decode_case(2, seed=11), METHODS[method])
    late = np.array([[True, False, True], [False, True, True]])
    parts = [[x[:, :, :2] for x in arrays] for arrays in (case.keys, case.values)]
    more = [[x[:, :, 2:5] for x in arrays] for arrays in (case.keys, case.values)]
    state = korder.prefill(*parts, case.spec).append(*more, key_masks=(None, late))
    masks = (None, np.concatenate([np.ones((2, 2), dtype=bool), late], axis=1))
    whole = [[x[:, :, :5] for x in arrays] for arrays in (case.keys, case.values)]
    expected = korder.attend(case.query, *whole, spec=case.spec, key_masks=masks)
    assert_agree(korder.decode(case.query, state), expected, dtype="float64")


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("lengths", [(0, 0), (0, 3), (4, 0)])
def test_nothing_to_attend_to(method: str, lengths: tuple[int, int]) -> None:
    case = decode_case(2, lengths=lengths, method=METHODS[method])
    result = korder.decode_result(case.query, fed(case, cuts=()))
    np.testing.assert_array_equal(result.output, np.zeros((2, 4, 11, 4)))
    assert np.all(result.lse == -np.inf)
    if result.certificate is not None:
        np.testing.assert_array_equal(result.certificate.bound, np.zeros((2, 4, 11)))


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("shape", [(), (4,), (3, 4), (2, 3, 4), (0, 4)])
@pytest.mark.parametrize("queries", [0, 3])
def test_axes_are_those_of_the_query(method: str, shape: tuple[int, ...], queries: int) -> None:
    rng = np.random.default_rng(12)
    groups = (*shape[:-1], 2) if shape else ()
    keys, values = (tuple(0.5 * rng.standard_normal((*groups, m, w)) for m in (4, 3)) for w in (5, 2))
    query = rng.standard_normal((*shape, queries, 5))
    spec = spec_of(2, METHODS[method])
    result = korder.decode_result(query, korder.prefill(keys, values, spec))
    expected = korder.attend_result(query, keys, values, spec=spec)
    assert result.output.shape == expected.output.shape == (*shape, queries, 2)
    assert result.lse.shape == query.shape[:-1]
    if query.size:
        assert_agree(result.output, expected.output, dtype="float64")
    if result.certificate is not None:
        assert result.certificate.score_range.shape == (*query.shape[:-1], 2)
        assert result.certificate.bound.shape == query.shape[:-1]


@pytest.mark.parametrize("method", ["exact", "polynomial"])
def test_results_of_disjoint_keys_merge(method: str) -> None:
    case = with_method(decode_case(2, seed=13, spread=0.4), METHODS[method])
    halves = [
        korder.prefill((case.keys[0][:, :, at], case.keys[1]), (case.values[0][:, :, at], case.values[1]), case.spec)
        for at in (slice(0, 2), slice(2, 7))
    ]
    merged = korder.merge([korder.decode_result(case.query, half) for half in halves])
    exact, _ = case.oracle()
    error = np.abs(merged.output - exact).max(-1)
    assert np.all(error <= (1e-13 if merged.certificate is None else merged.certificate.bound))


@pytest.mark.parametrize("mask", [Full(), Causal(), Causal(align="end")])
def test_full_and_causal_are_the_same_for_the_newest_query(mask: Any) -> None:
    case = decode_case(2, seed=14, method=Polynomial(degree=2), mask=mask)
    expected = korder.attend(case.query, case.keys, case.values, spec=case.with_spec(mask=Full()).spec)
    assert_agree(korder.decode(case.query, fed(case)), expected, dtype="float64")
    assert korder.decode_result(case.query, fed(case)).provenance.backend == "numpy"  # type: ignore[union-attr]
