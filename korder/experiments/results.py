"""Results on disk: all files of a run appear at once, or none; only what korder wrote is ever replaced."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from korder.errors import SpecError
from korder.spec.runs import AttendOutput, Output

if TYPE_CHECKING:
    from korder.experiments.attend import Report

RECORD = "result.json"
Writer = Callable[[Path], None]


def check_output(output: Output) -> None:
    """Refuse, before any work is done, an output that could not be written.

    Raises:
        SpecError: The directory holds something and may not be replaced, or a package for the arrays is missing.
    """
    if output.directory is None:
        return
    check_replaceable(Path(output.directory), output.overwrite)
    if isinstance(output, AttendOutput) and output.arrays == "safetensors" and find_spec("safetensors") is None:
        raise SpecError(
            "writing safetensors needs a package that is not installed.",
            code="extra-missing",
            expected="the extra korder[safetensors]",
            got="no module named safetensors",
            hint="pip install 'korder[safetensors]', or set output.arrays = \"npz\".",
        )


def check_replaceable(directory: Path, overwrite: bool) -> None:
    """Raise `SpecError` unless the directory is free, or holds only an earlier result that may be replaced."""
    _check_place(directory)
    target = Path(os.path.realpath(directory))
    if not target.exists():
        return
    if not target.is_dir():
        raise SpecError(
            f"{directory} is not a directory.", code="output-exists", expected="a directory, or nothing", got="a file"
        )
    present = sorted(entry.name for entry in target.iterdir())
    if not present:
        return
    foreign = sorted(set(present) - _written_before(target))
    if foreign:
        raise SpecError(
            f"the directory {directory} holds files that korder did not write.",
            code="output-foreign",
            expected="a directory that is new, empty, or holds one earlier result",
            got=", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""),
            hint="choose another with --output DIR; korder deletes nothing that it did not write.",
        )
    if not overwrite:
        raise SpecError(
            f"the directory {directory} already holds a result.",
            code="output-exists",
            expected="a new directory, or output.overwrite = true",
            got=", ".join(present),
            hint="pass --overwrite to replace it, or --output DIR to keep both.",
        )


def _check_place(directory: Path) -> None:
    """Refuse the working directory and its parents, which a rename would take from under the shell, and loose links."""
    for part in (directory, *directory.parents):
        if part.is_symlink() and not part.exists():
            raise SpecError(
                f"{part} is a link to nothing.",
                code="output-place",
                expected="a directory of the result's own, existing or not",
                got=f"{part} -> {os.readlink(part)}",
                hint="choose another with --output DIR, or remove the link.",
            )
    here = Path.cwd().resolve()
    target = Path(os.path.realpath(directory))
    if target == here or target in here.parents:
        raise SpecError(
            "results cannot take the place of the working directory or of a directory above it.",
            code="output-place",
            expected="a directory of the result's own, existing or not",
            got=f"{str(directory)!r}, which is {target}",
            hint="choose another with --output DIR, for example --output runs/first.",
        )


def _written_before(target: Path) -> set[str]:
    """Return the names that the directory's own record lists, none without a record."""
    try:
        record = json.loads((target / RECORD).read_text(encoding="utf-8"))
        names = record["files"] if record["written_by"] == "korder" else []
        return {str(name) for name in names if (target / str(name)).is_file()}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def publish(directory: Path, writers: Mapping[str, Writer], record: Mapping[str, Any], overwrite: bool) -> list[Path]:
    """Write files and their record into a directory, which appears whole or not at all.

    Everything is written and flushed to disk beside the target; one rename then puts it in place.

    Args:
        directory: The target; its parents are made.
        writers: For each file name, what writes it to a path.
        record: Content of result.json; the list of files is added.
        overwrite: Whether an earlier result may be replaced.

    Returns: The paths written.
    Raises:  SpecError as `check_replaceable`; whatever a writer raises, with nothing left behind.
    """
    check_replaceable(directory, overwrite)
    target = Path(os.path.realpath(directory))
    names = [*writers, RECORD]
    with _parents(target), _building(target) as building:
        for name, write in writers.items():
            write(building / name)
        whole = {"written_by": "korder", "files": names, **record}
        text = json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False, default=_plain)
        (building / RECORD).write_text(text + "\n", encoding="utf-8")
        for name in names:
            _flush(building / name)
        _flush(building)
        check_replaceable(directory, overwrite)
        _put_in_place(building, target)
    return [directory / name for name in names]


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Make the parents of the target, and take away again those made here if it fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        _make_parent(target)
        yield
    except BaseException:
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        raise


def _make_parent(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(target, error) from None


def _unwritable(target: Path, error: OSError) -> SpecError:
    return SpecError(
        f"the directory {target} cannot be written.",
        code="output-unwritable",
        expected="a place where files may be made",
        got=f"{error.strerror or error}: {error.filename or target}",
        hint="choose another with --output DIR.",
    )


@contextmanager
def _building(target: Path) -> Iterator[Path]:
    try:
        building = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise _unwritable(target, error) from None
    try:
        # mkdtemp makes a private directory; the result is to have the ordinary permissions.
        mask = os.umask(0)
        os.umask(mask)
        building.chmod(0o777 & ~mask)
        yield building
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _put_in_place(building: Path, target: Path) -> None:
    if not target.exists():
        os.rename(building, target)
    elif not any(target.iterdir()):
        target.rmdir()
        os.rename(building, target)
    else:
        _replace(building, target)
    _flush(target.parent)


def _replace(building: Path, target: Path) -> None:
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    old = aside / target.name
    os.rename(target, old)
    try:
        os.rename(building, target)
    except BaseException:
        os.rename(old, target)
        aside.rmdir()
        raise
    # By name, not as a tree: a file that somebody added in the meantime stays, in the directory set aside.
    for name in _written_before(old):
        (old / name).unlink()
    with suppress(OSError):
        old.rmdir()
        aside.rmdir()


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} has no place in a record")


def array_writer(arrays: Mapping[str, Any], form: str) -> Writer:
    """Return what writes arrays to an .npz or .safetensors file."""
    plain: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def write(path: Path) -> None:
        if form == "safetensors":
            from safetensors.numpy import save_file

            save_file(plain, path)
        else:
            np.savez(path, **plain)

    return write


def write_report(report: Report) -> list[Path]:
    """Write a report to its run's directory, and return the paths; none where the run names no directory."""
    from korder.experiments.record import arrays_of, record_of
    from korder.spec.files import write_run

    output = report.run.output
    if output.directory is None:
        return []
    # Whoever repeats the run decides anew what may be replaced.
    repeatable = report.run.model_copy(update={"output": output.model_copy(update={"overwrite": False})})
    suffix = "npz" if output.arrays == "npz" else "safetensors"
    writers: dict[str, Writer] = {
        f"arrays.{suffix}": array_writer(arrays_of(report), output.arrays),
        "run.toml": lambda path: write_run(repeatable, path),
    }
    if output.plot and find_spec("matplotlib") is not None:
        from korder.experiments.plots import draw

        writers["plot.png"] = lambda path: draw(report, path)
    return publish(Path(output.directory), writers, record_of(report), output.overwrite)
