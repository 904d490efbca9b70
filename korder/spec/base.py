"""The pydantic base of every spec model: frozen, nothing extra, errors in korder's own form."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self, cast

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from korder.errors import SpecError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # pydantic has no public name for it


class _SpecMeta(ModelMetaclass):
    """Turns the outermost `ValidationError` into a `SpecError`; nested models keep pydantic's, which carry the path."""

    def __call__(cls, *args: Any, **data: Any) -> Any:  # noqa: N805 - a metaclass
        try:
            return super().__call__(*args, **data)
        except ValidationError as error:
            raise spec_error(error, cast(type[BaseModel], cls)) from None


class SpecModel(BaseModel, metaclass=_SpecMeta):
    """Frozen model that refuses unknown keys and raises `SpecError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Build the model from a mapping; `SpecError` names the key path, the value and the nearest known key."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise spec_error(error, cls) from None


def spec_error(error: ValidationError, model: type[BaseModel]) -> SpecError:
    """Return the `SpecError` for a pydantic failure: its first problem in full, the others counted by key."""
    problems = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    first = problems[0]  # an unknown key first: where a required key was misspelt, it is the cause of the missing one
    path = _path(first["loc"], model)
    same = [item for item in problems if _path(item["loc"], model) == path]  # the branches of a union
    others = [item for item in problems if item not in same]
    suffix = f" (also wrong: {', '.join(_path(item['loc'], model) for item in others[:3])})" if others else ""
    if first["type"] == "extra_forbidden":
        return _unknown_key(path, first, suffix, model)
    return SpecError(
        f"{path or model.__name__} is not valid: {' or '.join(map(_sentence, same))}{suffix}.",
        code="spec-invalid",
        expected=_expected(first, model),
        got=_shorten(first["input"]) if first["type"] != "missing" else "nothing",
        hint=_hint(first) or "`korder schema` prints every key with its type and meaning.",
    )


def _unknown_key(path: str, item: ErrorDetails, suffix: str, model: type[BaseModel]) -> SpecError:
    known = sorted(_fields_at(item["loc"], model))
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
    return SpecError(
        f"unknown key {path!r}{suffix}.",
        code="spec-unknown-key",
        expected=f"one of {', '.join(known)}" if known else "no such key",
        got=f"{item['loc'][-1]} = {_shorten(item['input'])}",
        hint=f"did you mean {near[0]!r}?" if near else "remove the key, or see `korder schema`.",
    )


def _path(loc: Iterable[int | str], model: type[BaseModel]) -> str:
    """Dotted key path without the tags that pydantic inserts for discriminated unions."""
    text = ""
    for part, _ in _walk(tuple(loc), model):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _fields_at(loc: tuple[int | str, ...], model: type[BaseModel]) -> Iterable[str]:
    last = model
    for _, owner in _walk(loc, model):
        last = owner
    return last.model_fields


def _field_at(loc: tuple[int | str, ...], model: type[BaseModel]) -> FieldInfo:
    """Return the field that `loc` names, an empty one where it names none."""
    field = FieldInfo()
    for part, owner in _walk(loc, model):
        field = owner.model_fields.get(str(part), field)
    return field


def _walk(loc: tuple[int | str, ...], model: type[BaseModel]) -> Iterable[tuple[int | str, type[BaseModel]]]:
    """Yield each real key of `loc` with the model that owns it, stepping over union tags."""
    owner: type[BaseModel] | None = model
    options: list[type[BaseModel]] = []
    for part in loc:
        if options and isinstance(part, str):
            tagged = [option for option in options if _tag(option) == part or option.__name__ == part]
            if tagged:
                owner, options = tagged[0], []
                continue
        if owner is None:
            owner = options[0] if options else model
        yield part, owner
        field = owner.model_fields.get(part) if isinstance(part, str) else None
        options = _models_in(field.annotation) if field is not None else []
        if len(options) == 1:
            owner = options[0]
        elif not options and field is not None:
            yield from ((index, owner) for index in loc[loc.index(part) + 1 :] if isinstance(index, int))
            return


def _tag(option: type[BaseModel]) -> str | None:
    field = option.model_fields.get("kind")
    return field.default if field is not None else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found: list[type[BaseModel]] = []
    for inner in getattr(annotation, "__args__", ()):
        found.extend(_models_in(inner))
    return found


def _sentence(item: ErrorDetails) -> str:
    text = item["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:].rstrip(".")


def _expected(item: ErrorDetails, model: type[BaseModel]) -> str | None:
    context = item.get("ctx", {})
    if item["type"] == "union_tag_not_found":
        options = [tag for option in _models_in(_field_at(item["loc"], model).annotation) if (tag := _tag(option))]
        return f"kind = one of {', '.join(map(repr, options))}"
    if "expected_tags" in context:
        return f"kind = one of {context['expected_tags']}"
    if "expected" in context:
        return str(context["expected"])
    bounds = [f"{sign} {context[key]}" for key, sign in _BOUNDS.items() if key in context]
    if bounds or not item["loc"]:
        return " and ".join(bounds) or None
    field = _field_at(item["loc"], model)
    return field.description and field.description[:1].lower() + field.description[1:].rstrip(".")


_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _hint(item: ErrorDetails) -> str | None:
    tag = item.get("ctx", {}).get("tag")
    if tag is None:
        return None
    known = [word.strip("' ") for word in str(item["ctx"]["expected_tags"]).split(",")]
    near = difflib.get_close_matches(str(tag), known, n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}?" if near else None


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
