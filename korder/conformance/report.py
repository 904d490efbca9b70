"""A report as plain values for a file, and as a table that a person can read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from korder.conformance.levels import CHECKS
from korder.conformance.records import STATUSES, Ending, Report

_SHOWN = 20


def report_record(report: Report) -> dict[str, Any]:
    """Return a report as plain values."""
    return {
        "backend": report.backend,
        "kit_version": report.kit_version,
        "korder_version": report.korder_version,
        "depth": report.depth,
        "places": list(report.places),
        "machine": report.machine,
        "seconds": round(report.seconds, 3),
        "passed": not report.failed,
        "verified": report.verified,
        "counts": report.counts(),
        "items": [asdict(ending) | {"seconds": round(ending.seconds, 4)} for ending in report.endings],
    }


def write_report(report: Report, path: Path) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report_record(report), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def report_text(report: Report) -> str:
    """Return a report as text: who and where, one line per check, then what failed and why."""
    lines = [
        f"backend {report.backend}, {', '.join(report.places)}; {report.machine}",
        f"kit {report.kit_version}, korder {report.korder_version}, {report.depth} level, {report.seconds:.1f} s",
        "",
        _row(("", "check", *STATUSES, "seconds")),
    ]
    for check in CHECKS:
        own = [ending for ending in report.endings if ending.number == check.number]
        if own:
            lines.append(_row((check.number, check.id, *_numbers(own), f"{sum(e.seconds for e in own):.2f}")))
    for level, counts in report.counts().items():
        lines.append(_row(("", f"all of {level}", *(str(counts[status]) for status in STATUSES), "")))
    for status in ("failed", "expected", "unverified"):
        lines += _details(status, [ending for ending in report.endings if ending.status == status])
    lines += ["", _verdict(report)]
    return "\n".join(lines)


def _numbers(endings: list[Ending]) -> tuple[str, ...]:
    counts = [sum(ending.status == status for ending in endings) for status in STATUSES]
    return tuple(str(count) if count else "-" for count in counts)


def _row(cells: tuple[str, ...]) -> str:
    first, name, *rest = cells
    return f"{first:<6}{name:<24}" + "".join(f"{cell:>11}" for cell in rest)


def _details(status: str, endings: list[Ending]) -> list[str]:
    if not endings:
        return []
    lines = ["", f"{status}:"]
    for ending in endings[:_SHOWN]:
        lines.append(f"  {ending.number} {ending.id}")
        lines += [f"    {line}" for line in ending.message.splitlines()]
    if len(endings) > _SHOWN:
        lines.append(f"  and {len(endings) - _SHOWN} more; --report FILE holds them all")
    return lines


def _verdict(report: Report) -> str:
    if report.failed:
        return f"{report.backend} does not conform: {len(report.failed)} of {len(report.endings)} items failed"
    if not report.verified:
        return f"nothing of {report.backend} could be verified here"
    return f"{report.backend} conforms in everything that could be verified here"
