"""How the command line ends when no command can tell: wrong usage, Ctrl-C, a standard output that takes nothing."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import typer
from typer.core import TyperGroup

from korder.cli.output import INTERRUPTED, WRONG_INPUT, error_record
from korder.errors import KorderError


class UsageError(KorderError):
    """Arguments that the command line does not take."""

    default_code = "usage"


class OutputError(KorderError):
    """A standard output that cannot be written."""

    default_code = "stdout-unwritable"


class Commands(TyperGroup):
    """The group of all commands; every end is one message on stderr and an exit status, in text or JSON."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; Ctrl-C ends it with one line."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from None

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and leave with its status; in other than standalone mode leave errors to the caller."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        given = list(sys.argv[1:] if args is None else args)
        in_json = "--format=json" in given or ("--format", "json") in pairwise(given)
        try:
            status = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        except OSError as error:
            if not _about_stdout(error):
                raise
            status = _tell_output(error, in_json)
        except Exception as error:
            if not hasattr(error, "format_message"):  # only what click raises about usage has it
                raise
            status = _tell_usage(error, given, in_json)
        sys.exit(status or 0)


def _tell_usage(error: Any, given: list[str], in_json: bool) -> int:
    if not in_json:
        error.show()
        return int(error.exit_code)
    problem = UsageError(
        error.format_message(),
        expected="a command with its arguments and options",
        got="korder " + " ".join(given),
        hint="`korder --help` lists the commands, `korder COMMAND --help` its options.",
    )
    typer.echo(json.dumps(error_record(problem, error.exit_code), ensure_ascii=False), err=True)
    return int(error.exit_code)


def _tell_output(error: OSError, in_json: bool) -> int:
    with suppress(OSError, ValueError):  # what is still buffered would fail once more when the interpreter ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    text = error.strerror or str(error)
    problem = OutputError(f"standard output cannot be written: {text}.", expected="a writable output", got=text)
    record = json.dumps(error_record(problem, WRONG_INPUT), ensure_ascii=False)
    typer.echo(record if in_json else f"OutputError [{problem.code}] {problem.message}", err=True)
    return WRONG_INPUT


def _about_stdout(error: OSError) -> bool:
    """Whether it came from printing: a failed write names no file, and one of the libraries that print made it."""
    trace, module = error.__traceback__, ""
    while trace is not None:
        module, trace = trace.tb_frame.f_globals.get("__name__", ""), trace.tb_next
    return error.filename is None and module.split(".")[0] in ("typer", "click", "rich")
