"""The oracle, apart from everything: float64, plain loops over tuples, no einsum, no kernel or planning code.

Every other result is judged against these functions, so they repeat the definitions and share nothing with the
library but the mask models that name them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import Any

import numpy as np

Array = Any
Weight = Array | tuple[Array, ...] | None


def live(mask: Any, i: int, js: Sequence[int]) -> bool:
    """Whether a query at position `i` may attend to the tuple of keys at positions `js` (index + offset each)."""
    kind = "full" if mask is None else mask.kind
    if kind == "full":
        return True
    if kind == "causal":
        return all(j <= i for j in js)
    if kind == "window":
        return all(i - w < j <= i for j, w in zip(js, mask.sizes, strict=True))
    if kind == "ordered":
        return all(a < b for a, b in pairwise(js)) and js[-1] <= i
    raise AssertionError(f"no definition for mask {kind!r}")


def _may_attend(key_masks: Any, b: int, g: int, js: Sequence[int]) -> bool:
    for t, j in enumerate(js):
        allowed = None if key_masks is None else key_masks[t]
        if allowed is None:
            continue
        allowed = np.asarray(allowed)
        if allowed.ndim == 2:  # (b, m) stands for (b, 1, m)
            allowed = allowed[:, None, :]
        if not allowed[b, g if allowed.shape[1] > 1 else 0, j]:
            return False
    return True


def _bias(biases: Any, b: int, h: int, i: int, js: Sequence[int]) -> float:
    total = 0.0
    for t, j in enumerate(js):
        bias = None if biases is None else biases[t]
        if bias is None:
            continue
        at = [index if size > 1 else 0 for index, size in zip((b, h, i), bias.shape[:3], strict=True)]
        if bias[at[0], at[1], at[2], j] == -np.inf:
            return -np.inf
        total += float(bias[at[0], at[1], at[2], j])
    return total


def _dot(query: Array, rows: Sequence[Array], weight: Weight) -> float:
    """The multilinear form of one query row and one key row per mode."""
    if weight is None:
        terms = np.array(query, dtype=np.float64)
        for row in rows:
            terms = terms * row
        return float(np.sum(terms))
    if isinstance(weight, tuple):
        factors = [np.asarray(factor, dtype=np.float64) for factor in weight]
        return _dot(query @ factors[0], [row @ u for row, u in zip(rows, factors[1:], strict=True)], None)
    contracted = np.asarray(weight, dtype=np.float64)
    for row in (query, *rows):  # the first axis goes each time
        contracted = np.tensordot(row, contracted, axes=(0, 0))
    return float(contracted)


def _rows(query: Array, keys: Sequence[Array]) -> Iterator[tuple[int, int, int, int]]:
    batch, heads, queries, _ = query.shape
    share = heads // keys[0].shape[1]
    for b, h, i in product(range(batch), range(heads), range(queries)):
        yield b, h, h // share, i


def oracle_scores(
    query: Array,
    keys: Sequence[Array],
    *,
    scale: float,
    mask: Any = None,
    weight: Weight = None,
    biases: Any = None,
    key_masks: Any = None,
    query_offset: int | None = 0,
    key_offsets: Sequence[int] | None = None,
) -> Array:
    """Return every score, -inf where a tuple may not be attended to.

    Shapes:  query (b, h, n, d); keys[t] (b, g, m_t, d_t); result (b, h, n, m1, .., mk) in float64.
    """
    query = np.asarray(query, dtype=np.float64)
    keys = [np.asarray(key, dtype=np.float64) for key in keys]
    lengths = [key.shape[2] for key in keys]
    offsets = key_offsets or [0] * len(keys)
    scores = np.full((*query.shape[:3], *lengths), -np.inf)
    for b, h, g, i in _rows(query, keys):
        for js in product(*(range(m) for m in lengths)):
            positions = [j + offset for j, offset in zip(js, offsets, strict=True)]
            if not live(mask, i + (query_offset or 0), positions) or not _may_attend(key_masks, b, g, js):
                continue
            extra = _bias(biases, b, h, i, js)
            if extra == -np.inf:
                continue
            rows = [key[b, g, j] for key, j in zip(keys, js, strict=True)]
            scores[(b, h, i, *js)] = scale * _dot(query[b, h, i], rows, weight) + extra
    return scores


def oracle_attention(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    scale: float,
    mask: Any = None,
    weight: Weight = None,
    biases: Any = None,
    key_masks: Any = None,
    query_offset: int | None = 0,
    key_offsets: Sequence[int] | None = None,
    transform: Callable[[float], float] | None = None,
) -> tuple[Array, Array]:
    """Return output (b, h, n, e) and lse (b, h, n), by their definitions, in float64.

    A masked tuple is never looked at, whatever its keys and values hold; a query with nothing to attend to gives zeros
    and -inf. `transform` stands in for exp (the polynomial method); exp itself is computed about the row's maximum.
    """
    with np.errstate(all="ignore"):
        scores = oracle_scores(
            query,
            keys,
            scale=scale,
            mask=mask,
            weight=weight,
            biases=biases,
            key_masks=key_masks,
            query_offset=query_offset,
            key_offsets=key_offsets,
        )
        values = [np.asarray(value, dtype=np.float64) for value in values]
        output = np.zeros((*scores.shape[:3], values[0].shape[-1]))
        lse = np.full(scores.shape[:3], -np.inf)
        for b, h, g, i in _rows(np.asarray(query), values):
            row = scores[b, h, i]
            tuples = [js for js in np.ndindex(row.shape) if row[js] != -np.inf]
            if tuples:
                output[b, h, i], lse[b, h, i] = _attend_row(row, tuples, [v[b, g] for v in values], transform)
    return output, lse


def _attend_row(
    row: Array, tuples: list[tuple[int, ...]], values: list[Array], transform: Callable[[float], float] | None
) -> tuple[Array, float]:
    top = max((row[js] for js in tuples), key=lambda x: np.inf if np.isnan(x) else x) if transform is None else 0.0
    weights = [float(np.exp(row[js] - top)) if transform is None else transform(float(row[js])) for js in tuples]
    total = float(np.sum(weights))
    summed = np.zeros(values[0].shape[-1])
    for js, weight in zip(tuples, weights, strict=True):
        term = np.full(summed.shape, weight)
        for value, j in zip(values, js, strict=True):
            term = term * value[j]
        summed = summed + term
    return summed / total, float(np.log(total) + top)
