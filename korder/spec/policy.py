"""What a run may use: backends, precision of sums, memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ByteSize, Field
from pydantic_core import PydanticCustomError

from korder.spec.base import SpecModel

DEFAULT_MEMORY_LIMIT = 128 * 2**20


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("byte_size", "a boolean is not a size in bytes")
    return value


class Policy(SpecModel):
    """Limits on who computes and with what."""

    _example: ClassVar[Mapping[str, Any]] = {"memory_limit": "256MiB"}

    backends: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the backends that may be used; any when None."""
    precision: Literal["input", "float32", "float64"] = "input"
    """Dtype of sums, at least float32 and the operands' own; "input" may multiply 16-bit numbers as they are."""
    memory_limit: Annotated[ByteSize, Field(gt=0), BeforeValidator(_no_boolean)] = ByteSize(DEFAULT_MEMORY_LIMIT)
    """Workspace in bytes beyond inputs and outputs; a number or a text such as "256MiB"."""
