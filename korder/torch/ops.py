"""The custom ops `korder::attend` and `korder::attend_backward`: any backend's kernel as a node of PyTorch's graphs.

What is to be computed travels as a text (see `calls`). First derivatives are the kernel's own; the gradient op is
differentiated through the composite.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from korder.dispatch.prepare import Prepared, prepare
from korder.dispatch.registry import default_registry
from korder.dispatch.run import Request
from korder.errors import KernelError, UnsupportedProblemError
from korder.spi.operands import KernelOutput, OutputGradients
from korder.torch.calls import gradients_of, read_text, request_of
from korder.torch.composite import composite, has_tangents

CERTIFIED = ("normaliser", "moments", "magnitude")
"""What an approximate method returns beside output and lse, and before its residuals."""
PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that hold numbers."""


@torch.library.custom_op("korder::attend", mutates_args=())
def attend_op(tensors: list[Tensor], text: str, offsets: list[int], save: bool) -> list[Tensor]:
    """Return output (b, h, n, e), lse (b, h, n), what certificates need and, if saved, residuals in order of name."""
    request = request_of(tensors, text, offsets)
    prepared = prepared_for(request, text, save)
    _refuse_tangents(tensors)
    found = prepared.kernel.forward(request.operands, save=save)
    return _owned(_listed(prepared, request, found, save), tensors)


@attend_op.register_fake
def _(tensors: list[Tensor], text: str, offsets: list[int], save: bool) -> list[Tensor]:
    request = _planned_on_meta(tensors, text, offsets)
    _refuse_tangents(tensors)
    problem, query = request.problem, request.operands.query
    shapes = _shapes(prepared_for(request, text, save), request)
    rows = (problem.batch, problem.heads, problem.queries)
    names = [name for name in _order(shapes) if save or name in ("lse", *CERTIFIED)]
    output = query.new_empty((*rows, problem.value_width))
    return [output, *(query.new_empty(shapes[name][0], dtype=getattr(torch, shapes[name][1])) for name in names)]


@torch.library.custom_op("korder::attend_backward", mutates_args=())
def backward_op(
    tensors: list[Tensor],
    outputs: list[Tensor],
    output_gradient: Tensor,
    lse_gradient: Tensor | None,
    text: str,
    offsets: list[int],
    needs: list[bool],
) -> list[Tensor]:
    """Return the gradients of the tensors that `needs` marks, in their order and shapes."""
    request = request_of(tensors, text, offsets)
    prepared = prepared_for(request, text, True)
    layout = read_text(text)
    wanted = frozenset(group for group, need in zip(layout.groups, needs, strict=True) if need)
    saved = _kernel_output(prepared, request, outputs)
    found = prepared.kernel.backward(
        request.operands, saved, OutputGradients(output_gradient, lse_gradient), needs=wanted
    )
    gradients = gradients_of(tensors, layout, found)
    kept = [x for x, need in zip(gradients, needs, strict=True) if need]
    return [x.contiguous() for x in kept if x is not None]


@backward_op.register_fake
def _(
    tensors: list[Tensor],
    outputs: list[Tensor],
    output_gradient: Tensor,
    lse_gradient: Tensor | None,
    text: str,
    offsets: list[int],
    needs: list[bool],
) -> list[Tensor]:
    wanted = [x for x, need in zip(tensors, needs, strict=True) if need]
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted]


def prepared_for(request: Request, text: str, backward: bool) -> Prepared:
    """Return the kernel of a request, one that has a backward if that is asked for."""
    rank = read_text(text).rank
    return prepare(default_registry(), request.problem, "torch", request.backend, first=rank, backward=backward)


def _planned_on_meta(tensors: Sequence[Tensor], text: str, offsets: Sequence[int]) -> Request:
    """Return the request of tensors without numbers; what a device does not have is planned for the CPU."""
    # Sizes become numbers here: every shape is planned, and compiled, by itself.
    sized = [
        x if all(type(size) is int for size in x.shape) else x.new_empty([int(n) for n in x.shape]) for x in tensors
    ]
    request = request_of(sized, text, [int(offset) for offset in offsets])
    if request.problem.device != "meta":
        return request
    return replace(request, problem=replace(request.problem, device="cpu"))


def _symbolic(x: Tensor) -> bool:
    return any(type(size) is not int for size in x.shape)


