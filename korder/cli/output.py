"""What every command shares: formats, exit statuses, one clear error on stderr, and progress on a terminal."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from korder.errors import (
    AccuracyError,
    BackendUnavailableError,
    ConformanceFailure,
    KernelError,
    KorderError,
    PluginLoadError,
    UnsupportedProblemError,
)
from korder.experiments.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

DONE, FAILED, WRONG_INPUT, NOTHING_RUNS, INTERRUPTED = 0, 1, 2, 3, 130
_QUIET_SECONDS = 1.0
_WIDE = 220


class Format(StrEnum):
    """How a command prints what it found."""

    text = "text"
    json = "json"


FormatOption = Annotated[Format, typer.Option("--format", help="Print text, or JSON.")]


def exit_status(error: KorderError) -> int:
    """Return the exit status that an error means."""
    if isinstance(error, AccuracyError | ConformanceFailure | KernelError | PluginLoadError):
        return FAILED
    if isinstance(error, UnsupportedProblemError | BackendUnavailableError):
        return NOTHING_RUNS
    return WRONG_INPUT


@contextmanager
def reported(form: Format) -> Iterator[None]:
    """Print a `KorderError` once, on stderr, and leave with its exit status; other exceptions are bugs and pass."""
    try:
        yield
    except KorderError as error:
        status = exit_status(error)
        if form is Format.json:
            typer.echo(json.dumps(error_record(error, status), ensure_ascii=False), err=True)
        else:
            typer.echo(error.report(), err=True)
        raise typer.Exit(status) from None
    except MemoryError as error:
        text = str(error) or "no detail"
        problem = UnsupportedProblemError("this machine has too little memory.", code="memory-exhausted", got=text)
        with reported(form):
            raise problem from None


def error_record(error: KorderError, status: int) -> dict[str, Any]:
    """Return an error as plain values."""
    return {
        "error": type(error).__name__,
        "code": error.code,
        "message": error.message,
        "expected": error.expected,
        "got": error.got,
        "hint": error.hint,
        "exit_status": status,
    }


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def console() -> Console:
    """Return a console for tables on stdout; off a terminal it is wide enough that no name is cut in two."""
    from rich.console import Console

    plain = Console(markup=False, highlight=False)
    return plain if plain.is_terminal else Console(markup=False, highlight=False, width=_WIDE)


def _columns() -> tuple[ProgressColumn, ...]:
    """Return what a line of progress shows; the bar is there only once the work says how far it is."""
    from rich.progress import BarColumn, SpinnerColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class KnownBar(BarColumn):
        def render(self, task: Task) -> Any:
            return Text("") if task.total is None else super().render(task)

    return SpinnerColumn(), TextColumn("{task.description}"), KnownBar(), TaskProgressColumn(), TimeElapsedColumn()


class TerminalProgress(Progress):
    """A spinner with the elapsed time, or a bar where steps are reported; after a second, and only on a terminal."""

    def __init__(self, form: Format = Format.text) -> None:
        from rich.console import Console
        from rich.progress import Progress as Bar

        self._visible = sys.stderr.isatty()
        self._says_notes = form is Format.text
        self._bar = Bar(*_columns(), console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("starting", total=None)
        self._timer = threading.Timer(_QUIET_SECONDS, self._bar.start)

    def stage(self, text: str, total: int | None = None) -> None:
        """Show another stage; its clock starts anew."""
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task(text, total=total)

    def note(self, text: str) -> None:
        """Print a line on stderr, above the progress where there is one; nothing beside JSON."""
        if self._says_notes:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self) -> None:
        """Move the bar by one step."""
        self._bar.advance(self._task)

    def share(self, done: float) -> None:
        """Move the bar to a share of its length; the first share makes a spinner into a bar."""
        self._bar.update(self._task, total=1.0, completed=done)

    def __enter__(self) -> Self:
        if self._visible:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            self._timer.cancel()
            self._timer.join()
            self._bar.stop()
