"""The op for `torch.func`, whose transforms want a function that says apart what it computes and what it saves.

Below the transforms both functions call the custom ops, whose vmap rules serve here as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from korder.torch.ops import attend_op, backward_op
from korder.torch.rules import differentiated_gradients


class Attend(torch.autograd.Function):  # type: ignore[misc]
    """`korder::attend` under a transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(text: str, offsets: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the op."""
        return tuple(attend_op(list(tensors), text, list(offsets), True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep operands and outputs."""
        ctx.text, ctx.offsets, *tensors = inputs
        ctx.count = len(tensors)
        ctx.mark_non_differentiable(*output[2:])
        ctx.save_for_backward(*tensors, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Call the kernel's backward."""
        saved = ctx.saved_tensors
        tensors, outputs = saved[: ctx.count], saved[ctx.count :]
        needs = tuple(ctx.needs_input_grad[2:])
        found = iter(AttendBackward.apply(ctx.text, ctx.offsets, needs, *grads[:2], *tensors, *outputs))
        return (None, None, *(next(found) if need else None for need in needs))


class AttendBackward(torch.autograd.Function):  # type: ignore[misc]
    """`korder::attend_backward` under a transform."""

    generate_vmap_rule = True

    @staticmethod
    def forward(text: str, offsets: tuple[int, ...], needs: tuple[bool, ...], *given: Tensor) -> tuple[Tensor, ...]:
        """Run the op."""
        of_output, of_lse, *rest = given
        tensors, outputs = rest[: len(needs)], rest[len(needs) :]
        return tuple(backward_op(tensors, outputs, of_output, of_lse, text, list(offsets), list(needs)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what the gradients are functions of."""
        ctx.text, ctx.offsets, ctx.needs, *given = inputs
        ctx.outputs = len(given) - 2 - len(ctx.needs)
        ctx.save_for_backward(*given[: 2 + len(ctx.needs)])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        """Differentiate the gradients through the composite."""
        of_output, of_lse, *tensors = ctx.saved_tensors
        call = (ctx.text, list(ctx.offsets), list(ctx.needs))
        of_tensors, *of_grads = differentiated_gradients(call, tensors, (of_output, of_lse), cotangents)
        return (None, None, None, *of_grads, *of_tensors, *[None] * ctx.outputs)
