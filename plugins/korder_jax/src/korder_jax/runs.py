"""Features in runs of one length, each of one degree: what XLA sums in one product, where a slice a degree is many."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import comb
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any


@dataclass(frozen=True, slots=True)
class Runs:
    """How the features (r, ..) of all degrees lie in runs (g, l, ..), every degree filled up with zeros."""

    index: np.ndarray[Any, Any]
    """(g, l): the feature at each place, r where there is none."""
    degrees: np.ndarray[Any, Any]
    """(g,): the degree of each run, ascending."""

    @classmethod
    def of(cls, offsets: tuple[int, ...], length: int) -> Runs:
        """Return the runs of at most `length` features of degrees that begin at `offsets`, which the number closes."""
        length = min(length, int(max(np.diff(offsets))))
        blocks, degrees = [], []
        for degree, (first, stop) in enumerate(pairwise(offsets)):
            count = -(-(stop - first) // length)
            block = np.full((count, length), offsets[-1])
            block.reshape(-1)[: stop - first] = np.arange(first, stop)
            blocks.append(block)
            degrees += [degree] * count
        return cls(np.concatenate(blocks), np.asarray(degrees))

    @property
    def highest(self) -> int:
        """The highest degree."""
        return int(self.degrees[-1])

    def split(self, x: Array) -> Array:
        """(r, ..) to (g, l, ..)."""
        return jnp.concatenate([x, jnp.zeros_like(x[:1])])[self.index]

    def by_degree(self, x: Array) -> Array:
        """Return the sums of (g, ..) over the runs of each degree, (degree + 1, ..)."""
        return jax.ops.segment_sum(x, self.degrees, self.highest + 1, indices_are_sorted=True)

    def largest(self, x: Array) -> Array:
        """Return the largest finite entry in absolute value of (g, l, ..) in each degree; 1 in place of 0."""
        sizes = jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0).reshape(x.shape[0], -1)
        found = jax.ops.segment_max(jnp.max(sizes, axis=1), self.degrees, self.highest + 1, indices_are_sorted=True)
        return jnp.where(found == 0.0, 1.0, found)


def shift_matrix(shift: Array, degree: int) -> Array:
    """Return M (m, s, c) with (x + shift)^m = sum over s of M[m, s] x^s for shift (c,), m up to `degree`."""
    m, s = np.indices((degree + 1, degree + 1))
    binomials = np.array([[comb(i, j) for j in range(degree + 1)] for i in range(degree + 1)], float)
    powers = jnp.power(shift, jnp.asarray(np.maximum(m - s, 0))[:, :, None])
    return jnp.where(s[:, :, None] <= m[:, :, None], binomials[:, :, None] * powers, 0.0)
