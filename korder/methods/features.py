"""Monomials of the columns of a factor: the features whose inner product is a polynomial of the score.

Graded table, features first: the monomials of degree m whose first variable is l are x_l times some of those of degree
m - 1. Of all monomials these are one contiguous slice, so each entry costs one multiplication and nothing is gathered;
a pruned table gathers the parents of those that it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import device

from korder.planning.plan import PolynomialPlan, Pruning
from korder.planning.pruning import kept_monomials

Array = Any
Index = Callable[[np.ndarray, Any], Array]
"""Gives positions as an array of a device."""


class Children(NamedTuple):
    """The monomials of one degree that are a column times some of those of the degree below."""

    column: int
    parents: slice | np.ndarray
    """Which of those of the degree below: the last ones, or int64 positions in ascending order."""
    rows: slice
    """Where they are inside their own degree."""
    places: np.ndarray | None = None
    """For the last ones of the degree below, where their child is among `rows`, behind it if they have none; None if
    that is where they are themselves."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureTable:
    """Where each monomial of `width` variables up to `degree` lies: blocks by degree, inside them by first variable."""

    width: int
    degree: int
    offsets: tuple[int, ...]
    """First row of each degree, then the number of features."""
    starts: tuple[tuple[int, ...], ...]
    """starts[m][l]: position inside degree m of the first monomial whose first variable is l; one more closes it."""
    children: tuple[tuple[Children, ...], ...]
    """Per degree, by first variable; those of a variable that has none are left out."""
    pruned: bool = False
    """Whether monomials are left out, so that parents have to be gathered."""

    @property
    def features(self) -> int:
        """The number of monomials: r = C(width + degree, degree), or those that a pruned table keeps."""
        return self.offsets[-1]

    def rows(self, degree: int) -> slice:
        """Return the rows of one degree."""
        return slice(self.offsets[degree], self.offsets[degree + 1])


def table_of(width: int, polynomial: PolynomialPlan) -> FeatureTable:
    """Return the table of the monomials that a plan keeps."""
    pruning = polynomial.pruning
    return feature_table(width, polynomial.degree) if pruning is None else pruned_table(pruning)


@lru_cache(maxsize=64)
def feature_table(width: int, degree: int) -> FeatureTable:
    """Return the table of all monomials of `width` variables up to `degree`."""
    starts: list[tuple[int, ...]] = [(0,) * width + (1,)]
    children: list[tuple[Children, ...]] = [()]
    for m in range(1, degree + 1):
        sizes = [comb(width - first + m - 2, m - 1) for first in range(width)]
        positions = [0]
        for size in sizes:
            positions.append(positions[-1] + size)
        parents = starts[-1]
        starts.append(tuple(positions))
        children.append(
            tuple(
                Children(first, slice(parents[first], None), slice(*positions[first : first + 2]))
                for first in range(width)
            )
        )
    offsets = [0]
    for m in range(degree + 1):
        offsets.append(offsets[-1] + comb(width + m - 1, m))
    return FeatureTable(width, degree, tuple(offsets), tuple(starts), tuple(children))


@lru_cache(maxsize=64)
def pruned_table(pruning: Pruning) -> FeatureTable:
    """Return the table of the monomials that a pruning keeps; its variables are columns, least important first."""
    kept, width = kept_monomials(pruning), len(pruning.bounds)
    assert kept is not None, "a plan that keeps all monomials has no pruning"
    starts: list[tuple[int, ...]] = [(0,) * width + (1,)]
    children: list[tuple[Children, ...]] = [()]
    for variables, above in zip(kept.variables[1:], kept.parents[1:], strict=True):
        edges, before = np.searchsorted(variables, np.arange(width + 1)), starts[-1]
        found = []
        for variable in np.unique(variables):
            rows, first = slice(int(edges[variable]), int(edges[variable + 1])), before[variable]
            count = rows.stop - rows.start
            if count == before[-1] - first:
                found.append(Children(kept.columns[variable], slice(first, None), rows))
                continue
            places = np.full(before[-1] - first, count)
            places[above[rows] - first] = np.arange(count)
            found.append(Children(kept.columns[variable], above[rows], rows, places))
        starts.append(tuple(int(edge) for edge in edges))
        children.append(tuple(found))
    offsets = (0, *(int(x) for x in np.cumsum(kept.counts)))
    return FeatureTable(width, pruning.degree, offsets, tuple(starts), tuple(children), pruned=True)


