"""Run files on disk: TOML, JSON or YAML in, one clear error with a position when they are wrong, and back out again."""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from korder.errors import SpecError
from korder.spec.base import SpecModel
from korder.spec.runs import RUN_KINDS, Run, parse_run

SUFFIXES = (".toml", ".json", ".yaml", ".yml")


def read_run(path: str | Path, overrides: Iterable[str] = (), options: Mapping[str, Any] | None = None) -> Run:
    """Return the run that a file describes, after `a.b=value` overrides and then options.

    Args:
        path: A .toml, .json, .yaml or .yml file.
        overrides: Texts `dotted.key=value`; the value is read as TOML, a bare word as a string.
        options: Values by dotted key, taken as they are.

    Raises:
        SpecError: A file that cannot be read or is empty, broken syntax (with line and column), an unknown key or kind
            (with the nearest known one), a wrong type.
    """
    content = read_mapping(Path(path))
    for override in overrides:
        content = apply_override(content, override)
    for name, value in (options or {}).items():
        content = _with_value(content, name.split("."), value)
    return parse_run(content)


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the top-level table of a file, unchecked."""
    if path.suffix.lower() not in SUFFIXES:
        raise SpecError(
            f"the ending of {path.name!r} does not say which format the file has.",
            code="file-format",
            expected="a file name that ends in " + ", ".join(SUFFIXES),
            got=str(path),
        )
    text = _read_text(path)
    if not text.strip():
        raise SpecError(
            f"the file {path} is empty.",
            code="file-empty",
            expected='a run file, which begins with schema_version = 1 and kind = "attend"',
            got=f"{len(text)} characters of white space" if text else "no characters",
            hint="`korder schema` prints every key; examples/ has files to start from.",
        )
    content = _parse(path, text)
    if not isinstance(content, dict):
        raise SpecError(
            f"the file {path} does not hold a table.",
            code="file-syntax",
            expected="keys and values at the top level",
            got=f"a {type(content).__name__}",
        )
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        siblings = sorted(p.name for p in path.parent.glob("*") if p.suffix in SUFFIXES)
        stems = difflib.get_close_matches(path.stem, {Path(name).stem for name in siblings}, n=3, cutoff=0.6)
        near = [name for stem in stems for name in siblings if Path(name).stem == stem]
        raise SpecError(
            f"there is no file {path}.",
            code="file-missing",
            expected="the path of a run file",
            got=str(path.absolute()),
            hint=f"that folder has {', '.join(near)}." if near else "paths are relative to the working directory.",
        ) from None
    except UnicodeDecodeError as error:
        raise SpecError(
            f"the file {path} is not UTF-8 text.",
            code="file-encoding",
            expected="UTF-8",
            got=f"byte 0x{error.object[error.start]:02x} at offset {error.start}",
        ) from None
    except OSError as error:
        raise SpecError(
            f"the file {path} cannot be read.", code="file-unreadable", got=f"{error.strerror or error}"
        ) from None


def _parse(path: Path, text: str) -> Any:
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(text)
        if suffix == ".json":
            return json.loads(text, object_pairs_hook=_without_duplicates(path))
        return _parse_yaml(path, text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"\(at line (\d+), column (\d+)\)", str(error))
        line, column = (int(found[1]), int(found[2])) if found else _end(text)
        raise _syntax_error(path, text, line, column, str(error).split(" (at ")[0]) from None
    except json.JSONDecodeError as error:
        raise _syntax_error(path, text, error.lineno, error.colno, error.msg) from None
    except RecursionError:
        raise SpecError(
            f"the file {path} is nested too deeply.",
            code="file-syntax",
            expected="a table of tables of values",
            got="brackets within brackets without end",
        ) from None


def _parse_yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise SpecError(
            f"reading {path.name} needs PyYAML, which is not installed.",
            code="extra-missing",
            expected="the extra korder[yaml]",
            got="no module named yaml",
            hint="pip install 'korder[yaml]', or write the file as TOML.",
        ) from None
    try:
        return yaml.load(text, _yaml_loader(path))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else _end(text)
        raise _syntax_error(path, text, line, column, error.problem or "invalid YAML") from None
    except yaml.YAMLError as error:
        raise _syntax_error(path, text, *_end(text), str(error).splitlines()[0]) from None


# YAML 1.1 takes 1e-3 for text, because it asks for a point; here it is the number that it is in TOML and JSON.
_YAML_NUMBER = re.compile(r"[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+\Z")


def _yaml_loader(path: Path) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            _check_once(path, names)
            return node

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_NUMBER, list("-+0123456789"))
    return Loader


def _yaml_text(content: Mapping[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Puts quotes round a text that `_yaml_loader` would take for a number."""

    Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _YAML_NUMBER, list("-+0123456789"))
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False))


