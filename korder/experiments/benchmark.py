"""The benchmark: rows measured in one process against the machine's own limits; no speed without equal outputs."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from korder.dispatch.registry import default_registry
from korder.errors import BackendUnavailableError, SpecError, UnsupportedProblemError
from korder.experiments import benchmark_native, benchmark_native_polynomial, benchmark_rows, benchmark_torch
from korder.experiments.benchmark_cases import Disagreement
from korder.experiments.benchmark_figures import Measured, Point, Settings
from korder.experiments.benchmark_polynomial import LONG_ROWS
from korder.experiments.machine import busy_warning, describe_machine
from korder.experiments.progress import Progress
from korder.experiments.results import publish
from korder.experiments.roofline import Roofs, check_plot, draw_roofline
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
    points: tuple[Point, ...] = ()


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """All lines, what they were measured on, and its roofs if a plot wants them."""

    run: BenchmarkRun
    rows: tuple[Row, ...]
    machine: dict[str, Any]
    roofs: Roofs | None = None

    @property
    def agreed(self) -> bool:
        """Whether every output was what it should be."""
        return all(row.verdict != DISAGREES for row in self.rows)


DISAGREES = "WRONG OUTPUT"
Table = Mapping[str, Callable[[Settings], Measured]]
NATIVE_ROWS: Table = {**benchmark_native.ROWS, **benchmark_native_polynomial.ROWS}
TABLES: dict[str, Table] = {
    "torch": benchmark_torch.ROWS,
    "cuda": benchmark_torch.CUDA_ROWS,
    "native": NATIVE_ROWS,
}
"""The rows of the backends that have a table of their own; the others have the generic one."""


def run_benchmark(run: BenchmarkRun, progress: Progress | None = None, plot: Path | None = None) -> BenchmarkReport:
    """Measure the rows that a run asks for, and draw their roofline if `plot` says where.

    Raises:
        SpecError: A row of an unknown name, or a plot that nobody can draw.
        UnknownBackendError, BackendUnavailableError: The run names a backend that cannot be measured here.
    """
    progress = progress or Progress()
    backend = run.backend if run.backend != "auto" else os.environ.get("KORDER_BACKEND") or "auto"
    table = _table(backend)
    chosen = _chosen(run.rows, table)
    if plot is not None:
        _check_roofline(backend, plot)
    machine = describe_machine()
    machine["warnings"] += busy_warning()  # before the benchmark itself makes a load
    settings = Settings(run.quick, run.repeats, backend)
    rows = []
    for name in chosen:
        progress.stage(f"measuring {name}")
        rows.append(_row(name, table[name], settings))
    if plot is None:
        return BenchmarkReport(run, tuple(rows), machine)
    progress.stage("measuring the roofs")
    roofs = benchmark_native.roofs(settings)
    draw_roofline({row.name: row.points for row in rows if row.points}, roofs, plot)
    return BenchmarkReport(run, tuple(rows), machine, roofs)


def _check_roofline(backend: str, plot: Path) -> None:
    if TABLES.get(backend) is not NATIVE_ROWS:
        raise SpecError(
            "--plot draws the roofline of the C++ kernels.",
            code="plot-unavailable",
            expected="korder bench --backend native --plot FILE",
            got=f"backend {backend!r}",
        )
    check_plot(plot)


def _table(backend: str) -> Table:
    """The rows of a backend, which is one that can run here."""
    if backend == "auto":
        return {**benchmark_rows.ROWS, **LONG_ROWS}
    registry = default_registry()
    answer = registry.availability(registry.get(backend))
    if not answer.available:
        raise BackendUnavailableError(
            f"backend {backend!r} cannot run here.", got=answer.reason, hint=answer.remedy or None
        )
    long_rows = LONG_ROWS if registry.get(backend).capabilities().method("polynomial") else {}
    return {**TABLES.get(backend, benchmark_rows.ROWS), **long_rows}


def _chosen(names: tuple[str, ...] | None, table: Table) -> tuple[str, ...]:
    known = tuple(table)
    for name in names or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            elsewhere = [backend for backend, rows in TABLES.items() if name in rows]
            hint = f"`--backend {elsewhere[0]}` measures it." if elsewhere else None
            raise SpecError(
                f"no benchmark row is called {name!r}.",
                code="row-unknown",
                expected=", ".join(known),
                got=name,
                hint=hint or (f"did you mean {near[0]!r}?" if near else None),
            )
    return names or tuple(name for name in known if name not in LONG_ROWS)


def _row(name: str, measure: Callable[[Settings], Measured], settings: Settings) -> Row:
    try:
        found = measure(settings)
    except Disagreement as finding:
        return Row(name, "-", "-", DISAGREES, f"no speed is given: {finding}")
    except UnsupportedProblemError as error:
        return Row(name, "-", "-", "not run", error.message.splitlines()[0])
    unjudged = "not judged" if found.values else "not run"
    verdict = unjudged if found.met is None else "met" if found.met else "missed"
    return Row(name, found.text, found.target, verdict, found.detail, found.values, found.points)


def benchmark_record(report: BenchmarkReport) -> dict[str, Any]:
    """Return the report as plain values."""
    return {
        "agreed": report.agreed,
        "rows": [asdict(row) for row in report.rows],
        "spec": report.run.model_dump(mode="json"),
        "machine": report.machine,
        **({} if report.roofs is None else {"roofs": asdict(report.roofs)}),
    }


def write_benchmark(report: BenchmarkReport) -> list[Path]:
    """Write result.json where the run names a directory, and return the paths."""
    output = report.run.output
    if output.directory is None:
        return []
    return publish(Path(output.directory), {}, benchmark_record(report), output.overwrite)
