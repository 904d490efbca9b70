"""`attend` and `attend_result` for JAX arrays: those that hold numbers go the common way, traced ones through the node.

What depends on data (a tolerance, the certificate) needs numbers; under tracing it is refused or left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from korder.dispatch.registry import default_registry
from korder.dispatch.request import as_given, make_request, make_result
from korder.dispatch.run import Outcome, Request, run
from korder.errors import UnsupportedProblemError
from korder.jax.node import traced_rows
from korder.problem import ScoreStatistics
from korder.result import Certificate, Provenance, Result
from korder.spec import AttentionSpec

Array = Any

jax.tree_util.register_dataclass(Result, ["output", "lse", "certificate"], ["provenance"])
jax.tree_util.register_dataclass(
    Certificate, ["bound", "approximation", "rounding", "lse_bound", "score_range", "estimate"], ["kind"]
)


def attend(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    spec: AttentionSpec | None = None,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | Array | None = None,
    key_offsets: Sequence[int | Array] | None = None,
    statistics: ScoreStatistics | None = None,
    backend: str = "auto",
) -> Array:
    """Return order-k attention of JAX arrays; as `korder.attend`, which comes here for them, and differentiable.

    Gradients reach query, keys, values, biases and weight, in reverse mode, of any order. Statistics of the polynomial
    method are constants. Offsets may be traced integers, so one compiled function serves every shard.

    Raises:
        UnsupportedProblemError: A tolerance without `statistics` under tracing, or a backend that cannot be traced;
            else as `korder.attend`.

    Cost: backward is three times the forward's flop for the exact method; second derivatives keep what every tile was
        given.
    """
    given, request = _request(
        query, keys, values, spec, weight, biases, key_masks, query_offset, key_offsets, statistics, backend
    )
    if _is_traced(request):
        return as_given(given, traced_rows(request)[0])
    return as_given(given, _run(request, certify=False).output.output)


def attend_result(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    spec: AttentionSpec | None = None,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | Array | None = None,
    key_offsets: Sequence[int | Array] | None = None,
    statistics: ScoreStatistics | None = None,
    backend: str = "auto",
) -> Result:
    """Return what `attend` returns with lse, differentiable as well, the certificate and the provenance.

    Under tracing there is no certificate: it depends on numbers. A result may be returned from a `jit` function.
    """
    given, request = _request(
        query, keys, values, spec, weight, biases, key_masks, query_offset, key_offsets, statistics, backend
    )
    if _is_traced(request):
        output, lse, selection = traced_rows(request)
        provenance = Provenance(selection.backend.name, selection.plan, selection.rejected)
        return Result(as_given(given, output), as_given(given, lse), None, provenance)
    with jax.enable_x64(True):
        outcome = _run(request, certify=True)
        result = jax.tree.map(jnp.asarray, make_result(default_registry(), given, request, outcome))
    return result if jax.config.jax_enable_x64 else _narrowed(result)


def _request(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    spec: AttentionSpec | None,
    weight: Any,
    biases: Any,
    key_masks: Any,
    query_offset: Any,
    key_offsets: Any,
    statistics: ScoreStatistics | None,
    backend: str,
) -> tuple[Any, Request]:
    """Return the operands as given and the request, its offsets as they came, its statistics measured if need be."""
    known_offsets = key_offsets
    if isinstance(key_offsets, (tuple, list)):
        known_offsets = tuple(map(_known, key_offsets))
    given, request = make_request(
        query,
        keys,
        values,
        spec=spec,
        weight=weight,
        biases=biases,
        key_masks=key_masks,
        query_offset=_known(query_offset),
        key_offsets=known_offsets,
        statistics=statistics,
        backend=backend,
        measured=False,
    )
    operands = request.operands
    if isinstance(query_offset, jax.core.Tracer):
        operands = replace(operands, query_offset=query_offset)
    if known_offsets is not key_offsets:
        pairs = zip(operands.key_offsets, key_offsets, strict=True)
        operands = replace(
            operands, key_offsets=tuple(x if isinstance(x, jax.core.Tracer) else known for known, x in pairs)
        )
    request = replace(request, operands=operands)
    return given, _measured(request, statistics)


def _known(offset: Any) -> Any:
    """Return an offset that has a number, 0 in place of a traced one."""
    return 0 if isinstance(offset, jax.core.Tracer) else offset


def _measured(request: Request, statistics: ScoreStatistics | None) -> Request:
    """Return the request with the statistics that its method wants."""
    spec = request.problem.spec
    if spec.chooses:
        raise UnsupportedProblemError(
            f"method {type(spec.method).__name__} is not there for JAX arrays yet.",
            code="method-unsupported",
            expected="Exact(), or Polynomial(degree=... or tolerance=...)",
            got=f"method={spec.method.kind}",
            hint="numpy.asarray(array) goes through NumPy, without gradients.",
        )
    if statistics is not None or not spec.measured:
        return request
    if _is_traced(request):
        wanted = "prune=..." if spec.tolerance is None else f"tolerance={spec.tolerance:g}"
        raise UnsupportedProblemError(
            "a tolerance, or pruning, depends on numbers, which traced arrays do not have.",
            code="traced-tolerance",
            expected="Polynomial(degree=...), or statistics= of such operands",
            got=f"{type(spec.method).__name__}({wanted}) under jit, vmap or grad",
            hint="statistics = korder.measure(...) outside, then statistics=statistics here; the result is unchecked.",
        )
    from korder.dispatch.request import measure_request

    return replace(request, problem=replace(request.problem, statistics=measure_request(request)))


def _is_traced(request: Request) -> bool:
    operands = request.operands
    arrays = [operands.query, operands.keys, operands.values, operands.biases, operands.key_masks, operands.weight]
    leaves = jax.tree.leaves([*arrays, operands.query_offset, operands.key_offsets])
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _run(request: Request, *, certify: bool) -> Outcome:
    # Certificates are float64 whatever the operands are.
    with jax.enable_x64(True):
        return run(default_registry(), request, certify=certify)


def _narrowed(result: Result) -> Result:
    """Return a result without float64 arrays, which are a nuisance while jax_enable_x64 is off; bounds stay bounds."""
    certificate = result.certificate
    if certificate is not None:
        names = ("bound", "approximation", "rounding", "lse_bound")
        bounds = {name: _rounded(getattr(certificate, name), jnp.inf) for name in names}
        low, high = certificate.score_range[..., 0], certificate.score_range[..., 1]
        ends = jnp.stack([_rounded(low, -jnp.inf), _rounded(high, jnp.inf)], axis=-1)
        estimate = None if certificate.estimate is None else _float32(certificate.estimate)
        certificate = replace(certificate, **bounds, score_range=ends, estimate=estimate)
    return replace(result, lse=_float32(result.lse), certificate=certificate)


def _float32(x: Array) -> Array:
    with jax.enable_x64(True):
        return x.astype(jnp.float32) if x.dtype == jnp.float64 else x


def _rounded(x: Array, towards: float) -> Array:
    """Return x in float32, rounded to one side."""
    with jax.enable_x64(True):
        near = x.astype(jnp.float32)
        wrong = near.astype(x.dtype) < x if towards > 0 else near.astype(x.dtype) > x
        return jnp.where(wrong, jnp.nextafter(near, jnp.float32(towards)), near)
