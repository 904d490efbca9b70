"""Every limit of the kit in one place: the ratio rule, and how far two computations in other orders may differ.

An error may be four times that of a plain evaluation in the same dtype, plus one unit in the last place of the largest
entry; nothing relaxes that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from korder.errors import ConformanceFailure

Array = Any
RATIO = 4.0
"""Error of a kernel over the error of a plain evaluation in the same dtype."""
RELATION = {"float16": 4e-3, "bfloat16": 3.2e-2, "float32": 2e-5, "float64": 1e-13}
"""Largest difference, relative to the largest entry, of two results that must agree but may sum in other orders."""
GRADIENT = 4.0
"""Least factor on the limit of a gradient; the largest lse where that is more, whose rounding the weights carry."""
CENTRE = 16.0
"""The same for the polynomial method, whose centre the kit reads off lse and the normaliser, which rounds."""
MEMORY_RATIO = 1.2
"""Measured workspace over the declared one."""
MAGNITUDE = 1e-3
"""Largest relative difference of `KernelOutput.magnitude`, which enters certificates as a factor."""
REFERENCE = np.longdouble
"""What the oracle computes in: wider than every dtype of a kernel, where the platform has such a type."""
_HAS_WIDER = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps


def as_dtype(x: Array, dtype: str) -> Array:
    """Return the numbers rounded to a dtype, held in float64."""
    x = np.asarray(x, dtype=np.float64)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return x.astype(dtype).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), nearest.view(np.float32), x).astype(np.float64)


def unit(dtype: str, largest: float) -> float:
    """Return one unit in the last place of `largest` in a dtype."""
    if dtype == "bfloat16":
        return float(np.spacing(np.float32(abs(largest)))) * 2.0**16
    return float(np.spacing(np.asarray(abs(largest), dtype=dtype)))


def largest_of(x: Array) -> float:
    """Return the largest finite entry in absolute value, 0 where there is none."""
    x = np.asarray(x, dtype=np.float64)
    return float(np.max(np.abs(x[np.isfinite(x)]), initial=0.0))


def error(name: str, got: Array, wanted: Array) -> float:
    """Return the largest difference; infinities and NaN must stand in the same places.

    Raises:
        ConformanceFailure: Another shape, or something finite where there should be none, or the other way round.
    """
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape:
        raise ConformanceFailure(
            f"{name} has the wrong shape.", expected=str(tuple(wanted.shape)), got=str(tuple(got.shape))
        )
    finite = np.isfinite(wanted)
    odd = np.isfinite(got) != finite
    odd |= ~finite & ~((got == wanted) | (np.isnan(got) & np.isnan(wanted)))
    if np.any(odd):
        place = tuple(int(index) for index in np.argwhere(odd)[0])
        raise ConformanceFailure(
            f"{name} is wrong at {place}.", expected=repr(float(wanted[place])), got=repr(float(got[place]))
        )
    wide = np.asarray(got[finite], dtype=REFERENCE) - wanted[finite]
    return float(np.max(np.abs(wide), initial=0.0))


def within_ratio(
    name: str, got: Array, plain: Sequence[Array], exact: Array, *, dtype: str, condition: float = 1.0
) -> None:
    """Raise unless error(got) <= condition * (4 error(plain) + 1 ulp of the largest entry).

    Args:
        name: What is compared.
        got: What the kernel returned.
        plain: Plain evaluations in the dtype of the sums, rounded to `dtype`; the worst counts.
        exact: The oracle.
        dtype: Dtype of `got`.
        condition: Condition number of the sum, 1 for the exact method.
    """
    largest = largest_of(exact)
    last = unit(dtype, largest)
    allowed = condition * (
        RATIO * max(*(error(name, each, exact) for each in plain), 0.0 if _HAS_WIDER else last) + last
    )
    found = error(name, got, exact)
    if not found <= allowed:
        raise ConformanceFailure(
            f"{name} is farther from the oracle than a plain evaluation in the same dtype allows.",
            expected=f"error at most {allowed:.3e} (largest entry {largest:.3e}, {dtype})",
            got=f"error {found:.3e}",
        )


def agree(name: str, got: Array, wanted: Array, *, dtype: str, slack: float = 1.0) -> None:
    """Raise unless two results agree to the relation limit of their dtype."""
    largest = largest_of(wanted)
    allowed = slack * RELATION[dtype] * max(largest, 1e-30)
    found = error(name, got, wanted)
    if not found <= allowed:
        raise ConformanceFailure(
            f"{name} differs from what it must equal.",
            expected=f"difference at most {allowed:.3e} (largest entry {largest:.3e}, {dtype})",
            got=f"difference {found:.3e}",
        )


def same_bits(name: str, got: Array, wanted: Array) -> None:
    """Raise unless two arrays hold the same numbers, NaN included."""
    if np.shape(got) != np.shape(wanted) or not np.array_equal(got, wanted, equal_nan=np.asarray(got).dtype != bool):
        raise ConformanceFailure(f"{name} was changed.", expected="the same numbers as before the call", got="others")


def require(holds: bool, message: str, *, expected: str, got: str) -> None:
    """Raise unless something holds."""
    if not holds:
        raise ConformanceFailure(message, expected=expected, got=got)
