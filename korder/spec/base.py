"""The pydantic base of every spec model: frozen, nothing extra, errors in korder's own form."""

from __future__ import annotations

import difflib
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from korder.errors import SpecError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # pydantic has no public name for it


def _as_integer(value: Any) -> Any:
    """Return NumPy's integers and their like as int, and leave everything else to the check that follows."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value


AsInteger = BeforeValidator(_as_integer)
"""Put it last in an annotation: pydantic leaves the bounds that follow it out of the JSON Schema."""


def conflict(message: str, *, expected: str | None = None, got: str | None = None) -> PydanticCustomError:
    """Return the error of a model validator: keys that do not fit each other."""
    return PydanticCustomError("conflict", "{message}", {"message": message, "expected": expected, "got": got})


class _SpecMeta(ModelMetaclass):
    """Turns the outermost `ValidationError` into a `SpecError`; nested models keep pydantic's, which carry the path."""

    def __call__(cls, *args: Any, **data: Any) -> Any:  # noqa: N805 - a metaclass
        model = cast("type[SpecModel]", cls)
        if args:
            raise SpecError(
                f"{model.__name__} takes keyword arguments only.",
                expected=f"for example {model.__name__}({_arguments(model)})",
                got=f"{model.__name__}({', '.join(map(_shorten, args))})",
                hint="name every argument.",
            )
        try:
            return super().__call__(**data)
        except ValidationError as error:
            raise spec_error(error, model) from None


class SpecModel(BaseModel, metaclass=_SpecMeta):
    """Frozen model that refuses unknown keys and raises `SpecError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    _example: ClassVar[Mapping[str, Any]] = {}  # what an error text shows as a way to build the model

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Build the model from a mapping; `SpecError` names the key path, the value and the nearest known key."""
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise spec_error(error, cls) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Build the model from a JSON text; `SpecError` as for `model_validate`."""
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise spec_error(error, cls) from None

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some fields replaced, checked like a new one; `deep` changes nothing, all is frozen."""
        return type(self)(**{**{name: getattr(self, name) for name in type(self).model_fields}, **(update or {})})

    if not TYPE_CHECKING:  # a type checker knows the fields as read-only

        def __setattr__(self, name: str, value: Any) -> None:
            raise _frozen(self, name, f"{name} = {_shorten(value)}", _shorten(value))

        def __delattr__(self, name: str) -> None:
            raise _frozen(self, name, f"del {name}", "...")


def _frozen(spec: SpecModel, name: str, got: str, value: str) -> SpecError:
    return SpecError(
        f"specs are frozen, {name} cannot be set.",
        expected="a new spec with the other value",
        got=got,
        hint=f"use spec.model_copy(update={{{name!r}: {value}}})." if name in type(spec).model_fields else None,
    )


def spec_error(error: ValidationError, model: type[BaseModel]) -> SpecError:
    """Return the `SpecError` for a pydantic failure: its first problem in full, the others counted by key."""
    problems = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
    first = problems[0]  # an unknown key first: where a required key was misspelt, it is the cause of the missing one
    path = _path(first["loc"], model)
    same = [item for item in problems if _path(item["loc"], model) == path]  # the branches of a union
    others = dict.fromkeys(_path(item["loc"], model) for item in problems if item not in same)
    wrong = [other for other in others if not path.startswith(other)]
    suffix = f" (also wrong: {', '.join(wrong[:3])})" if wrong else ""
    if first["type"] == "extra_forbidden":
        return _unknown_key(path, first, suffix, model)
    expected = _expected(first, model)
    return SpecError(
        f"{_message(path or model.__name__, same, model)}{suffix}.",
        expected=expected,
        got=_got(first),
        hint=_hint(first, model, expected or ""),
    )


def _unknown_key(path: str, item: ErrorDetails, suffix: str, model: type[BaseModel]) -> SpecError:
    fields = _fields_at(item["loc"], model)
    known = sorted(name for name, field in fields.items() if name != "kind" or field.is_required())
    near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
    remove = "remove the key, or see `korder schema`." if _is_file(model) else "remove it."
    return SpecError(
        f"unknown key {path!r}{suffix}.",
        code="spec-unknown-key",
        expected=f"one of {', '.join(known)}" if known else "no further key",
        got=f"{item['loc'][-1]} = {_shorten(item['input'])}",
        hint=f"did you mean {near[0]!r}?" if near else remove,
    )


def _path(loc: Iterable[int | str], model: type[BaseModel]) -> str:
    """Dotted key path without the tags that pydantic inserts for discriminated unions."""
    text = ""
    for part, _ in _walk(tuple(loc), model):
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _fields_at(loc: tuple[int | str, ...], model: type[BaseModel]) -> Mapping[str, FieldInfo]:
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


