"""The commands about this machine: backends, and bench."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from korder.cli.output import DONE, FAILED, Format, FormatOption, TerminalProgress, console, print_json, reported
from korder.errors import SpecError

if TYPE_CHECKING:
    from korder.dispatch.registry import BackendStatus
    from korder.experiments.benchmark import BenchmarkReport
    from korder.spec.runs import BenchmarkRun


def list_backends(form: FormatOption = Format.text) -> None:
    """List every backend, whether it can run here and why not, and plugins that failed to load."""
    with reported(form):
        from korder.api import backends

        statuses = backends()
        if form is Format.json:
            print_json([_status_record(status) for status in statuses])
        else:
            _print_backends(statuses)


def _status_record(status: BackendStatus) -> dict[str, Any]:
    names = ("name", "priority", "distribution", "loaded", "available", "reason", "remedy")
    record: dict[str, Any] = {name: getattr(status, name) for name in names}
    record["array_kinds"] = list(status.array_kinds)
    if status.capabilities is not None:
        facts = status.capabilities
        record |= {
            "orders": sorted(facts.orders),
            "dtypes": sorted(facts.dtypes),
            "devices": sorted(facts.devices),
            "methods": {method.name: sorted(method.masks) for method in facts.methods},
        }
    return record


def _print_backends(statuses: tuple[BackendStatus, ...]) -> None:
    from rich.table import Table

    table = Table("name", "priority", "from", "arrays", "methods", "dtypes", "can run here", box=None, pad_edge=False)
    for status in statuses:
        facts = status.capabilities
        answer = "yes" if status.available else "failed to load" if not status.loaded else "no"
        detail = "; ".join(part for part in (status.reason, status.remedy) if part)
        table.add_row(
            status.name,
            str(status.priority) if status.loaded else "",
            status.distribution,
            ", ".join(status.array_kinds),
            ", ".join(method.name for method in facts.methods) if facts else "",
            ", ".join(sorted(facts.dtypes)) if facts else "",
            answer + (f": {detail}" if detail else ""),
        )
    if statuses:
        console().print(table)
    else:
        typer.echo("no backend is installed")


def bench(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help='A run file of kind = "benchmark"; all rows when omitted.')
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes, for a first look.")] = False,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Measure this row only; repeatable.")] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Measure this backend; torch has rows of its own.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Measure speed and memory against the machine's own limits; no speed without equal outputs."""
    with reported(form):
        from korder.spec.files import read_run
        from korder.spec.runs import parse_run

        options: dict[str, Any] = {"quick": True} if quick else {}
        options |= {"rows": list(rows)} if rows else {}
        options |= {} if backend is None else {"backend": backend}
        whole = {"schema_version": 1, "kind": "benchmark", **options}
        run = parse_run(whole) if file is None else read_run(file, options=options)
        if run.kind != "benchmark":
            raise SpecError(
                "`korder bench` takes a run file that benchmarks.",
                code="spec-kind",
                expected='kind = "benchmark"',
                got=f'kind = "{run.kind}"',
                hint="`korder run FILE` runs it.",
            )
        run_benchmark(run, form)


def run_benchmark(run: BenchmarkRun, form: Format) -> None:
    """Run a benchmark, print it, write it where the file says so."""
    from korder.experiments.benchmark import benchmark_record, write_benchmark
    from korder.experiments.benchmark import run_benchmark as measure
    from korder.experiments.results import check_output

    check_output(run.output)
    with TerminalProgress() as progress:
        report = measure(run, progress)
    files = write_benchmark(report)
    if form is Format.json:
        print_json({**benchmark_record(report), "files": [str(path) for path in files]})
    else:
        _print_benchmark(report)
    raise typer.Exit(DONE if report.agreed else FAILED)


def _print_benchmark(report: BenchmarkReport) -> None:
    from rich.table import Table

    machine = report.machine
    typer.echo(f"cores {machine['cores']}, {machine['machine']}, {machine['instruction_set']}")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    typer.echo(f"python {machine['python']}, {versions}; BLAS {machine['blas']}")
    for warning in machine["warnings"]:
        typer.echo(f"warning: {warning}")
    table = Table("row", "measured", "target", "", "detail", box=None, pad_edge=False)
    for row in report.rows:
        table.add_row(row.name, row.measured, row.target, row.verdict, row.detail)
    console().print(table)
