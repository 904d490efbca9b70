"""The order-k attention layer: projections around `attend`, rotary positions, bounded scores, output dropout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, sqrt
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from korder.spec import AttentionSpec, Full, Mask, Method, Policy
from korder.spec.layers import AttentionLayerSpec
from korder.torch.functional import attend
from korder.torch.inputs import check_shapes, read_memories
from korder.torch.rotary import embed_rotary, rotary_factor
from korder.torch.scores import alibi, unit_rows


class OrderKAttention(nn.Module):  # type: ignore[misc]
    """Attention of every input row to all tuples of k memory rows, with learned projections.

    Shapes:
        input (.., n, width), memories (.., m_t, memory_width), output (.., n, width).
    Args:
        width: Columns of the input and of the output.
        order: Number of key matrices, k; 2 when neither it nor a spec is given.
        mask: Which tuples may be attended to; all when omitted.
        method: Exact when omitted.
        scale: As of `AttentionSpec`, d being the head width.
        policy: Backends, precision and memory.
        spec: An `AttentionSpec` in place of order, mask, method, scale and policy.
        heads: Query heads, h.
        key_value_heads: Key/value heads, g, which must divide h; h when omitted.
        head_width: Columns of query and keys in one head, d; width / heads when omitted.
        value_width: Columns of values in one head, e; d when omitted.
        memory_width: Columns of the memories; width when omitted.
        bias: Whether the projections add a learned bias.
        rotary: Turn queries and keys by their positions (`embed_rotary`).
        rotary_base: Sets the slowest turn.
        alibi: Add a linear bias per head and mode (`alibi`).
        score_bound: Normalise queries and keys so that no score exceeds this in size, biases left out.
        learn_sharpness: Let each head learn a factor between 0 and 1 on the bound.
        dropout: Chance of each entry of the output to be dropped in training. Weights cannot be dropped, they are
            never stored.
        device: Of the parameters.
        dtype: Of the parameters.
    Raises:
        SpecError: Arguments that are out of range or do not fit each other.
    Numerics:
        At the start query, keys and values of unit-variance inputs have unit mean square (see `reset_parameters`).
    Example:
        >>> layer = OrderKAttention(8, order=2, heads=2, mask={"kind": "causal"}, rotary=True)
        >>> tuple(layer(torch.ones(3, 5, 8)).shape)
        (3, 5, 8)
    """

    def __init__(
        self,
        width: int,
        *,
        order: int | None = None,
        mask: Mask | Mapping[str, Any] | None = None,
        method: Method | Mapping[str, Any] | None = None,
        scale: Literal["inverse_sqrt_dim", "inverse_dim"] | float | None = None,
        policy: Policy | Mapping[str, Any] | None = None,
        spec: AttentionSpec | None = None,
        heads: int = 1,
        key_value_heads: int | None = None,
        head_width: int | None = None,
        value_width: int | None = None,
        memory_width: int | None = None,
        bias: bool = True,
        rotary: bool = False,
        rotary_base: float = 10000.0,
        alibi: bool = False,
        score_bound: float | None = None,
        learn_sharpness: bool = False,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        config = AttentionLayerSpec.from_arguments(
            spec=spec,
            order=order,
            mask=mask,
            method=method,
            scale=scale,
            policy=policy,
            width=width,
            heads=heads,
            key_value_heads=key_value_heads,
            head_width=head_width,
            value_width=value_width,
            memory_width=memory_width,
            bias=bias,
            rotary=rotary,
            rotary_base=rotary_base,
            alibi=alibi,
            score_bound=score_bound,
            learn_sharpness=learn_sharpness,
            dropout=dropout,
        )
        super().__init__()
        self._build(config, device, dtype)

    @classmethod
    def from_config(
        cls,
        config: AttentionLayerSpec | Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the layer from its declarative form, or from a mapping with the same keys.

        Raises:
            SpecError: A key that is unknown, out of range, or does not fit another.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._build(AttentionLayerSpec.model_validate(config), device, dtype)
        return layer

    def _build(self, config: AttentionLayerSpec, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.config = config
        self.order = config.attention.order
        self.width = config.width
        self.memory_width = config.memory_width or config.width
        self.heads = config.heads
        self.key_value_heads = config.key_value_heads or config.heads
        self.head_width = config.columns
        self.value_width = config.value_width or config.columns
        self.score_bound = config.score_bound
        scale = config.attention.score_factor(self.head_width) if self.score_bound is None else self.score_bound
        scale *= rotary_factor(self.order) if config.rotary else 1.0
        self._spec = config.attention.model_copy(update={"scale": scale})

        def linear(inputs: int, outputs: int) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias=config.bias, device=device, dtype=dtype)

        key_columns, value_columns = self.key_value_heads * self.head_width, self.key_value_heads * self.value_width
        self.query_projection = linear(self.width, self.heads * self.head_width)
        self.key_projections = nn.ModuleList(linear(self.memory_width, key_columns) for _ in range(self.order))
        self.value_projections = nn.ModuleList(linear(self.memory_width, value_columns) for _ in range(self.order))
        self.output_projection = linear(self.heads * self.value_width, self.width)
        self.output_dropout = nn.Dropout(config.dropout)
        if config.learn_sharpness:
            self.sharpness = nn.Parameter(torch.empty(self.heads, device=device, dtype=dtype))
        else:
            self.register_parameter("sharpness", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters anew.

        Query, key and value weights are uniform with variance 1 / inputs, so that their results have the variance of
        the inputs, and with the default scale scores of variance 1 for every order; with rotary positions the keys of
        all modes but the first get half that variance, for the same scores. An average of products of k values that
        vary about 0 shrinks as n ** (-k / 2), so values of all modes but the first vary about sqrt(1/2), through their
        bias, with variance 1/2: the mean square of a product is still 1, and the average shrinks as n ** (-1/2), as
        for order 1. Without biases it cannot be so. The output weight is Glorot-uniform, as torch's own attention
        draws its weights. All other biases are 0.

        Source:  LeCun et al., Efficient BackProp, 1998; Glorot & Bengio 2010; the choice for orders above 1 is ours.
        """
        _draw(self.query_projection)
        for t, (key, value) in enumerate(zip(self.key_projections, self.value_projections, strict=True)):
            _draw(key, variance=0.5 if t and self.config.rotary else 1.0)
            shifted = bool(t) and self.config.bias
            _draw(value, variance=0.5 if shifted else 1.0, shift=sqrt(0.5) if shifted else 0.0)
        nn.init.xavier_uniform_(self.output_projection.weight)
        if self.output_projection.bias is not None:
            nn.init.zeros_(self.output_projection.bias)
        if self.sharpness is not None:
            nn.init.zeros_(self.sharpness)

    def score_bounds(self) -> Tensor:
        """Return what the scores of each head cannot exceed in size now, biases left out, to rounding.

        Shapes:  result (h,); `score_bound` for every head or, learned, a share of it; infinite without normalisation.
        """
        if self.sharpness is not None:
            return self.score_bound * torch.sigmoid(self.sharpness)
        bound = inf if self.score_bound is None else self.score_bound
        return self.query_projection.weight.new_full((self.heads,), bound)

    def forward(
        self,
        x: Tensor,
        memories: Tensor | Sequence[Tensor] | None = None,
        *,
        biases: Sequence[Tensor | None] | None = None,
        key_masks: Sequence[Tensor | None] | None = None,
        query_offset: int | None = None,
        key_offsets: Sequence[int] | None = None,
    ) -> Tensor:
        """Return the attention of `x` to its memories.

        Shapes:
            x (.., n, width); memories (.., m_t, memory_width); biases[t] (.., h, n, m_t) with 1 where it is the same;
            key_masks[t] (.., m_t) or (.., g, m_t), True = may be attended to; result (.., n, width).
        Args:
            x: Rows that ask.
            memories: Rows to attend to, one tensor for all modes or one per mode; `x` itself when omitted.
            biases: Per mode, added to the score; entries may be None.
            key_masks: Per mode; entries may be None.
            query_offset: Position of the first query, for the mask, rotary positions and alibi.
            key_offsets: Position of the first key of each mode.
        Raises:
            ShapeError: Shapes that do not fit the layer or each other; unequal lengths under a mask that does not say
                how they line up.
            OperandError: Rows of another dtype than the parameters.
        """
        rows = read_memories(self.config, self.query_projection.weight.dtype, x, memories)
        if not torch.compiler.is_compiling():
            check_shapes(self._spec, self.config, x, rows, biases, key_masks, query_offset, key_offsets)
        query = _split(self.query_projection(x), self.heads)
        keys = tuple(
            _split(project(row), self.key_value_heads) for project, row in zip(self.key_projections, rows, strict=True)
        )
        values = tuple(
            _split(project(row), self.key_value_heads)
            for project, row in zip(self.value_projections, rows, strict=True)
        )
        first, offsets = self._positions(x, rows, query_offset, key_offsets)
        query, keys = self._score_operands(query, keys, first, offsets)
        output = attend(
            query,
            keys,
            values,
            spec=self._spec,
            biases=self._biases(query, keys, biases, first, offsets),
            key_masks=key_masks,
            query_offset=query_offset,
            key_offsets=key_offsets,
        )
        return self.output_dropout(self.output_projection(output.transpose(-3, -2).flatten(-2)))

    def extra_repr(self) -> str:
        """Return what the layer is, in one line; the projections follow it."""
        config, spec = self.config, self.config.attention
        parts = [
            f"width={self.width}, order={self.order}, heads={self.heads}, key_value_heads={self.key_value_heads}",
            f"head_width={self.head_width}, value_width={self.value_width}",
            f"method={spec.method.kind}, mask={spec.mask.kind}, rotary={config.rotary}",
        ]
        if self.memory_width != self.width:
            parts.append(f"memory_width={self.memory_width}")
        if config.alibi:
            parts.append("alibi=True")
        if self.score_bound is not None:
            parts.append(f"score_bound={self.score_bound:g}, learn_sharpness={config.learn_sharpness}")
        return ", ".join(parts)

    def _positions(
        self, x: Tensor, rows: Sequence[Tensor], query_offset: int | None, key_offsets: Sequence[int] | None
    ) -> tuple[int, tuple[int, ...]]:
        """Return the positions of the first query and of each mode's first key, as the mask counts them."""
        mask = self._spec.mask
        if not isinstance(mask, Full) and mask.align == "end":
            return 0, tuple(x.shape[-2] - row.shape[-2] for row in rows)
        return query_offset or 0, tuple(key_offsets or (0,) * self.order)

    def _score_operands(
        self, query: Tensor, keys: tuple[Tensor, ...], first: int, offsets: tuple[int, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return query and keys whose plain scores, times the scale, are the layer's."""
        rotary = self.config.rotary
        if self.score_bound is not None:
            query, *others = (unit_rows(rows, self.order, pairs=rotary) for rows in (query, *keys))
            keys = tuple(others)
        if self.sharpness is not None:
            query = query * torch.sigmoid(self.sharpness)[:, None, None].to(query.dtype)
        if rotary:
            base = self.config.rotary_base
            query, keys, _ = embed_rotary(query, keys, query_offset=first, key_offsets=offsets, base=base)
        return query, keys

    def _biases(
        self,
        query: Tensor,
        keys: Sequence[Tensor],
        biases: Sequence[Tensor | None] | None,
        first: int,
        offsets: Sequence[int],
    ) -> Sequence[Tensor | None] | None:
        if not self.config.alibi:
            return biases
        options = {"dtype": query.dtype, "device": query.device}
        whole: list[Tensor | None] = []
        for t, (key, offset) in enumerate(zip(keys, offsets, strict=True)):
            slope = alibi(self.heads, query.shape[-2], key.shape[-2], query_offset=first, key_offset=offset, **options)
            slope = slope.reshape(*(1,) * (query.ndim - 3), *slope.shape)
            given = biases[t] if biases else None
            whole.append(slope if given is None else slope + given)
        return tuple(whole)


def _draw(linear: nn.Linear, *, variance: float = 1.0, shift: float = 0.0) -> None:
    """Draw a weight that gives unit-variance inputs this variance, and set the bias."""
    limit = sqrt(3.0 * variance / linear.in_features)
    nn.init.uniform_(linear.weight, -limit, limit)
    if linear.bias is not None:
        nn.init.constant_(linear.bias, shift)


def _split(rows: Tensor, heads: int) -> Tensor:
    """(.., n, heads * width) -> (.., heads, n, width)."""
    return rows.unflatten(-1, (heads, -1)).transpose(-3, -2)
