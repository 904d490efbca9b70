"""The operands of a run before they reach a backend, and the arithmetic that sets the size of their scores."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from korder.errors import SpecError
from korder.problem import Shapes

FloatArray = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Inputs:
    """NumPy operands as `korder.attend` takes them."""

    query: FloatArray
    keys: tuple[FloatArray, ...]
    values: tuple[FloatArray, ...]
    weight: FloatArray | tuple[FloatArray, ...] | None = None
    biases: tuple[FloatArray | None, ...] | None = None
    key_masks: tuple[NDArray[np.bool_] | None, ...] | None = None

    def optional(self) -> dict[str, Any]:
        """Return the operands that are given by keyword, those present."""
        given = {"weight": self.weight, "biases": self.biases, "key_masks": self.key_masks}
        return {name: value for name, value in given.items() if value is not None}

    def outline(self) -> Outline:
        """Return the shapes and the dtype."""
        weight = self.weight
        return Outline(
            Shapes(
                query=self.query.shape,
                keys=tuple(key.shape for key in self.keys),
                values=tuple(value.shape for value in self.values),
                weight=tuple(factor.shape for factor in weight) if isinstance(weight, tuple) else _shape(weight),
                biases=tuple(map(_shape, self.biases or ())),
                key_masks=tuple(map(_shape, self.key_masks or ())),
            ),
            self.query.dtype.name,
        )


@dataclass(frozen=True, slots=True)
class Outline:
    """What planning needs to know of the operands: shapes and dtype, no arrays."""

    shapes: Shapes
    dtype: str


def _shape(array: FloatArray | None) -> tuple[int, ...] | None:
    return None if array is None else array.shape


def score_rms(query: FloatArray, keys: tuple[FloatArray, ...], factor: float) -> float:
    """Return the root mean square of every score, over all queries, tuples and heads, without forming one of them.

    Shapes:   query (.., h, n, d); keys[t] (.., g, m_t, d), or all without the leading axes.
    Cost:     O((n + m1 + .. + mk) d^2).
    Numerics: float64.
    Source:   the mean of q_i^T (G_1 o .. o G_k) q_i with G_t the Gram matrix of mode t over m_t.
    """
    gram: FloatArray = np.ones((query.shape[-1],) * 2)
    for key in keys:
        wide = key.astype(np.float64)
        gram = gram * _per_query_head(np.swapaxes(wide, -1, -2) @ wide / max(key.shape[-2], 1), query)
    wide = query.astype(np.float64)
    return abs(factor) * sqrt(max(float(np.mean(np.sum((wide @ gram) * wide, axis=-1))), 0.0))


def score_bound(query: FloatArray, keys: tuple[FloatArray, ...], factor: float) -> float:
    """Return a bound on the size of every score: |factor| max_i sum_l |q_il| prod_t max_j |k_t,jl|.

    Shapes:  query (.., h, n, d); keys[t] (.., g, m_t, d), or all without the leading axes.
    """
    reach: FloatArray = np.ones((1, query.shape[-1]))
    for key in keys:
        reach = reach * _per_query_head(np.max(np.abs(key), axis=-2, keepdims=True, initial=0.0), query)
    return abs(factor) * float(np.max(np.sum(np.abs(query) * reach, axis=-1, dtype=np.float64), initial=0.0))


def _per_query_head(of_keys: FloatArray, query: FloatArray) -> FloatArray:
    if query.ndim < 3 or of_keys.shape[-3] == query.shape[-3]:
        return of_keys
    return np.repeat(of_keys, query.shape[-3] // of_keys.shape[-3], axis=-3)


def rescaled(query: FloatArray, present: float, wanted: float, key: str) -> FloatArray:
    """Return the query times wanted / present, in its own dtype; unchanged where all scores are zero.

    Args:
        query: What is rescaled.
        present: The size of the scores as it is.
        wanted: The size as it is to be.
        key: The key of the run file that asks for it.

    Raises: SpecError where the query does not fit into its dtype.
    """
    if present == 0.0:
        return query
    with np.errstate(over="ignore", invalid="ignore"):
        scaled: FloatArray = (query * (wanted / present)).astype(query.dtype)
    if np.isfinite(scaled).all():
        return scaled
    raise SpecError(
        f"{key} or attention.scale makes a query that {query.dtype.name} cannot hold.",
        code="data-overflow",
        expected=f"entries of the query up to {np.finfo(query.dtype).max:.3g}",
        got=f"{key} = {wanted:g}, where the scores are {present:.3g} with attention.scale as it is",
        hint=f"set a smaller {key}, a larger attention.scale, or a wider data.dtype.",
    )
