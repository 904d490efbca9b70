"""The backends that ship with korder conform, so do the generic kernels over another library, and the page agrees."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from korder.conformance import parametrize_with_checks, report_text, run_conformance
from korder.conformance.levels import CHECKS
from korder.dispatch.registry import default_registry
from korder.spi import Capabilities, NamespaceBackend

PAGE = Path(__file__).resolve().parents[1] / "docs" / "backends" / "conformance.md"


class StrictBackend(NamespaceBackend):
    """The generic kernels over the strictest Array API namespace."""

    name: ClassVar[str] = "strict"
    array_kinds: ClassVar[frozenset[str]] = frozenset({"array_api_strict"})

    def namespace(self) -> Any:
        import array_api_strict

        return array_api_strict


@parametrize_with_checks(default_registry().get("numpy"))
def test_numpy(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(default_registry().get("torch"))
def test_torch(check: Callable[[], None]) -> None:
    check()


def test_strict_namespace_passes_the_core_level() -> None:
    report = run_conformance(StrictBackend(), only="core")
    assert not report.failed, report_text(report)
    counts = report.counts()["core"]
    assert counts["passed"] > 15
    assert counts["unverified"] == 1  # it comes from no entry point


def test_everything_stays_on_the_device_of_the_operands() -> None:
    import array_api_strict as strict

    class Narrow(StrictBackend):
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities(), orders=frozenset({2}), dtypes=frozenset({"float64"}))

    def to_array(x: Any, dtype: str, _: str) -> Any:
        return strict.asarray(x, dtype=getattr(strict, dtype), device=strict.Device("device1"))

    def from_array(x: Any) -> Any:
        assert x.device == strict.Device("device1")
        return np.asarray(x.to_device(strict.Device("CPU_DEVICE")))

    for only in ("value.core", "edge.length_zero", "polynomial.output", "polynomial.certificate", "edge.nothing_live"):
        report = run_conformance(Narrow(), only=only, to_array=to_array, from_array=from_array)
        assert not report.failed, report_text(report)


@pytest.mark.parametrize("check", ["gradient.lse", "gradient.operands", "polynomial.output", "polynomial.gradient"])
def test_strict_namespace_runs_both_methods_forward_and_backward(check: str) -> None:
    # the walks of full and causal are in those of the others but for the products
    narrow = {"masks": frozenset({"full", "causal"})}
    if check == "polynomial.gradient":
        narrow = {"masks": frozenset({"window", "ordered"}), "weights": frozenset()}

    class Narrow(StrictBackend):
        def capabilities(self) -> Capabilities:
            facts = super().capabilities()
            methods = tuple(replace(x, **narrow) if x.name == "polynomial" else x for x in facts.methods)
            return replace(facts, orders=frozenset({2}), dtypes=frozenset({"float64"}), methods=methods)

    report = run_conformance(Narrow(), only=check)
    assert not report.failed, report_text(report)
    assert report.counts()["claimed"]["passed"] >= 2


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_every_claimed_combination(name: str) -> None:
    report = run_conformance(default_registry().get(name), depth="full")
    assert not report.failed, report_text(report)


def test_page_lists_every_behaviour_as_the_code_has_it() -> None:
    rows = re.findall(r"^\| (C\d+\.\d+) \| `([a-z_.]+)` \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [(check.number, check.id, check.behaviour) for check in CHECKS]


def test_numbers_count_up_within_each_chapter() -> None:
    chapters: dict[str, list[int]] = {}
    for check in CHECKS:
        chapter, number = check.number.split(".")
        chapters.setdefault(chapter, []).append(int(number))
    assert list(chapters) == ["C1", "C2", "C3", "C4", "C5", "C6"]
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in chapters.values())
    assert len({check.id for check in CHECKS}) == len(CHECKS)
