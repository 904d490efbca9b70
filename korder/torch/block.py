"""A pre-norm transformer block around the order-k attention layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from korder.spec.layers import AttentionLayerSpec, TransformerBlockSpec
from korder.torch.attention import OrderKAttention
from korder.torch.inputs import read_memories

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class OrderKTransformerBlock(nn.Module):  # type: ignore[misc]
    """Two residual branches, each behind a layer normalisation: order-k attention, then two linear maps.

        x = x + attention(norm(x));  x = x + contract(activation(expand(norm(x))))

    Shapes:
        input and output (.., n, width).
    Args:
        width: Columns of the input and of the output.
        hidden_width: Columns between the two linear maps; four times the width when omitted.
        activation: What stands between them: "gelu", "relu" or "silu".
        dropout: Chance of each entry of either branch to be dropped in training.
        norm_epsilon: What layer normalisation adds to the variance.
        device: Of the parameters.
        dtype: Of the parameters.
        attention: All further arguments of `OrderKAttention`.
    Raises:
        SpecError: Arguments that are out of range or do not fit each other.
    Source:
        Xiong et al., arXiv 2002.04745, for the place of the normalisations.
    Example:
        >>> block = OrderKTransformerBlock(8, order=2, heads=2, dropout=0.1).eval()
        >>> tuple(block(torch.ones(3, 5, 8)).shape)
        (3, 5, 8)
    """

    def __init__(
        self,
        width: int,
        *,
        hidden_width: int | None = None,
        activation: Literal["gelu", "relu", "silu"] = "gelu",
        dropout: float = 0.0,
        norm_epsilon: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ) -> None:
        layer = AttentionLayerSpec.from_arguments(width=width, dropout=dropout, **attention)
        config = TransformerBlockSpec(
            attention=layer,
            hidden_width=hidden_width,
            activation=activation,
            dropout=dropout,
            norm_epsilon=norm_epsilon,
        )
        super().__init__()
        self._build(config, device, dtype)

    @classmethod
    def from_config(
        cls,
        config: TransformerBlockSpec | Mapping[str, Any],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the block from its declarative form, or from a mapping with the same keys.

        Raises:
            SpecError: A key that is unknown, out of range, or does not fit another.
        """
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block._build(TransformerBlockSpec.model_validate(config), device, dtype)
        return block

    def _build(
        self, config: TransformerBlockSpec, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        width = config.attention.width
        hidden = config.hidden_width or 4 * width
        placed = {"device": device, "dtype": dtype}
        self.config = config
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_epsilon, **placed)
        self.attention = OrderKAttention.from_config(config.attention, **placed)
        self.hidden_norm = nn.LayerNorm(width, eps=config.norm_epsilon, **placed)
        self.expand = nn.Linear(width, hidden, **placed)
        self.activation = _ACTIVATIONS[config.activation]()
        self.contract = nn.Linear(hidden, width, **placed)
        self.hidden_dropout = nn.Dropout(config.dropout)
        self._draw()

    def reset_parameters(self) -> None:
        """Draw all parameters anew: the two linear maps Glorot-uniform with biases 0, the rest as its own kind does.

        Source:  Glorot & Bengio 2010; `OrderKAttention.reset_parameters` for the attention.
        """
        self.attention.reset_parameters()
        self.attention_norm.reset_parameters()
        self.hidden_norm.reset_parameters()
        self._draw()

    def _draw(self) -> None:
        for linear in (self.expand, self.contract):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

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
        """Return the block's output; arguments and errors are those of `OrderKAttention.forward`.

        Memories, where given, are attended to as they are; the block normalises its own rows only.
        """
        # A wrong x is reported by the attention, in whose terms it is wrong, before the normalisation would trip on it.
        read_memories(self.attention.config, self.attention.query_projection.weight.dtype, x, memories)
        attended = self.attention(
            self.attention_norm(x),
            memories,
            biases=biases,
            key_masks=key_masks,
            query_offset=query_offset,
            key_offsets=key_offsets,
        )
        x = x + attended
        hidden = self.contract(self.activation(self.expand(self.hidden_norm(x))))
        return x + self.hidden_dropout(hidden)

    def extra_repr(self) -> str:
        """Return the activation's name; the attention and the linear maps print themselves."""
        return f"activation={self.config.activation!r}"
