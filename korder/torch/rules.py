"""How the custom ops are differentiated and mapped: rules for autograd and for vmap.

First derivatives are the kernel's own; the gradient op is differentiated through the composite.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from korder.errors import KernelError
from korder.planning.plan import Plan
from korder.spi.operands import OutputGradients
from korder.torch.calls import gradients_of, read_text, request_of
from korder.torch.composite import composite, composite_gradients, has_closed_form
from korder.torch.ops import PLAIN, attend_op, backward_op, planned_without_numbers, prepared_for

Call = tuple[str, list[int], list[bool]]
"""Text and offsets of a call, and which operands' gradients were taken."""


def _keep(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, ctx.text, ctx.offsets, ctx.saved = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[2:])
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *output)
    ctx.versions = [(weakref.ref(x), x._version) for x in tensors] if type(tensors[0]) in PLAIN else []


def _first_derivative(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    """Call the kernel's backward for the operands that want a gradient."""
    if not ctx.saved:
        raise KernelError(
            "korder::attend was called to save nothing for its backward.", expected="save=True", got="False"
        )
    saved = _unchanged(ctx)
    tensors, outputs = saved[: ctx.count], saved[ctx.count :]
    needs = list(ctx.needs_input_grad[0])
    output_gradient, lse_gradient = grads[0], grads[1]
    if not any(needs) or (output_gradient is None and lse_gradient is None):
        return [None] * ctx.count, None, None, None
    if output_gradient is None:
        output_gradient = torch.zeros_like(outputs[0])
    found = iter(backward_op(tensors, outputs, output_gradient, lse_gradient, ctx.text, ctx.offsets, needs))
    return [next(found) if need else None for need in needs], None, None, None


def _unchanged(ctx: Any) -> list[Tensor]:
    """Return what was saved; an operand that was changed in place since then is named."""
    try:
        return list(ctx.saved_tensors)
    except RuntimeError:
        changed = ((place, known, tensor()) for place, (tensor, known) in enumerate(ctx.versions))
        for place, known, tensor in changed:
            if tensor is not None and tensor._version != known:
                raise KernelError(
                    f"{read_text(ctx.text).names[place]} was changed in place between the forward and the backward.",
                    code="operand-changed",
                    expected=f"version {known} of it, as the forward saw",
                    got=f"version {tensor._version}",
                    hint="clone it before, or change it after the backward.",
                ) from None
        raise


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, outputs, output_gradient, lse_gradient, ctx.text, ctx.offsets, ctx.needs = inputs
    ctx.set_materialize_grads(False)
    ctx.outputs = len(outputs)
    ctx.save_for_backward(*tensors, output_gradient, lse_gradient)


def _second_derivative(ctx: Any, cotangents: list[Tensor | None]) -> tuple[Any, ...]:
    """Differentiate the gradients; what the forward saved is a function of the operands and gets nothing of its own."""
    *tensors, output_gradient, lse_gradient = ctx.saved_tensors
    call = (ctx.text, ctx.offsets, ctx.needs)
    of_tensors, *of_grads = differentiated_gradients(call, tensors, (output_gradient, lse_gradient), cotangents)
    return of_tensors, [None] * ctx.outputs, *of_grads, None, None, None


def differentiated_gradients(
    call: Call,
    tensors: Sequence[Tensor],
    grads: tuple[Tensor, Tensor | None],
    cotangents: Sequence[Tensor | None],
) -> tuple[list[Tensor | None], Tensor, Tensor | None]:
    """Pull cotangents of the gradients back to the operands, the output's gradient and that of lse.

    Args:
        call: The call.
        tensors: The operands.
        grads: Gradients of output and lse; None for lse counts as zeros.
        cotangents: One per gradient that was taken; None counts as zeros.
    """
    text, offsets, _ = call
    given = [x for x in grads if x is not None]
    variable = [x.is_floating_point() for x in tensors]
    plan = prepared_for(planned_without_numbers(tensors, text, offsets), text, True).selection.plan
    recorded = _closed_form if has_closed_form(plan) else _of_function

    def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
        own = OutputGradients(*primals[sum(variable) :])
        return recorded(plan, call, _mixed(tensors, variable, primals), own)

    primals = [x for x, varies in zip(tensors, variable, strict=True) if varies]
    found, pull = torch.func.vjp(gradients, *primals, *given)
    filled = [torch.zeros_like(x) if y is None else y for x, y in zip(found, cotangents, strict=True)]
    parts = iter(pull(tuple(filled)))
    of_tensors = [next(parts) if varies else None for varies in variable]
    return of_tensors, next(parts), next(parts, None)


def _of_function(plan: Plan, call: Call, tensors: list[Tensor], grads: OutputGradients) -> tuple[Tensor, ...]:
    """Return the gradients that a call took, as those of what it computed."""
    text, offsets, needs = call

    def attention(*wanted: Tensor) -> tuple[Tensor, Tensor]:
        return composite(plan, request_of(_mixed(tensors, needs, wanted), text, offsets).operands)

    found, pull = torch.func.vjp(attention, *(x for x, need in zip(tensors, needs, strict=True) if need))
    pulled: tuple[Tensor, ...] = pull((grads.output, torch.zeros_like(found[1]) if grads.lse is None else grads.lse))
    return pulled


def _closed_form(plan: Plan, call: Call, tensors: list[Tensor], grads: OutputGradients) -> tuple[Tensor, ...]:
    """Return the gradients that a call took, by the operations of a backward, since they are those of no function."""
    text, offsets, needs = call
    found = composite_gradients(plan, request_of(tensors, text, offsets).operands, grads)
    listed = zip(gradients_of(tensors, read_text(text), found), needs, strict=True)
    return tuple(x for x, need in listed if need and x is not None)


def _mixed(tensors: Sequence[Tensor], taken: Sequence[bool], others: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors, those that are marked replaced by the others in turn."""
    remaining = iter(others)
    return [next(remaining) if take else x for x, take in zip(tensors, taken, strict=True)]


def _attend_many(
    info: Any, in_dims: tuple[Any, ...], tensors: list[Tensor], text: str, offsets: list[int], save: bool
) -> tuple[list[Tensor], list[int]]:
    """Run a batch of calls as one with a larger batch; one by one where their weights differ."""
    dims = in_dims[0]
    if not _foldable(tensors, dims, text):
        found = [attend_op(_nth(tensors, dims, i), text, offsets, save) for i in range(info.batch_size)]
        outputs = [torch.stack(parts) for parts in zip(*found, strict=True)]
    else:
        outputs = attend_op(_folded(tensors, dims, text, info.batch_size), text, offsets, save)
        outputs = [x.reshape(info.batch_size, x.shape[0] // info.batch_size, *x.shape[1:]) for x in outputs]
    return outputs, [0] * len(outputs)


def _backward_many(
    info: Any,
    in_dims: tuple[Any, ...],
    tensors: list[Tensor],
    outputs: list[Tensor],
    output_gradient: Tensor,
    lse_gradient: Tensor | None,
    text: str,
    offsets: list[int],
    needs: list[bool],
) -> tuple[list[Tensor], list[int]]:
    """The backward of `_attend_many`; one by one where each call has a weight's gradient of its own."""
    dims, of_outputs, of_gradient, of_lse = in_dims[:4]
    size = info.batch_size
    of_weights = any(need for group, need in zip(read_text(text).groups, needs, strict=True) if group == "weight")
    if of_weights or not _foldable(tensors, dims, text):
        found = []
        for i in range(size):
            saved, own = _nth(outputs, of_outputs, i), _nth(tensors, dims, i)
            grads = _nth([output_gradient], [of_gradient], i) + _nth([lse_gradient], [of_lse], i)
            found.append(backward_op(own, saved, *grads, text, offsets, needs))
        return [torch.stack(parts) for parts in zip(*found, strict=True)], [0] * sum(needs)
    shapes = [x.shape if dim is None else x.movedim(dim, 0).shape[1:] for x, dim in zip(tensors, dims, strict=True)]
    saved = [_front(x, dim, size).flatten(0, 1) for x, dim in zip(outputs, of_outputs, strict=True)]
    gradient = _front(output_gradient, of_gradient, size).flatten(0, 1)
    of_rows = None if lse_gradient is None else _front(lse_gradient, of_lse, size).flatten(0, 1)
    many = _folded(tensors, dims, text, size)
    parts = backward_op(many, saved, gradient, of_rows, text, offsets, needs)
    wanted = [shape for shape, need in zip(shapes, needs, strict=True) if need]
    unfolded = [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in parts]
    found = [
        x.reshape(size, *shape) if x.numel() == size * shape.numel() else x.sum_to_size((size, *shape))
        for x, shape in zip(unfolded, wanted, strict=True)
    ]
    return found, [0] * len(found)


def _foldable(tensors: list[Tensor], dims: list[int | None], text: str) -> bool:
    """Whether a batch of calls is one call with a larger batch: one weight, and axes left for the batch."""
    groups = read_text(text).groups
    shared = all(dim is None for group, dim in zip(groups, dims, strict=True) if group == "weight")
    return shared and tensors[0].ndim - (dims[0] is not None) <= 4


def _folded(tensors: list[Tensor], dims: list[int | None], text: str, size: int) -> list[Tensor]:
    """Return the tensors of a batch of calls as those of one, in four axes (masks in three)."""
    axes = tensors[0].ndim - (dims[0] is not None)
    groups = read_text(text).groups
    batch = 1 if axes < 4 else _front(tensors[0], dims[0], size).shape[1]
    folded = []
    for x, dim, group in zip(tensors, dims, groups, strict=True):
        if group == "weight":
            folded.append(x)
            continue
        many = _front(x, dim, size)
        if group == "key_masks":  # (size, batch.., m) or (size, batch.., heads, m)
            folded.append(many.reshape(size * batch, *many.shape[1 + max(axes - 3, 0) :]))
            continue
        if axes == 2:
            many = many[:, None]
        elif axes == 4:
            many = many.expand(size, batch, *many.shape[2:]).flatten(0, 1)
        folded.append(many)
    return folded


def _front(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Return a tensor with the mapped axis first; one that is the same for all is repeated."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _nth(tensors: Sequence[Tensor | None], dims: Sequence[int | None], index: int) -> list[Any]:
    return [x if x is None or dim is None else x.select(dim, index) for x, dim in zip(tensors, dims, strict=True)]


attend_op.register_autograd(_first_derivative, setup_context=_keep)
backward_op.register_autograd(_second_derivative, setup_context=_keep_for_second)
attend_op.register_vmap(_attend_many)
backward_op.register_vmap(_backward_many)
