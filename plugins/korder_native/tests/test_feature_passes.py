"""The C++ passes over features, one by one, against sums in float64 over monomials that itertools lists."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise
from typing import Any

import numpy as np
import pytest
from reference import ISAS

from korder_native import _native
from korder_native.arrays import NUMBERS, address, plain_view

Array = Any
TOKENS = (0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 127, 128, 129, 191, 192, 193, 255, 256, 257, 300, 513)
CHANNELS = (*range(1, 21), 32, 33, 65)
SHAPES = ((1, 0), (1, 6), (2, 6), (3, 0), (3, 1), (3, 5), (5, 4), (9, 3), (11, 2))
"""Widths and degrees."""


def in_memory_by_columns(x: Array) -> Array:
    return np.asfortranarray(x)


def spread(x: Array) -> Array:
    """Every second row and third column of a larger array, backwards, NaN in between."""
    large = np.full((2 * x.shape[0] + 1, 3 * x.shape[1] + 1), np.nan, x.dtype)
    view = large[1::2, 1::3][::-1, ::-1]
    view[...] = x
    return view


LAYOUTS = {"dense": np.ascontiguousarray, "columns": in_memory_by_columns, "spread": spread}


class Walk:
    """Monomials by degree, each a path of columns, in the order in which kernels walk them."""

    def __init__(self, width: int, paths: list[list[tuple[int, ...]]]) -> None:
        self.paths = [path for rows in paths for path in rows]
        self.degrees = np.array([len(path) for path in self.paths])
        self.width, self.degree = width, len(paths) - 1
        self.native = _native.Monomials(width)
        for degree, rows in enumerate(paths):
            array = np.array(rows, np.int32).reshape(len(rows), degree)
            levels = np.array([1, *(first_difference(a, b) for a, b in pairwise(rows))], np.int32)
            self.native.add(len(rows), array.ctypes.data, levels.ctypes.data)

    @classmethod
    def all(cls, width: int, degree: int) -> Walk:
        return cls(width, [list(combinations_with_replacement(range(width), s)) for s in range(degree + 1)])

    def features(self, columns: Array) -> Array:
        """(r, tokens) of columns (w, tokens)."""
        return np.array([columns[list(path)].prod(axis=0) for path in self.paths])

    def adjoint(self, columns: Array, gradient: Array) -> Array:
        """The gradient (w, tokens) of columns, given that of the features (r, tokens)."""
        found = np.zeros_like(columns)
        for path, row in zip(self.paths, gradient, strict=True):
            for place, column in enumerate(path):
                found[column] += row * columns[[*path[:place], *path[place + 1 :]]].prod(axis=0)
        return found


def first_difference(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """The first step, counted from 1, in which paths differ."""
    return next(step for step, (a, b) in enumerate(zip(one, other, strict=True), 1) if a != b)


@dataclass
class Tokens:
    """What a pass reads of tokens, and the same in float64."""

    walk: Walk
    rows: Array
    values: Array
    wide: bool
    factors: Array | None = None
    open: Array | None = None
    weights: Array | None = None
    shares: Array | None = None
    appends: bool = False
    numbers: tuple[str, str] | None = None

    @property
    def real(self) -> str:
        return "float64" if self.wide else "float32"

    @property
    def channels(self) -> int:
        return self.values.shape[1] + self.appends

    @property
    def columns(self) -> Array:
        """(w, tokens), zeros for closed tokens."""
        rows = self.rows if self.open is None else np.where(self.open[:, None], self.rows, 0)
        return (rows * (1.0 if self.factors is None else self.factors)).T.astype(float)

    @property
    def weighted(self) -> Array:
        """(tokens, channels), the weight behind the values, zeros for closed tokens."""
        weights = np.ones(len(self.rows)) if self.weights is None else self.weights
        values = np.concatenate([self.values, np.ones((len(weights), 1))][: 1 + self.appends], axis=1)
        found = values.astype(float) * weights[:, None]
        return found if self.open is None else np.where(self.open[:, None], found, 0)

    @property
    def spread_shares(self) -> Array:
        """(r, tokens)."""
        return (
            np.ones((len(self.walk.paths), len(self.rows))) if self.shares is None else self.shares.T[self.walk.degrees]
        )

    def call(self, threads: int = 1) -> Any:
        call = _native.FeatureCall(self.walk.native, self.wide, threads, len(self.rows), self.channels)
        numbers = self.numbers or (str(self.rows.dtype), str(self.values.dtype))
        call.set_columns(plain_view(self.rows), NUMBERS[numbers[0]], address(self.factors), address(self.open))
        call.set_values(plain_view(self.values), NUMBERS[numbers[1]], self.appends, address(self.weights))
        return call

    def limit(self, terms: int) -> float:
        """The relative error of a sum of products of columns, a value and a share, in this dtype."""
        return (min(terms, 256) + 2 * self.walk.degree + 8) * float(np.finfo(self.real).eps)


def tokens_of(
    count: int, channels: int = 5, shape: tuple[int, int] = (3, 3), *, wide: bool, layout: str = "dense", seed: int = 0
) -> Tokens:
    """Tokens with factors, closed ones that hold NaN, weights, and a weight behind the values."""
    rng = np.random.default_rng(seed)
    real = "f8" if wide else "f4"
    rows, values = (rng.standard_normal((count, size)).astype(real) for size in (shape[0], channels - 1))
    closed = rng.random(count) < 0.2
    rows[closed], values[closed] = np.nan, np.nan
    made = LAYOUTS[layout]
    factors, weights = 2.0 ** rng.integers(-1, 2, shape[0]), np.where(closed, 0, rng.random(count))
    return Tokens(Walk.all(*shape), made(rows), made(values), wide, factors, ~closed, weights, appends=True)


def open_tokens_of(count: int, channels: int = 5, shape: tuple[int, int] = (3, 3), **options: Any) -> Tokens:
    """Tokens with a share of every degree, whose values are float64."""
    tokens = tokens_of(count, channels + 1, shape, **options)
    rng = np.random.default_rng(1)
    tokens.rows, tokens.values = (np.nan_to_num(x, nan=0.5) for x in (tokens.rows, tokens.values.astype(float)))
    tokens.shares = rng.standard_normal((count, shape[1] + 1))
    tokens.open, tokens.weights, tokens.factors, tokens.appends = None, None, None, False
    return tokens


def assert_within(got: Array, wanted: Array, allowed: Array) -> None:
    wrong = np.abs(got - wanted)
    worst = np.unravel_index(np.argmax(wrong - allowed), wrong.shape) if wrong.size else ()
    assert np.all(wrong <= allowed), f"at {worst}: {got[worst]} for {wanted[worst]}, allowed {allowed[worst]:.3e}"


def assert_sums(tokens: Tokens, isa: str, threads: int = 1) -> tuple[Array, Array]:
    rng = np.random.default_rng(5)
    before, before_absolute = (
        rng.standard_normal((len(tokens.walk.paths), tokens.channels)),
        rng.random(len(tokens.walk.paths)),
    )
    sums, absolute = before.copy(), before_absolute.copy()
    kernels = _native.kernels(isa)
    kernels.feature_sums(tokens.call(threads), address(tokens.shares), address(sums), address(absolute))
    features, weighted = tokens.walk.features(tokens.columns) * tokens.spread_shares, tokens.weighted
    limit = tokens.limit(len(weighted))
    assert_within(
        sums, before + features @ weighted, limit * (np.abs(features) @ np.abs(weighted)) + 1e-15 * np.abs(before)
    )
    if tokens.shares is None:
        sizes = np.abs(features) @ weighted[:, -1]
        assert_within(absolute, before_absolute + sizes, limit * sizes + 1e-15)
    return sums, absolute


def assert_reading(tokens: Tokens, isa: str, threads: int = 1) -> Array:
    rng = np.random.default_rng(6)
    table = rng.standard_normal((len(tokens.walk.paths), tokens.channels)).astype(tokens.real)
    found = np.full((len(tokens.rows) + 1, tokens.channels), np.nan)
    _native.kernels(isa).read_features(tokens.call(threads), address(table), address(found), None)
    features = tokens.walk.features(tokens.columns)
    sizes = np.abs(features).T @ np.abs(table.astype(float))
    assert_within(found[:-1], features.T @ table.astype(float), tokens.limit(len(table)) * sizes)
    assert np.isnan(found[-1]).all()
    return found[:-1]


def assert_gradient(tokens: Tokens, isa: str, threads: int = 1) -> Array:
    rng = np.random.default_rng(7)
    table = rng.standard_normal((len(tokens.walk.paths), tokens.channels)).astype(tokens.real)
    found = np.full((tokens.walk.width + 1, len(tokens.rows)), np.nan, tokens.real)
    _native.kernels(isa).feature_gradient(tokens.call(threads), address(tokens.shares), address(table), address(found))
    columns, weighted, shares = tokens.columns, tokens.weighted, tokens.spread_shares
    wanted = tokens.walk.adjoint(columns, (table.astype(float) @ weighted.T) * shares)
    sizes = tokens.walk.adjoint(np.abs(columns), (np.abs(table) @ np.abs(weighted).T) * np.abs(shares))
    # sums over channels, then over the monomials of a group and what they send on
    assert_within(found[:-1], wanted, (tokens.limit(256) + 256 * float(np.finfo(tokens.real).eps)) * sizes)
    assert np.isnan(found[-1]).all()
    return found[:-1]


def both(count: int, *arguments: Any, isa: str, **options: Any) -> None:
    """Every pass, of tokens as keys are read and as rows are on the way back."""
    for wide in (False, True):
        keys = tokens_of(count, *arguments, wide=wide, **options)
        rows = open_tokens_of(count, *arguments, wide=wide, **options)
        assert_sums(keys, isa)
        assert_sums(rows, isa)
        assert_reading(keys, isa)
        assert_gradient(keys, isa)
        assert_gradient(rows, isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", TOKENS)
def test_every_number_of_tokens(count: int, isa: str) -> None:
    both(count, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_every_number_of_channels(channels: int, isa: str) -> None:
    both(37, channels, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_width_and_degree(shape: tuple[int, int], isa: str) -> None:
    both(19, 4, shape, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_are_read_where_they_lie(layout: str, isa: str) -> None:
    both(45, 6, (4, 2), isa=isa, layout=layout)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("number", NUMBERS)
def test_every_dtype_of_rows_and_values(number: str, wide: bool, isa: str) -> None:
    """A number is widened or narrowed when it is read; bfloat16 is the upper half of a float32."""
    tokens, other = tokens_of(21, wide=wide), tokens_of(21, wide=wide)
    if number == "bfloat16":
        halves = [(x.astype("f4").view("u4") >> 16).astype("u2") for x in (tokens.rows, tokens.values)]
        other.rows, other.values = ((x.astype("u4") << 16).view("f4") for x in halves)
        tokens.rows, tokens.values, tokens.numbers = *halves, (number, number)
    else:
        tokens.rows, tokens.values = tokens.rows.astype(number), tokens.values.astype(number)
        other.rows, other.values = (x.astype(other.real) for x in (tokens.rows, tokens.values))
    results = []
    for each in (tokens, other):
        sums, absolute = np.zeros((len(each.walk.paths), each.channels)), np.zeros(len(each.walk.paths))
        _native.kernels(isa).feature_sums(each.call(), None, address(sums), address(absolute))
        results.append((sums, absolute))
    assert np.all(results[0][0][0] != 0)
    for got, wanted in zip(*results, strict=True):
        assert np.array_equal(got, wanted)


@pytest.mark.parametrize("isa", ISAS)
def test_any_monomials_in_any_order_of_columns(isa: str) -> None:
    """A table may lack monomials and begin with any column, as long as those that begin alike follow one another."""
    rng = np.random.default_rng(3)
    paths: list[list[tuple[int, ...]]] = [[()]]
    for s in range(1, 6):
        every = sorted(combinations_with_replacement((4, 1, 3, 0, 2), s))
        kept = [every[i] for i in sorted(rng.choice(len(every), max(1, len(every) // 3), replace=False))]
        paths.append(kept)
    for wide in (False, True):
        keys, rows = (make(50, 4, (5, 5), wide=wide) for make in (tokens_of, open_tokens_of))
        keys.walk = rows.walk = Walk(5, paths)
        assert_sums(keys, isa)
        assert_reading(keys, isa)
        assert_gradient(keys, isa)
        assert_gradient(rows, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_do_not_change_a_bit(isa: str) -> None:
    for wide in (False, True):
        keys, rows = (make(1500, 17, (5, 4), wide=wide) for make in (tokens_of, open_tokens_of))
        passes = ((assert_sums, keys), (assert_sums, rows), (assert_reading, keys), (assert_gradient, rows))
        for assert_right, tokens in passes:
            one, *others = (assert_right(tokens, isa, threads) for threads in (1, 2, 3))
            assert all(np.array_equal(x, y) for other in others for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [0, 1, 33, 200])
@pytest.mark.parametrize("degree", [0, 1, 5])
def test_rows_are_finished_into_means_of_the_centred_polynomial(degree: int, count: int, isa: str) -> None:
    rng = np.random.default_rng(degree)
    for wide in (False, True):
        tokens = tokens_of(count, 4, (3, degree), wide=wide)
        tokens.open = None
        tokens.rows = np.nan_to_num(tokens.rows, nan=0.25)
        r = len(tokens.walk.paths)
        table, sizes = rng.standard_normal((r, 4)).astype(tokens.real), rng.random(r).astype(tokens.real)
        table[0, -1] = 40.0  # so that the mean is far from zero
        coefficients, factors, size_factors = (
            rng.random(degree + 1),
            rng.standard_normal(degree + 1),
            rng.random(degree + 1),
        )
        coefficients[0] = factors[0] = 1.0
        centres, live = rng.standard_normal(count), rng.random(count) > 0.3
        found = np.full((count, 4), np.nan)
        moments, magnitude = np.full((count, degree + 1), np.nan), np.full(count, np.nan)
        finish = _native.Finish(
            *map(address, (coefficients, factors, sizes, size_factors, centres, live, moments, magnitude))
        )
        _native.kernels(isa).read_features(tokens.call(), address(table), address(found), finish)

        features, polynomial = tokens.walk.features(tokens.columns), np.polynomial.Polynomial
        of_degree = tokens.walk.degrees[:, None] == np.arange(degree + 1)
        powers = np.einsum("rt,rc,rs->tsc", features, table.astype(float), of_degree * factors)
        absolute = np.einsum("rt,r,rs->ts", np.abs(features), sizes.astype(float), of_degree * size_factors)
        for j in range(count):
            shifted = [polynomial([-centres[j], 1]) ** m for m in range(degree + 1)]
            grown = [polynomial([abs(centres[j]), 1]) ** m for m in range(degree + 1)]
            wanted_moments = np.array([p.coef @ powers[j, : m + 1, -1] for m, p in enumerate(shifted)])
            total = sum(
                c * (p.coef @ powers[j, : m + 1]) for m, (c, p) in enumerate(zip(coefficients, shifted, strict=True))
            )
            size = sum(
                c * (p.coef @ absolute[j, : m + 1]) for m, (c, p) in enumerate(zip(coefficients, grown, strict=True))
            )
            if not live[j]:
                total, wanted_moments, size = total * 0, wanted_moments * 0, 0.0
            wanted = np.append(total[:-1] / total[-1], total[-1]) if live[j] else total
            limit = 2e3 * float(np.finfo(tokens.real).eps)
            assert np.allclose(found[j], wanted, rtol=limit, atol=limit * np.max(np.abs(wanted)))
            assert np.allclose(moments[j], wanted_moments, rtol=limit, atol=limit * np.max(np.abs(wanted_moments)))
            assert np.isclose(magnitude[j], size / total[-1] if live[j] else 0.0, rtol=limit, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_facts_of_tokens(isa: str) -> None:
    """Peaks pass over what is closed or not finite; totals pass over what is closed."""
    for number in ("float32", "float64"):
        for weights in (None, np.random.default_rng(2).random(29)):
            tokens = tokens_of(29, wide=True, layout="spread")
            tokens.rows, tokens.weights = spread(tokens.rows.astype(number)), weights
            tokens.rows[np.flatnonzero(tokens.open)[0], 1] = -np.inf
            peaks, totals, products = np.full(3, np.nan), np.full(3, np.nan), np.full(29, np.nan)
            kernels = _native.kernels(isa)
            kernels.column_facts(tokens.call(), *map(address, (weights, peaks, totals)))
            kernels.token_products(tokens.call(), *map(address, (tokens.factors, products)))
            inside = np.where(tokens.open[:, None], tokens.rows.astype(float), 0.0)
            weighted = inside * (1.0 if weights is None else weights[:, None])
            assert np.array_equal(peaks, np.max(np.where(np.isfinite(inside), np.abs(inside), 0), axis=0))
            assert np.allclose(totals, weighted.sum(axis=0), rtol=0, atol=1e-13)
            assert np.allclose(products, tokens.rows.astype(float) @ tokens.factors, rtol=1e-14, equal_nan=True)
