"""The polynomial method by its definition, dense and in any dtype: explicit scores, P of centred ones, plain sums.

Shares no code with kernels: scores are built by broadcasting over tuples, -inf where a tuple may not be attended to.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from tests.problems import Case

Array = Any


def dense_scores(case: Case, dtype: Any = np.longdouble, *, absolute: bool = False) -> tuple[Array, Array]:
    """Return scores without biases and the sum of biases, each (b, h, n, m1 .. mk) flattened over tuples.

    The bias is -inf where a tuple may not be attended to; masked keys are never looked at. With `absolute`, scores are
    the sums of the absolute values of their terms.
    """
    sized = np.abs if absolute else np.asarray
    order, (batch, heads, queries, width) = len(case.keys), case.query.shape
    share = heads // case.keys[0].shape[1]
    lengths = tuple(key.shape[2] for key in case.keys)
    scores, bias = (np.zeros((batch, heads, queries, int(np.prod(lengths))), dtype) for _ in range(2))
    for b in range(batch):
        for h in range(heads):
            live = [_live_keys(case, t, b, h, h // share) for t in range(order)]
            keys = [key[b, h // share] for key in case.keys]
            rows = [np.where(x[:, None], key, 0).astype(dtype) for x, key in zip(live, keys, strict=True)]
            factors = _factors(case, case.query[b, h].astype(dtype), rows, dtype)
            scores[b, h] = _row_scores([sized(x) for x in factors]).reshape(queries, -1)
            bias[b, h] = _row_biases(case, live, b, h, dtype).reshape(queries, -1)
    return scores * sized(np.asarray(case.spec.score_factor(width), dtype)), bias


def _live_keys(case: Case, t: int, b: int, h: int, g: int) -> Array:
    live = np.ones(case.keys[t].shape[2], dtype=bool)
    mask = case.key_masks[t] if case.key_masks else None
    if mask is not None:
        mask = mask if mask.ndim == 3 else mask[:, None, :]
        live &= mask[b, g if mask.shape[1] > 1 else 0]
    bias = case.biases[t] if case.biases else None
    if bias is not None:
        live &= np.broadcast_to(bias, (case.query.shape[0], case.query.shape[1], 1, len(live)))[b, h, 0] != -np.inf
    return live


def _factors(case: Case, query: Array, rows: list[Array], dtype: Any) -> list[Array]:
    """Return the k + 1 matrices whose rows' elementwise products sum to scores."""
    if isinstance(case.weight, tuple):
        projections = [np.asarray(x, dtype=dtype) for x in case.weight]
        return [x @ projection for x, projection in zip((query, *rows), projections, strict=True)]
    if case.weight is None:
        return [query, *rows]
    widths = [row.shape[1] for row in rows]
    columns = np.indices(widths).reshape(len(rows), -1)
    flat = np.asarray(case.weight, dtype=dtype).reshape(query.shape[1], -1)
    return [query @ flat, *(row[:, index] for row, index in zip(rows, columns, strict=True))]


def _row_scores(factors: list[Array]) -> Array:
    tensor = factors[0]
    for row in factors[1:]:
        tensor = tensor[..., None, :] * row
    return tensor.sum(-1)


def _row_biases(case: Case, live: list[Array], b: int, h: int, dtype: Any) -> Array:
    queries, order = case.query.shape[2], len(live)
    total = np.zeros((queries, *(len(x) for x in live)), dtype)
    for t, alive in enumerate(live):
        part = np.where(alive, 0.0, -np.inf).astype(dtype)[None, :].repeat(queries, axis=0)
        given = case.biases[t] if case.biases else None
        if given is not None:
            part = part + np.broadcast_to(given, (*case.query.shape[:2], 1, len(alive)))[b, h].astype(dtype)
        total = total + part.reshape(queries, *(len(alive) if s == t else 1 for s in range(order)))
    offsets = case.key_offsets or (0,) * order
    return np.where(_hidden(case.spec.mask, case.query_offset, offsets, total.shape), -np.inf, total)


