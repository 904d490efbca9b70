"""What is expected of certificates before a run: tails by drawn tuples, rows that miss, on normal and heavy inputs."""

from __future__ import annotations

from itertools import product

import array_api_strict
import numpy as np
import pytest

import korder
from korder.dispatch.arrays import namespace_of_kind
from korder.dispatch.request import make_request
from korder.methods import expectations, outliers, tolerances

NUMPY = namespace_of_kind("numpy")


def draw(order, n, width, rms, *, heavy=0, factor=15.0, uniform=False, seed=0):
    """Return query, keys and values of one head, float32; a few keys of each mode stand out."""
    rng = np.random.default_rng(seed)
    lengths = (n, *(n + 3 + 4 * t for t in range(order)))
    size = (rms * (3.0 ** (0.5 * (order + 1)) if uniform else 1.0)) ** (1.0 / (order + 1))
    make = (lambda shape: rng.uniform(-1, 1, shape)) if uniform else rng.standard_normal
    query, *keys = ((make((m, width)) * size).astype("float32") for m in lengths)
    for key in keys:
        key[rng.choice(len(key), heavy, replace=False)] *= factor
    values = [rng.standard_normal((m, 3)).astype("float32") for m in lengths[1:]]
    return query, keys, values


def request_of(query, keys, values, tolerance=1e-2, **options):
    spec = korder.AttentionSpec(order=len(keys), method=korder.Auto(tolerance=tolerance))
    return make_request(query, keys, values, spec=spec, backend="numpy", **options)[1]


