"""The features of the polynomial method as gathers that XLA compiles quickly, in the order of korder's tables."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np

Array = Any
Starts = tuple[tuple[int, ...], ...]
"""Per degree m the position of the first monomial of each first variable, then the number of monomials of degree m."""


def monomials(starts: Starts, columns: Array) -> Array:
    """Return every monomial of the columns up to a degree, features first.

    Shapes:  columns (w, c); output (r, c).
    Cost:    r multiplications a token, and two gathers a degree: a slice for every variable would take XLA minutes to
             compile, a loop over them twice the time backward.
    """
    block = jnp.ones_like(columns[:1])
    blocks = [block]
    for variables, above in _parents(starts):
        block = columns[variables] * block[above]
        blocks.append(block)
    return jnp.concatenate(blocks)


@lru_cache(maxsize=64)
def _parents(starts: Starts) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return, per degree from 1 on, the first variable of each monomial, and the monomial that it multiplies."""
    found = []
    for before, here in pairwise(starts):
        sizes = np.diff(here)
        above = [np.arange(start, start + size) for start, size in zip(before[:-1], sizes, strict=True)]
        found.append((np.repeat(np.arange(len(sizes)), sizes), np.concatenate(above)))
    return found


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