@cache
def _hidden(mask: Any, query_offset: int, key_offsets: tuple[int, ...], shape: tuple[int, ...]) -> Array:
    """Return which tuples each row may not see by the mask alone, (n, m1 .. mk), tuple by tuple."""
    hidden = np.zeros(shape, dtype=bool)
    for place in np.ndindex(*shape) if mask.kind != "full" else ():
        row, keys = place[0] + query_offset, [j + offset for j, offset in zip(place[1:], key_offsets, strict=True)]
        seen = all(key <= row for key in keys)
        if mask.kind == "window":
            seen = seen and all(key > row - w for key, w in zip(keys, mask.sizes, strict=True))
        if mask.kind == "ordered":
            seen = seen and all(a < b for a, b in pairwise(keys))
        hidden[place] = not seen
    return hidden


def value_products(case: Case, dtype: Any = np.longdouble) -> Array:
    """Return the value products of all tuples, (b, h, m1 .. mk, e) flattened over tuples; dead keys' values are 0."""
    batch, heads = case.query.shape[:2]
    share = heads // case.keys[0].shape[1]
    found = []
    for b in range(batch):
        for h in range(heads):
            tensor = np.ones(case.values[0].shape[3], dtype)
            for t, value in enumerate(case.values):
                live = _live_keys(case, t, b, h, h // share)
                tensor = tensor[..., None, :] * np.where(live[:, None], value[b, h // share], 0).astype(dtype)
            found.append(tensor.reshape(-1, tensor.shape[-1]))
    return np.stack(found).reshape(batch, heads, -1, found[0].shape[-1])


def weighted_answer(weights: Array, products: Array) -> tuple[Array, Array]:
    """Return output and the sum of weights (b, h, n); zeros for a row without weight."""
    total = weights.sum(-1)
    safe = np.where(total == 0, 1.0, total)
    return (weights @ products) / safe[..., None], total


def dense_exact(case: Case) -> tuple[Array, Array]:
    """Return output and lse of the exact method."""
    scores, bias = dense_scores(case)
    logits = np.where(bias == -np.inf, -np.inf, scores + bias)
    top = np.max(logits, axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(top == -np.inf, 0.0, top)
    output, total = weighted_answer(np.exp(logits - top), value_products(case))
    with np.errstate(divide="ignore"):
        return output, np.log(total) + top[..., 0]


def dense_polynomial(
    case: Case, coefficients: tuple[float, ...], centre: Array, dtype: Any = np.longdouble
) -> dict[str, Array]:
    """Return what a kernel of these coefficients and centres (b, h, n) is to return, computed in `dtype`.

    lse is centre + ln of the sum, biases being weights; `mean` the polynomial's mean over tuples; `condition` the sum
    of absolute monomial terms over the sum: by tuples, |P| at the sum of the absolute terms of score and centre.
    """
    scores, bias = dense_scores(case, dtype)
    absolute, _ = dense_scores(case, dtype, absolute=True)
    weights = np.where(bias == -np.inf, 0, np.exp(np.where(bias == -np.inf, 0, bias)))
    values = np.asarray(coefficients, dtype)
    shift = centre[..., None].astype(dtype)
    centred = scores - shift
    output, total = weighted_answer(
        weights * np.polynomial.polynomial.polyval(centred, values), value_products(case, dtype)
    )
    sizes = (weights * np.polynomial.polynomial.polyval(absolute + np.abs(shift), np.abs(values))).sum(-1)
    count = weights.sum(-1)
    safe, divisor = np.where(count == 0, 1, count), np.where(total == 0, 1, total)
    moments = np.stack([(weights * centred**m).sum(-1) / safe for m in range(len(coefficients))], axis=-1)
    lse = np.where(count == 0, -np.inf, centre + np.log(divisor))
    return {"output": output, "lse": lse, "moments": moments, "mean": total / safe, "condition": sizes / divisor}