def _shapes(prepared: Prepared, request: Request) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of all that the kernel returns beside its output."""
    of_residuals = getattr(prepared.kernel, "residual_shapes", None)
    if of_residuals is None:
        raise KernelError(
            f"backend {prepared.selection.backend.name!r} does not say what its kernel saves for the backward.",
            expected="a kernel with residual_shapes(operands)",
            got=type(prepared.kernel).__name__,
            hint="korder.torch needs it to record a kernel; see korder.spi.Kernel.",
        )
    found: dict[str, tuple[tuple[int, ...], str]] = of_residuals(request.operands)
    return found


def _order(shapes: dict[str, tuple[tuple[int, ...], str]]) -> list[str]:
    """Return the names of the tensors that follow the output."""
    fields = ("lse", *(name for name in CERTIFIED if name in shapes))
    return [*fields, *sorted(shapes.keys() - set(fields))]


def _listed(prepared: Prepared, request: Request, found: KernelOutput, save: bool) -> list[Tensor]:
    if not save:
        certified = (getattr(found, name) for name in CERTIFIED)
        return [found.output, found.lse, *(x for x in certified if x is not None)]
    shapes = _shapes(prepared, request)
    known = {"lse": found.lse, **{name: getattr(found, name) for name in CERTIFIED}, **(found.residuals or {})}
    outputs = [found.output]
    for name in _order(shapes):
        shape, dtype = shapes[name]
        empty = 0 in shape and name not in known
        outputs.append(found.output.new_empty(shape, dtype=getattr(torch, dtype)) if empty else known[name])
    return outputs


def _kernel_output(prepared: Prepared, request: Request, outputs: Sequence[Tensor]) -> KernelOutput:
    """Return what `_listed` made a list of."""
    named = dict(zip(_order(_shapes(prepared, request)), outputs[1:], strict=True))
    fields = {name: named.pop(name, None) for name in ("lse", *CERTIFIED)}
    return KernelOutput(output=outputs[0], residuals=named, **fields)


def _owned(outputs: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return outputs that share no memory with the operands or each other, as PyTorch wants of an op."""
    taken = {x.untyped_storage().data_ptr() for x in tensors}
    owned = []
    for x in outputs:
        place = x.untyped_storage().data_ptr()
        owned.append(x.clone() if place in taken else x.contiguous())
        taken.add(place)
    return owned


def _refuse_tangents(tensors: Sequence[Tensor]) -> None:
    if has_tangents(tensors):
        raise UnsupportedProblemError(
            "a kernel has no forward-mode derivative, and would drop the tangents.",
            expected="korder.torch.attend outside torch.compile, which takes plain differentiable operations instead",
            got="operands with tangents",
        )


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
    """Differentiate the gradients as functions of operands and output gradients, in recorded operations.

    What the forward saved counts as a function of the operands, so it gets no gradient of its own.
    """
    *tensors, output_gradient, lse_gradient = ctx.saved_tensors
    given = [x for x in (output_gradient, lse_gradient) if x is not None]
    variable = [x.is_floating_point() for x in tensors]
    plan = prepared_for(_planned_on_meta(tensors, ctx.text, ctx.offsets), ctx.text, True).selection.plan

    def gradients(*primals: Tensor) -> tuple[Tensor, ...]:
        parts = iter(primals)
        operands = [next(parts) if varies else x for x, varies in zip(tensors, variable, strict=True)]
        grads = (next(parts), next(parts) if lse_gradient is not None else None)
        return _pulled_back(plan, operands, grads, ctx)

    primals = [x for x, varies in zip(tensors, variable, strict=True) if varies]
    found, pull = torch.func.vjp(gradients, *primals, *given)
    cotangents = [torch.zeros_like(x) if y is None else y for x, y in zip(found, cotangents, strict=True)]
    parts = iter(pull(tuple(cotangents)))
    of_tensors = [next(parts) if varies else None for varies in variable]
    of_grads = [next(parts), next(parts) if lse_gradient is not None else None]
    return of_tensors, [None] * ctx.outputs, *of_grads, None, None, None


def _pulled_back(
    plan: Any, operands: list[Tensor], grads: tuple[Tensor, Tensor | None], ctx: Any
) -> tuple[Tensor, ...]:
    """Return the gradients of the operands that were wanted, by the composite."""

    def forward(*wanted: Tensor) -> tuple[Tensor, Tensor]:
        parts = iter(wanted)
        mixed = [next(parts) if need else x for x, need in zip(operands, ctx.needs, strict=True)]
        return composite(plan, request_of(mixed, ctx.text, ctx.offsets).operands)

    found, pull = torch.func.vjp(forward, *(x for x, need in zip(operands, ctx.needs, strict=True) if need))
    of_lse = torch.zeros_like(found[1]) if grads[1] is None else grads[1]
    gradients: tuple[Tensor, ...] = pull((grads[0], of_lse))
    return gradients


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
    """The backward of `_attend_many`."""
    dims, of_outputs, of_gradient, of_lse = in_dims[:4]
    size = info.batch_size
    if not _foldable(tensors, dims, text):
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
