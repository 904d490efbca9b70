"""The public functions, end to end through planning and dispatch: layouts, defaults, provenance, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import korder
from korder import AttentionSpec, Causal, OperandError, Polynomial, ShapeError, SpecError, Window
from tests.limits import assert_agree, assert_within_ratio
from tests.problems import Case, random_case


def arguments(case: Case) -> dict[str, Any]:
    return {
        "query": case.query,
        "keys": case.keys,
        "values": case.values,
        "weight": case.weight,
        "biases": case.biases or None,
        "key_masks": case.key_masks or None,
        "query_offset": case.query_offset,
        "key_offsets": case.key_offsets or None,
    }


CASES = {
    "plain": {},
    "order 1": {"order": 1},
    "order 3": {"order": 3, "queries": 5},
    "causal": {"mask": Causal(), "query_offset": 2, "key_offsets": (1, 3)},
    "window": {"mask": Window(sizes=(3, 5)), "query_offset": 1},
    "masks and biases": {"key_masks": (True, True), "biases": ("key", "full")},
    "full weight": {"weight": "full"},
    "cp weight": {"weight": "cp", "scale": 0.7},
    "float32": {"dtype": "float32"},
    "float16": {"dtype": "float16"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_attend_equals_the_oracle(options: dict[str, Any]) -> None:
    case = random_case(**options, seed=3)
    output, lse = case.oracle()
    plain, plain_lse = case.plain()
    result = korder.attend_result(**arguments(case), spec=case.spec)
    assert result.output.dtype == case.query.dtype
    assert result.lse.dtype == ("float64" if case.dtype == "float64" else "float32")
    assert_within_ratio(result.output, plain, output, dtype=case.dtype)
    assert_within_ratio(result.lse, plain_lse, lse, dtype=str(result.lse.dtype))
    np.testing.assert_array_equal(korder.attend(**arguments(case), spec=case.spec), result.output)
    assert result.certificate is None
    assert result.provenance is not None
    assert result.provenance.backend == "numpy"


def test_without_a_spec_it_is_exact_full_and_of_the_order_of_the_keys() -> None:
    case = random_case(2, seed=1)
    np.testing.assert_array_equal(
        korder.attend(case.query, case.keys, case.values),
        korder.attend(case.query, case.keys, case.values, spec=AttentionSpec(order=2)),
    )


def test_layouts() -> None:
    """One head in two axes, heads in three, two batch axes in five: the same numbers."""
    case = random_case(2, seed=2, batch=6, key_masks=(True, True), biases=("full", None))
    whole = korder.attend_result(**arguments(case))
    deep = {
        "query": case.query.reshape(2, 3, *case.query.shape[1:]),
        "keys": tuple(x.reshape(2, 3, *x.shape[1:]) for x in case.keys),
        "values": tuple(x.reshape(2, 3, *x.shape[1:]) for x in case.values),
        "key_masks": tuple(x.reshape(2, 3, *x.shape[1:]) for x in case.key_masks),
        "biases": (case.biases[0].reshape(2, 3, *case.biases[0].shape[1:]), None),
    }
    result = korder.attend_result(**deep)
    assert result.output.shape == (2, 3, *whole.output.shape[1:])
    assert result.lse.shape == (2, 3, *whole.lse.shape[1:])
    assert_agree(result.output.reshape(whole.output.shape), whole.output, dtype="float64")
    three = korder.attend(
        case.query[1],
        tuple(x[1] for x in case.keys),
        tuple(x[1] for x in case.values),
        key_masks=tuple(x[1] for x in case.key_masks),
        biases=(case.biases[0][1], None),
    )
    assert_agree(three, whole.output[1], dtype="float64")
    two = korder.attend(
        case.query[1, 3],
        tuple(x[1, 1] for x in case.keys),
        tuple(x[1, 1] for x in case.values),
        key_masks=(case.key_masks[0][1], case.key_masks[1][1, 1]),
        biases=(case.biases[0][1, 3], None),
    )
    assert_agree(two, whole.output[1, 3], dtype="float64")


def test_a_bias_broadcasts_over_two_batch_axes() -> None:
    case = random_case(1, seed=4, batch=6)
    query = case.query.reshape(2, 3, *case.query.shape[1:])
    keys, values = ((x[0].reshape(2, 3, *x[0].shape[1:]),) for x in (case.keys, case.values))
    bias = np.random.default_rng(0).standard_normal((1, 3, 1, 1, case.keys[0].shape[2]))
    spread = np.broadcast_to(bias, (2, 3, *bias.shape[2:])).reshape(6, 1, 1, -1)
    expected = korder.attend(case.query, case.keys, case.values, biases=(spread,))
    found = korder.attend(query, keys, values, biases=(bias,)).reshape(expected.shape)
    assert_agree(found, expected, dtype="float64")


def test_align_end_is_an_offset() -> None:
    case = random_case(2, seed=5, queries=3)
    ends = tuple(3 - x.shape[2] for x in case.keys)
    aligned = korder.attend(case.query, case.keys, case.values, spec=AttentionSpec(order=2, mask=Causal(align="end")))
    moved = korder.attend(
        case.query, case.keys, case.values, spec=AttentionSpec(order=2, mask=Causal()), query_offset=0, key_offsets=ends
    )
    np.testing.assert_array_equal(aligned, moved)


def test_inputs_are_left_as_they_were_and_may_be_strided() -> None:
    case = random_case(2, seed=6)
    strided = [np.asfortranarray(x) for x in (case.query, *case.keys, *case.values)]
    copies = [x.copy() for x in strided]
    found = korder.attend(strided[0], tuple(strided[1:3]), tuple(strided[3:]))
    assert_agree(found, korder.attend(case.query, case.keys, case.values), dtype="float64")
    for array, copy in zip(strided, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_plan_needs_shapes_only_and_is_the_one_that_runs() -> None:
    case = random_case(2, seed=7)
    shapes = {"query": case.query.shape, "keys": [x.shape for x in case.keys], "values": [x.shape for x in case.values]}
    plans = korder.plan(case.spec, **shapes, dtype="float64")
    result = korder.attend_result(**arguments(case), spec=case.spec)
    assert result.provenance is not None
    assert result.provenance.plan == plans[0]
    text = plans[0].explain()
    for word in ("n=11, m=7 x 5", "flops", "peak memory", "exact"):
        assert word in text


def test_polynomial_through_the_front_door() -> None:
    case = random_case(2, seed=8, spread=0.5, method=Polynomial(degree=6))
    exact, _ = case.oracle()
    result = korder.attend_result(**arguments(case), spec=case.spec)
    assert result.certificate is not None
    error = np.abs(result.output - exact).max(axis=-1)
    assert error.max() > 0
    assert (error <= result.certificate.bound).all()
    assert (result.certificate.bound == result.certificate.approximation + result.certificate.rounding).all()
    assert result.certificate.score_range.shape == (*error.shape, 2)


def test_the_degree_for_a_tolerance_is_found_and_recorded() -> None:
    case = random_case(2, seed=9, spread=0.6, queries=13, lengths=(31, 29))
    spec = AttentionSpec(order=2, method=Polynomial(tolerance=1e-3))
    exact, _ = case.oracle()
    result = korder.attend_result(case.query, case.keys, case.values, spec=spec)
    assert result.certificate is not None
    assert result.provenance is not None
    assert result.provenance.plan.polynomial is not None
    degree = result.provenance.plan.polynomial.degree
    assert degree % 2 == 0
    assert (np.abs(result.output - exact).max(axis=-1) <= result.certificate.bound).all()
    lower = Polynomial(degree=degree - 2, tolerance=1e-3)
    with pytest.raises(korder.AccuracyError, match="tolerance"):
        korder.attend(case.query, case.keys, case.values, spec=AttentionSpec(order=2, method=lower))


HARD = {"seed": 10, "spread": 3.0, "dtype": "float32"}


def test_a_tolerance_that_no_degree_meets_raises_warns_or_is_met_exactly() -> None:
    case = random_case(2, **HARD)

    def attend(on_exceed: str) -> korder.Result:
        method = Polynomial(tolerance=1e-4, on_exceed=on_exceed)
        return korder.attend_result(case.query, case.keys, case.values, spec=AttentionSpec(order=2, method=method))

    with pytest.raises(korder.AccuracyError) as caught:
        attend("raise")
    assert "0.0001" in str(caught.value)
    exact = attend("exact")
    assert exact.provenance is not None
    assert exact.provenance.plan.method == "exact"
    np.testing.assert_array_equal(exact.output, korder.attend(case.query, case.keys, case.values))
    with pytest.warns(korder.AccuracyWarning, match="misses its tolerance"):
        warned = attend("warn")
    assert warned.certificate is not None


def test_rounding_that_misses_alone_stops_the_search_and_is_said() -> None:
    case = random_case(2, seed=9, spread=0.8, dtype="float32")
    method = Polynomial(tolerance=1e-7)
    with pytest.raises(korder.AccuracyError) as caught:
        korder.attend(case.query, case.keys, case.values, spec=AttentionSpec(order=2, method=method))
    assert 'precision="float64"' in (caught.value.hint or "")
    spec = AttentionSpec(order=2, method=method, policy={"precision": "float64"})
    wide = korder.attend_result(case.query, case.keys, case.values, spec=spec)
    assert wide.provenance is not None
    assert wide.provenance.plan.polynomial is not None
    warns = Polynomial(tolerance=1e-7, on_exceed="warn")
    with pytest.warns(korder.AccuracyWarning):
        best = korder.attend_result(case.query, case.keys, case.values, spec=AttentionSpec(order=2, method=warns))
    assert best.certificate is not None
    assert best.certificate.bound.max() < 1e-2, "the best attempt is returned, not the last"


def test_estimated_rows_are_measured_errors() -> None:
    case = random_case(
        2, seed=11, spread=0.8, mask=Causal(), query_offset=6, key_masks=(True, False), biases=("key", None)
    )
    spec = case.with_spec(method=Polynomial(degree=3, estimate_rows=9)).spec
    exact, _ = case.oracle()
    result = korder.attend_result(**arguments(case), spec=spec)
    assert result.certificate is not None
    rows, errors = result.certificate.estimate.T
    measured = np.abs(result.output - exact).max(axis=-1).reshape(-1)
    assert len(rows) == 9
    assert (rows[0], rows[-1]) == (0, measured.size - 1)
    np.testing.assert_allclose(errors, measured[rows.astype(int)], rtol=1e-6, atol=1e-12)


def test_measured_statistics_can_be_passed_in() -> None:
    case = random_case(2, seed=12, spread=0.5)
    spec = AttentionSpec(order=2, method=Polynomial(tolerance=1e-2))
    found = korder.measure(case.query, case.keys, case.values, spec=spec)
    scores = np.einsum("bhil,bhal,bhcl->bhiac", case.query, *(np.repeat(k, 2, axis=1) for k in case.keys)) * 6**-0.5
    assert found.score_low <= scores.min()
    assert found.score_high >= scores.max()
    again = korder.attend(case.query, case.keys, case.values, spec=spec, statistics=found)
    np.testing.assert_array_equal(again, korder.attend(case.query, case.keys, case.values, spec=spec))


X = np.zeros((5, 3), "float32")
WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "keys not a tuple": ({"keys": X}, OperandError, "keys must be a tuple"),
    "lists of numbers": ({"query": [[1.0]]}, OperandError, "query is not an array"),
    "integer query": ({"query": X.astype(int)}, OperandError, "query must be a real floating-point"),
    "integers everywhere": (
        {"query": X.astype(int), "keys": (X.astype(int),), "values": (X.astype(int),)}, OperandError, "query must be"),
    "mixed dtypes": ({"values": (X.astype("float64"),)}, OperandError, "values[0] has another dtype"),
    "mask of numbers": ({"key_masks": (np.ones(5, "float32"),)}, OperandError, "key_masks[0]"),
    "bias dtype": ({"biases": (np.ones((5, 5)),)}, OperandError, "biases[0]"),
    "backend": ({"backend": "nunpy"}, korder.UnknownBackendError, "nunpy"),
    "spec": ({"spec": {"order": 1}}, SpecError, "spec must be"),
    "order": ({"spec": AttentionSpec(order=2)}, SpecError, "order must equal"),
    "no keys": ({"keys": (), "values": ()}, ShapeError, "at least one key"),
    "offsets": ({"key_offsets": (1, 2)}, ShapeError, "key_offsets"),
    "shapes": ({"values": (X[:4],)}, ShapeError, "keys[0] and values[0]"),
    "fractional offset": ({"query_offset": 1.5}, OperandError, "query_offset must be an integer"),
    "text offset": ({"key_offsets": ("a",)}, OperandError, "key_offsets[0] must be an integer"),
    "offset not in a tuple": ({"key_offsets": np.int64(1)}, ShapeError, "key_offsets"),
    "masked array": ({"query": np.ma.masked_array(X)}, OperandError, "MaskedArray"),
    "matrix": ({"query": X.view(np.matrix)}, OperandError, "matrix"),
    "no heads": ({"query": X[None, :0, None], "keys": (X[None, :1, None],), "values": (X[None, :1, None],)},
                 ShapeError, "both at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("changed", "error", "text"), WRONG.values(), ids=WRONG)
def test_wrong_input_is_one_clear_error(changed: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error) as caught:
        korder.attend(**{"query": X, "keys": (X,), "values": (X,)} | changed)
    assert text in str(caught.value)
    assert isinstance(caught.value, korder.KorderError)


def test_tensors_are_refused_by_numpy_with_the_extra_that_takes_them() -> None:
    torch = pytest.importorskip("torch")
    x = torch.zeros(5, 3)
    spec = AttentionSpec(order=1, policy={"backends": ["numpy"]})
    with pytest.raises(korder.UnsupportedProblemError, match=r"korder\[torch\]"):
        korder.attend(x, (x,), (x,), spec=spec)


def test_backends_can_be_listed() -> None:
    lines = {line.name: line for line in korder.backends()}
    assert lines["numpy"].available
    assert (lines["numpy"].distribution, lines["numpy"].version) == ("korder", "0.1.0")
    assert "float16" in lines["numpy"].capabilities.dtypes


def test_kernel_layout_does_not_copy() -> None:
    from korder.dispatch.arrays import read_operands, to_kernel_layout

    case = random_case(2, seed=13)
    given = read_operands(case.query, case.keys, case.values)
    operands = to_kernel_layout(given, AttentionSpec(order=2))
    assert operands.query is case.query
    assert np.shares_memory(operands.keys[1], case.keys[1])


def test_an_array_of_a_users_own_class_is_of_the_kind_it_derives_from() -> None:
    class Named(np.ndarray):
        pass

    case = random_case(1, seed=14)
    found = korder.attend(case.query.view(Named), case.keys, case.values)
    np.testing.assert_array_equal(np.asarray(found), korder.attend(case.query, case.keys, case.values))


def test_numpy_integers_are_offsets() -> None:
    case = random_case(1, seed=15, mask=Causal())
    options = {"spec": case.spec, "query_offset": np.int64(3), "key_offsets": (np.int32(-1),)}
    found = korder.attend(case.query, case.keys, case.values, **options)
    expected = korder.attend(case.query, case.keys, case.values, spec=case.spec, query_offset=3, key_offsets=(-1,))
    np.testing.assert_array_equal(found, expected)


def test_no_queries_give_no_rows_to_estimate() -> None:
    x = np.ones((3, 2))
    spec = AttentionSpec(order=1, method=Polynomial(degree=2, estimate_rows=4))
    result = korder.attend_result(x[:0], (x,), (x,), spec=spec)
    assert result.certificate is not None
    assert (result.output.shape, result.certificate.estimate.shape) == ((0, 2), (0, 2))


def test_the_exact_method_stands_in_when_no_degree_fits_the_memory() -> None:
    case = random_case(2, seed=16, query_width=40, value_width=64, lengths=(7, 5))
    method = Polynomial(degree=4, tolerance=0.5, on_exceed="exact")
    spec = AttentionSpec(order=2, method=method, policy={"memory_limit": "2MiB"})
    result = korder.attend_result(case.query, case.keys, case.values, spec=spec)
    assert result.provenance is not None
    assert result.provenance.plan.method == "exact"


def test_who_was_turned_down_is_in_the_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    from korder import api
    from korder.dispatch.registry import Registry
    from tests.test_dispatch import Stub

    own = Registry.from_entry_points()
    own.register(Stub("picky", 300, orders=(1,)))
    monkeypatch.setattr(api, "default_registry", lambda: own)
    case = random_case(2, seed=9, spread=0.6, queries=13, lengths=(31, 29))
    spec = AttentionSpec(order=2, method=Polynomial(tolerance=1e-3))
    provenance = korder.attend_result(case.query, case.keys, case.values, spec=spec).provenance
    assert provenance is not None
    picky = [rejection for rejection in provenance.rejected if rejection.backend == "picky"]
    assert len(picky) == len(provenance.replanned) + 1, "once for every degree that was tried"
    assert "of degree" in picky[0].plan


def test_a_spec_of_the_wrong_type_is_said_so_everywhere() -> None:
    for call in (
        lambda: korder.plan("x", query=(5, 3), keys=[(5, 3)], values=[(5, 3)]),
        lambda: korder.marginals(X, (X,), spec="x"),
        lambda: korder.top_tuples(X, (X,), count=1, spec="x"),
        lambda: korder.measure(X, (X,), (X,), spec="x"),
    ):
        with pytest.raises(SpecError, match="spec must be"):
            call()


@pytest.mark.parametrize("shape", [12, (-1, 3), (5.0, 3), "ab", None])
def test_what_is_no_shape_is_refused_before_planning(shape: Any) -> None:
    with pytest.raises(ShapeError, match="query is not a shape"):
        korder.plan(query=shape, keys=[(5, 3)], values=[(5, 3)])


def test_plans_take_arrays_for_their_shapes() -> None:
    assert korder.plan(query=X, keys=[X], values=[X]) == korder.plan(query=(5, 3), keys=[(5, 3)], values=[(5, 3)])


def test_statistics_are_what_measure_returns() -> None:
    spec = AttentionSpec(order=1, method=Polynomial(tolerance=0.1))
    with pytest.raises(OperandError, match="statistics"):
        korder.attend(X, (X,), (X,), spec=spec, statistics=3)


def test_plans_and_calls_infer_the_same_spec() -> None:
    shape = (5, 3)
    plan = korder.plan(query=shape, keys=[shape], values=[shape], weight=(3, 3))[0]
    assert plan.problem.spec.score == "kronecker"
    with pytest.raises(ShapeError, match="at least one key"):
        korder.plan(query=shape, keys=[], values=[])
