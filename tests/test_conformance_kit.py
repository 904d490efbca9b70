"""How items end, and what the front ends make of it: strict expectations, unverified places, reports, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import array_api_strict
import numpy as np
import pytest

from korder.conformance import KIT_VERSION, Report, report_record, report_text, run_conformance
from korder.conformance.levels import CHECKS
from korder.dispatch import registry
from korder.dispatch.plugins import Loaded, Origin
from korder.dispatch.registry import Registry, default_registry
from korder.errors import SpecError
from korder.spi import Availability, NamespaceBackend
from tests.command_line import call
from tests.mutants import Mutant
from tests.mutants_contract import CONTRACT
from tests.mutants_forward import FORWARD

NUMPY = default_registry().get("numpy")
NAME = "contract.name"
CAUSAL = "value.masks[exact order=1 causal float64]"


def statuses(report: Report) -> set[str]:
    return {ending.status for ending in report.endings}


def test_an_expected_failure_that_fails_is_expected() -> None:
    wrong = FORWARD["causal off by one"].backend()
    failed = run_conformance(wrong, only="value.masks").failed
    assert 0 < len(failed) < 18
    reasons = {ending.id: "the mask is being rewritten" for ending in failed}
    report = run_conformance(wrong, only="value.masks", expected_failures=reasons)
    assert not report.failed
    assert report.counts()["claimed"]["expected"] == len(failed)
    assert "the mask is being rewritten" in report_text(report)


@pytest.mark.parametrize("key", ["value.masks", CAUSAL])
def test_an_expected_failure_that_passes_fails(key: str) -> None:
    report = run_conformance(NUMPY, only="value.masks", expected_failures={key: "once wrong"})
    assert {ending.id for ending in report.failed} >= {CAUSAL}
    assert all("was expected to fail: once wrong" in ending.message for ending in report.failed)


@pytest.mark.parametrize("expected", [{"value.mask": "misspelt"}, {NAME: ""}])
def test_expected_failures_must_exist_and_have_a_reason(expected: dict[str, str]) -> None:
    with pytest.raises(SpecError, match="expected failure"):
        run_conformance(NUMPY, only=NAME, expected_failures=expected)


def test_an_unknown_depth_is_refused() -> None:
    with pytest.raises(SpecError, match="unknown depth"):
        run_conformance(NUMPY, depth="deep")


def test_a_backend_that_cannot_run_here_is_unverified() -> None:
    away = Mutant("", (), facts={"availability": lambda self: Availability.no("no such chip", "buy one")}).backend()
    report = run_conformance(away)
    assert not report.failed
    assert not report.verified
    assert {ending.status for ending in report.endings if not ending.static} == {"unverified"}
    assert "nothing of mutant could be verified here" in report_text(report)
    by_id = {ending.id.split("[")[0]: ending for ending in report.endings}
    assert by_id["value.core"].status == "unverified"
    assert "no such chip" in by_id["value.core"].message
    assert by_id["contract.core"].status == "passed"
    assert by_id["contract.refuses"].status == "refused"


def test_availability_that_raises_is_a_failure_of_its_check_alone() -> None:
    def broken(self: NamespaceBackend) -> Any:
        raise OSError("no driver")

    report = run_conformance(Mutant("", (), facts={"availability": broken}).backend(), only="core")
    assert [ending.id for ending in report.failed] == ["contract.availability"]


def claiming(**changes: Any) -> NamespaceBackend:
    facts = replace(NamespaceBackend().capabilities(), **changes)
    return Mutant("", (), facts={"capabilities": lambda self: facts}).backend()


def test_an_absent_device_is_unverified_and_the_present_one_is_not() -> None:
    report = run_conformance(claiming(devices=frozenset({"cpu", "cuda"})), only="value.core")
    by_device = {"cuda" in ending.id: ending.status for ending in report.endings}
    assert by_device == {False: "passed", True: "unverified"}
    assert report.places == ("numpy on cpu", "numpy on cuda")


def test_narrow_claims_are_enough_and_all_else_must_be_refused() -> None:
    exact = replace(NamespaceBackend().capabilities().methods[0], masks=frozenset({"full"}), biases=frozenset(),
                    weights=frozenset(), key_masks=False, backward=False)  # fmt: skip
    narrow = claiming(
        orders=frozenset({1, 2, 3}), dtypes=frozenset({"float32"}), methods=(exact,), grouped_heads=False,
        accumulation=frozenset({"float32"}),
    )  # fmt: skip
    report = run_conformance(narrow)
    assert not report.failed, report_text(report)
    refused = {ending.id for ending in report.endings if ending.status == "refused"}
    told = " ".join(sorted(refused))
    for what in ("order 4", "dtype float64", "causal mask", "key biases", "cp weight", "key masks", "grouped heads",
                 "method polynomial", "device nowhere", "float32 sums in float64"):  # fmt: skip
        assert f"not {what}]" in told, what
    checks = {ending.id.split(".")[0] for ending in report.endings if "[" in ending.id}
    assert checks == {"contract", "value", "relation", "edge"}


def test_a_kernel_that_raises_fails_its_item_and_stops_no_other() -> None:
    report = run_conformance(FORWARD["empty refused"].backend(), only="edge.*")
    assert {ending.id.split("[")[0] for ending in report.failed} == {"edge.length_zero", "edge.no_batch"}
    assert "ZeroDivisionError: a launch grid of size 0" in report.failed[0].message


def test_arrays_of_an_unknown_kind_come_through_functions() -> None:
    made: list[str] = []

    def to_array(x: Any, dtype: str, device: str) -> Any:
        made.append(f"{dtype} on {device}")
        return array_api_strict.asarray(x, dtype=getattr(array_api_strict, dtype))

    facts = {"array_kinds": frozenset({"mine"}), "namespace": lambda self: array_api_strict}
    backend = Mutant("", (), facts=facts).backend()
    report = run_conformance(backend, only="value.core", to_array=to_array, from_array=np.asarray)
    assert statuses(report) == {"passed"}, report_text(report)
    assert set(made) == {"float64 on cpu"}
    without = run_conformance(backend, only="value.core")
    assert statuses(without) == {"unverified"}


def test_the_record_has_what_a_reader_wants() -> None:
    report = run_conformance(NUMPY, only="contract.*")
    record = json.loads(json.dumps(report_record(report)))
    assert (record["backend"], record["kit_version"], record["depth"]) == ("numpy", KIT_VERSION, "quick")
    assert record["places"] == ["numpy on cpu"]
    assert record["passed"]
    assert set(record["counts"]) == {"core", "claimed"}
    assert set(record["counts"]["core"]) == {"passed", "failed", "expected", "unverified", "refused"}
    assert sum(sum(counts.values()) for counts in record["counts"].values()) == len(record["items"])
    assert set(record["items"][0]) == {"id", "number", "level", "status", "seconds", "message", "static"}
    text = report_text(report)
    assert "C1.9  contract.inputs" in text
    assert "numpy conforms" in text


@pytest.fixture
def mutant_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CONTRACT["claims too little"].backend()
    own = Registry([Loaded(backend, Origin("test"))])
    monkeypatch.setattr(registry, "default_registry", lambda: own)
    # one chapter is enough to see the command end
    import korder.conformance.run as run

    few = tuple(check for check in CHECKS if check.level == "core" and check.id != "contract.import")
    monkeypatch.setattr(run.collect, "__kwdefaults__", {**(run.collect.__kwdefaults__ or {}), "checks": few})


@pytest.mark.usefixtures("mutant_registry")
def test_the_command_fails_where_a_check_fails(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    result = call("conformance", "mutant", "--report", str(file))
    assert result.exit_code == 1
    assert "core: orders 1, 2 and 3 are claimed." in result.stdout
    assert "mutant does not conform" in result.stdout
    record = json.loads(file.read_text())
    assert not record["passed"]
    in_json = call("conformance", "mutant", "--format", "json")
    assert in_json.exit_code == 1
    assert json.loads(in_json.stdout)["counts"] == record["counts"]


@pytest.mark.usefixtures("mutant_registry")
def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    unknown = call("conformance", "mutamt", "--format", "json")
    assert (unknown.exit_code, json.loads(unknown.stderr)["code"]) == (2, "backend-unknown")
    nothing = call("conformance", "mutant", "--only", "values.*", "--format", "json")
    assert (nothing.exit_code, json.loads(nothing.stderr)["code"]) == (2, "check-unknown")
    nowhere = call("conformance", "mutant", "--report", str(tmp_path / "no" / "report.json"), "--format", "json")
    assert (nowhere.exit_code, json.loads(nowhere.stderr)["code"]) == (2, "report-path")


def test_the_command_says_when_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    away = Mutant("", (), facts={"availability": lambda self: Availability.no("no such chip")}).backend()
    monkeypatch.setattr(registry, "default_registry", lambda: Registry([Loaded(away, Origin("test"))]))
    result = call("conformance", "mutant")
    assert result.exit_code == 3
    assert "not available: no such chip" in result.stdout


PLUGIN = """
import cupy
from typing import ClassVar
from korder.spi import NamespaceBackend, hookimpl

