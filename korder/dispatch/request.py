"""From the arguments of a public function to a request, checked and measured, and from its outcome to a result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from korder.dispatch import rows
from korder.dispatch.arrays import (
    Given,
    checked_backend_name,
    namespace_of_kind,
    on_host,
    read_operands,
    resolve_spec,
    to_kernel_layout,
)
from korder.dispatch.registry import Registry
from korder.dispatch.run import Outcome, Request
from korder.errors import OperandError
from korder.problem import ScoreStatistics, make_problem
from korder.result import ROW_FIELDS, Certificate, Result
from korder.spec import AttentionSpec

Array = Any


def make_request(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    spec: AttentionSpec | None = None,
    weight: Any = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
    statistics: ScoreStatistics | None = None,
    backend: str = "auto",
    measured: bool = True,
) -> tuple[Given, Request]:
    """Return the operands as given and the request that they make.

    Args:
        measured: Whether to measure statistics where the method wants them and none were given; the other arguments
            are those of `korder.attend`.

    Raises:
        ShapeError, SpecError, OperandError: As `korder.attend`.
    """
    given = read_operands(
        query,
        keys,
        values,
        weight=weight,
        biases=biases,
        key_masks=key_masks,
        query_offset=query_offset,
        key_offsets=key_offsets,
    )
    if statistics is not None and not isinstance(statistics, ScoreStatistics):
        raise OperandError(
            "statistics must be what measure returns.", expected="korder.measure(...)", got=repr(statistics)
        )
    spec, backend = resolve_spec(spec, len(given.keys), weighted=weight is not None), checked_backend_name(backend)
    problem = make_problem(spec, given.shapes, given.dtype, given.device, statistics)
    request = Request(problem, to_kernel_layout(given, spec), given.kind, backend)
    if measured and statistics is None and spec.measured:
        request = replace(request, problem=replace(problem, statistics=measure_request(request)))
    return given, request


def measure_request(request: Request) -> ScoreStatistics:
    """Return the statistics of a request's scores; those without outliers too, where the method may set them aside."""
    from korder.methods import outliers, statistics

    xp, (operands,) = on_host(request.array_kind, request.operands)
    measure = outliers.measure_levels if request.problem.spec.chooses else statistics.measure
    return measure(xp, request.problem, operands)


def as_given(given: Given, array: Array) -> Array:
    """(b, h, n, ..) back to the query's own leading axes."""
    if len(given.shapes.query) == 4:
        return array
    return namespace_of_kind(given.kind).reshape(array, (*given.shapes.query[:-1], *array.shape[3:]))


def certificate_as_given(given: Given, certificate: Certificate) -> Certificate:
    """Return a certificate in the query's own leading axes."""
    return replace(certificate, **{name: as_given(given, getattr(certificate, name)) for name in ROW_FIELDS})


def make_result(registry: Registry, given: Given, request: Request, outcome: Outcome) -> Result:
    """Return an outcome as the user sees it, with the rows that the method wants to have estimated."""
    certificate = outcome.certificate
    method = request.problem.spec.polynomial
    if certificate is not None and method is not None:
        certificate = certificate_as_given(given, certificate)
        if method.estimate_rows:
            measured = rows.estimate(registry, request, outcome.output, method.estimate_rows)
            certificate = replace(certificate, estimate=measured)
    return Result(
        output=as_given(given, outcome.output.output),
        lse=as_given(given, outcome.output.lse),
        certificate=certificate,
        provenance=outcome.provenance,
    )