_WORDS = {
    "missing": "missing",
    "int_type": "not an integer",
    "int_from_float": "not an integer",
    "float_type": "not a number",
    "float_parsing": "not a number",
    "finite_number": "not a finite number",
    "bool_type": "neither true nor false",
    "string_type": "not a text",
    "tuple_type": "not a list",
    "literal_error": "not one of the known values",
    "greater_than": "out of range",
    "greater_than_equal": "out of range",
    "less_than": "out of range",
    "less_than_equal": "out of range",
    "too_short": "empty",
    "string_too_short": "empty",
    "byte_size": "not a size in bytes",
    "byte_size_unit": "not a size in bytes",
    "union_tag_not_found": "without a kind",
}
_NO_TABLE = ("model_type", "model_attributes_type")


def _message(path: str, same: list[ErrorDetails], model: type[BaseModel]) -> str:
    """Return line 1: what is wrong with the key at `path`; keys that do not fit each other speak for themselves."""
    item, value = same[0], same[0]["input"]
    if isinstance(value, type) and item["type"] in (*_NO_TABLE, "union_tag_not_found"):
        return f"{path} is the class {value.__name__}, not an instance"
    if item["type"] in _NO_TABLE:
        return f"{path} is {_noun(value)} where {'a table' if _is_file(model) else 'a spec'} belongs"
    if isinstance(value, BaseModel) and item["type"].startswith("union_tag"):
        return f"{path} is {_noun(value)}, which does not belong there"
    if item["type"] == "union_tag_invalid":
        return f"{path} is of an unknown kind, {item['ctx']['tag']!r}"
    if all(one["type"] in _WORDS for one in same):
        return f"{path} is {' and '.join(dict.fromkeys(_WORDS[one['type']] for one in same))}"
    text = " or ".join(_sentence(one) for one in same)
    return text if item["type"] in ("conflict", "value_error") and not item["loc"] else f"{path} is not valid: {text}"


def _sentence(item: ErrorDetails) -> str:
    text = item["msg"].removeprefix("Value error, ")
    return text[:1].lower() + text[1:].rstrip(".")


def _noun(value: Any) -> str:
    kinds: tuple[tuple[Any, str], ...] = (
        (bool, "a boolean"), (str, "a text"), ((int, float), "a number"), ((list, tuple), "a list"), (NoneType, "None"),
    )  # fmt: skip
    return next((name for kind, name in kinds if isinstance(value, kind)), _article(type(value).__name__))


def _got(item: ErrorDetails) -> str | None:
    if item["type"] == "missing":
        return "nothing"
    if item["type"] in ("conflict", "value_error"):
        return item.get("ctx", {}).get("got") or _concerned(_sentence(item), item["input"])
    return f"the class {item['input'].__name__}" if isinstance(item["input"], type) else _shorten(item["input"])


def _concerned(text: str, values: Any) -> str | None:
    """Return the values of the keys that `text` names, None where it names none."""
    found = {}
    for path in re.findall(r"\w+(?:\.\w+)*", text):
        value = values
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if value is not None and not callable(value):
            found[path] = value
    return ", ".join(f"{path} = {_shorten(value)}" for path, value in found.items()) or None


def _expected(item: ErrorDetails, model: type[BaseModel]) -> str | None:
    if item["type"] in ("conflict", "value_error"):
        return cast("str | None", item.get("ctx", {}).get("expected"))
    if not item["loc"]:
        return _table_or_spec([model], model) if item["type"] in _NO_TABLE else None
    field = _field_at(item["loc"], model)
    if item["type"].startswith("union_tag") and isinstance(item["input"], Mapping):
        return f"kind = {_either([repr(_tag(option)) for option in _models_in(field.annotation)])}"
    models = _models_in(field.annotation)
    if models:
        return _table_or_spec(models, model)
    annotation, metadata = field.annotation, list(field.metadata)
    if isinstance(item["loc"][-1], int):
        annotation, metadata = _item_of(annotation), []
    return _either(_choices(annotation, metadata)) or None


def _table_or_spec(options: list[type[BaseModel]], model: type[BaseModel]) -> str:
    tags = [repr(tag) for option in options if (tag := _tag(option))]
    names = (
        f"such as {_table(options[0], model)}" if _sample(options[0]) else f"of {', '.join(options[0].model_fields)}"
    )
    keys = f"with kind = {_either(tags)}" if tags else names
    if _is_file(model):
        return f"a table {keys}"
    return f"an instance of {_either([option.__name__ for option in options])}, or a dict {keys}"


