"""What a layer is: the declarative form of an attention layer and of a transformer block, no framework.

`korder.torch` builds its modules from these; field names are those of the modules' arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from korder.errors import SpecError
from korder.spec.attention import AttentionSpec
from korder.spec.base import AsInteger, SpecModel, conflict

Size = Annotated[int, Field(ge=1, strict=True), AsInteger]
Share = Annotated[float, Field(ge=0, lt=1)]


class AttentionLayerSpec(SpecModel):
    """An order-k attention with its projections, from rows of `width` columns to rows of `width` columns.

    Example:
        >>> AttentionLayerSpec(width=64, heads=4, attention={"order": 2}).columns
        16
    """

    _example: ClassVar[Mapping[str, Any]] = {"width": 64, "attention": {"order": 2}}

    width: Size
    """Columns of the input and of the output."""
    attention: AttentionSpec
    """Order, mask, method, scale and policy; d of the scale is the head width."""
    heads: Size = 1
    """Query heads, h."""
    key_value_heads: Size | None = None
    """Key/value heads, g, which must divide the heads; the heads when omitted."""
    head_width: Size | None = None
    """Columns of the query and of every key in one head, d; width / heads when omitted."""
    value_width: Size | None = None
    """Columns of every value in one head, e; the head width when omitted."""
    memory_width: Size | None = None
    """Columns of the memories, which keys and values are made of; the width when omitted."""
    bias: bool = True
    """Whether the projections add a learned bias."""
    rotary: bool = False
    """Whether positions turn queries and keys, so that scores depend on differences of positions only."""
    rotary_base: Annotated[float, Field(gt=1)] = 10000.0
    """Pair l of d / 2 turns by base ** (-2 l / d) per position."""
    alibi: bool = False
    """Whether each head adds -slope * |i - j_t| to the score, for every mode t."""
    score_bound: Annotated[float, Field(gt=0)] | None = None
    """Normalise queries and keys so that no score, biases left out, exceeds this in size; not done when omitted."""
    learn_sharpness: bool = False
    """Whether each head learns a factor between 0 and 1 on the score bound, 1/2 at the start."""
    dropout: Share = 0.0
    """Chance of each entry of the output to be dropped in training."""

    @model_validator(mode="after")
    def _widths_fit(self) -> Self:
        if self.key_value_heads is not None and self.heads % self.key_value_heads:
            raise conflict(
                f"key_value_heads = {self.key_value_heads} does not divide heads = {self.heads}",
                expected=f"a divisor of {self.heads}",
            )
        if self.head_width is None and self.width % self.heads:
            raise conflict(
                f"heads = {self.heads} does not divide width = {self.width}",
                expected=f"a divisor of {self.width}, or a head_width",
            )
        if self.rotary and self.columns % 2:
            raise conflict(
                f"rotary turns pairs of columns, but head_width is {self.columns}",
                expected="an even head_width",
                got=f"head_width = {self.columns}",
            )
        return self

    @model_validator(mode="after")
    def _scores_fit(self) -> Self:
        if self.attention.score == "kronecker":
            raise conflict(
                "attention.score has no place in a layer: its projections are the CP factors of the weight",
                expected="attention.score = 'khatri_rao'",
            )
        if self.score_bound is not None and self.attention.scale != "inverse_sqrt_dim":
            raise conflict(
                "score_bound and attention.scale both say how large scores are", expected="one of them, not both"
            )
        if self.learn_sharpness and self.score_bound is None:
            raise conflict("learn_sharpness belongs to a score_bound", expected="a score_bound, or no learn_sharpness")
        if self.alibi and self.attention.polynomial is not None:
            raise conflict(
                "alibi depends on query and key at once, which attention.method = polynomial cannot take",
                expected="attention.method = exact, or rotary in place of alibi",
                got="alibi = True, method = polynomial",
            )
        return self

    @classmethod
    def from_arguments(
        cls,
        *,
        spec: AttentionSpec | None = None,
        order: int | None = None,
        mask: Any = None,
        method: Any = None,
        scale: Any = None,
        policy: Any = None,
        **fields: Any,
    ) -> Self:
        """Build the model from the fields of its `attention`, or from a spec in their place, and its other fields.

        Raises:
            SpecError: A spec together with fields that it holds; else as the model itself.
        """
        described = {"order": order, "mask": mask, "method": method, "scale": scale, "policy": policy}
        given = {name: value for name, value in described.items() if value is not None}
        if spec is None:
            return cls(attention=AttentionSpec(**{"order": 2, **given}), **fields)
        if given:
            raise SpecError(
                "a spec and arguments that it holds were given together.",
                expected=f"spec alone, or {', '.join(described)}",
                got=f"spec and {', '.join(given)}",
                hint=f"use spec.model_copy(update={{{', '.join(f'{name!r}: ...' for name in given)}}}).",
            )
        return cls(attention=AttentionSpec.model_validate(spec), **fields)

    @property
    def columns(self) -> int:
        """Columns of the query and of every key in one head, d, as projected."""
        return self.width // self.heads if self.head_width is None else self.head_width


class TransformerBlockSpec(SpecModel):
    """A pre-norm transformer block around an order-k attention layer.

    Example:
        >>> TransformerBlockSpec(attention={"width": 64, "attention": {"order": 2}}).activation
        'gelu'
    """

    _example: ClassVar[Mapping[str, Any]] = {"attention": {"width": 64, "attention": {"order": 2}}}

    attention: AttentionLayerSpec
    """The attention layer, its dropout included."""
    hidden_width: Size | None = None
    """Columns between the two linear maps of the second branch; four times the width when omitted."""
    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """What stands between the two linear maps."""
    dropout: Share = 0.0
    """Chance of each entry of the second branch to be dropped in training."""
    norm_epsilon: Annotated[float, Field(gt=0)] = 1e-5
    """What layer normalisation adds to the variance."""
