"""A program of its own, run by test_sharded: `shard_map` over the query axis against one device, and the definition."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from reference import Case, dense, largest_error, random_case

import korder

Array = Any
DEVICES, ROWS, FIRST = 8, 2, -3
CAUSAL = korder.Causal()
METHOD = korder.Polynomial(degree=2)
CASES = {
    "full": random_case(2, key_masks=True),
    "causal": random_case(2, mask=CAUSAL, biases=("key", None), query_offset=FIRST, key_offsets=(1, -2)),
    "polynomial": random_case(1, mask=CAUSAL, method=METHOD, spread=0.5, width=3, heads=(4, 4), query_offset=FIRST),
}
Operands = tuple[Array, tuple[Array, ...], tuple[Array, ...], tuple[Array | None, ...]]


def attended(case: Case, given: Operands, offset: Array | int) -> tuple[Array, Array]:
    """Return output and lse of these operands, the first query at `offset`."""
    query, keys, values, biases = given
    result = korder.attend_result(
        query,
        keys,
        values,
        spec=case.spec,
        biases=biases,
        key_masks=jax.tree.map(jnp.asarray, case.key_masks),
        query_offset=offset,
        key_offsets=case.key_offsets,
    )
    return result.output, result.lse


def sharded(case: Case) -> Callable[[Operands], tuple[Array, Array]]:
    """Return the same with the query axis over the devices of a mesh; keys, values and biases are on each of them."""
    mesh = jax.make_mesh((DEVICES,), ("rows",), axis_types=(AxisType.Auto,))
    rows, everywhere = PartitionSpec(None, None, "rows"), PartitionSpec()

    @partial(jax.shard_map, mesh=mesh, in_specs=((rows, everywhere, everywhere, everywhere),), out_specs=(rows, rows))
    def shard(given: Operands) -> tuple[Array, Array]:
        first = case.query_offset + jax.lax.axis_index("rows") * ROWS
        return attended(case, given, first)

    return shard


def main(name: str) -> None:
    """Compare, and print how many devices there were."""
    case = CASES[name]
    rng = np.random.default_rng(3)
    query = jnp.asarray(rng.standard_normal((2, 4, DEVICES * ROWS, case.query.shape[-1])) * 0.5)
    given = (query, *(jax.tree.map(jnp.asarray, x) for x in (case.keys, case.values, case.biases)))
    wanted = jnp.asarray(rng.standard_normal((2, 4, DEVICES * ROWS, 4)))

    def with_gradients(function: Callable[[Operands], tuple[Array, Array]]) -> Any:
        def loss(given: Operands) -> tuple[Array, Any]:
            output, lse = function(given)
            return jnp.sum(output * wanted) + jnp.sum(jnp.where(lse == -jnp.inf, 0.0, lse)), (output, lse)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(given)

    whole = with_gradients(lambda given: attended(case, given, case.query_offset))
    shards = with_gradients(sharded(case))
    if name == "polynomial":  # each shard has column scales of its own, powers of two
        assert largest_error(shards, whole) < 1e-11
    else:
        assert largest_error(shards, whole) < 1e-13
        by_definition = dense(_with_rows(case, query), (*given, None))
        assert largest_error(shards[0][1], by_definition) < 1e-13
    assert len(shards[0][1][0].sharding.device_set) == DEVICES
    print(jax.device_count(), "devices, equal")


def _with_rows(case: Case, query: Array) -> Case:
    return replace(case, query=np.asarray(query))


if __name__ == "__main__":
    main(sys.argv[1])
