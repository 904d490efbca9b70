"""The command line: `korder run | plan | validate | schema | backends | bench`, each with --format text or json."""

from __future__ import annotations

import typer

from korder.cli import machine, runs

app = typer.Typer(
    name="korder",
    help="Order-k generalized attention: exact, or certified near-linear, on any backend.",
    epilog="Exit status: 0 done, 1 a check failed or the accuracy was not met, 2 wrong usage or input, 3 nothing can "
    "run it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(runs.run_file)
app.command("plan")(runs.plan_file)
app.command("validate")(runs.validate_file)
app.command("schema")(runs.print_schema)
app.command("backends")(machine.list_backends)
app.command("bench")(machine.bench)
