"""docs/configs.md says of every key of a run file what the models say: type, default, meaning."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Gt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from korder.spec import AttentionSpec, Auto, Causal, Exact, Full, Ordered, Policy, Polynomial, Split, Window
from korder.spec.runs import (
    ArraysData,
    AttendOutput,
    AttendRun,
    BenchmarkRun,
    Output,
    RandomData,
    SetCardsData,
    TextData,
    parse_run,
)

DOC = Path(__file__).parents[1] / "docs" / "configs.md"
MODELS: tuple[type[BaseModel], ...] = (
    AttendRun, BenchmarkRun, ArraysData, RandomData, SetCardsData, TextData, AttentionSpec, Full, Causal, Window,
    Ordered, Exact, Polynomial, Split, Auto, Policy, Output, AttendOutput,
)  # fmt: skip


def table(model: type[BaseModel]) -> str:
    """The table that docs/configs.md must hold for a model."""
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    schema = model.model_json_schema()
    for name, field in model.model_fields.items():
        kind = _kind(_with_strict_bounds(schema["properties"][name], field), schema.get("$defs", {}))
        required = field.default is PydanticUndefined or name == "kind"
        default = "required" if required else _default(field.default)
        meaning = field.description or ("The kind." if name == "kind" else "")
        lines.append(f"| `{name}` | {kind} | {default} | {' '.join(meaning.split())} |")
    return "\n".join(lines)


def _with_strict_bounds(schema: dict[str, Any], field: FieldInfo) -> dict[str, Any]:
    """The schema of a size in bytes says ">= 0" of its own; what the model asks for wins."""
    above = [item.gt for item in field.metadata if isinstance(item, Gt)]
    if not above or "anyOf" not in schema:
        return schema
    options = [{k: v for k, v in option.items() if k != "minimum"} for option in schema["anyOf"]]
    for option in options:
        if option.get("type") in ("integer", "number"):
            option["exclusiveMinimum"] = above[0]
    return {**schema, "anyOf": options}


def _kind(schema: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "const" in schema:
        return f"`{_toml(schema['const'])}`"
    if "enum" in schema:
        return " or ".join(f"`{_toml(value)}`" for value in schema["enum"])
    if "anyOf" in schema:
        kinds = [_kind(option, definitions) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "oneOf" in schema or "$ref" in schema or schema.get("type") == "object":
        return "table"
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'], definitions)}"
    bounds = [f"{sign} {schema[key]:g}" for key, sign in BOUNDS.items() if key in schema]
    return " ".join([str(schema["type"]), ", ".join(bounds)]).strip()


BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        kind = getattr(value, "kind", None)
        return f'`{{ kind = "{kind}" }}`' if kind else "its defaults"
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_key_is_documented_as_it_is(model: type[BaseModel]) -> None:
    assert table(model) in DOC.read_text(encoding="utf-8"), f"docs/configs.md should hold:\n{table(model)}"


def test_every_model_is_among_them() -> None:
    from korder.spec.files import run_schema

    assert set(run_schema()["$defs"]) == {model.__name__ for model in MODELS}


def test_the_run_files_in_the_docs_are_valid() -> None:
    found = 0
    for path in sorted(DOC.parent.glob("*.md")):
        for block in re.findall(r"```toml\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL):
            if "schema_version" in block:
                parse_run(tomllib.loads(block))
                found += 1
    assert found >= 3