class Backend(NamespaceBackend):
    name = "heavy"
    array_kinds = frozenset({"numpy"})

@hookimpl
def korder_backends():
    return (Backend(),)
"""


def test_a_hook_that_imports_a_framework_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cupy.py").write_text("")
    (tmp_path / "heavy_plugin.py").write_text(PLUGIN)
    facts = tmp_path / "heavy_plugin-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: heavy-plugin\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[korder.backends]\nheavy = heavy_plugin\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import heavy_plugin  # type: ignore[import-not-found]

    report = run_conformance(heavy_plugin.korder_backends()[0], only="contract.import")
    assert [ending.status for ending in report.endings] == ["failed"]
    assert "cupy" in report.endings[0].message
    for name in ("heavy_plugin", "cupy"):
        del sys.modules[name]  # not by monkeypatch, which would put it back


SUITE = """
from korder.conformance import parametrize_with_checks
from korder.dispatch.registry import default_registry
from tests.mutants_forward import FORWARD

expected = {"contract.name": "x"}

@parametrize_with_checks(default_registry().get("numpy"), only="contract.[nc]*", expected_failures=expected)
def test_right(check):
    check()

expected = {"value.core": "base 2"}

@parametrize_with_checks(FORWARD["lse in base 2"].backend(), only="value.core", expected_failures=expected)
def test_wrong(check):
    check()

@parametrize_with_checks(FORWARD["empty refused"].backend(), only="edge.no_batch")
def test_raises(check):
    check()
"""


def test_pytest_front_end_is_strict(tmp_path: Path) -> None:
    file = tmp_path / "test_mine.py"
    file.write_text(SUITE)
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(file)],
        capture_output=True, text=True, cwd=root, check=False,
    )  # fmt: skip
    assert run.returncode == 1, run.stdout + run.stderr
    assert "[XPASS(strict)] x" in run.stdout
    assert f"FAILED {file.name}::test_wrong" not in run.stdout
    assert "6 xfailed" in run.stdout
    assert "raised ZeroDivisionError: a launch grid of size 0" in run.stdout


def test_the_kit_loads_only_where_it_is_asked_for() -> None:
    code = "import sys; import korder, korder.cli; print('korder.conformance' in sys.modules);"
    code += "import korder.conformance; print({'pytest', 'torch', 'jax'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[:2] == ["False", "set()"]