def _without_duplicates(path: Path) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        _check_once(path, [name for name, _ in pairs])
        return dict(pairs)

    return table


def _check_once(path: Path, names: list[str]) -> None:
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise SpecError(
            f"{path}: the key {name!r} stands {count} times in one table.",
            code="file-syntax",
            expected="every key once in a table",
            got=f"{name!r} {count} times",
            hint="remove all but one.",
        )


def _end(text: str) -> tuple[int, int]:
    lines = text.splitlines() or [""]
    return len(lines), len(lines[-1]) + 1


def _syntax_error(path: Path, text: str, line: int, column: int, problem: str) -> SpecError:
    lines = text.splitlines()
    shown = lines[line - 1].strip() if 0 < line <= len(lines) else "the end of the file"
    kind = {"toml": "TOML", "json": "JSON"}.get(path.suffix.lower().lstrip("."), "YAML")
    return SpecError(
        f"{path}, line {line}, column {column}: {problem[:1].lower()}{problem[1:]}.",
        code="file-syntax",
        expected=f"valid {kind}",
        got=shown[:120],
    )


def apply_override(content: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return a copy of a table with one `dotted.key=value` set; tables on the way are made where missing."""
    name, separator, text = override.partition("=")
    parts = name.strip().split(".")
    if not separator or not all(parts):
        raise SpecError(
            "an override must be a dotted key, an equals sign and a value.",
            code="override-syntax",
            expected="for example attention.order=3",
            got=override,
        )
    return _with_value(content, parts, _override_value(text.strip(), override))


def _with_value(content: Mapping[str, Any], parts: list[str], value: Any) -> dict[str, Any]:
    changed = dict(content)
    table = changed
    for depth, part in enumerate(parts[:-1]):
        inner = table.get(part, {})
        if not isinstance(inner, Mapping):
            raise SpecError(
                f"the override of {'.'.join(parts)!r} goes into something that is not a table.",
                code="override-path",
                expected=f"{'.'.join(parts[: depth + 1])} to be a table",
                got=repr(inner),
            )
        table[part] = dict(inner)
        table = table[part]
    table[parts[-1]] = value
    return changed


def _override_value(text: str, override: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        # A shell takes the quotes away, so a bare word stands for itself; what opens a bracket must close it.
        if text and text[0] not in "\"'[{" and "\n" not in text:
            return text
        raise SpecError(
            f"the value of the override {override!r} cannot be read.",
            code="override-syntax",
            expected="a TOML value or a bare word",
            got=text or "nothing",
            hint="quote it for the shell, for example --set 'attention.mask={kind=\"causal\"}'.",
        ) from None


def run_schema() -> dict[str, Any]:
    """Return the JSON Schema of run files: one alternative per kind."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(Run).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"korder run file ({' | '.join(RUN_KINDS)})",
        **schema,
    }


def write_run(run: SpecModel, path: str | Path) -> None:
    """Write a run to a .toml, .json or .yaml file; keys at their defaults are left out."""
    path = Path(path)
    path.write_text(format_run(run, path.suffix.lower()), encoding="utf-8")


def format_run(run: SpecModel, suffix: str = ".toml") -> str:
    """Return the text of a run file; what it says is read back equal."""
    content = run.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    content = _with_kinds(run, content)
    if suffix == ".json":
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    if suffix in (".yaml", ".yml"):
        return _yaml_text(content)
    return _toml_document(content)


def _with_kinds(model: SpecModel, content: dict[str, Any]) -> dict[str, Any]:
    """A discriminating `kind` is always its model's default, and still has to be written."""
    whole: dict[str, Any] = {}
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, SpecModel) and name in content:
            whole[name] = _with_kinds(value, content[name])
        elif name in content or name == "kind":
            whole[name] = content.get(name, value)
    return whole


def _toml_document(content: Mapping[str, Any]) -> str:
    # A dozen lines instead of a dependency: run files hold only tables, lists, strings, numbers and booleans.
    lines = [f"{name} = {_toml(value)}" for name, value in content.items() if not isinstance(value, Mapping)]
    for name, table in content.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{key} = {_toml(inner)}" for key, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value)
