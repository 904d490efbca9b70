"""The custom ops `korder::attend` and `korder::attend_backward`: any backend's kernel as a node of PyTorch's graphs.

What is to be computed travels as a text (see `calls`). How they are differentiated and mapped stands in `rules`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from korder.dispatch.prepare import Prepared, prepare
from korder.dispatch.registry import default_registry
from korder.dispatch.run import Request
from korder.errors import KernelError, UnsupportedProblemError
from korder.problem import ScoreStatistics
from korder.spec import AttentionSpec
from korder.spi.operands import KernelOutput, OutputGradients
from korder.torch.calls import gradients_of, read_text, request_of
from korder.torch.composite import has_tangents, in_forward_mode

CERTIFIED = ("normaliser", "moments", "magnitude")
"""What an approximate method returns beside output and lse, and before its residuals."""
PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that hold numbers."""


def _attend(tensors: list[Tensor], text: str, offsets: list[int], save: bool) -> list[Tensor]:
    """Return output (b, h, n, e), lse (b, h, n), what certificates need and, if saved, residuals in order of name."""
    request = request_of(tensors, text, offsets)
    prepared = prepared_for(request, text, save)
    _refuse_tangents(has_tangents(tensors))
    found = prepared.kernel.forward(request.operands, save=save)
    return _owned(_listed(prepared, request, found, save), tensors)


def _attend_shapes(tensors: list[Tensor], text: str, offsets: list[int], save: bool) -> list[Tensor]:
    layout = read_text(text)
    # Not implemented: under a compiler that may break the graph, the call then runs outside of it.
    require_static(layout.spec, layout.statistics)
    _refuse_tangents(in_forward_mode())
    request = planned_without_numbers(tensors, text, offsets)
    prepared = prepared_for(request, text, save)
    problem, query = request.problem, request.operands.query
    shapes = _shapes(prepared, request)
    rows = (problem.batch, problem.heads, problem.queries)
    names = [name for name in _order(shapes) if save or name in ("lse", *CERTIFIED)]
    output = query.new_empty((*rows, problem.value_width))
    return [output, *(query.new_empty(shapes[name][0], dtype=getattr(torch, shapes[name][1])) for name in names)]


def _backward(
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


def _backward_shapes(
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


def depends_on_data(spec: AttentionSpec | None) -> bool:
    """Return whether numbers decide what is computed."""
    return spec is not None and spec.measured


def require_static(spec: AttentionSpec | None, statistics: ScoreStatistics | None) -> None:
    """Raise for what only numbers can decide."""
    if spec is not None and spec.chooses:
        refuse_choice(spec)
    if spec is not None and depends_on_data(spec) and statistics is None:
        what = "a tolerance" if spec.tolerance is not None else "prune"
        raise UnsupportedProblemError(
            f"{what} cannot be kept to while tensors are traced, because their numbers are not known.",
            code="needs-statistics",
            expected="method=Polynomial(degree=...), or statistics= measured before with korder.measure",
            got=f"{what} without statistics=",
            hint="with statistics the degree is chosen from them, and the certificate is not checked.",
        )


def refuse_choice(spec: AttentionSpec) -> None:
    """Raise: a method cannot be chosen by numbers that are not there."""
    raise UnsupportedProblemError(
        f"method {type(spec.method).__name__} chooses by the numbers of its operands, which traced tensors, and those "
        "with tangents, do not give.",
        code="needs-statistics",
        expected="method=Exact(), or Polynomial(tolerance=...) with statistics= measured before with korder.measure",
        got=f"method={spec.method.kind}",
    )


def planned_without_numbers(tensors: Sequence[Tensor], text: str, offsets: Sequence[int]) -> Request:
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
    """Return outputs that share no memory with the operands or each other, and are no views: what an op may return."""
    taken = {x.untyped_storage().data_ptr() for x in tensors}
    owned = []
    for x in outputs:
        place = x.untyped_storage().data_ptr()
        owned.append(x.clone() if place in taken or x._is_view() else x.contiguous())
        taken.add(place)
    return owned


def _refuse_tangents(found: bool) -> None:
    if found:
        raise UnsupportedProblemError(
            "a kernel has no forward-mode derivative, and would drop the tangents.",
            expected="korder.torch.attend outside torch.compile, which takes plain differentiable operations instead",
            got="operands with tangents",
        )


attend_op = torch.library.custom_op("korder::attend", _attend, mutates_args=())
attend_op.register_fake(_attend_shapes)
backward_op = torch.library.custom_op("korder::attend_backward", _backward, mutates_args=())
backward_op.register_fake(_backward_shapes)
