"""The conformance kit, by which a backend proves itself: numbered checks of what it claims."""

from __future__ import annotations

from korder.conformance.pytest_plugin import parametrize_with_checks
from korder.conformance.records import KIT_VERSION, Ending, Report
from korder.conformance.report import report_record, report_text, write_report
from korder.conformance.run import run_conformance

__all__ = [
    "KIT_VERSION",
    "Ending",
    "Report",
    "parametrize_with_checks",
    "report_record",
    "report_text",
    "run_conformance",
    "write_report",
]
