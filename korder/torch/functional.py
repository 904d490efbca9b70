"""`attend` and `attend_result` for tensors: the kernel's own backward, recorded in autograd.

First derivatives by reverse mode go through the kernel; second derivatives and forward mode through `composite`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from korder.dispatch.registry import default_registry
from korder.dispatch.request import as_given, make_request, make_result
from korder.dispatch.run import Outcome, Request, run
from korder.errors import OperandError
from korder.problem import ScoreStatistics
from korder.result import Result
from korder.spec import AttentionSpec
from korder.spi.operands import OperandGradients, Operands, OutputGradients
from korder.torch.composite import composite


def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    spec: AttentionSpec | None = None,
    weight: Tensor | Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    key_masks: Sequence[Tensor | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
    statistics: ScoreStatistics | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return order-k attention of tensors; as `korder.attend`, which comes here for tensors, and differentiable.

    Gradients reach query, keys, values, biases and weight, of first and second order, in reverse and forward mode.
    Statistics of the polynomial method are constants.

    Raises:
        OperandError: A key mask that requires a gradient; else as `korder.attend`.

    Cost: backward is three times the forward's flop for the exact method, twice for the polynomial one; second
        derivatives and forward mode keep every tile, so memory grows with n m1 .. mk.

    Example:
        >>> x = torch.ones(4, 3, requires_grad=True)
        >>> attend(x, (x, x), (x, x)).sum().backward()
        >>> tuple(x.grad.shape)
        (4, 3)
    """
    given, request = make_request(
        query,
        keys,
        values,
        spec=spec,
        weight=weight,
        biases=biases,
        key_masks=key_masks,
        query_offset=query_offset,
        key_offsets=key_offsets,
        statistics=statistics,
        backend=backend,
    )
    outcome = _run(request, certify=False)
    return as_given(given, outcome.output.output)


