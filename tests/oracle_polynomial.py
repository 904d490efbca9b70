"""The polynomial method by its definition, dense and in float64: explicit scores, P of the centred ones, plain sums.

Shares no code with kernels: scores are built by broadcasting over tuples, -inf where a tuple may not be attended to.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.problems import Case

Array = Any


def dense_scores(case: Case) -> tuple[Array, Array]:
    """Return scores without biases and the sum of biases, each (b, h, n, m1 .. mk) flattened over tuples.

    The bias is -inf where a tuple may not be attended to; masked keys are never looked at.
    """
    order, (batch, heads, queries, width) = len(case.keys), case.query.shape
    share = heads // case.keys[0].shape[1]
    lengths = tuple(key.shape[2] for key in case.keys)
    scores, bias = (np.zeros((batch, heads, queries, int(np.prod(lengths)))) for _ in range(2))
    for b in range(batch):
        for h in range(heads):
            live = [_live_keys(case, t, b, h, h // share) for t in range(order)]
            keys = [key[b, h // share] for key in case.keys]
            rows = [np.where(x[:, None], key, 0).astype(float) for x, key in zip(live, keys, strict=True)]
            scores[b, h] = _row_scores(case, case.query[b, h].astype(float), rows).reshape(queries, -1)
            bias[b, h] = _row_biases(case, live, b, h).reshape(queries, -1)
    return scores * case.spec.score_factor(width), bias


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


def _row_scores(case: Case, query: Array, rows: list[Array]) -> Array:
    if isinstance(case.weight, tuple):
        factors = [np.asarray(x, dtype=float) for x in case.weight]
        query, rows = query @ factors[0], [row @ x for row, x in zip(rows, factors[1:], strict=True)]
    elif case.weight is not None:
        result = np.tensordot(query, np.asarray(case.weight, dtype=float), axes=(1, 0))
        for row in rows:  # each contraction moves its tokens to the end
            result = np.tensordot(result, row, axes=(1, 1))
        return result
    tensor = query
    for row in rows:
        tensor = tensor[..., None, :] * row
    return tensor.sum(-1)


def _row_biases(case: Case, live: list[Array], b: int, h: int) -> Array:
    queries, order = case.query.shape[2], len(live)
    total = np.zeros((queries, *(len(x) for x in live)))
    causal = case.spec.mask.kind == "causal"
    for t, alive in enumerate(live):
        part = np.where(alive, 0.0, -np.inf)[None, :].repeat(queries, axis=0)
        given = case.biases[t] if case.biases else None
        if given is not None:
            part = part + np.broadcast_to(given, (*case.query.shape[:2], 1, len(alive)))[b, h].astype(float)
        if causal:
            offset = case.key_offsets[t] if case.key_offsets else 0
            later = np.arange(len(alive))[None, :] + offset > np.arange(queries)[:, None] + case.query_offset
            part = np.where(later, -np.inf, part)
        total = total + part.reshape(queries, *(len(alive) if s == t else 1 for s in range(order)))
    return total


def value_products(case: Case) -> Array:
    """Return the value products of all tuples, (b, h, m1 .. mk, e) flattened over tuples; dead keys' values are 0."""
    batch, heads = case.query.shape[:2]
    share = heads // case.keys[0].shape[1]
    found = []
    for b in range(batch):
        for h in range(heads):
            tensor = np.ones(case.values[0].shape[3])
            for t, value in enumerate(case.values):
                live = _live_keys(case, t, b, h, h // share)
                tensor = tensor[..., None, :] * np.where(live[:, None], value[b, h // share], 0).astype(float)
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


def dense_polynomial(case: Case, coefficients: tuple[float, ...], centre: Array) -> dict[str, Array]:
    """Return what a kernel of these coefficients and centres (b, h, n) returns: output, lse, moments, magnitude.

    lse is centre + ln of the sum, with biases as weights; moments and the magnitude follow `KernelOutput`.
    """
    scores, bias = dense_scores(case)
    weights = np.where(bias == -np.inf, 0.0, np.exp(np.where(bias == -np.inf, 0.0, bias)))
    centred = scores - centre[..., None]
    values = np.polynomial.polynomial.polyval(centred, np.asarray(coefficients))
    output, total = weighted_answer(weights * values, value_products(case))
    count = weights.sum(-1)
    safe = np.where(count == 0, 1.0, count)
    powers = range(len(coefficients))
    moments = np.stack([(weights * centred**m).sum(-1) / safe for m in powers], axis=-1)
    with np.errstate(divide="ignore"):
        lse = np.where(count == 0, -np.inf, centre + np.log(np.where(count == 0, 1.0, total)))
    return {"output": output, "lse": lse, "moments": moments, "mean": total / safe, "live": count > 0}
