"""The kit's own oracle: explicit score tensors in a wide float, by the definitions; no kernel or planning code.

The same functions in the dtype of a kernel are the plain evaluation that its error is measured against. Scores and
value products are multilinear, so the gradient with respect to one factor is the sum of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.limits import REFERENCE, as_dtype
from korder.conformance.monomials import Monomial, about, kept_powers, kept_slopes

Array = Any
WAYS = ("forward", "backward")
"""Two plain evaluations: products from the first factor on with scores scaled, from the last on with the query scaled.

One alone may be right by luck where there are few numbers; together they show what rounding does.
"""
MODES = "uvwxyz"
COLUMNS = "ABCDEF"


@dataclass(frozen=True, slots=True)
class Transform:
    """A polynomial of the centred score in place of exp.

    Shapes:  centre (b, h, n); coefficients of 1, x, x^2, ..
    """

    coefficients: tuple[float, ...]
    centre: Array
    closed_form: bool = False
    """Whether gradients have the polynomial itself in the place of its derivative, as exp is its own."""
    monomials: tuple[Monomial, ...] = ()
    """Those that are kept, of scores without a weight; empty for all."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What attention is, with the tensors behind it.

    Shapes:  output (b, h, n, e); lse, total (b, h, n); shares, slopes (b, h, n, m1, .., mk).
    """

    output: Array
    lse: Array
    total: Array
    """Sum of the weights: about each row's largest score, or of the polynomial."""
    shares: Array
    """Weights over their sum, 0 where a tuple may not be attended to."""
    slopes: Array
    """Derivatives of the weights with respect to the score, or what stands in their place, over the same sum.

    With monomials left out, with respect to each of its terms, on a further axis.
    """


def live_tuples(case: Case) -> Array:
    """Return which tuples each query may attend to, (b, h, n, m1, .., mk) bool."""
    batch, heads, queries = case.query.shape[:3]
    lengths = tuple(key.shape[2] for key in case.keys)
    live = np.ones((batch, heads, queries, *lengths), dtype=bool)
    rows = np.arange(queries) + case.query_offset
    i = rows.reshape(-1, *(1,) * case.order)
    js = [
        _along(np.arange(m) + o, t, case.order) for t, (m, o) in enumerate(zip(lengths, case.key_offsets, strict=True))
    ]
    mask = case.spec.mask
    if mask.kind == "causal":
        for j in js:
            live &= j <= i
    elif mask.kind == "window":
        for j, size in zip(js, mask.sizes, strict=True):
            live &= (i - size < j) & (j <= i)
    elif mask.kind == "ordered":
        for before, after in pairwise(js):
            live &= before < after
        live &= js[-1] <= i
    for t in range(case.order):
        live &= _along(_open_keys(case, t)[:, :, None, :], t, case.order)
        bias = case.biases[t]
        if bias is not None:
            live &= _along(bias != -np.inf, t, case.order)
    return live


def _along(x: Array, mode: int, order: int) -> Array:
    """Put the last axis of `x` at the place of a mode among `order` modes."""
    shape = [1] * order
    shape[mode] = x.shape[-1]
    return x.reshape(*x.shape[:-1], *shape)


