"""The public functions of decoding: prefill, decode, decode_result, load_state."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from korder.decoding.state import DecodeState
from korder.decoding.tokens import TokenLayout
from korder.dispatch.arrays import resolve_spec
from korder.errors import OperandError, SpecError, UnsupportedProblemError
from korder.result import Certificate, Result
from korder.spec import AttentionSpec

Array = Any


def prefill(
    keys: Sequence[Array],
    values: Sequence[Array],
    spec: AttentionSpec | None = None,
    *,
    key_masks: Sequence[Array | None] | None = None,
    query_bound: float | None = None,
    capacity: int | None = None,
) -> DecodeState:
    """Return the state of these keys and values, to be extended by `state.append` and read by `decode`.

    Under the polynomial method a state is k r (e + 1) sums for each key head, whatever the number of keys; under the
    exact one it holds the keys and values themselves.

    Shapes:
        keys[t] (b, g, m_t, d), values[t] (b, g, m_t, e), key_masks[t] bool (b, m_t) or (b, g, m_t), axes as in
        `attend`; lengths may be 0.

    Args:
        keys: One key matrix per mode.
        values: One value matrix per mode.
        spec: What to compute; exact, order = len(keys) when None. Full and Causal mean that a query sees every key of
            the state; Window keeps the last keys, Ordered wants as many tokens in every mode (both exact method only).
        key_masks: Keys that may be attended to, per mode; entries may be None.
        query_bound: Bound on the absolute entries of queries. Polynomial method only: it chooses the degree of a
            tolerance alone, and the interval of minimax coefficients. It is no promise: a certificate is checked at
            every query if there is a tolerance.
        capacity: Keys of each mode that the exact method makes room for at once; it makes more when they are there.

    Raises:
        ShapeError, OperandError: Keys and values that do not fit each other.
        SpecError: A Kronecker score, which needs a weight; a tolerance alone without a query bound.
        UnsupportedProblemError: JAX arrays, or a choice that needs the keys under the polynomial method.

    Cost: polynomial 2 m r (e + 1) flop a mode; exact a copy.
    Numerics: polynomial sums are float64, whatever the operands' dtype.
    Source: docs/decode.md.

    Example:
        >>> import numpy as np
        >>> x = np.eye(4, dtype="float32")
        >>> state = prefill((x[:3], x[:3]), (x[:3], x[:3])).append((x[3:], x[3:]), (x[3:], x[3:]))
        >>> decode(x[3:], state).shape
        (1, 4)
    """
    layout = TokenLayout.of(keys, values)
    spec = resolve_spec(spec, layout.order, weighted=False)
    _check_spec(spec, layout)
    tokens = layout.read(keys, values, key_masks, "keys[0]")
    if spec.polynomial is None:
        from korder.decoding.factor_cache import FactorCache

        room = _checked_capacity(capacity)
        with layout.quiet():
            return FactorCache.empty(spec, layout, tokens, room).extended(tokens)
    from korder.decoding.polynomial_state import PolynomialState

    with layout.quiet():
        return PolynomialState.empty(spec, layout, tokens, query_bound).extended(tokens)


def _check_spec(spec: AttentionSpec, layout: TokenLayout) -> None:
    if spec.order != layout.order:
        raise SpecError(
            "the spec's order must equal the number of key matrices.",
            code="order-mismatch",
            expected=f"{spec.order} key matrices, because the spec says order={spec.order}",
            got=f"{layout.order} key matrices",
            hint="the query does not count: order 2 means two key matrices.",
        )
    if spec.method.kind not in ("exact", "polynomial"):
        raise UnsupportedProblemError(
            "a state is made for one method, before a query is there to choose another by.",
            code="decode-unsupported",
            expected="method Exact() or Polynomial(degree=..)",
            got=f"method={spec.method.kind}",
        )
    if spec.score != "khatri_rao":
        raise SpecError(
            "a state takes no score weight.",
            code="decode-unsupported",
            expected="score='khatri_rao'",
            got=f"score={spec.score!r}",
            hint="project with the CP factors beforehand, query @ factors[0] and keys[t] @ factors[t + 1], and give "
            "the scale as a number.",
        )


def _checked_capacity(capacity: Any) -> int | None:
    if capacity is None:
        return None
    try:
        count = -1 if isinstance(capacity, bool) else operator.index(capacity)
    except TypeError:
        count = -1
    if count < 0:
        raise SpecError("capacity must be a number of keys.", expected="an integer, 0 or more", got=repr(capacity))
    return count


def decode(query: Array, state: DecodeState) -> Array:
    """Return the attention of queries over all keys of a state.

    It equals the rows of `attend` over the same keys whose queries see all of them, as the last row of a causal mask
    does. No gradient is recorded.

    Shapes:  query (b, h, n, d), g of the state divides h; output (b, h, n, e); leading axes as in `attend`.
    Args:
        query: Queries, each of which sees every key of the state: append a token's own key first.
        state: What `prefill` or `append` returned.

    Returns:
        The output, of the query's kind and dtype; zeros where there is nothing to attend to.

    Raises:
        ShapeError, OperandError: A query that does not fit the state, or that asks for a gradient.
        AccuracyError: The spec has a tolerance, and the certificate of these queries misses it.

    Cost: polynomial 2 k r (e + 2) flop, whatever the number of keys, and 2 r (e + 2) for each query; exact
        2 n m1 .. mk (d + e) flop.
    """
    shape, outcome = _answer(query, state, certify=False)
    return _as_given(state, shape, outcome.output.output)


def decode_result(query: Array, state: DecodeState) -> Result:
    """Return what `decode` returns, with lse, the certificate of the polynomial method, and the provenance.

    Arguments, shapes and errors as `decode`; `korder.merge` joins results of states over disjoint keys.
    """
    shape, outcome = _answer(query, state, certify=True)
    certificate = outcome.certificate
    if certificate is not None:
        names = [field.name for field in fields(Certificate) if field.name not in ("kind", "estimate")]
        shaped = {name: _as_given(state, shape, getattr(certificate, name)) for name in names}
        certificate = replace(certificate, **shaped)
    return Result(
        output=_as_given(state, shape, outcome.output.output),
        lse=_as_given(state, shape, outcome.output.lse),
        certificate=certificate,
        provenance=outcome.provenance,
    )


def _answer(query: Array, state: Any, *, certify: bool) -> tuple[tuple[int, ...], Any]:
    if not isinstance(state, DecodeState):
        raise OperandError(
            "the second argument must be a state.",
            code="not-a-state",
            expected="what korder.prefill, append or korder.load_state returns",
            got=type(state).__name__,
            hint="decode(query, state): the query comes first.",
        )
    rows = state.layout.read_query(query)
    with state.layout.quiet():
        return tuple(query.shape), state.answer(rows, certify=certify)


def _as_given(state: DecodeState, query_shape: tuple[int, ...], x: Array) -> Array:
    """(b, h, n, ..) back to the query's own leading axes."""
    return state.layout.namespace.reshape(x, (*query_shape[:-1], *x.shape[3:]))


def load_state(path: str | Path, *, device: Any = None) -> DecodeState:
    """Return the state that `state.save` wrote, of the array kind that it was saved from.

    Args:
        path: The file.
        device: Where the arrays are to live, as their library names it; the library's default when None.

    Raises:
        SpecError: No such file, or one that no `save` wrote, or whose version or contents do not fit.
    """
    from korder.decoding.files import read_state

    return read_state(Path(path), device)
