"""The public functions: arrays in, arrays and provenance out. Everything here is thin; the work is behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from korder.dispatch.arrays import (
    Given,
    array_kind,
    checked_shape,
    dtype_name,
    each_mode,
    namespace_of_kind,
    resolve_spec,
)
from korder.dispatch.registry import BackendStatus, default_registry
from korder.dispatch.request import as_given, make_request, make_result, measure_request
from korder.dispatch.run import Request, run
from korder.errors import OperandError, ShapeError
from korder.methods import merging
from korder.planning.candidates import candidate_plans
from korder.planning.plan import Plan
from korder.problem import ScoreStatistics, Shapes, make_problem
from korder.result import Result
from korder.spec import AttentionSpec
from korder.spi.backend import Backend

Array = Any


def attend(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    spec: AttentionSpec | None = None,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
    statistics: ScoreStatistics | None = None,
    backend: str = "auto",
) -> Array:
    """Return order-k attention of `query` over all tuples of `keys`.

    Shapes:
        query (b, h, n, d); keys[t] (b, g, m_t, d); values[t] (b, g, m_t, e), g divides h; output (b, h, n, e).
        Axis -3 is the head axis, axes before it are batch and equal everywhere; 2-D operands are one head.
        key_masks[t] bool (b, m_t) or (b, g, m_t), True = may be attended to.
        biases[t] (b, h, n, m_t), or with 1 in any axis but the last.
        weight (d, d1, .., dk) or a tuple of k + 1 CP factors (d_t, rank), for score="kronecker".

    Args:
        query: Queries.
        keys: One key matrix per mode.
        values: One value matrix per mode.
        spec: What to compute; exact, full, order = len(keys) when None.
        weight: Score weight of the Kronecker form.
        biases: Added to the score, per mode; entries may be None.
        key_masks: Keys that may be attended to, per mode; entries may be None.
        query_offset: Position of the first query.
        key_offsets: Position of the first key of each mode.
        statistics: Measured before, with `measure`; else measured here when the method asks for it.
        backend: A backend name, which then runs it or raises, or "auto".

    Returns:
        The output, of the operands' kind, dtype and leading axes; zeros for a query with nothing to attend to.

    Raises:
        ShapeError: Shapes that do not fit.
        OperandError: Wrong dtype, array kind or device.
        UnsupportedProblemError: Nothing installed can run it.
        AccuracyError: The certificate of the polynomial method misses its tolerance.

    Cost: exact 2 n m1 .. mk (d + e) flop; polynomial 2 (k + 1) n r (e + 1) flop, r = C(d + degree, degree).
    Numerics: Summed in float32 or wider; masked keys never matter, not even NaN.
    Source: order 2: Alman & Song, arXiv 2310.04064.

    Example:
        >>> import numpy as np
        >>> x = np.ones((4, 3), "float32")
        >>> attend(x, (x, x), (x, x)).shape
        (4, 3)
    """
    door = _door(query)
    if door is not None:  # that of the arrays' framework, so that nothing is silently not differentiable
        return door.attend(
            query,
            keys,
            values,
            spec=spec,
            weight=weight,
            biases=biases,
            key_masks=key_masks,
            query_offset=query_offset,
            key_offsets=key_offsets,
            statistics=statistics,
            backend=backend,
        )
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
        statistics=statistics,
        backend=backend,
    )
    if request.problem.spec.chooses:
        return _chosen(given, request).output
    return as_given(given, run(default_registry(), request).output.output)


def _chosen(given: Given, request: Request) -> Result:
    """Return the result of a method that chooses; other calls do not pay for loading what it measures with."""
    from korder.dispatch.choosing import run_choice

    return run_choice(default_registry(), attend_result, given, request)


def _door(query: Array) -> Any:
    """Return the module with the functions for arrays of a framework, None where there is none."""
    # A plain tensor is known by its module, a question that a compiler can trace.
    kind = "torch" if type(query).__module__.startswith("torch") else array_kind(query, "query")
    if kind == "torch":
        import korder.torch.functional as door
    elif kind == "jax":
        import korder.jax.functional as door  # type: ignore[no-redef]
    else:
        return None
    return door


def attend_result(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    spec: AttentionSpec | None = None,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
    statistics: ScoreStatistics | None = None,
    backend: str = "auto",
) -> Result:
    """Return what `attend` returns, with lse, the certificate of an approximate method, and the provenance.

    Arguments, shapes and errors as `attend`; lse has the query's leading axes and length.
    """
    door = _door(query)
    if door is not None:
        result: Result = door.attend_result(
            query,
            keys,
            values,
            spec=spec,
            weight=weight,
            biases=biases,
            key_masks=key_masks,
            query_offset=query_offset,
            key_offsets=key_offsets,
            statistics=statistics,
            backend=backend,
        )
        return result
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
        statistics=statistics,
        backend=backend,
    )
    registry = default_registry()
    if request.problem.spec.chooses:
        return _chosen(given, request)
    return make_result(registry, given, request, run(registry, request, certify=True))


def plan(
    spec: AttentionSpec | None = None,
    *,
    query: tuple[int, ...],
    keys: Sequence[tuple[int, ...]],
    values: Sequence[tuple[int, ...]],
    weight: Any = None,
    biases: Sequence[tuple[int, ...] | None] | None = None,
    key_masks: Sequence[tuple[int, ...] | None] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    statistics: ScoreStatistics | None = None,
) -> tuple[Plan, ...]:
    """Return the ranked plans for operands of these shapes; no array is needed. `print(plan(...)[0].explain())`.

    Shapes: as `attend`, given as tuples of integers, or as the arrays themselves.
    Raises: ShapeError, SpecError, UnsupportedProblemError: as `attend`.
    """
    keys, values = each_mode(keys, "keys"), each_mode(values, "values")
    spec = resolve_spec(spec, len(keys), weighted=weight is not None)
    shapes = Shapes(
        query=checked_shape(query, "query"),
        keys=tuple(checked_shape(key, f"keys[{t}]") for t, key in enumerate(keys)),
        values=tuple(checked_shape(value, f"values[{t}]") for t, value in enumerate(values)),
        weight=_weight_shape(weight),
        biases=_optional_shapes(biases, "biases"),
        key_masks=_optional_shapes(key_masks, "key_masks"),
        # Positions are run-time operands, so a plan does not ask for them.
        offsets_given=getattr(spec.mask, "align", None) is None,
    )
    return candidate_plans(make_problem(spec, shapes, str(dtype), device, statistics))


def measure(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    spec: AttentionSpec | None = None,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
) -> ScoreStatistics:
    """Return the score range and moments that planning may use, rounded outward to two digits.

    Cost: O(k n d). Pass the result as `statistics=` where arrays cannot be looked at (tracing).
    Source: the bounds are those of docs/method_polynomial.md.
    """
    _, request = make_request(
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
    return measure_request(request)


def merge(results: Sequence[Result]) -> Result:
    """Return the result over all tuples from results over disjoint sets of tuples, by their lse.

    Parts may come from key masks, offsets, or any other cut of the tuples, and from different methods and backends;
    that the sets are disjoint is the caller's to know. The certificate, if any part has one, bounds the merged error
    beyond the rounding of exact parts.

    Shapes:
        every part output (b, h, n, e) and lse (b, h, n), the same for all; so is the result.

    Raises:
        ShapeError: No part, or parts of different shapes.
        OperandError: Parts of different kinds or dtypes.

    Example:
        >>> import numpy as np
        >>> x = np.eye(4, dtype="float32")
        >>> parts = [attend_result(x, (x, half), (x, half)) for half in (x[:2], x[2:])]
        >>> bool(np.allclose(merge(parts).output, attend(x, (x, x), (x, x))))
        True
    """
    parts = _checked_parts(results)
    xp = namespace_of_kind(array_kind(parts[0].output))
    output, lse = merging.merge_outputs(xp, [part.output for part in parts], [part.lse for part in parts])
    return Result(output, lse, merging.merge_certificates(xp, parts, lse))


def _checked_parts(results: Any) -> tuple[Result, ...]:
    parts = tuple(results) if isinstance(results, Iterable) else (results,)
    for index, part in enumerate(parts):
        if not isinstance(part, Result) or not isinstance(results, Iterable):
            raise OperandError(
                "merge takes a sequence of results of attend_result.",
                code="not-a-result",
                expected="[korder.attend_result(...), ...]",
                got=f"{type(part).__name__} at position {index}" if part is not results else type(results).__name__,
            )
    if not parts:
        raise ShapeError("there is nothing to merge.", code="parts-missing", expected="at least one result", got="none")
    first = parts[0]
    for index, part in enumerate(parts):
        for name in ("output", "lse"):
            array, model = getattr(part, name), getattr(first, name)
            if array.shape != model.shape:
                raise ShapeError(
                    f"{name} of results[{index}] has another shape than that of results[0].",
                    expected=str(tuple(model.shape)),
                    got=str(tuple(array.shape)),
                )
            found, wanted = [array_kind(array), dtype_name(array)], [array_kind(model), dtype_name(model)]
            if name == "lse":  # float32 from one method, float64 from another
                found, wanted = found[:1], wanted[:1]
            if found != wanted:
                raise OperandError(
                    f"{name} of results[{index}] is of another kind than that of results[0].",
                    expected=" ".join(wanted),
                    got=" ".join(found),
                )
    return parts


def backends() -> tuple[BackendStatus, ...]:
    """Return every backend, whether it can run here and why not, then the plugins that failed to load."""
    return default_registry().status()


def register_backend(backend: Backend) -> None:
    """Register a backend for this process, as a notebook or a test does; distributions use entry points.

    Raises:
        PluginLoadError: Not a Backend, another contract version, or a name that is taken.
    """
    default_registry().register(backend)


def _weight_shape(weight: Any) -> Any:
    if weight is None:
        return None
    if hasattr(weight, "shape") or all(isinstance(size, int) for size in weight):
        return checked_shape(weight, "weight")
    return tuple(checked_shape(factor, f"weight[{t}]") for t, factor in enumerate(weight))


def _optional_shapes(shapes: Any, name: str) -> tuple[tuple[int, ...] | None, ...]:
    if shapes is None:
        return ()
    named = enumerate(each_mode(shapes, name))
    return tuple(None if shape is None else checked_shape(shape, f"{name}[{t}]") for t, shape in named)
