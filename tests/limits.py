"""Every tolerance of the test suite, in one place; nothing relaxes them.

A kernel is judged by a ratio: its error may be four times that of a plain evaluation in the same dtype, plus one unit
in the last place of the largest output.
"""

from __future__ import annotations

from typing import Any

import numpy as np

RATIO = 4.0
"""Error of a kernel over the error of a plain evaluation in the same dtype."""
GRADIENT_STEP = 1e-5
"""Step of central differences in float64."""
GRADIENT_LIMIT = 1e-7
"""Largest error of a gradient against central differences, relative to the largest gradient entry."""
RELATION_LIMIT = {"float32": 2e-5, "float64": 1e-13}
"""Largest difference, relative to the largest entry, of two computations that must agree but sum in other orders."""


def unit(dtype: str, largest: float) -> float:
    """Return one unit in the last place of `largest` in `dtype`."""
    return float(np.spacing(np.asarray(abs(largest), dtype=dtype)))


def error(got: Any, exact: Any) -> float:
    """Return the largest absolute difference; the same infinities and NaN in both count as equal."""
    got, exact = np.asarray(got, dtype=np.float64), np.asarray(exact, dtype=np.float64)
    assert got.shape == exact.shape, (got.shape, exact.shape)
    finite = np.isfinite(exact)
    assert np.array_equal(np.isfinite(got), finite), "finite entries in different places"
    assert np.array_equal(got[~finite], exact[~finite], equal_nan=True), "other infinities or NaN"
    return float(np.max(np.abs(got[finite] - exact[finite]), initial=0.0))


def assert_within_ratio(got: Any, plain: Any, exact: Any, *, dtype: str, ratio: float = RATIO) -> None:
    """Assert error(got) <= ratio * error(plain) + 1 ulp of the largest exact entry; `dtype` is that of `got`."""
    exact = np.asarray(exact, dtype=np.float64)
    largest = float(np.max(np.abs(exact[np.isfinite(exact)]), initial=0.0))
    allowed = ratio * error(plain, exact) + unit(dtype, largest)
    found = error(got, exact)
    assert found <= allowed, f"error {found:.3e} above {allowed:.3e} (largest entry {largest:.3e}, {dtype})"


def assert_agree(got: Any, other: Any, *, dtype: str) -> None:
    """Assert that two computations agree to `RELATION_LIMIT` of the largest entry."""
    other = np.asarray(other, dtype=np.float64)
    largest = float(np.max(np.abs(other[np.isfinite(other)]), initial=0.0))
    found = error(got, other)
    assert found <= RELATION_LIMIT[dtype] * max(largest, 1e-30), f"difference {found:.3e}, largest entry {largest:.3e}"
