"""What the attention weights say, without ever storing them: marginals of each mode, and the tuples that won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

from array_api_compat import device

from korder.dispatch.arrays import (
    Given,
    array_kind,
    checked_backend_name,
    namespace_of_kind,
    on_host,
)
from korder.dispatch.prepare import prepare
from korder.dispatch.registry import default_registry
from korder.dispatch.request import make_request
from korder.errors import OperandError, SpecError, UnsupportedProblemError
from korder.planning.exact import exact_plan
from korder.problem import Problem
from korder.spec import AttentionSpec, Exact
from korder.spi.operands import Operands, OutputGradients

Array = Any


def marginals(
    query: Array,
    keys: Sequence[Array],
    *,
    spec: AttentionSpec | None = None,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
    backend: str = "auto",
) -> tuple[Array, ...]:
    """Return, for every mode, the probability of each of its keys: the weights summed over all other modes.

    A marginal is the derivative of lse by a bias of its mode, so this is one backward pass of the exact method; the
    tuples are never stored.

    Shapes:
        as `attend`; one array (b, h, n, m_t) per mode, rows summing to 1, or 0 where nothing may be attended to.

    Raises:
        UnsupportedProblemError: The spec asks for an approximate method.

    Cost: about 6 n m1 .. mk d flop, and the output's size in memory.

    Example:
        >>> import numpy as np
        >>> x = np.zeros((2, 3), "float32")
        >>> marginals(x, (x,))[0].tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    given, problem, operands = _exact_request(
        query, keys, spec, weight, biases, key_masks, query_offset, key_offsets, "marginals"
    )
    xp = namespace_of_kind(given.kind)
    problem = replace(problem, biases=("full",) * problem.order)
    operands = replace(operands, biases=_full_biases(xp, problem, operands))
    registry = default_registry()
    kernel = prepare(registry, problem, given.kind, checked_backend_name(backend), backward=True).kernel
    saved = kernel.forward(operands, save=True)
    # A row with nothing to attend to has lse = -inf and, by the contract, zero gradients.
    gradients = OutputGradients(xp.zeros_like(saved.output), xp.ones_like(saved.lse))
    found = kernel.backward(operands, saved, gradients, needs=frozenset({"biases"})).biases
    leading = given.shapes.query[:-1]
    return tuple(xp.reshape(array, (*leading, length)) for array, length in zip(found, problem.lengths, strict=True))


def _full_biases(xp: Any, problem: Problem, operands: Operands) -> tuple[Array, ...]:
    """Every mode's bias written out over heads and queries, zero where none was given."""
    full = []
    for bias, length in zip(operands.biases, problem.lengths, strict=True):
        shape = (problem.batch, problem.heads, problem.queries, length)
        if bias is None:
            bias = xp.zeros((1, 1, 1, 1), dtype=operands.query.dtype, device=device(operands.query))
        full.append(xp.broadcast_to(bias, shape))
    return tuple(full)


def _exact_request(
    query: Array,
    keys: Sequence[Array],
    spec: AttentionSpec | None,
    weight: Any,
    biases: Any,
    key_masks: Any,
    query_offset: int | None,
    key_offsets: Sequence[int] | None,
    caller: str,
) -> tuple[Given, Problem, Operands]:
    """The exact problem of these scores, with values of width 1 that nobody looks at."""
    values = [_no_values(key, f"keys[{t}]") for t, key in enumerate(keys)] if isinstance(keys, (tuple, list)) else keys
    given, request = make_request(
        query,
        keys,
        values,
        spec=spec,
        weight=weight,
        biases=biases,
        key_masks=key_masks,
        query_offset=query_offset,
        key_offsets=key_offsets,
        measured=False,
    )
    method = request.problem.spec.method
    if not isinstance(method, Exact):
        raise UnsupportedProblemError(
            f"{caller} are those of the exact method.",
            code="exact-only",
            expected="a spec whose method is Exact()",
            got=f"method={method.kind}",
            hint='spec.model_copy(update={"method": korder.Exact()})',
        )
    return given, request.problem, request.operands


def _no_values(key: Array, name: str) -> Array:
    kind = array_kind(key, name)
    if key.ndim < 1:
        raise OperandError(f"{name} must have at least two axes.", expected="(length, width)", got="a scalar")
    return namespace_of_kind(kind).zeros_like(key[..., :1])


def top_tuples(
    query: Array,
    keys: Sequence[Array],
    *,
    count: int,
    spec: AttentionSpec | None = None,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
) -> tuple[Array, Array]:
    """Return the `count` tuples of keys that each query attends to most, and their probabilities, largest first.

    Walks the tiles of the exact method on the arrays' own library, whatever backend would compute the output.

    Shapes:
        as `attend`; indices (b, h, n, count, k), one key index per mode, -1 where a query has fewer tuples;
        probabilities (b, h, n, count), 0 there, in float32 or wider. A count above the number of tuples becomes that.

    Raises:
        SpecError: `count` below 1.
        UnsupportedProblemError: The spec asks for an approximate method.

    Cost: 2 n m1 .. mk d flop; memory as the plan says, with `count` scores a query.

    Example:
        >>> import numpy as np
        >>> x = 5 * np.eye(3, dtype="float32")
        >>> top_tuples(x, (x, x), count=1)[0][:, 0].tolist()
        [[0, 0], [1, 1], [2, 2]]
    """
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise SpecError("count must be a positive integer.", expected="count >= 1", got=repr(count))
    given, problem, operands = _exact_request(
        query, keys, spec, weight, biases, key_masks, query_offset, key_offsets, "top tuples"
    )
    from korder.methods.top_tuples import TopTuples

    xp, (operands,) = on_host(given.kind, operands)
    count = min(int(count), max(problem.tuples, 1))
    found = TopTuples(xp, exact_plan(problem)).top(operands, count)
    xp = namespace_of_kind(given.kind)
    indices, probabilities = (xp.asarray(x) for x in found)
    leading = given.shapes.query[:-1]
    return xp.reshape(indices, (*leading, count, problem.order)), xp.reshape(probabilities, (*leading, count))
