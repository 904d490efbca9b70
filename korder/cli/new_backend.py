"""The command `korder new-backend`: a distribution of its own that installs and conforms before a line is changed."""

from __future__ import annotations

import os
import re
import shlex
import tempfile
from collections.abc import Mapping
from importlib.resources import files
from importlib.util import find_spec
from keyword import iskeyword
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from korder.cli.output import Format, FormatOption, print_json, reported
from korder.errors import SpecError

LONGEST_NAME = 40
_FILES = {
    "README.md": "README.md.txt",
    "pyproject.toml": "pyproject.toml.txt",
    "src/$package/__init__.py": "hook.py.txt",
    "src/$package/backend.py": "backend.py.txt",
    "src/$package/py.typed": "py.typed.txt",
    "tests/test_conformance.py": "test_conformance.py.txt",
}
"""What is written, and the template it is made from."""


def write_backend(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the backend will be called, for example acme.")],
    directory: Annotated[
        Path, typer.Option("--directory", metavar="DIR", help="Directory that korder-NAME is made in.")
    ] = Path(),
    form: FormatOption = Format.text,
) -> None:
    """Write a distribution korder-NAME with a backend that conforms as it is, to be filled in step by step."""
    with reported(form):
        check_name(name)
        target = directory / distribution_name(name)
        written = write_distribution(name, target)
        path = str(target) if target.is_absolute() or str(target).startswith(".") else f".{os.sep}{target}"
        following = [f"pip install -e {shlex.quote(path)}", f"korder conformance {name}"]
        if form is Format.json:
            record = {"name": name, "distribution": target.name, "directory": str(target)}
            print_json({**record, "files": written, "next": following})
        else:
            typer.echo("\n".join([f"wrote {target}", *(f"  {file}" for file in written), "next"]))
            typer.echo("\n".join(f"  {command}" for command in [*following, f"then {target / 'README.md'}"]))


def check_name(name: str) -> None:
    """Raise unless a new backend may have this name.

    Raises:
        SpecError: It is no lower-case Python name, a keyword, or taken.
    """
    shaped = re.fullmatch(r"[a-z](_?[a-z0-9])*", name) is not None and len(name) <= LONGEST_NAME
    if not shaped or iskeyword(name) or name == "auto":
        near = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_0123456789")[:LONGEST_NAME].rstrip("_")
        usable = bool(near) and not iskeyword(near) and near not in ("auto", name)
        raise SpecError(
            "a backend cannot have this name.",
            code="backend-name",
            expected=f"at most {LONGEST_NAME} of a-z, 0-9 and single _ between them, a letter first; no keyword of "
            "Python, and not 'auto', which asks for any backend",
            got=repr(name),
            hint=f"for example {near!r}." if usable else "for example 'acme'.",
        )
    taken = _taken_names()
    package = package_name(name)
    if name in taken or find_spec(package) is not None:
        raise SpecError(
            f"the name {name!r} is taken.",
            code="backend-name-taken",
            expected=f"none of {', '.join(sorted(taken))}, and no installed package {package}",
            got=repr(name) if name in taken else f"an installed package {package}",
            hint="choose another name, or uninstall what has it.",
        )


def _taken_names() -> set[str]:
    from korder.dispatch.registry import default_registry

    registry = default_registry()
    return {backend.name for backend in registry.ordered()} | {
        failure.origin.entry_point for failure in registry.failures
    }


def distribution_name(name: str) -> str:
    """Return the name of the distribution, which is that of its directory too."""
    return f"korder-{name.replace('_', '-')}"


def package_name(name: str) -> str:
    """Return the name of the package to import."""
    return f"korder_{name}"


def write_distribution(name: str, target: Path) -> list[str]:
    """Write the distribution of a backend called `name` as `target`, which appears whole or not at all.

    Returns: The files, relative to `target`.
    Raises:  SpecError: Something is there already, or nothing can be written there.
    """
    if os.path.lexists(target):
        raise SpecError(
            f"{target} exists already.",
            code="output-exists",
            expected="a directory that is new",
            got=f"{'a directory' if target.is_dir() else 'a file'} {target}",
            hint="choose another place with --directory DIR, or another name; korder overwrites nothing.",
        )
    content = _content(name)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.partial-", dir=target.parent) as building:
            whole = Path(building) / target.name
            for file, text in content.items():
                (whole / file).parent.mkdir(parents=True, exist_ok=True)
                (whole / file).write_text(text, encoding="utf-8")
            os.rename(whole, target)
    except OSError as error:
        raise SpecError(
            f"nothing can be written in {target.parent}.",
            code="output-unwritable",
            expected="a directory that exists and where files may be made",
            got=f"{error.strerror or error}: {error.filename or target}",
            hint="choose another place with --directory DIR.",
        ) from None
    return list(content)


def _content(name: str) -> Mapping[str, str]:
    """Return the text of every file by its path."""
    from korder import __version__

    words = {
        "name": name,
        "distribution": distribution_name(name),
        "package": package_name(name),
        "backend": "".join(part.capitalize() for part in name.split("_")) + "Backend",
        "korder_version": ".".join(__version__.split(".")[:2]),
    }
    templates = files("korder.cli") / "templates"
    return {
        Template(path).substitute(words): Template((templates / file).read_text(encoding="utf-8")).substitute(words)
        for path, file in _FILES.items()
    }
