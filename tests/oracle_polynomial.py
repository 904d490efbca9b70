"""The polynomial method by its definition, dense and in any dtype: explicit scores, P of centred ones, plain sums.

Shares no code with kernels: scores are built by broadcasting over tuples, -inf where a tuple may not be attended to.
"""

from __future__ import annotations

from collections.abc import Callable
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


def dense_gradients(
    case: Case,
    weight: Callable[[Array], Array],
    slope: Callable[[Array], Array],
    centre: Array,
    grads: tuple[Array, Array | None],
    dtype: Any = np.longdouble,
) -> dict[str, Array]:
    """Return gradients by operand, from the weight of a tuple and its derivative by the score, both of x - centre.

    With the derivative of the weight they are those of the function computed; with the weight itself in its place they
    are softmax's with other weights.

    Args:
        case: The problem.
        weight: Of an array of centred scores.
        slope: The same.
        centre: (b, h, n).
        grads: Those of output (b, h, n, e) and lse (b, h, n); None counts as zeros.
        dtype: What all is computed in.
    """
    scores, bias = dense_scores(case, dtype)
    centred, products = scores - centre[..., None].astype(dtype), value_products(case, dtype)
    open_weights = np.where(bias == -np.inf, 0, np.exp(np.where(bias == -np.inf, 0, bias)))
    output, total = weighted_answer(open_weights * weight(centred), products)
    safe = np.where(total == 0, 1, total)[..., None]
    shares, slopes = open_weights * weight(centred) / safe, open_weights * slope(centred) / safe
    upstream = grads[0].astype(dtype)
    inner = upstream @ np.swapaxes(products, -1, -2) - (upstream * output).sum(-1)[..., None]
    if grads[1] is not None:
        inner = inner + grads[1].astype(dtype)[..., None]
    scale = np.asarray(case.spec.score_factor(case.query.shape[3]), dtype)
    found: dict[str, Array] = {}
    for b in range(case.query.shape[0]):
        for h in range(case.query.shape[1]):
            _add_scores(found, case, b, h, scale * slopes[b, h] * inner[b, h], dtype)
            _add_values(found, case, b, h, (shares[b, h], upstream[b, h], inner[b, h]), dtype)
    return found


def _add(found: dict[str, Array], name: str, like: Array, place: Any, part: Array) -> None:
    found.setdefault(name, np.zeros(like.shape, part.dtype))[place] += part


def _add_scores(found: dict[str, Array], case: Case, b: int, h: int, gradient: Array, dtype: Any) -> None:
    """Add one head's gradients of query, keys and weight, given that of its scores (n, m1 .. mk)."""
    order, g = len(case.keys), h // (case.query.shape[1] // case.keys[0].shape[1])
    live = [_live_keys(case, t, b, h, g) for t in range(order)]
    operands = [case.query[b, h].astype(dtype)]
    operands += [np.where(x[:, None], key[b, g], 0).astype(dtype) for x, key in zip(live, case.keys, strict=True)]
    factors = _factors(case, operands[0], operands[1:], dtype)
    tensor = gradient.reshape(-1, *(len(x) for x in live))
    names = [("query", case.query, h), *((f"keys[{t}]", key, g) for t, key in enumerate(case.keys))]
    for t, (name, like, head) in enumerate(names):
        own = _without(tensor, factors, t)
        if isinstance(case.weight, tuple):
            _add(found, f"weight[{t}]", case.weight[t], ..., operands[t].T @ own)
            own = own @ case.weight[t].T.astype(dtype)
        elif case.weight is not None:
            columns = np.indices(case.weight.shape[1:]).reshape(order, -1)
            if t == 0:
                _add(found, "weight", case.weight, ..., (operands[0].T @ own).reshape(case.weight.shape))
                own = own @ case.weight.reshape(len(case.weight), -1).T.astype(dtype)
            else:
                picked = columns[t - 1][:, None] == np.arange(like.shape[3])
                own = own @ picked.astype(dtype)
        _add(found, name, like, (b, head), own if t == 0 else np.where(live[t - 1][:, None], own, 0))


def _add_values(found: dict[str, Array], case: Case, b: int, h: int, parts: tuple[Array, ...], dtype: Any) -> None:
    """Add one head's gradients of values and biases, given shares, upstream gradient, and that of the logits' inner."""
    shares, upstream, inner = parts
    order, g = len(case.keys), h // (case.query.shape[1] // case.keys[0].shape[1])
    live = [_live_keys(case, t, b, h, g) for t in range(order)]
    rows = [np.where(x[:, None], value[b, g], 0).astype(dtype) for x, value in zip(live, case.values, strict=True)]
    shape = (-1, *(len(x) for x in live))
    for t in range(order):
        own = _without(shares.reshape(shape), [upstream, *rows], t + 1)
        _add(found, f"values[{t}]", case.values[t], (b, g), np.where(live[t][:, None], own, 0))
        bias = case.biases[t] if case.biases else None
        if bias is not None:
            others = tuple(axis for axis in range(order + 1) if axis != t + 1)
            place = (b if bias.shape[0] > 1 else 0, h if bias.shape[1] > 1 else 0, 0)
            _add(found, f"biases[{t}]", bias, place, (shares * inner).reshape(shape).sum(axis=others))


def _without(tensor: Array, factors: list[Array], left: int) -> Array:
    """Return the sum over all axes but one of a tensor times the rows of the factors of the other axes."""
    axes = "iuvw"[: tensor.ndim]
    others = [s for s in range(tensor.ndim) if s != left]
    subscripts = ",".join([axes, *(f"{axes[s]}c" for s in others)]) + f"->{axes[left]}c"
    return np.einsum(subscripts, tensor, *(factors[s] for s in others))
