"""Which tuples of keys a query may attend to. Positions are `index + offset`; offsets are run-time operands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from korder.spec.base import AsInteger, SpecModel

Align = Literal["start", "end"]


class Full(SpecModel):
    """Every tuple may be attended to."""

    kind: Literal["full"] = "full"


class Causal(SpecModel):
    """A query at position i sees the tuples with every j_t <= i."""

    kind: Literal["causal"] = "causal"
    align: Align | None = None
    """How unequal lengths line up: "start" puts first on first, "end" puts last on last."""


class Window(SpecModel):
    """A query at position i sees the tuples with i - w_t < j_t <= i for every mode t: w_t keys, its own included."""

    _example: ClassVar[Mapping[str, Any]] = {"sizes": (128, 128)}

    kind: Literal["window"] = "window"
    sizes: Annotated[tuple[Annotated[int, Field(gt=0, strict=True), AsInteger], ...], Field(min_length=1)]
    """One window per mode, in keys."""
    align: Align | None = None
    """How unequal lengths line up: "start" puts first on first, "end" puts last on last."""


class Ordered(SpecModel):
    """A query at position i sees the tuples with j_1 < j_2 < ... < j_k <= i."""

    kind: Literal["ordered"] = "ordered"
    align: Align | None = None
    """How unequal lengths line up: "start" puts first on first, "end" puts last on last."""


Mask = Annotated[Full | Causal | Window | Ordered, Field(discriminator="kind")]
