"""Monomials of the columns of a factor: the features whose inner product is a polynomial of the score.

Graded table, features first: the monomials of degree m whose first variable is l are x_l times one contiguous slice of
those of degree m - 1, so each entry costs one multiplication and nothing is gathered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Any

import numpy as np

Array = Any


@dataclass(frozen=True, slots=True)
class FeatureTable:
    """Where each monomial of `width` variables up to `degree` lies: blocks by degree, inside them by first variable."""

    width: int
    degree: int
    offsets: tuple[int, ...]
    """First row of each degree, then the number of features."""
    starts: tuple[tuple[int, ...], ...]
    """starts[m][l]: position inside degree m of the first monomial whose first variable is l; one more closes it."""

    @property
    def features(self) -> int:
        """r = C(width + degree, degree)."""
        return self.offsets[-1]

    def rows(self, degree: int) -> slice:
        """Return the rows of one degree."""
        return slice(self.offsets[degree], self.offsets[degree + 1])


@lru_cache(maxsize=64)
def feature_table(width: int, degree: int) -> FeatureTable:
    """Return the table of all monomials of `width` variables up to `degree`."""
    starts: list[tuple[int, ...]] = [(0,) * width + (1,)]
    for m in range(1, degree + 1):
        sizes = [comb(width - first + m - 2, m - 1) for first in range(width)]
        positions = [0]
        for size in sizes:
            positions.append(positions[-1] + size)
        starts.append(tuple(positions))
    offsets = [0]
    for m in range(degree + 1):
        offsets.append(offsets[-1] + comb(width + m - 1, m))
    return FeatureTable(width, degree, tuple(offsets), tuple(starts))


@lru_cache(maxsize=64)
def parents(table: FeatureTable, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each monomial of a degree >= 1, the row of its parent inside degree - 1 and its first variable.

    Shapes:  two arrays (r_m,), int64, read-only.
    """
    starts, positions = table.starts[degree - 1], table.starts[degree]
    sizes = np.diff(positions)
    above = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=False)])
    variables = np.repeat(np.arange(table.width), sizes)
    for array in (above, variables):
        array.flags.writeable = False
    return above, variables


@lru_cache(maxsize=64)
def multinomials(table: FeatureTable) -> np.ndarray:
    """Return |a|! / a! of every monomial: how often it occurs when a power of the score is multiplied out.

    Shapes:  (r,), float64, read-only.
    """
    counts = [np.ones(1)]
    leading = np.zeros(1)  # exponent of each monomial's first variable
    for m in range(1, table.degree + 1):
        previous, parts, firsts = table.starts[m - 1], [], []
        for first in range(table.width):
            repeated = previous[first + 1] - previous[first] if m > 1 else 0
            exponent = np.ones(len(counts[-1]) - previous[first])
            exponent[:repeated] = leading[previous[first] : previous[first + 1]] + 1.0 if m > 1 else 1.0
            firsts.append(exponent)
            parts.append(counts[-1][previous[first] :] * m / exponent)
        counts.append(np.concatenate(parts))
        leading = np.concatenate(firsts)
    result = np.concatenate(counts)
    result.flags.writeable = False
    return result


def polynomial_features(xp: Any, table: FeatureTable, columns: Array) -> Array:
    """Return every monomial of the columns up to the table's degree, features first.

    Shapes:  columns (width, c); output (r, c).
    Cost:    r c multiplications; no gather.
    Source:  Alman & Song, arXiv 2310.04064, Section 4, with the rank C(width + degree, degree); layout is ours.
    """
    block = xp.ones_like(columns[:1, :])
    blocks = [block]
    for m in range(1, table.degree + 1):
        starts = table.starts[m - 1]
        parts = [columns[first : first + 1, :] * block[starts[first] :, :] for first in range(table.width)]
        block = xp.concat(parts, axis=0)
        blocks.append(block)
    return xp.concat(blocks, axis=0)


def gathered_features(xp: Any, table: FeatureTable, columns: Array, indices: list[tuple[Array, Array]]) -> Array:
    """Return what `polynomial_features` does by gathering: faster for a few columns, slower for many.

    Args:  indices: `parents` of the degrees 1, 2, .. as arrays of the columns' device.
    """
    block = xp.ones_like(columns[:1, :])
    blocks = [block]
    for above, variables in indices[: table.degree]:
        block = xp.take(block, above, axis=0) * xp.take(columns, variables, axis=0)
        blocks.append(block)
    return xp.concat(blocks, axis=0)


def feature_adjoint(xp: Any, table: FeatureTable, columns: Array, features: Array, gradient: Array) -> Array:
    """Return the gradient with respect to the columns, given the one with respect to the features.

    Shapes:  columns and output (width, c); features and gradient (r, c).
    Cost:    2 r c multiplications; each block is visited once, highest degree first.
    """
    if table.degree == 0:
        return xp.zeros_like(columns)
    total = [xp.zeros_like(columns[0, :])] * table.width
    block = gradient[table.rows(table.degree), :]
    for m in range(table.degree, 1, -1):
        parents = features[table.rows(m - 1), :]
        starts, positions = table.starts[m - 1], table.starts[m]
        passed = None  # gradient of the parents from `first` on; it grows towards the front
        for first in range(table.width - 1, -1, -1):
            own = block[positions[first] : positions[first + 1], :]
            total[first] = total[first] + xp.sum(own * parents[starts[first] :, :], axis=0)
            scaled = columns[first : first + 1, :] * own
            passed = scaled if passed is None else _prepend(xp, scaled, passed)
        block = gradient[table.rows(m - 1), :] + passed
    return xp.stack(total, axis=0) + block


def _prepend(xp: Any, longer: Array, shorter: Array) -> Array:
    """Add two blocks that end together."""
    head = longer.shape[0] - shorter.shape[0]
    return xp.concat([longer[:head, :], longer[head:, :] + shorter], axis=0)
