"""What a run may use: backends, precision of sums, memory."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ByteSize, Field

from korder.spec.base import SpecModel

DEFAULT_MEMORY_LIMIT = 128 * 2**20


class Policy(SpecModel):
    """Limits on who computes and with what."""

    backends: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Names of the backends that may be used; any when None."""
    precision: Literal["input", "float32", "float64"] = "input"
    """Dtype of products and sums; never narrower than float32 nor than the operands."""
    memory_limit: Annotated[ByteSize, Field(gt=0)] = ByteSize(DEFAULT_MEMORY_LIMIT)
    """Workspace in bytes beyond inputs and outputs; a number or a text such as "256MiB"."""
