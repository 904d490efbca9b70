"""The degree that a tolerance leads to, against every even degree tried one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import korder
from korder import AttentionSpec, Causal, Full, Polynomial, Window
from korder.methods.tolerances import meets_tolerance
from korder.spi import Operands

DEGREES = range(2, 31, 2)
MASKS = {"full": Full(), "causal": Causal(), "window": Window(sizes=(5, 4))}


def tokens(seed: int, rms: float, *, width: int = 3, n: int = 24) -> tuple[Any, Any, Any]:
    """Return query, keys and values with scores of about an rms."""
    rng = np.random.default_rng(seed)
    size = rms ** (1 / 3)
    query, *rest = (rng.normal(size=(n, width)) * size for _ in range(5))
    if seed % 3 == 0:  # one row far from the others, which decides the degree
        query[n // 2] *= 2.5
    return query, tuple(rest[:2]), tuple(rest[2:])


def smallest_degree(operands: tuple[Any, Any, Any], mask: Any, tolerance: float) -> int | None:
    """Return the first even degree whose own certificate meets the tolerance."""
    query, keys, values = operands
    kernel_layout = Operands(
        query[None, None], tuple(k[None, None] for k in keys), tuple(v[None, None] for v in values),
        (None, None), (None, None), key_offsets=(0, 0),
    )  # fmt: skip
    for degree in DEGREES:
        spec = AttentionSpec(order=2, mask=mask, method=Polynomial(degree=degree))
        try:
            certificate = korder.attend_result(query, keys, values, spec=spec).certificate
        except korder.AccuracyError:
            continue
        batched = type(certificate)(
            **{
                name: x[None, None] if isinstance(x := getattr(certificate, name), np.ndarray) else x
                for name in certificate.__dataclass_fields__
            }
        )
        if meets_tolerance(np, batched, kernel_layout, tolerance).met:
            return degree
    return None


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6])
@pytest.mark.parametrize("seed", range(4))
def test_it_ends_at_most_one_even_step_above_the_smallest(seed: int, tolerance: float, mask: Any) -> None:
    operands = tokens(seed, (0.02, 0.1, 0.3, 0.6)[seed])
    needed = smallest_degree(operands, mask, tolerance)
    spec = AttentionSpec(order=2, mask=mask, method=Polynomial(tolerance=tolerance))
    query, keys, values = operands
    plan = korder.attend_result(query, keys, values, spec=spec).provenance.plan
    assert plan.polynomial is not None
    assert needed is not None
    assert needed <= plan.polynomial.degree <= needed + 2


def test_more_than_one_degree_is_needed_by_these_inputs() -> None:
    found = {smallest_degree(tokens(seed, rms), Full(), 1e-3) for seed, rms in enumerate((0.02, 0.1, 0.3, 0.6))}
    assert len(found) >= 3
