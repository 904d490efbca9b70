"""Checks of what a layer is given, in the layer's own terms and before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from korder.errors import OperandError, ShapeError
from korder.problem import Shape, Shapes, make_problem
from korder.spec import AttentionSpec
from korder.spec.layers import AttentionLayerSpec

Entries = Sequence[Tensor | None] | None


def read_memories(
    config: AttentionLayerSpec, dtype: torch.dtype, x: Tensor, memories: Tensor | Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """Return one tensor per mode: `x` for each without memories, the one for each, or the ones given.

    Raises:
        ShapeError: A wrong width, number of memories, or batch axes that differ from those of `x`.
        OperandError: No tensor, or another dtype than the parameters' outside autocast.
    """
    _check_rows("x", x, config.width, dtype)
    order = config.attention.order
    own = memories is None
    given = x if memories is None else memories
    rows = (given,) * order if isinstance(given, Tensor) else tuple(given)
    if len(rows) != order:
        raise ShapeError(
            "memories must be one tensor, or one per mode.",
            code="modes-mismatch",
            expected=f"{order} tensors, because the order is {order}",
            got=f"{len(rows)} tensors",
        )
    for t, row in enumerate(rows):
        name = "x as its own memory" if own else f"memories[{t}]"
        _check_rows(name, row, config.memory_width or config.width, dtype)
        if row.shape[:-2] != x.shape[:-2]:
            raise ShapeError(
                f"x and {name} must have the same batch axes.",
                expected=f"batch axes {tuple(x.shape[:-2])}, as in x.shape == {tuple(x.shape)}",
                got=f"{name}.shape == {tuple(row.shape)}",
            )
    return rows


def _check_rows(name: str, rows: Tensor, width: int, dtype: torch.dtype) -> None:
    if not isinstance(rows, Tensor):
        raise OperandError(f"{name} must be a tensor.", expected="a torch.Tensor", got=type(rows).__name__)
    if rows.ndim < 2 or rows.shape[-1] != width:
        raise ShapeError(
            f"{name} must have rows as wide as the layer takes them.",
            code="width-mismatch",
            expected=f"shape (batch, length, {width}), or (length, {width})",
            got=f"shape {tuple(rows.shape)}",
            hint="the layer's width is that of x, its memory_width that of the memories.",
        )
    if rows.dtype != dtype and not torch.is_autocast_enabled(rows.device.type):
        raise OperandError(
            f"{name} must have the dtype of the layer's parameters.",
            expected=str(dtype),
            got=str(rows.dtype),
            hint=f"convert the rows, or the layer: layer.to({rows.dtype}).",
        )


def check_shapes(
    spec: AttentionSpec,
    config: AttentionLayerSpec,
    x: Tensor,
    rows: Sequence[Tensor],
    biases: Entries,
    key_masks: Entries,
    query_offset: int | None,
    key_offsets: Sequence[int] | None,
) -> None:
    """Raise before the projections what `attend` would raise after them."""
    if key_offsets is not None and len(key_offsets) != len(rows):
        raise ShapeError(
            "key_offsets must have one entry per mode.",
            code="modes-mismatch",
            expected=f"{len(rows)} offsets",
            got=f"{len(key_offsets)} offsets",
        )
    batch = tuple(x.shape[:-2])
    groups, width = config.key_value_heads or config.heads, config.columns
    lengths = [row.shape[-2] for row in rows]
    shapes = Shapes(
        query=(*batch, config.heads, x.shape[-2], width),
        keys=tuple((*batch, groups, length, width) for length in lengths),
        values=tuple((*batch, groups, length, config.value_width or width) for length in lengths),
        biases=_shapes(biases),
        key_masks=_shapes(key_masks),
        offsets_given=query_offset is not None or key_offsets is not None,
    )
    make_problem(spec, shapes, str(x.dtype).removeprefix("torch."), x.device.type)


def _shapes(tensors: Entries) -> tuple[Shape | None, ...]:
    return tuple(None if tensor is None else tuple(tensor.shape) for tensor in tensors or ())
