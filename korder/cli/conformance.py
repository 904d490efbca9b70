"""The command `korder conformance`: a backend against what it claims, as a table, as JSON, and into a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from korder.cli.output import DONE, FAILED, NOTHING_RUNS, Format, FormatOption, TerminalProgress, print_json, reported
from korder.errors import SpecError

if TYPE_CHECKING:
    from korder.conformance import Report


def check_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend, as `korder backends` lists it.")],
    full: Annotated[
        bool, typer.Option("--full/--quick", help="Every claimed combination, or a selection of them.")
    ] = False,
    file: Annotated[Path | None, typer.Option("--report", metavar="FILE", help="Write the report as JSON.")] = None,
    only: Annotated[
        str | None, typer.Option("--only", metavar="PATTERN", help='Checks to run, such as "value.*", or "core".')
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Processes that share the checks.")] = 1,
    form: FormatOption = Format.text,
) -> None:
    """Check a backend against the numbered behaviours of the contract, as far as it claims them."""
    with reported(form):
        from korder.conformance import report_record, report_text, run_conformance, write_report
        from korder.dispatch.registry import default_registry

        backend = default_registry().get(name)
        if file is not None:
            _check_writable(file)
        with TerminalProgress(form) as progress:
            progress.stage(f"checking {name}")
            report = run_conformance(backend, depth="full" if full else "quick", only=only, workers=workers)
        if not report.endings:
            raise SpecError(
                "no check is called that.",
                code="check-unknown",
                expected="the id of a check, a pattern of ids, or a level, core or claimed",
                got=repr(only),
            )
        if file is not None:
            write_report(report, file)
        if form is Format.json:
            print_json(report_record(report))
        else:
            typer.echo(report_text(report))
        raise typer.Exit(_status(report))


def _status(report: Report) -> int:
    if report.failed:
        return FAILED
    return DONE if report.verified else NOTHING_RUNS


def _check_writable(file: Path) -> None:
    """Raise before minutes of work rather than after."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise SpecError(
            "the report cannot be written there.",
            code="report-path",
            expected="a file in a directory that exists",
            got=str(file),
        )