@lru_cache(maxsize=64)
def parents(table: FeatureTable, degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, for each monomial of a degree >= 1, the row of its parent inside degree - 1 and its first column.

    Shapes:  two arrays (r_m,), int64, read-only.
    """
    places = np.arange(table.offsets[degree] - table.offsets[degree - 1])
    groups = table.children[degree]
    above = np.concatenate([places[group.parents] for group in groups])
    columns = np.concatenate([np.full(group.rows.stop - group.rows.start, group.column) for group in groups])
    for array in (above, columns):
        array.flags.writeable = False
    return above, columns


@lru_cache(maxsize=64)
def multinomials(table: FeatureTable) -> np.ndarray:
    """Return |a|! / a! of every monomial: how often it occurs when a power of the score is multiplied out.

    Shapes:  (r,), float64, read-only.
    """
    counts = [np.ones(1)]
    leading, exponents = np.full(1, -1), np.zeros(1)  # each monomial's first column, and its exponent
    for m in range(1, table.degree + 1):
        above, columns = parents(table, m)
        exponents = np.where(columns == leading[above], exponents[above], 0.0) + 1.0
        leading = columns
        counts.append(counts[-1][above] * m / exponents)
    result = np.concatenate(counts)
    result.flags.writeable = False
    return result


def index_of(xp: Any) -> Index:
    """Return what makes positions arrays of a namespace, anew each time."""
    # a copy, because not every library takes memory that it may not write to
    return lambda positions, where: xp.asarray(positions.copy(), device=where)


def polynomial_features(xp: Any, table: FeatureTable, columns: Array) -> Array:
    """Return every monomial of the columns that the table has, features first.

    Shapes:  columns (width, c); output (r, c).
    Cost:    r c multiplications; no gather but for a pruned table.
    Source:  Alman & Song, arXiv 2310.04064, Section 4, with the rank C(width + degree, degree); layout is ours.
    """
    if table.pruned:
        index, place = index_of(xp), device(columns)
        pairs = [parents(table, m) for m in range(1, table.degree + 1)]
        return gathered_features(xp, table, columns, [(index(a, place), index(b, place)) for a, b in pairs])
    block = xp.ones_like(columns[:1, :])
    blocks = [block]
    for m in range(1, table.degree + 1):
        parts = [columns[group.column : group.column + 1, :] * block[group.parents, :] for group in table.children[m]]
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


def feature_adjoint(
    xp: Any, table: FeatureTable, columns: Array, features: Array, gradient: Array, index: Index | None = None
) -> Array:
    """Return the gradient with respect to the columns, given the one with respect to the features.

    Shapes:  columns and output (width, c); features and gradient (r, c).
    Args:    index: Makes positions arrays of a device; a kernel's own remembers them.
    Cost:    2 r c multiplications; each block is visited once, highest degree first.
    """
    index = index or index_of(xp)
    total = [xp.zeros_like(columns[0, :])] * table.width
    if table.degree == 0:
        return xp.stack(total, axis=0)
    block = gradient[table.rows(table.degree), :]
    for m in range(table.degree, 1, -1):
        above = features[table.rows(m - 1), :]
        passed = None  # gradient of the parents from some row on; it grows towards the front
        for group in reversed(table.children[m]):
            own = block[group.rows, :]
            total[group.column] = total[group.column] + xp.sum(own * _taken(xp, above, group.parents, index), axis=0)
            scaled = _spread(xp, columns[group.column : group.column + 1, :] * own, group.places, index)
            passed = scaled if passed is None else _prepend(xp, scaled, passed)
        block = _prepend(xp, gradient[table.rows(m - 1), :], passed)
    for group in table.children[1]:
        total[group.column] = total[group.column] + block[group.rows.start, :]
    return xp.stack(total, axis=0)


def _taken(xp: Any, block: Array, rows: slice | np.ndarray, index: Index) -> Array:
    return block[rows, :] if isinstance(rows, slice) else xp.take(block, index(rows, device(block)), axis=0)


def _spread(xp: Any, own: Array, places: np.ndarray | None, index: Index) -> Array:
    """Return the rows of children at their parents, zeros at those without one; see `Children.places`."""
    if places is None:
        return own
    padded = xp.concat([own, xp.zeros_like(own[:1, :])], axis=0)
    return xp.take(padded, index(places, device(own)), axis=0)


def _prepend(xp: Any, longer: Array, shorter: Array) -> Array:
    """Add two blocks that end together."""
    head = longer.shape[0] - shorter.shape[0]
    return xp.concat([longer[:head, :], longer[head:, :] + shorter], axis=0)
