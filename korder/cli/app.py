"""The command line: `korder run | plan | validate | schema | backends | bench | conformance | new-backend`."""

from __future__ import annotations

from typing import Annotated

import typer

from korder.cli import conformance, machine, new_backend, runs
from korder.cli.group import Commands

app = typer.Typer(
    name="korder",
    cls=Commands,
    help="Order-k generalized attention: exact, or certified near-linear, on any backend.",
    epilog="Exit status: 0 done, 1 a check failed or the accuracy was not met, 2 wrong usage or input, 3 nothing can "
    "run it, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from korder import __version__

        typer.echo(f"korder {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """The options of `korder` itself, which act before any command."""


app.command("run")(runs.run_file)
app.command("plan")(runs.plan_file)
app.command("validate")(runs.validate_file)
app.command("schema")(runs.print_schema)
app.command("backends")(machine.list_backends)
app.command("bench")(machine.bench)
app.command("conformance")(conformance.check_backend)
app.command("new-backend")(new_backend.write_backend)
