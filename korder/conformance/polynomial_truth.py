"""What the polynomial method must return, from explicit scores and the centre that the kernel used.

The centre is a choice of the kernel's; it follows from what it returns: lse = centre + ln normaliser + bias maxima.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.limits import REFERENCE
from korder.conformance.monomials import about, kept_powers, monomials_of
from korder.conformance.oracle import Transform, answer, bias_of, column_terms, live_tuples, scores_of
from korder.conformance.subject import Found

Array = Any


@dataclass(frozen=True, slots=True)
class Truth:
    """What a kernel is to return about its centre.

    Shapes:  output (b, h, n, e); normaliser, magnitude (b, h, n); moments (b, h, n, degree + 1).
    """

    output: Array
    normaliser: Array
    moments: Array
    magnitude: Array


def bias_maxima(case: Case) -> Array:
    """Return the sum over modes of the largest finite bias of an unmasked key, (b, h, 1)."""
    batch, heads = case.query.shape[:2]
    total = np.zeros((batch, heads, 1))
    for bias, mask in zip(case.biases, case.key_masks, strict=True):
        if bias is None:
            continue
        shown = np.broadcast_to(bias[:, :, 0, :], (batch, heads, bias.shape[-1]))
        live = np.isfinite(shown)
        if mask is not None:
            live = live & np.repeat(mask, heads // mask.shape[1], axis=1)
        largest = np.max(np.where(live, shown, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        total = total + np.where(largest == -np.inf, 0.0, largest)
    return total


def centre_of(case: Case, found: Found) -> Array:
    """Return the centre (b, h, n) that a kernel used, 0 in rows without a live tuple."""
    live = live_tuples(case).any(axis=tuple(range(3, 3 + case.order)))
    normaliser = np.where(live, found.normaliser, 1.0)
    lse = np.where(live, found.lse, 0.0)
    with np.errstate(all="ignore"):
        return np.where(live, lse - np.log(normaliser) - bias_maxima(case), 0.0)


def transform_of(case: Case, found: Found) -> Transform:
    """Return the polynomial that a kernel computed with."""
    plan = case.plan()
    assert plan.polynomial is not None
    closed_form = plan.polynomial.gradient == "closed_form"
    return Transform(plan.polynomial.values, centre_of(case, found), closed_form, monomials_of(plan))


def truth_of(case: Case, transform: Transform, dtype: Any = REFERENCE, way: str = "") -> Truth:
    """Return what a kernel is to return, computed in `dtype` in one of the oracle's ways."""
    axes = tuple(range(3, 3 + case.order))
    rows = (..., *(None,) * case.order)
    live, bias = live_tuples(case), bias_of(case, dtype)
    weights = np.where(live, np.exp(bias), 0.0).astype(dtype)
    count = weights.sum(axis=axes)
    safe = np.where(count == 0, 1, count).astype(dtype)
    shift = transform.centre.astype(dtype)[rows]
    powers = _powers(case, transform, dtype, -shift, way)
    moments = np.stack([(weights * power).sum(axis=axes) / safe for power in powers], axis=-1)
    found = answer(case, dtype, transform, way=way)
    absolute = np.stack(_powers(case, transform, dtype, np.abs(shift), absolute=True))
    sizes = np.tensordot(np.abs(np.asarray(transform.coefficients, dtype)), absolute, axes=1)
    total = np.where(found.total == 0, 1, found.total)
    shrink = np.exp(-bias_maxima(case)).astype(dtype)
    return Truth(found.output, found.total * shrink, moments, (weights * sizes).sum(axis=axes) / total)


def _powers(
    case: Case, transform: Transform, dtype: Any, shift: Array, way: str = "", *, absolute: bool = False
) -> list[Array]:
    """Return the powers, up to the degree, of scores moved by a shift; of the kept monomials where some are not."""
    degree = len(transform.coefficients) - 1
    if transform.monomials:
        terms = column_terms(case, dtype, absolute=absolute, way=way)
        return about(kept_powers(terms, transform.monomials, degree), shift)
    moved = scores_of(case, dtype, absolute=absolute, way=way) + shift
    powers = [moved**0]
    for _ in range(degree):
        powers.append(powers[-1] * moved)
    return powers
