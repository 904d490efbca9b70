"""Powers of two by which columns are divided before monomials are made of them, so that none overflows."""

from __future__ import annotations

from typing import Any

from korder.methods.readings import nonzero

Array = Any
_LARGEST_EXPONENT = 1023.0


def finite_peaks(xp: Any, columns: Array) -> Array:
    """Return the largest finite absolute entries (.., w) of columns (.., w, c), 0 where there are none."""
    sizes = xp.where(xp.isfinite(columns), xp.abs(columns), xp.zeros_like(columns))
    return xp.max(sizes, axis=-1) if columns.shape[-1] else xp.sum(sizes, axis=-1)


def powers_near(xp: Any, peaks: Array) -> Array:
    """Return the least powers of two that are not below positive peaks, 1 for a peak of 0; float64, of one shape."""
    usable = xp.where(peaks > 0.0, peaks, xp.ones_like(peaks))
    exponents = xp.ceil(xp.log2(usable))
    return xp.pow(xp.full_like(usable, 2.0), xp.minimum(exponents, xp.full_like(usable, _LARGEST_EXPONENT)))


def scales_of_peaks(xp: Any, peaks: Array) -> Array:
    """Return the scales (.., k + 1, w) of a query's and its keys' columns, given their largest absolute entries.

    A column that is zero in some factor adds nothing to a score, and must not set the size of monomials either: it gets
    a scale with which the product over factors is that of the largest of the other columns.
    """
    positive = peaks > 0.0
    scales = powers_near(xp, peaks)
    product = xp.prod(scales, axis=-2, keepdims=True)
    alive = xp.min(xp.astype(positive, xp.float64), axis=-2, keepdims=True) > 0.0
    largest = xp.max(xp.where(alive, product, xp.zeros_like(product)), axis=-1, keepdims=True)
    zeros = xp.astype(xp.logical_not(positive), xp.float64)
    first = xp.logical_and(xp.logical_not(positive), xp.cumulative_sum(zeros, axis=-2) == 1.0)
    return xp.where(first, scales * (nonzero(xp, largest) / product), scales)
