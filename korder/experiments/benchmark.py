"""The benchmark: rows measured in one process against the machine's own limits; no speed without equal outputs."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from korder.errors import SpecError, UnsupportedProblemError
from korder.experiments import benchmark_rows
from korder.experiments.benchmark_cases import Disagreement
from korder.experiments.benchmark_rows import Measured, Settings
from korder.experiments.machine import busy_warning, describe_machine
from korder.experiments.progress import Progress
from korder.experiments.results import publish
from korder.spec.runs import BenchmarkRun


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    measured: str
    target: str
    verdict: str
    detail: str
    values: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """All lines, and what they were measured on."""

    run: BenchmarkRun
    rows: tuple[Row, ...]
    machine: dict[str, Any]

    @property
    def agreed(self) -> bool:
        """Whether every output was what it should be."""
        return all(row.verdict != DISAGREES for row in self.rows)


DISAGREES = "WRONG OUTPUT"


def run_benchmark(run: BenchmarkRun, progress: Progress | None = None) -> BenchmarkReport:
    """Measure the rows that a run asks for.

    Raises:
        SpecError: A row of an unknown name.
    """
    progress = progress or Progress()
    chosen = _chosen(run.rows)
    machine = describe_machine()
    machine["warnings"] += busy_warning()  # before the benchmark itself makes a load
    settings = Settings(run.quick, run.repeats, run.backend)
    rows = []
    for name in chosen:
        progress.stage(f"measuring {name}")
        rows.append(_row(name, benchmark_rows.ROWS[name], settings))
    return BenchmarkReport(run, tuple(rows), machine)


def _chosen(names: tuple[str, ...] | None) -> tuple[str, ...]:
    known = tuple(benchmark_rows.ROWS)
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            raise SpecError(
                f"no benchmark row is called {name!r}.",
                code="row-unknown",
                expected=", ".join(known),
                got=name,
                hint=f"did you mean {near[0]!r}?" if near else None,
            )
    return names or known


def _row(name: str, measure: Callable[[Settings], Measured], settings: Settings) -> Row:
    try:
        found = measure(settings)
    except Disagreement as finding:
        return Row(name, "-", "-", DISAGREES, f"no speed is given: {finding}")
    except UnsupportedProblemError as error:
        return Row(name, "-", "-", "not run", error.message.splitlines()[0])
    verdict = "met" if found.met else "missed" if found.met is not None else "not run"
    return Row(name, found.text, found.target, verdict, found.detail, found.values)


def benchmark_record(report: BenchmarkReport) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "agreed": report.agreed,
        "rows": [asdict(row) for row in report.rows],
        "spec": report.run.model_dump(mode="json"),
        "machine": report.machine,
    }


def write_benchmark(report: BenchmarkReport) -> list[Path]:
    """Write result.json where the run names a directory, and return the paths."""
    output = report.run.output
    if output.directory is None:
        return []
    return publish(Path(output.directory), {}, benchmark_record(report), output.overwrite)
