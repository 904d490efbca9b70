"""A report as plain values: what result.json says, what the array file holds."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from korder.experiments.attend import Report
from korder.experiments.machine import describe_machine
from korder.experiments.placement import to_numpy
from korder.result import Certificate


def record_of(report: Report) -> dict[str, Any]:
    """Return everything about a run but its arrays, ready for JSON."""
    provenance = report.result.provenance
    assert provenance is not None
    return {
        "passed": report.passed,
        "checks": [asdict(check) for check in report.checks],
        "answer": report.answer,
        "warnings": report.warnings,
        "spec": report.run.model_dump(mode="json"),
        "problem": provenance.plan.problem.describe(),
        "plan": provenance.plan.explain(),
        "cost": asdict(provenance.plan.cost),
        "backend": provenance.backend,
        "rejected": [str(rejection) for rejection in provenance.rejected],
        "replanned": list(provenance.replanned),
        "certificate": certificate_summary(report.result.certificate),
        "measured_rows": _measured(report),
        "exact_would_need": _exact_need(report),
        "timings": report.timings,
        "machine": describe_machine(),
    }


def arrays_of(report: Report) -> dict[str, Any]:
    """Return the arrays of a run by name."""
    result = report.result
    arrays: dict[str, Any] = {"output": to_numpy(result.output), "lse": to_numpy(result.lse)}
    if result.certificate is not None:
        for name in ("bound", "approximation", "rounding", "lse_bound", "score_range"):
            arrays[name] = to_numpy(getattr(result.certificate, name))
    if report.measured is not None:
        arrays["measured_positions"] = np.asarray(report.measured.positions, dtype=np.int64)
        arrays["measured_errors"] = report.measured.errors
    return arrays


def certificate_summary(certificate: Certificate | None) -> dict[str, Any] | None:
    """Return the largest and the median bound, and what they are made of; None for an exact result."""
    if certificate is None:
        return None
    ranges, bound = to_numpy(certificate.score_range), to_numpy(certificate.bound)
    return {
        "kind": certificate.kind,
        "bound_largest": _largest(certificate.bound),
        "bound_median": _number(np.median(bound)) if bound.size else None,
        "approximation_largest": _largest(certificate.approximation),
        "rounding_largest": _largest(certificate.rounding),
        "lse_bound_largest": _largest(certificate.lse_bound),
        "score_low": _number(ranges[..., 0].min()) if ranges.size else None,
        "score_high": _number(ranges[..., 1].max()) if ranges.size else None,
    }


def _largest(array: Any) -> float | str | None:
    plain = to_numpy(array)
    return _number(plain.max()) if plain.size else None


def _number(value: Any) -> float | str:
    """JSON has no infinities, so they are written as text."""
    number = float(value)
    return number if np.isfinite(number) else str(number)


def _measured(report: Report) -> dict[str, Any] | None:
    if report.measured is None:
        return None
    return {
        "positions": list(report.measured.positions),
        "errors": [_number(error) for error in report.measured.errors],
        "certified": [_number(bound) for bound in report.measured.bounds],
        "seconds": report.measured.seconds,
    }


def _exact_need(report: Report) -> dict[str, Any] | None:
    need = report.exact_need
    if need is None:
        return None
    return {
        "flops": need.plan.cost.flops,
        "exponentials": need.plan.cost.exponentials,
        "workspace_bytes": need.plan.cost.peak_memory,
        "flop_per_second": need.flop_per_second,
        "seconds_at_least": need.seconds,
    }
