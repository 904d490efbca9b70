"""The polynomial kernel against P of explicit scores about the same centre, and against the NumPy backend's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, largest_error, random_case

import korder
from korder.dispatch.registry import default_registry
from korder.spi import NEEDS, KernelOutput, Operands, OutputGradients


def polynomial_case(order: int, degree: int, *, coefficients: Any = None, **options: Any) -> Case:
    method = korder.Polynomial(degree=degree, **(coefficients or {}))
    return random_case(order, method=method, spread=0.6, width=3, **options)


OFFSETS = {"query_offset": 4, "key_offsets": (6, 2)}
MINIMAX = {"coefficients": "minimax", "interval": 3.0}
CASES = {
    "order 1 causal": polynomial_case(
        1, 2, mask=korder.Causal(), biases=("key",), query_offset=2, key_offsets=(3,), scale=-0.7
    ),
    "order 1 minimax": polynomial_case(1, 3, coefficients=MINIMAX, scale=0.4),
    "order 2 full": polynomial_case(2, 2, biases=("shared", "key"), key_masks=True, scale=-0.5),
    "order 2 causal": polynomial_case(2, 2, mask=korder.Causal(), biases=(None, "key"), key_masks=True, **OFFSETS),
    "order 3 full": polynomial_case(3, 2, heads=(3, 1)),
    "order 3 causal": polynomial_case(3, 1, mask=korder.Causal(), heads=(3, 3), key_offsets=(1, -2, 0)),
    "cp weight": polynomial_case(2, 1, weight="cp", key_masks=True),
}
TAYLOR = [name for name in CASES if "minimax" not in name]
"""Those whose centre is defined, the mean score; the middle of a range is whatever interval a kernel knows."""


def upstream(case: Case) -> tuple[Any, Any]:
    rng = np.random.default_rng(5)
    rows = case.query.shape[:3]
    return jnp.asarray(rng.standard_normal((*rows, 4))), jnp.asarray(rng.standard_normal(rows))


def polynomial_of(case: Case, found: KernelOutput) -> Any:
    """Return what takes the place of exp on scores: P about the kernel's centre, a constant."""
    plan = case.plan().polynomial
    assert plan is not None
    assert found.residuals is not None
    centre = jnp.asarray(found.residuals["centre"]).reshape(*found.lse.shape, *[1] * len(case.keys))
    return lambda x: jnp.polyval(jnp.asarray(plan.values[::-1]), x - centre) * jnp.exp(centre)


def in_numpy(case: Case) -> Operands:
    query, keys, values, biases, weight = case.variables
    return Operands(query, keys, values, case.key_masks, biases, weight, case.query_offset, case.key_offsets)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_dense_polynomial(name: str) -> None:
    case = CASES[name]
    kernel, operands = case.kernel(small=True), case.operands()
    found = kernel.forward(operands, save=True)
    output, lse, wanted = case.reference_gradients(*upstream(case), polynomial_of(case, found))
    assert largest_error((found.output, found.lse), (output, lse)) < 1e-12
    given = kernel.backward(operands, found, OutputGradients(*upstream(case)), needs=NEEDS)
    gradients = (given.query, given.keys, given.values, given.biases, given.weight)
    assert largest_error(gradients, wanted) < 1e-10


@pytest.mark.parametrize("name", TAYLOR)
def test_everything_a_certificate_needs_is_as_the_numpy_backend_has_it(name: str) -> None:
    case = CASES[name]
    found = case.kernel(small=True).forward(case.operands(), save=True)
    other = default_registry().get("numpy").compile(case.plan(small=True)).forward(in_numpy(case), save=True)
    for part in ("output", "lse", "normaliser", "moments", "magnitude"):
        assert largest_error(getattr(found, part), getattr(other, part)) < 1e-11, part
    assert found.residuals is not None
    assert other.residuals is not None
    live = np.isfinite(np.asarray(other.lse))
    for statistic in ("centre", "scales", "maxima"):
        mine, its = (np.asarray(x[statistic]) for x in (found.residuals, other.residuals))
        mine, its = (x[live] if statistic == "centre" else x for x in (mine, its))
        assert largest_error(mine, its) < 1e-13, statistic


def test_statistics_of_an_earlier_call_are_kept() -> None:
    case = CASES["order 2 full"]
    kernel = case.kernel(small=True)
    first = kernel.forward(case.operands(), save=True)
    moved = replace(case, keys=(case.keys[0] + 0.3, case.keys[1]))
    own = kernel.forward(moved.operands(), save=False)
    kept = kernel.forward(moved.operands(), save=True, residuals=first.residuals)
    assert largest_error((kept.output, kept.lse), moved.reference(polynomial_of(case, first))) < 1e-12
    assert largest_error(kept.output, own.output) > 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_operands_are_summed_in_float32_and_joined_in_float64(dtype: str) -> None:
    case = CASES["order 2 full"]
    narrow = case.operands(dtype)
    rounded = {name: getattr(narrow, name) for name in ("query", "keys", "values", "biases")}
    case = replace(case, **jax.tree.map(lambda x: np.asarray(x, np.float64), rounded))
    with jax.enable_x64(False):
        found = case.kernel(dtype, small=True).forward(narrow, save=True)
    assert (found.output.dtype, found.lse.dtype) == (jnp.dtype(dtype), jnp.float64)
    output, lse = case.reference(polynomial_of(case, found))
    assert largest_error(found.lse, lse) < 1e-6
    assert largest_error(found.output, output) < max(float(jnp.finfo(dtype).eps), 2e-6)


def test_a_row_whose_polynomial_is_not_positive_raises_and_is_nan_where_traced() -> None:
    keys, values = jnp.asarray([[-9.0], [3.0], [3.0], [3.0]]), jnp.arange(4.0)[:, None]
    query = jnp.asarray([[0.1], [1.0]])
    spec = korder.AttentionSpec(order=1, scale=1.0, method=korder.Polynomial(degree=3))
    with pytest.raises(korder.AccuracyError, match=r"not positive in batch 0, head 0, row 1"):
        korder.attend(query, (keys,), (values,), spec=spec)
    traced = jax.jit(lambda query: korder.attend(query, (keys,), (values,), spec=spec))(query)
    np.testing.assert_array_equal(np.isnan(np.asarray(traced)), [[False], [True]])
