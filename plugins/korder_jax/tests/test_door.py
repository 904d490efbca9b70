"""The door: JAX arrays in, JAX arrays out, differentiable through `korder.attend`, under jit, vmap and grad."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import largest_error

import korder
import korder.jax

Array = Any
QUERIES, LENGTHS, WIDTH, VALUES = 7, (5, 3), 3, 2
CAUSAL = korder.AttentionSpec(order=2, mask=korder.Causal())
DEGREE = korder.AttentionSpec(order=1, scale=0.3, method=korder.Polynomial(degree=2))
TOLERANCE = korder.AttentionSpec(order=1, scale=0.3, method=korder.Polynomial(tolerance=1e-2))


def operands(
    order: int = 2, dtype: str = "float64", seed: int = 0
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:
    rng = np.random.default_rng(seed)
    query = jnp.asarray(rng.standard_normal((QUERIES, WIDTH)), dtype)
    keys = tuple(jnp.asarray(rng.standard_normal((m, WIDTH)), dtype) for m in LENGTHS[:order])
    values = tuple(jnp.asarray(rng.standard_normal((m, VALUES)), dtype) for m in LENGTHS[:order])
    return query, keys, values


def dense(
    query: Array, keys: tuple[Array, ...], values: tuple[Array, ...], biases: Any, weight: Array | None, offset: int = 1
) -> tuple[Array, Array]:
    """Return output and lse of order 2 under a causal mask by the definition; the first query at `offset`."""
    if weight is None:
        scores = jnp.einsum("il,jl,kl->ijk", query, *keys)
    else:
        scores = jnp.einsum("il,lpq,jp,kq->ijk", query, weight, *keys)
    scores = scores * WIDTH**-0.5 + biases[0][:, :, None] + biases[1][:, None, :]
    rows, first, second = (jnp.arange(size) for size in scores.shape)
    seen = (first[:, None] <= rows[:, None, None] + offset) & (second <= rows[:, None, None] + offset)
    scores = jnp.where(seen, scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=(1, 2))
    return jnp.einsum("ijk,je,ke->ie", jnp.exp(scores - lse[:, None, None]), *values), lse


def everything() -> tuple[Any, ...]:
    rng = np.random.default_rng(4)
    biases = (rng.standard_normal((QUERIES, LENGTHS[0])), rng.standard_normal((1, LENGTHS[1])))
    weight = rng.standard_normal((WIDTH, WIDTH, WIDTH)) / WIDTH
    return (*operands(), tuple(map(jnp.asarray, biases)), jnp.asarray(weight))


def by_korder(query: Array, keys: Any, values: Any, biases: Any, weight: Array) -> tuple[Array, Array]:
    spec = korder.AttentionSpec(order=2, mask=korder.Causal(), score="kronecker")
    result = korder.attend_result(query, keys, values, spec=spec, biases=biases, weight=weight, query_offset=1)
    return result.output, result.lse


def by_definition(query: Array, keys: Any, values: Any, biases: Any, weight: Array) -> tuple[Array, Array]:
    return dense(query, keys, values, biases, weight)


def scalar(function: Any) -> Any:
    """Return a number of all of output and lse, a different weight on each entry."""

    def loss(*arguments: Any) -> Array:
        output, lse = function(*arguments)
        return jnp.sum(output * jnp.cos(jnp.arange(output.size).reshape(output.shape))) + jnp.sum(lse * jnp.sin(lse))

    return loss


def test_gradients_reach_every_operand_through_output_and_lse() -> None:
    given = everything()
    places = tuple(range(5))
    found = jax.grad(scalar(by_korder), places)(*given)
    assert largest_error(found, jax.grad(scalar(by_definition), places)(*given)) < 1e-12
    assert largest_error(jax.jit(jax.grad(scalar(by_korder), places))(*given), found) < 1e-13


def test_attend_alone_is_differentiable_too() -> None:
    query, keys, values = operands()
    zeros = (jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    found = jax.grad(lambda x: jnp.sum(jnp.sin(korder.attend(x, keys, values, spec=CAUSAL, query_offset=1))))(query)
    wanted = jax.grad(lambda x: jnp.sum(jnp.sin(dense(x, keys, values, zeros, None)[0])))(query)
    assert largest_error(found, wanted) < 1e-12


def test_hessians_are_those_of_the_definition() -> None:
    given = everything()

    def of(function: Any) -> Any:
        return jax.jacrev(jax.grad(lambda x: scalar(function)(x[0], (given[1][0], x[1]), *given[2:])))

    point = (given[0][:2], given[1][1][:1])

    def cut(function: Any) -> Any:
        biases = (given[3][0][:2], given[3][1][:, :1])
        values = (given[2][0], given[2][1][:1])
        return lambda query, keys, *_: function(query, keys, values, biases, given[4])

    found, wanted = of(cut(by_korder))(point), of(cut(by_definition))(point)
    assert largest_error(found, wanted) < 1e-11


def test_vmap_and_jit_with_a_traced_offset() -> None:
    query, keys, values = operands()
    many = jnp.stack([query, 2.0 * query, query + 1.0])
    offsets = jnp.asarray([0, 1, 4])

    def one(query: Array, offset: Array) -> Array:
        return korder.attend(query, keys, values, spec=CAUSAL, query_offset=offset)

    found = jax.jit(jax.vmap(one))(many, offsets)
    zeros = (jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    wanted = [dense(x, keys, values, zeros, None, int(offset))[0] for x, offset in zip(many, offsets, strict=True)]
    assert largest_error(found, jnp.stack(wanted)) < 1e-13


@pytest.mark.parametrize("wide", [True, False], ids=["x64", "narrow"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("spec", [None, DEGREE], ids=["exact", "polynomial"])
def test_arrays_come_back_as_jax_arrays_of_their_dtype(spec: Any, dtype: str, wide: bool) -> None:
    with jax.enable_x64(wide):
        if dtype == "float64" and not wide:
            assert operands(1, "float32")[0].dtype == jnp.float32
            dtype = "float32"
        query, keys, values = operands(1, dtype)
        output = korder.attend(query, keys, values, spec=spec)
        result = korder.jax.attend_result(query, keys, values, spec=spec)
    assert isinstance(output, jax.Array)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(result))
    assert {output.dtype, result.output.dtype} == {jnp.dtype(dtype)}
    assert result.provenance.backend == "jax"
    assert (result.certificate is None) == (spec is None)
    if not wide:
        assert all(x.dtype != jnp.float64 for x in jax.tree.leaves(result))
    numbers = [np.asarray(x, np.float64) for x in (query, *keys, *values)]
    wanted = korder.attend_result(numbers[0], (numbers[1],), (numbers[2],), spec=spec)
    limit = max(2.0 * float(jnp.finfo(dtype).eps), 2e-6 if dtype == "float32" else 0.0)
    assert largest_error(result.output, wanted.output) < limit
    assert largest_error(result.lse, wanted.lse) < max(1e-6 if dtype != "float64" else 0.0, 1e-13)


def test_second_derivatives_of_the_polynomial_want_float64() -> None:
    with jax.enable_x64(False):
        query, keys, values = operands(1, "float32")

        def loss(query: Array) -> Array:
            return jnp.sum(korder.attend(query, keys, values, spec=DEGREE) ** 2)

        assert jax.grad(loss)(query).dtype == jnp.float32
        with pytest.raises(korder.UnsupportedProblemError, match="second derivatives of the polynomial") as raised:
            jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2))(query)
    assert "jax_enable_x64" in str(raised.value)


def test_a_tolerance_is_refused_where_traced_and_runs_with_statistics() -> None:
    query, keys, values = operands(1)
    statistics = korder.measure(query, keys, values, spec=TOLERANCE)

    def attended(query: Array, statistics: Any = None) -> korder.Result:
        return korder.attend_result(query, keys, values, spec=TOLERANCE, statistics=statistics)

    with pytest.raises(korder.UnsupportedProblemError, match="statistics=statistics") as raised:
        jax.jit(attended)(query)
    assert "got:      Polynomial(tolerance=0.01) under jit, vmap or grad" in str(raised.value)
    traced = jax.jit(lambda query: attended(query, statistics))(query)
    plain = attended(query)
    degree = traced.provenance.plan.polynomial.degree
    fixed = korder.AttentionSpec(order=1, scale=0.3, method=korder.Polynomial(degree=degree))
    same = korder.attend_result(query, keys, values, spec=fixed)
    assert traced.certificate is None
    assert plain.certificate is not None
    assert largest_error((traced.output, traced.lse), (same.output, same.lse)) < 1e-13
    exact = korder.attend(query, keys, values, spec=korder.AttentionSpec(order=1, scale=0.3))
    error = jnp.max(jnp.abs(plain.output - exact), axis=-1)
    assert bool(jnp.all(error <= plain.certificate.bound))


def test_errors_say_what_is_wrong() -> None:
    query, keys, values = operands(1)
    with pytest.raises(korder.OperandError, match=r"keys\[0\].*dtype") as raised:
        korder.attend(query, (keys[0].astype("float32"),), values)
    assert "float64" in str(raised.value)
    assert "float32" in str(raised.value)
    with pytest.raises(korder.OperandError, match=r"values\[0\] has another array kind"):
        korder.attend(query, keys, (np.asarray(values[0]),))
    with pytest.raises(korder.UnknownBackendError, match="jaxx"):
        korder.attend(query, keys, values, backend="jaxx")
    with pytest.raises(korder.OperandError, match="backend 'torch' does not take jax arrays"):
        korder.attend(query, keys, values, backend="torch")
