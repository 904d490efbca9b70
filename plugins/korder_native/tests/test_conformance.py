"""The kit of korder itself: all of its quick level on the best instruction set here, its core on every other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from reference import ALL_ISAS

from korder.conformance import parametrize_with_checks, run_conformance
from korder.conformance.report import report_text
from korder_native.backend import NativeBackend


@parametrize_with_checks(NativeBackend())
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("isa", ALL_ISAS[1:])
@pytest.mark.parametrize("part", ["core", "value.together", "gradient.masks", "edge.large_scores"])
def test_another_instruction_set(isa: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORDER_NATIVE_ISA", isa)
    report = run_conformance(NativeBackend(), only=part)
    assert report.verified, report_text(report)
