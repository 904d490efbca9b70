"""The features of the polynomial method as loops that XLA compiles quickly, in the order of korder's tables."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from korder_jax.arrays import filled

Array = Any
Starts = tuple[tuple[int, ...], ...]
"""Per degree m the position of the first monomial of each first variable, then the number of monomials of degree m."""


def monomials(starts: Starts, columns: Array) -> Array:
    """Return every monomial of the columns up to a degree, features first.

    The monomials of degree m whose first variable is l are x_l times those of degree m - 1 from `starts[m - 1][l]` on.
    A loop over l, last first, multiplies all of them: what is written too early lies before the place of l, where the
    steps to come write.

    Shapes:  columns (w, c); output (r, c).
    Cost:    w r_m-1 = about m r_m multiplications for degree m, one loop each; a slice for every variable would cost
             r_m, and XLA minutes to compile.
    """
    block = jnp.ones_like(columns[:1])
    blocks = [block]
    for before, here in pairwise(starts):
        places = [position - start for position, start in zip(here[:-1], before[:-1], strict=True)]
        block = _products(columns, block, jnp.asarray(places, jnp.int32), here[-1])
        blocks.append(block)
    return jnp.concatenate(blocks)


def _products(columns: Array, parents: Array, places: Array, count: int) -> Array:
    def put(block: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        column, place = step
        return lax.dynamic_update_slice_in_dim(block, column[None, :] * parents, place, 0), None

    empty = filled((count, columns.shape[1]), 0.0, columns)
    return lax.scan(put, empty, (columns, places), reverse=True)[0]


@lru_cache(maxsize=64)
def multiplicities(starts: Starts) -> np.ndarray[Any, Any]:
    """Return |a|! / a! of every monomial, how often it occurs in a power of the score: (r,) float64."""
    width = len(starts[0]) - 1
    counts, leading = [np.ones(1)], np.zeros(1)  # leading: exponent of each monomial's first variable
    for m, (before, here) in enumerate(pairwise(starts), start=1):
        parts, exponents = [], []
        for first in range(width):
            count = here[first + 1] - here[first]
            exponent = np.ones(count)
            own = before[first + 1] - before[first] if m > 1 else 0
            exponent[:own] += leading[before[first] : before[first] + own]
            parts.append(counts[-1][before[first] :] * m / exponent)
            exponents.append(exponent)
        counts.append(np.concatenate(parts))
        leading = np.concatenate(exponents)
    return np.concatenate(counts)