def true_factors(request, count):
    """Return, per power, the moments of all scores of every row, tuple by tuple, in float64."""
    problem, operands = request.problem, request.operands
    shared = problem.heads // problem.groups
    found = np.empty((count, problem.batch, problem.heads, problem.queries))
    for b, h, i in product(range(problem.batch), range(problem.heads), range(problem.queries)):
        scores, weights = problem.scale * operands.query[b, h, i].astype(np.float64), np.ones(())
        for t, key in enumerate(operands.keys):
            scores = scores[..., None, :] * key[b, h // shared].astype(np.float64)
            mask, bias = operands.key_masks[t], operands.biases[t]
            weight = np.ones(key.shape[2]) if mask is None else mask[b, h // shared if mask.shape[1] > 1 else 0] * 1.0
            if bias is not None:
                weight = weight * np.exp(bias[b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, 0])
            weights = weights[..., None] * weight
        scores = scores.sum(-1)
        share = weights / weights.sum()
        centred = scores - (share * scores).sum()
        second = (share * centred**2).sum()
        found[:, b, h, i] = [(share * centred ** (2 * p)).sum() / second**p for p in range(1, count + 1)]
    return found


def estimated(request, count, xp=NUMPY):
    sizes = outliers.typical_sizes(xp, request.problem, request.operands)
    return np.stack(
        [np.asarray(x) for x in expectations.tail_factors(xp, request.problem, request.operands, sizes, count)]
    )


@pytest.mark.parametrize("heavy", [0, 2])
@pytest.mark.parametrize(("order", "n", "width"), [(1, 211, 4), (1, 211, 16), (2, 61, 4), (2, 61, 16), (3, 23, 5)])
def test_tail_factors_are_those_of_all_tuples(order, n, width, heavy):
    request = request_of(*draw(order, n, width, 0.3, heavy=heavy, seed=order + width))
    true, found = true_factors(request, 4), estimated(request, 4)
    np.testing.assert_allclose(found[0], 1.0)
    for power in (2, 3, 4):
        ratio = found[power - 1] / true[power - 1]
        # a moment of degree 8 that is off by 3 is that of scores off by 1.15
        assert abs(np.log(np.median(ratio))) <= np.log(1.4 if order < 3 else 2.5)
        assert (np.abs(np.log(ratio)) <= np.log(1.5 if order < 3 else 2.0) * (power - 1)).mean() >= 0.8


def test_heavy_keys_make_heavy_tails():
    """A normal law would say 105 for the moment of degree 8; few of the tuples make it thousands."""
    request = request_of(*draw(2, 61, 16, 0.3, heavy=1, seed=5))
    assert np.median(estimated(request, 4)[3]) > 1e4


def test_tail_factors_with_masks_biases_and_grouped_heads():
    rng = np.random.default_rng(2)
    query = rng.normal(size=(2, 4, 19, 5))
    keys = [rng.normal(size=(2, 2, m, 5)) for m in (23, 29)]
    values = [rng.normal(size=(2, 2, m, 3)) for m in (23, 29)]
    masks = (rng.random((2, 2, 23)) < 0.7, rng.random((2, 29)) < 0.8)
    biases = (rng.normal(size=(2, 4, 1, 23)), None)
    keys[0][0, 0, ~masks[0][0, 0]] = np.nan  # under a mask
    request = request_of(query, keys, values, key_masks=masks, biases=biases)
    for t, key in enumerate(request.operands.keys):
        key[np.isnan(key)] = 0.0 if t == 0 else key[np.isnan(key)]
    ratio = estimated(request, 3) / true_factors(request, 3)
    assert 0.8 <= np.median(ratio[2]) <= 1.25
    assert (np.abs(np.log(ratio[2])) <= np.log(2.0)).mean() >= 0.9


def test_rows_between_those_looked_at_take_their_shape(monkeypatch):
    request = request_of(*draw(1, 47, 4, 0.3))
    whole = estimated(request, 3)
    monkeypatch.setattr(expectations, "ROWS", 16)
    some = estimated(request, 3)
    assert some.shape == whole.shape
    np.testing.assert_array_equal(some, whole[..., np.arange(47) // 3 * 3])


def test_every_namespace_expects_the_same():
    request = request_of(*draw(2, 31, 4, 0.3, heavy=1))
    query, keys, values = (
        [array_api_strict.asarray(x) for x in group]
        for group in ([request.operands.query], request.operands.keys, request.operands.values)
    )
    strict = type(request.operands)(query[0], tuple(keys), tuple(values), (None, None), (None, None))
    found = []
    for xp, operands in ((NUMPY, request.operands), (array_api_strict, strict)):
        sizes = outliers.typical_sizes(xp, request.problem, operands)
        shifts = expectations.expected_shifts(xp, request.problem, operands, sizes, (2, 4, 6))
        found.append([np.asarray(shift) for shift in shifts])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)


def missing(request, degree, level):
    """Return how many rows of the head miss by a polynomial of a degree, when the keys of a level are set aside."""
    problem, operands = request.problem, request.operands
    sizes = outliers.typical_sizes(NUMPY, problem, operands)
    masks = None
    if any(level.keys):
        found = outliers.outlying_keys(NUMPY, sizes, level.threshold)
        masks = tuple(~heavy[:, 0] for heavy in found)
    spec = korder.AttentionSpec(order=problem.order, method=korder.Polynomial(degree=degree))
    try:
        result = korder.attend_result(
            operands.query, operands.keys, operands.values, spec=spec, key_masks=masks, backend="numpy"
        )
    except korder.AccuracyError:  # scores so large that float32 loses the sum
        return problem.queries
    return int(tolerances.missing_rows(NUMPY, result.certificate, operands, problem.spec.tolerance).sum())


@pytest.mark.parametrize(
    "inputs",
    [
        {"order": 1, "n": 301, "width": 4, "rms": 0.4},
        {"order": 1, "n": 301, "width": 8, "rms": 0.15, "heavy": 3},
        {"order": 2, "n": 257, "width": 4, "rms": 0.4},
        {"order": 2, "n": 257, "width": 16, "rms": 0.12},
        {"order": 2, "n": 257, "width": 4, "rms": 0.1, "heavy": 3},
        {"order": 2, "n": 257, "width": 8, "rms": 0.3, "uniform": True},
        {"order": 3, "n": 61, "width": 4, "rms": 0.3, "heavy": 1},
    ],
    ids=lambda x: " ".join(f"{name}={value}" for name, value in x.items()),
)
def test_as_many_rows_miss_as_are_expected(inputs):
    """Neither more nor fewer, whether or not some outlying keys are left to the polynomial."""
    request = request_of(*draw(**inputs))
    compared = 0
    for level in request.problem.statistics.levels:
        share = 0.8 if any(level.keys) else 1.0  # what joining exact parts adds is left room for
        for degree, expected in zip((2, 4, 6), level.missing, strict=False):
            count = missing(request, degree, level)
            assert share * count / 1.5 - 4 <= expected <= (1.25 * count / share**4) * 1.5 + 4
            compared += 0 < count < request.problem.queries
    assert compared >= 2


def test_value_reach_is_how_far_products_lie_from_their_mean():
    query, keys, values = draw(2, 13, 4, 0.1)
    request = request_of(query, keys, values)
    products = np.einsum("ac,bc->abc", *(v.astype(np.float64) for v in values)).reshape(-1, 3)
    spread = np.ptp(products, axis=0).max()
    wanted = np.abs(products - products.mean(axis=0)).max() / spread
    reach = expectations.value_reach(NUMPY, request.problem, request.operands)
    assert reach.shape == (1, 1, 13)
    assert (reach >= wanted).all()
    np.testing.assert_allclose(reach, wanted, rtol=0.02)


def test_nothing_misses_where_all_values_agree():
    query, keys, values = draw(1, 31, 4, 0.5, heavy=2)
    values[0][:] = 0.5
    request = request_of(query, keys, values)
    assert request.problem.statistics.levels[0].missing[0] == 0
    assert missing(request, 2, request.problem.statistics.levels[0]) == 0


def test_what_is_not_finite_is_expected_to_miss():
    query, keys, values = draw(1, 31, 4, 0.1)
    query[3, 1] = np.nan
    assert request_of(query, keys, values).problem.statistics.levels[0].missing == (1,) * 6
    keys[0][5, 2] = np.inf
    level = request_of(query, keys, values).problem.statistics.levels[0]
    assert level.missing == (31,) * 6


def test_a_head_that_sees_nothing_misses_nothing():
    rng = np.random.default_rng(3)
    query, key = rng.normal(size=(1, 2, 21, 4)) * 0.2, rng.normal(size=(1, 2, 23, 4)) * 0.2
    value = rng.normal(size=(1, 2, 23, 3))
    mask = np.ones((1, 2, 23), dtype=bool)
    mask[0, 1] = False
    levels = request_of(query, [key], [value], key_masks=(mask,)).problem.statistics.levels
    assert levels[0].missing == (0,) * 6


def test_levels_end_where_nothing_is_left_to_gain():
    quiet = request_of(*draw(1, 61, 4, 0.02)).problem.statistics.levels
    assert [level.keys for level in quiet] == [(0,)]
    assert quiet[0].missing[0] == 0
    loud = request_of(*draw(1, 61, 4, 1.5, heavy=2))
    assert len(loud.problem.statistics.levels) > 2
    assert all(outliers.outlying_share(loud.problem, level.keys) <= 0.5 for level in loud.problem.statistics.levels)


@pytest.mark.parametrize(("count", "keys", "rows"), [(0, 0, 0), (1, 1, 1), (5, 8, 5), (9, 16, 10), (129, 200, 160)])
def test_counts_are_rounded_up(count, keys, rows):
    found = np.zeros((2, 3, 200), dtype=bool)
    found[1, 2, :count] = True
    assert (outliers.key_count(NUMPY, found), outliers.row_count(NUMPY, found)) == (keys, rows)
