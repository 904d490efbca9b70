"""The polynomial method at its edges: features stay out of memory on the way back, and what is no number stays none."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest

import korder
from korder.spi import NEEDS, Operands, OutputGradients
from korder_native.polynomial import NativePolynomialKernel

LENGTH, WIDTH, DEGREE = 4096, 8, 4


def problem(mask: Any, gradient: str, rows: int, dtype: str) -> tuple[NativePolynomialKernel, Operands]:
    """A kernel for few rows and many keys, nearly all of them before the first row, and operands for it."""
    method = korder.Polynomial(degree=DEGREE, gradient=gradient)
    spec = korder.AttentionSpec(order=1, mask=mask, method=method)
    rng = np.random.default_rng(7)
    query, key, value = (
        (0.3 * rng.standard_normal((1, 1, size, WIDTH))).astype(dtype) for size in (rows, LENGTH, LENGTH)
    )
    shapes = {"query": query.shape, "keys": [key.shape], "values": [value.shape]}
    kernel = NativePolynomialKernel(korder.plan(spec, **shapes, dtype=dtype)[0])
    return kernel, Operands(query, (key,), (value,), (None,), (None,), None, LENGTH - rows, (0,))


@pytest.mark.parametrize(
    ("mask", "gradient", "features"),
    [
        (korder.Causal(), "consistent", 495),
        (korder.Full(), "consistent", 495),
        (korder.Full(), "closed_form", 1287),  # of a degree more
    ],
)
def test_backward_keeps_no_features_of_all_tokens(mask: Any, gradient: str, features: int) -> None:
    kernel, operands = problem(mask, gradient, 8, "float64")
    saved = kernel.forward(operands, save=True)
    grads = OutputGradients(np.ones_like(operands.query), None)
    kernel.backward(operands, saved, grads, needs=NEEDS)  # what is made once and kept
    tracemalloc.start()
    try:
        kernel.backward(operands, saved, grads, needs=NEEDS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < LENGTH * features * 8


@pytest.mark.parametrize("mask", [korder.Full(), korder.Causal()])
def test_a_query_that_is_no_number_is_none_in_degree_0_either(mask: Any) -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 4))
    x[0, 2, 1] = np.nan
    spec = korder.AttentionSpec(order=1, mask=mask, method=korder.Polynomial(degree=0))
    for backend in ("native", "numpy"):
        found = korder.attend(x[0], (x[1],), (x[2],), spec=spec, backend=backend)
        assert np.array_equal(np.isnan(found).all(axis=1), np.arange(5) == 2), backend