def _open_keys(case: Case, mode: int) -> Array:
    """Return which keys of a mode are not masked, (b, h, m)."""
    batch, heads = case.query.shape[:2]
    mask = case.key_masks[mode]
    if mask is None:
        return np.ones((batch, heads, case.keys[mode].shape[2]), dtype=bool)
    return mask if mask.shape[1] == heads else np.repeat(mask, heads // mask.shape[1], axis=1)


def _by_query_head(case: Case, arrays: Sequence[Array], dtype: Any) -> list[Array]:
    """Return keys or values (b, h, m, width), one copy for each query head, masked ones zero."""
    heads = case.query.shape[1]
    found = []
    for t, x in enumerate(arrays):
        wide = np.repeat(x, heads // x.shape[1], axis=1)
        found.append(np.where(_open_keys(case, t)[..., None], wide, 0.0).astype(dtype))
    return found


def score_factors(case: Case, dtype: Any) -> dict[str, tuple[Array, str]]:
    """Return the factors that scores are the sum of products of, by operand name, with their einsum subscripts."""
    names = [f"keys[{t}]" for t in range(case.order)]
    keys, modes = _by_query_head(case, case.keys, dtype), MODES[: case.order]
    query = case.query.astype(dtype)
    if case.weight is None:
        return {"query": (query, "bhir"), **{a: (k, f"bh{m}r") for a, k, m in zip(names, keys, modes, strict=True)}}
    found = {"query": (query, "bhia")}
    found |= {a: (k, f"bh{m}{c}") for a, k, m, c in zip(names, keys, modes, COLUMNS, strict=False)}
    if not isinstance(case.weight, tuple):
        weight = {"weight": (case.weight.astype(dtype), "a" + COLUMNS[: case.order])}
        return {"query": found.pop("query"), **weight, **found}
    columns = "a" + COLUMNS[: case.order]
    factors = [(u.astype(dtype), f"{c}r") for u, c in zip(case.weight, columns, strict=True)]
    # each factor of the weight stands behind its operand, so that products stay small from either end
    paired = zip(found.items(), enumerate(factors), strict=True)
    return {name: x for operand, (t, factor) in paired for name, x in (operand, (f"weight[{t}]", factor))}


def value_factors(case: Case, dtype: Any) -> dict[str, tuple[Array, str]]:
    """Return the factors of the value products, by operand name, with their subscripts."""
    values = _by_query_head(case, case.values, dtype)
    return {f"values[{t}]": (v, f"bh{MODES[t]}e") for t, v in enumerate(values)}


def _sum_of_products(factors: Sequence[tuple[Array, str]], result: str, way: str = "") -> Array:
    arrays = [array for array, _ in factors]
    subscripts = ",".join(part for _, part in factors)
    count = len(arrays)
    path: Any = "greedy" if count > 2 else False
    if way == "forward" and count > 2:
        path = ["einsum_path", (0, 1), *((0, left - 1) for left in range(count - 1, 1, -1))]
    elif way == "backward" and count > 2:
        path = ["einsum_path", *((left - 2, left - 1) for left in range(count, 1, -1))]
    return np.einsum(f"{subscripts}->{result}", *arrays, optimize=path)


def scores_of(case: Case, dtype: Any = REFERENCE, *, absolute: bool = False, way: str = "") -> Array:
    """Return the scores without biases; with `absolute` the sums of their terms' absolute values."""
    factors = list(_projected(case, dtype) if absolute else score_factors(case, dtype).values())
    if absolute:
        factors = [(np.abs(array), subscripts) for array, subscripts in factors]
    scale = abs(case.scale) if absolute else case.scale
    if way == "backward":
        factors[0] = (factors[0][0] * dtype(scale), factors[0][1])
    total = _sum_of_products(factors, "bhi" + MODES[: case.order], way)
    return total if way == "backward" else total * dtype(scale)


def column_terms(case: Case, dtype: Any = REFERENCE, *, absolute: bool = False, way: str = "") -> Array:
    """Return the terms of the scores, one for each column on a further axis; of scores without a weight."""
    assert case.weight is None
    factors = list(score_factors(case, dtype).values())
    terms = _sum_of_products(factors, "bhi" + MODES[: case.order] + "r", way) * dtype(case.scale)
    return np.abs(terms) if absolute else terms


def _projected(case: Case, dtype: Any) -> list[tuple[Array, str]]:
    """Return the k + 1 factors whose columns make the monomials: operands already through the weight."""
    factors = score_factors(case, dtype)
    if case.weight is None:
        return list(factors.values())
    names = ["query", *(f"keys[{t}]" for t in range(case.order))]
    if isinstance(case.weight, tuple):
        pairs = [(factors[name], factors[f"weight[{t}]"]) for t, name in enumerate(names)]
        return [(x @ u, subscripts[:-1] + "r") for (x, subscripts), (u, _) in pairs]
    query = _sum_of_products([factors["query"], factors["weight"]], "bhi" + COLUMNS[: case.order])
    return [(query, "bhi" + COLUMNS[: case.order]), *(factors[name] for name in names[1:])]


def bias_of(case: Case, dtype: Any = REFERENCE) -> Array | float:
    """Return the sum of the biases, broadcastable to the scores; 0 in place of -inf."""
    total: Any = dtype(0.0)
    for t, bias in enumerate(case.biases):
        if bias is not None:
            total = total + _along(np.where(bias == -np.inf, 0.0, bias).astype(dtype), t, case.order)
    return total


def answer(case: Case, dtype: Any = REFERENCE, transform: Transform | None = None, *, way: str = "") -> Answer:
    """Return output and lse by their definitions, computed in `dtype` in one of `WAYS`."""
    live, scores, bias = live_tuples(case), scores_of(case, dtype, way=way), bias_of(case, dtype)
    axes = tuple(range(3, scores.ndim))
    with np.errstate(all="ignore"):
        if transform is None:
            logits = np.where(live, scores + bias, -np.inf).astype(dtype)
            reference = np.max(logits, axis=axes, initial=-np.inf)
            reference = np.where(np.isfinite(reference), reference, 0.0).astype(dtype)
            weights = slopes = np.exp(logits - _rows(reference, case.order))
        else:
            reference = transform.centre.astype(dtype)
            open_weights = np.where(live, np.exp(bias), 0.0).astype(dtype)
            weights, slopes = _polynomial(case, transform, scores, way)
            weights = open_weights * weights
            slopes = (open_weights if slopes.ndim == weights.ndim else open_weights[..., None]) * slopes
        total = weights.sum(axis=axes)
        any_live = live.any(axis=axes)
        lse = np.where(any_live, reference + np.log(np.where(any_live, total, 1.0)), -np.inf)
    divisor = _rows(np.where(any_live, total, 1.0), case.order)
    shares = (weights / divisor).astype(dtype)
    slopes = (slopes / (divisor if slopes.ndim == weights.ndim else divisor[..., None])).astype(dtype)
    factors = list(value_factors(case, dtype).values())
    output = _sum_of_products([(shares, "bhi" + MODES[: case.order]), *factors], "bhie", way)
    return Answer(output, lse, total, shares, slopes)


def _polynomial(case: Case, transform: Transform, scores: Array, way: str) -> tuple[Array, Array]:
    """Return the polynomial of the centred scores, and its derivatives."""
    coefficients = np.asarray(transform.coefficients, scores.dtype)
    centre = _rows(transform.centre.astype(scores.dtype), case.order)
    if not transform.monomials:
        slope = coefficients if transform.closed_form else _derivative(coefficients)
        centred = scores - centre
        return np.polynomial.polynomial.polyval(centred, coefficients), np.polynomial.polynomial.polyval(centred, slope)
    terms, degree = column_terms(case, scores.dtype.type, way=way), len(coefficients) - 1
    weights = about(kept_powers(terms, transform.monomials, degree), -centre)
    slopes = about(kept_slopes(terms, transform.monomials, degree), -centre[..., None])
    return np.tensordot(coefficients, np.stack(weights), axes=1), np.tensordot(coefficients, np.stack(slopes), axes=1)


def _rows(x: Array, order: int) -> Array:
    return x.reshape(*x.shape, *(1,) * order)


def _derivative(coefficients: Array) -> Array:
    return np.polynomial.polynomial.polyder(coefficients) if len(coefficients) > 1 else coefficients[:1] * 0


def gradients(
    case: Case,
    output_gradient: Array,
    lse_gradient: Array | None,
    dtype: Any = REFERENCE,
    transform: Transform | None = None,
    *,
    way: str = "",
) -> dict[str, Array]:
    """Return the gradient of every operand by name, as a closed form over explicit tensors."""
    found = answer(case, dtype, transform, way=way)
    modes, order = MODES[: case.order], case.order
    upstream = output_gradient.astype(dtype)
    values, scores = value_factors(case, dtype), score_factors(case, dtype)
    inner = _sum_of_products([(upstream, "bhie"), *values.values()], "bhi" + modes, way)
    inner = inner - _rows((upstream * found.output).sum(-1), order)
    if lse_gradient is not None:
        inner = inner + _rows(lse_gradient.astype(dtype), order)
    logit_gradient, columns = found.shares * inner, "r" if found.slopes.ndim > inner.ndim else ""
    score_gradient = found.slopes * (inner[..., None] if columns else inner) * dtype(case.scale)
    result = {}
    for name, (_, subscripts) in scores.items():
        others = [factor for other, factor in scores.items() if other != name]
        result[name] = _sum_of_products([(score_gradient, "bhi" + modes + columns), *others], subscripts, way)
    for name, (_, subscripts) in values.items():
        others = [factor for other, factor in values.items() if other != name]
        result[name] = _sum_of_products([(found.shares, "bhi" + modes), (upstream, "bhie"), *others], subscripts, way)
    for t in range(order):
        for name in (f"keys[{t}]", f"values[{t}]"):
            result[name] = _by_key_head(result[name], case.keys[t].shape[1])
        bias = case.biases[t]
        if bias is not None:
            rest = tuple(3 + s for s in range(order) if s != t)
            full = logit_gradient.sum(axis=rest)
            shared = tuple(axis for axis in range(3) if bias.shape[axis] == 1)
            result[f"biases[{t}]"] = full.sum(axis=shared, keepdims=True)
    return result


def _by_key_head(x: Array, groups: int) -> Array:
    batch, heads, *rest = x.shape
    return x.reshape(batch, groups, heads // groups, *rest).sum(axis=2)


def narrowed(x: Array, dtype: str) -> Array:
    """Return the numbers of a plain evaluation as its result holds them."""
    return as_dtype(np.asarray(x, dtype=np.float64), dtype)
