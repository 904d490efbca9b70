"""The commands about this machine: backends, and bench."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from korder.cli.output import DONE, FAILED, Format, FormatOption, TerminalProgress, console, print_json, reported
from korder.errors import SpecError

if TYPE_CHECKING:
    from korder.dispatch.registry import BackendStatus
    from korder.experiments.benchmark import BenchmarkReport
    from korder.spec.runs import BenchmarkRun
    from korder.spi import Capabilities, MethodSupport

_COLUMNS = 100


def list_backends(form: FormatOption = Format.text) -> None:
    """List every backend: what it can do, whether it can run here and why not; and plugins that failed to load."""
    with reported(form):
        from korder.api import backends

        statuses = backends()
        if form is Format.json:
            print_json([_status_record(status) for status in statuses])
        else:
            typer.echo("\n\n".join(map(_status_text, statuses)) or "no backend is installed")


def _status_record(status: BackendStatus) -> dict[str, Any]:
    names = ("name", "priority", "distribution", "version", "entry_point", "loaded", "available", "reason", "remedy")
    record: dict[str, Any] = {name: getattr(status, name) for name in names}
    record["array_kinds"] = list(status.array_kinds)
    if status.capabilities is not None:
        facts = status.capabilities
        record |= {
            "orders": sorted(facts.orders),
            "dtypes": sorted(facts.dtypes),
            "devices": sorted(facts.devices),
            "accumulation": sorted(facts.accumulation),
            "grouped_heads": facts.grouped_heads,
            "methods": {method.name: _method_record(method) for method in facts.methods},
        }
    return record


def _method_record(method: MethodSupport) -> dict[str, Any]:
    sets = {name: sorted(getattr(method, name)) for name in ("masks", "biases", "weights", "closed_form")}
    return {**sets, "key_masks": method.key_masks, "backward": method.backward, "state": method.state}


def _status_text(status: BackendStatus) -> str:
    """Return a heading with who and from where, then one paragraph for each fact."""
    place = f"{status.distribution} {status.version}".strip()
    place += f", entry point {status.entry_point!r}" if status.entry_point else ""
    if not status.loaded:
        return "\n".join([f"{status.name}  failed to load  {place}", *_paragraph("", status.reason)])
    facts = [("runs here", ": ".join(part for part in ("yes" if status.available else "no", status.reason) if part))]
    if status.remedy:
        facts.append(("remedy", status.remedy))
    if status.capabilities is not None:
        facts += _capability_facts(status.array_kinds, status.capabilities)
    lines = [line for label, text in facts for line in _paragraph(label, text)]
    return "\n".join([f"{status.name}  priority {status.priority}  {place}", *lines])


def _capability_facts(kinds: tuple[str, ...], facts: Capabilities) -> list[tuple[str, str]]:
    found = [
        ("arrays", f"{_listed(kinds)} on {_listed(facts.devices)}; {_listed(facts.dtypes)}"),
        ("orders", _listed(facts.orders) + ("; grouped heads" if facts.grouped_heads else "")),
        ("sums", _listed(facts.accumulation)),
    ]
    for method in facts.methods:
        sets = [("masks", method.masks), ("biases", method.biases), ("weights", method.weights)]
        sets.append(("closed-form gradient under", method.closed_form))
        parts = [f"{name} {_listed(entries)}" for name, entries in sets if entries]
        flags = (("key masks", method.key_masks), ("backward", method.backward), ("decoding state", method.state))
        parts += [name for name, has in flags if has]
        found.append((method.name, "; ".join(parts) or "nothing"))
    return found


def _listed(entries: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, entries))) or "none"


def _paragraph(label: str, text: str) -> list[str]:
    """Return a labelled text, every line of it wrapped under its own beginning."""
    start = f"  {label:<12}" if label else "  "
    lines: list[str] = []
    for part in text.splitlines() or [""]:
        body = part.lstrip()
        first = start if not lines else " " * len(start)
        indent = " " * (len(part) - len(body))
        lines += textwrap.wrap(
            body,
            _COLUMNS,
            initial_indent=first + indent,
            subsequent_indent=" " * len(first) + indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def bench(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help='A run file of kind = "benchmark"; all rows when omitted.')
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller sizes, for a first look.")] = False,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Measure this row only; repeatable.")] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="Measure this backend; torch has rows of its own.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure what Split and Auto predict with, and keep it for this user.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the roofline of backend native.")
    ] = None,
    form: FormatOption = Format.text,
) -> None:
    """Measure speed and memory against the machine's own limits; no speed without equal outputs."""
    with reported(form):
        if calibrate:
            calibrate_machine(file, quick or bool(rows) or backend is not None or plot is not None, form)
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
        run_benchmark(run, form, plot)


def calibrate_machine(file: Path | None, others: bool, form: Format) -> None:
    """Measure the rates of this machine, print them and write them where predictions look."""
    from dataclasses import asdict

    from korder.experiments.calibrate import calibrate, write_rates

    if file is not None or others:
        raise SpecError("--calibrate stands alone.", expected="korder bench --calibrate", got="other options beside it")
    with TerminalProgress() as progress:
        rates = calibrate(progress)
    path = write_rates(rates)
    if form is Format.json:
        print_json({"rates": {name: asdict(found) for name, found in rates.items()}, "files": [str(path)]})
    else:
        for name, found in rates.items():
            typer.echo(f"{name}: " + ", ".join(f"{kind} {value:g}" for kind, value in asdict(found).items()))
        typer.echo(f"\nwritten: {path}")
    raise typer.Exit(DONE)


def run_benchmark(run: BenchmarkRun, form: Format, plot: Path | None = None) -> None:
    """Run a benchmark, print it, write it where the file says so, and its roofline where `plot` does."""
    from korder.experiments.benchmark import benchmark_record, write_benchmark
    from korder.experiments.benchmark import run_benchmark as measure
    from korder.experiments.results import check_output

    check_output(run.output)
    with TerminalProgress() as progress:
        report = measure(run, progress, plot)
    files = write_benchmark(report) + ([] if plot is None else [plot])
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
    if report.roofs is not None:
        from korder.experiments.roofline import roofs_text

        typer.echo(roofs_text(report.roofs))
