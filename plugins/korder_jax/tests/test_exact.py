"""The exact kernel against the definition in float64: values and gradients, by every mask, bias, weight and offset."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, largest_error, random_case

import korder
from korder.spi import NEEDS, OutputGradients

WINDOW = korder.Window(sizes=(4, 6))
EVERYTHING: dict[str, Any] = {"biases": ("full", "key"), "key_masks": True}
OFFSETS = {"query_offset": 4, "key_offsets": (6, 2)}
CASES = {
    "order 1 causal": random_case(1, mask=korder.Causal(), biases=("full",), query_offset=2, key_offsets=(3,)),
    "order 2 full": random_case(2, biases=("shared", "full"), key_masks=True),
    "order 2 causal": random_case(2, mask=korder.Causal(), **EVERYTHING, **OFFSETS),
    "order 2 window": random_case(2, mask=WINDOW, heads=(3, 3), **OFFSETS),
    "order 2 ordered": random_case(2, mask=korder.Ordered(), **EVERYTHING, query_offset=1, key_offsets=(-2, 0)),
    "order 3 ordered": random_case(3, mask=korder.Ordered(), heads=(3, 1), query_offset=3),
    "order 3 full": random_case(3),
    "cp weight": random_case(2, mask=korder.Causal(), weight="cp", **OFFSETS),
    "full weight": random_case(2, weight="full", key_masks=True),
    "full weight of order 3": random_case(3, weight="full", width=2),
}


def upstream(case: Case) -> tuple[Any, Any]:
    rng = np.random.default_rng(9)
    rows = case.query.shape[:3]
    return jnp.asarray(rng.standard_normal((*rows, 4))), jnp.asarray(rng.standard_normal(rows))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_definition(name: str) -> None:
    case = CASES[name]
    kernel, operands = case.kernel(small=True), case.operands()
    found = kernel.forward(operands, save=True)
    output, lse, wanted = case.reference_gradients(*upstream(case))
    assert largest_error((found.output, found.lse), (output, lse)) < 1e-13
    given = kernel.backward(operands, found, OutputGradients(*upstream(case)), needs=NEEDS)
    gradients = (given.query, given.keys, given.values, given.biases, given.weight)
    assert largest_error(gradients, wanted) < 1e-12


def test_the_plan_s_own_tiles_give_the_same() -> None:
    for name in ("order 2 causal", "order 3 full"):
        case = CASES[name]
        found = case.kernel().forward(case.operands(), save=False)
        assert largest_error((found.output, found.lse), case.reference()) < 1e-13


def test_one_kernel_takes_any_offsets_however_far() -> None:
    case = CASES["order 2 causal"]
    kernel = case.kernel(small=True)
    for query_offset, far in ((5, 0), (0, 0), (3, 2**40), (-2, -(2**40))):
        moved = replace(case, query_offset=query_offset, key_offsets=(4, 1))
        shifted = replace(case, query_offset=query_offset + far, key_offsets=(4 + far, 1 + far))
        found = kernel.forward(shifted.operands(), save=False)
        assert largest_error((found.output, found.lse), moved.reference()) < 1e-13
    assert kernel._forward._cache_size() <= 2  # one for save=True, from another test, and one for these


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_operands_are_summed_in_float32(dtype: str) -> None:
    case = CASES["order 2 causal"]
    narrow = case.operands(dtype)
    rounded = {name: getattr(narrow, name) for name in ("query", "keys", "values", "biases")}
    case = replace(case, **jax.tree.map(lambda x: np.asarray(x, np.float64), rounded))
    gradient = upstream(case)[0].astype(dtype)
    with jax.enable_x64(False):
        kernel = case.kernel(dtype, small=True)
        found = kernel.forward(narrow, save=True)
        given = kernel.backward(narrow, found, OutputGradients(gradient), needs=frozenset({"query", "biases"}))
    assert (found.output.dtype, found.lse.dtype) == (jnp.dtype(dtype), jnp.float32)
    assert given.query.dtype == jnp.dtype(dtype)
    assert given.keys == (None, None)
    output, lse, wanted = case.reference_gradients(gradient.astype("float64"), jnp.zeros(found.lse.shape))
    last = max(float(jnp.finfo(dtype).eps), 2e-6)
    assert largest_error(found.lse, lse) < 1e-6
    assert largest_error(found.output, output) < last
    assert largest_error((given.query, given.biases), (wanted[0], wanted[3])) < 2 * last


def test_no_keys_no_queries_and_scores_that_overflow_exp() -> None:
    case = CASES["order 2 full"]
    none = replace(case, keys=(case.keys[0][:, :, :0], case.keys[1]), values=(case.values[0][:, :, :0], case.values[1]))
    none = replace(none, biases=(None, None), key_masks=(None, None))
    kernel = none.kernel()
    found = kernel.forward(none.operands(), save=True)
    assert float(jnp.max(jnp.abs(found.output))) == 0.0
    assert bool(jnp.all(found.lse == -jnp.inf))
    given = kernel.backward(none.operands(), found, OutputGradients(*upstream(case)), needs=NEEDS)
    assert float(jnp.max(jnp.abs(given.query))) == 0.0
    large = replace(CASES["order 3 full"], query=1e4 * CASES["order 3 full"].query)
    found = large.kernel().forward(large.operands(), save=False)
    assert largest_error((found.output, found.lse), large.reference()) < 1e-12