def _choices(annotation: Any, metadata: Sequence[Any] = (), *, many: bool = False) -> list[str]:
    """Return in words what a field of this type takes, one text per alternative."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [part for item in arguments[1:] for part in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _choices(arguments[0], [*metadata, *inner], many=many)
    if origin in (Union, UnionType):
        parts = [_choices(part, metadata, many=many) for part in arguments if part is not NoneType]
        return [choice for part in parts for choice in part]
    filled = "non-empty " if any(getattr(item, "min_length", None) for item in metadata) else ""
    if origin is Literal:
        return [repr(value) for value in arguments]
    if origin is tuple:
        return [f"a {filled}list of {_either(_choices(arguments[0], many=True))}"]
    if annotation is ByteSize:
        return ["a positive number of bytes, or a text such as '256MiB'"]
    if annotation is bool:
        return ["true or false"]
    if annotation is str:
        return ["texts" if many else f"a {filled}text"]
    bounds = {name: bound for item in metadata for name in _SIGNS if (bound := getattr(item, name, None)) is not None}
    return [_number(annotation, bounds, many)] if annotation in (int, float) else []


def _item_of(annotation: Any) -> Any:
    """Return the type of the items of the first list in `annotation`."""
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    return next((item for part in get_args(annotation) if (item := _item_of(part)) is not None), None)


_SIGNS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}


def _number(kind: type, bounds: dict[str, float], many: bool) -> str:
    noun = ("integer" if kind is int else "number") + ("s" if many else "")
    if kind is int and "gt" in bounds:
        bounds = {"ge": bounds["gt"] + 1, **{name: bound for name, bound in bounds.items() if name != "gt"}}
    text = noun if kind is int else f"finite {noun}"
    if bounds in ({"ge": 1}, {"gt": 0}):
        text = f"positive {noun}"
    elif set(bounds) == {"ge", "le"}:
        text = f"{noun} from {bounds['ge']:g} to {bounds['le']:g}"
    elif bounds:
        text = f"{noun} {' and '.join(f'{_SIGNS[name]} {bound:g}' for name, bound in bounds.items())}"
    return text if many else _article(text)


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiouAEIOU' else 'a'} {noun}"


def _either(words: list[str]) -> str:
    return " or ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def _hint(item: ErrorDetails, model: type[BaseModel], expected: str) -> str | None:
    """Return what to write instead; a run file without anything nearer is sent to the schema."""
    fallback = "`korder schema` prints every key with its type and meaning." if _is_file(model) else None
    if item["type"] in ("conflict", "value_error"):
        return fallback
    value, options = item["input"], _models_in(_field_at(item["loc"], model).annotation) if item["loc"] else [model]
    if isinstance(value, type):
        return f"korder.{value.__name__}({_arguments(value)})" if value in options else fallback
    if item["type"] == "union_tag_not_found" and isinstance(value, Mapping):
        fitting = [option for option in options if set(value) <= set(option.model_fields)]
        return f'add the key, for example kind = "{_tag((fitting or options)[0])}".'
    word = item["ctx"]["tag"] if item["type"] == "union_tag_invalid" else value
    known = re.findall(r"'([^' ]+)'", expected) if isinstance(word, str) else []
    near = difflib.get_close_matches(str(word), known, n=1, cutoff=0.4)
    meant = [option for option in options if near and _tag(option) == near[0]]
    if meant and item["type"] in _NO_TABLE:
        python = "" if _is_file(model) else f", or korder.{meant[0].__name__}({_arguments(meant[0])})"
        return f"write {_table(meant[0], model)}{python}."
    return f"did you mean {near[0]!r}?" if near and item["type"] != "byte_size" else fallback


def _is_file(model: type[BaseModel]) -> bool:
    return "schema_version" in model.model_fields


def _sample(model: type[BaseModel]) -> Mapping[str, Any]:
    example: Mapping[str, Any] = getattr(model, "_example", {})
    return example or {name: ... for name, field in model.model_fields.items() if field.is_required()}


def _arguments(model: type[BaseModel]) -> str:
    """Return keyword arguments, as in Python, that build a `model`."""
    return ", ".join(f"{name}={_shorten(value)}" for name, value in _sample(model).items())


def _table(option: type[BaseModel], model: type[BaseModel]) -> str:
    """Return a table that builds an `option`, as TOML in a run file and as a dict in Python."""
    values = ({"kind": tag} if (tag := _tag(option)) else {}) | dict(_sample(option))
    if _is_file(model):
        texts = {name: "..." if item is ... else json.dumps(item) for name, item in values.items()}
        return "{" + ", ".join(f"{name} = {text}" for name, text in texts.items()) + "}"
    return "{" + ", ".join(f"{name!r}: {_shorten(item)}" for name, item in values.items()) + "}"


def _shorten(value: Any) -> str:
    text = "..." if value is ... else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