def attend_result(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    spec: AttentionSpec | None = None,
    weight: Tensor | Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    key_masks: Sequence[Tensor | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
    statistics: ScoreStatistics | None = None,
    backend: str = "auto",
) -> Result:
    """Return what `attend` returns with lse, differentiable as well, the detached certificate and the provenance."""
    given, request = make_request(
        query,
        keys,
        values,
        spec=spec,
        weight=weight,
        biases=biases,
        key_masks=key_masks,
        query_offset=query_offset,
        key_offsets=key_offsets,
        statistics=statistics,
        backend=backend,
    )
    outcome = _run(request, certify=True)
    return make_result(default_registry(), given, request, outcome)


def _run(request: Request, *, certify: bool) -> Outcome:
    """Run a request so that autograd knows of it; the outcome's output and lse carry the graph."""
    tensors = _tensors(request.operands)
    call = _Call(request, certify)
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        # Seen before the node, because a node without a rule for tangents would drop them.
        call.outcome = run(default_registry(), _detached(request, tensors), certify=certify)
        output, lse = composite(call.outcome.provenance.plan, request.operands)
    else:
        output, lse = _Attend.apply(call, *tensors)
    assert call.outcome is not None
    return replace(call.outcome, output=replace(call.outcome.output, output=output, lse=lse))


@dataclass(slots=True)
class _Call:
    """What goes into the autograd function beside tensors, and what comes out beside tensors."""

    request: Request
    certify: bool
    outcome: Outcome | None = None


class _Attend(torch.autograd.Function):  # type: ignore[misc]
    """The kernel of a request as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """Run the request; keep what its backward wants only if a gradient may be asked for."""
        wanted = any(ctx.needs_input_grad)
        request = _detached(call.request, tensors)
        outcome = run(default_registry(), request, save=wanted, certify=call.certify)
        call.outcome = outcome
        output, lse = outcome.output.output, outcome.output.lse
        if wanted:
            ctx.save_for_backward(*tensors, output, lse)
            # Without the outputs, which would hold the graph that holds them.
            ctx.rest = replace(outcome.output, output=None, lse=None)
            ctx.operands = _with_tensors(request.operands, [...] * len(tensors))
            ctx.selected = outcome.prepared
        ctx.set_materialize_grads(False)
        return output, lse

    @staticmethod
    def backward(ctx: Any, output: Tensor | None, lse: Tensor | None) -> tuple[Tensor | None, ...]:
        """Call the kernel's backward for the operands that want a gradient; the composite if it is to be recorded."""
        *tensors, saved_output, saved_lse = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (None, *_recorded_gradients(ctx, tensors, output, lse))
        operands = _with_tensors(ctx.operands, tensors)
        saved = replace(ctx.rest, output=saved_output, lse=saved_lse)
        gradient = torch.zeros_like(saved_output) if output is None else output
        groups = _groups(operands)
        needs = frozenset(group for group, need in zip(groups, ctx.needs_input_grad[1:], strict=True) if need)
        found = ctx.selected.kernel.backward(operands, saved, OutputGradients(gradient, lse), needs=needs)
        gradients = _tensors_of_gradients(operands, found)
        kept = zip(gradients, ctx.needs_input_grad[1:], strict=True)
        return (None, *(gradient if need else None for gradient, need in kept))


def _recorded_gradients(
    ctx: Any, tensors: list[Tensor], output: Tensor | None, lse: Tensor | None
) -> list[Tensor | None]:
    """The gradients as functions of operands and cotangents, for a second derivative."""
    # Views, so that one tensor given in two places is two variables here.
    apart = [tensor.view_as(tensor) for tensor in tensors]
    found = composite(ctx.selected.selection.plan, _with_tensors(ctx.operands, apart))
    pairs = [(y, cotangent) for y, cotangent in zip(found, (output, lse), strict=True) if cotangent is not None]
    wanted = [tensor for tensor, need in zip(apart, ctx.needs_input_grad[1:], strict=True) if need]
    outputs, cotangents = zip(*pairs, strict=True)
    gradients = iter(torch.autograd.grad(outputs, wanted, cotangents, create_graph=True, allow_unused=True))
    return [next(gradients) if need else None for need in ctx.needs_input_grad[1:]]


def _detached(request: Request, tensors: Sequence[Tensor]) -> Request:
    """The request on operands without a graph or tangents."""
    plain = [forward_ad.unpack_dual(tensor).primal.detach() for tensor in tensors]
    return replace(request, operands=_with_tensors(request.operands, plain))


def _tensors(operands: Operands) -> list[Tensor]:
    """The operands that may carry a gradient, in the order of `_groups`."""
    for t, mask in enumerate(operands.key_masks):
        if mask is not None and mask.requires_grad:
            raise OperandError(
                f"key_masks[{t}] cannot carry a gradient.", expected="a bool tensor", got="requires_grad"
            )
    weight = operands.weight
    weights = weight if isinstance(weight, tuple) else () if weight is None else (weight,)
    biases = [bias for bias in operands.biases if bias is not None]
    return [operands.query, *operands.keys, *operands.values, *biases, *weights]


def _groups(operands: Operands) -> list[str]:
    """The name that `needs` has for each tensor of `_tensors`."""
    weight = operands.weight
    weights = len(weight) if isinstance(weight, tuple) else int(weight is not None)
    order = len(operands.keys)
    biases = sum(bias is not None for bias in operands.biases)
    return ["query", *["keys"] * order, *["values"] * order, *["biases"] * biases, *["weight"] * weights]


def _with_tensors(operands: Operands, tensors: list[Any]) -> Operands:
    """The operands with other tensors in place of those of `_tensors`."""
    remaining = iter(tensors)
    query = next(remaining)
    keys = tuple(next(remaining) for _ in operands.keys)
    values = tuple(next(remaining) for _ in operands.values)
    biases = tuple(None if bias is None else next(remaining) for bias in operands.biases)
    weight: Any = None
    if operands.weight is not None:
        weight = tuple(remaining) if isinstance(operands.weight, tuple) else next(remaining)
    return replace(operands, query=query, keys=keys, values=values, biases=biases, weight=weight)


def _tensors_of_gradients(operands: Operands, found: OperandGradients) -> list[Tensor | None]:
    weight = found.weight
    expected = len(operands.weight) if isinstance(operands.weight, tuple) else int(operands.weight is not None)
    weights = list(weight) if isinstance(weight, tuple) else [weight] * expected
    given = zip(operands.biases, found.biases, strict=True)
    biases = [gradient for bias, gradient in given if bias is not None]
    return [found.query, *found.keys, *found.values, *biases, *weights]
