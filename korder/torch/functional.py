"""`attend` and `attend_result` for tensors: one custom op, so that autograd, compilers and transforms all know it.

Forward mode goes through `composite`, and is noticed before the op, which would drop tangents.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from korder.dispatch.prepare import Prepared
from korder.dispatch.registry import default_registry
from korder.dispatch.request import as_given, make_request, make_result
from korder.dispatch.run import Request, run
from korder.problem import ScoreStatistics
from korder.result import Result
from korder.spec import AttentionSpec
from korder.spi.operands import KernelOutput
from korder.torch.calls import Packed, arguments_of, pack, request_of
from korder.torch.composite import composite, has_tangents, in_transform
from korder.torch.ops import CERTIFIED, attend_op, depends_on_data, prepared_for, refuse_choice, require_static
from korder.torch.transforms import Attend


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
    packed = pack(
        query, keys, values, spec, weight, biases, key_masks, query_offset, key_offsets, statistics, backend
    )  # fmt: skip
    if torch.compiler.is_dynamo_compiling():  # which must not be led into what only numbers can answer
        if _needs_numbers(packed):
            outside: Result = _outside(packed)
            return outside.output
        return _like_query(_run_op(packed, _autocast(packed.tensors))[0], query)
    tensors = _autocast(packed.tensors)
    if _chooses(spec, tensors):
        return _chosen(packed, tensors).output
    if has_tangents(tensors):
        return _like_query(_recorded(packed, tensors)[0], query)
    if _without_numbers(tensors):
        require_static(spec, statistics)
    elif depends_on_data(spec):
        return _result(packed, tensors, certify=False).output
    return _like_query(_run_op(packed, tensors)[0], query)


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
    packed = pack(
        query, keys, values, spec, weight, biases, key_masks, query_offset, key_offsets, statistics, backend
    )  # fmt: skip
    if torch.compiler.is_dynamo_compiling():
        if _needs_numbers(packed):
            outside: Result = _outside(packed)
            return outside
        output, lse = _run_op(packed, _autocast(packed.tensors))[:2]
        return Result(_like_query(output, query), _like_query(lse, query))
    tensors = _autocast(packed.tensors)
    if _chooses(spec, tensors):
        return _chosen(packed, tensors)
    if has_tangents(tensors) or _without_numbers(tensors):
        require_static(spec, statistics)
        found = _recorded(packed, tensors) if has_tangents(tensors) else _run_op(packed, tensors)
        return Result(_like_query(found[0], query), _like_query(found[1], query))
    return _result(packed, tensors, certify=True)


def _needs_numbers(packed: Packed) -> bool:
    """Whether numbers decide what is computed and no statistics stand for them; by the text, which compilers trace."""
    _, statistics, spec, _ = packed.text.split("\n", 3)
    if statistics:
        return False
    tolerant = '"tolerance":' in spec and '"tolerance":null' not in spec
    return tolerant or ('"prune":' in spec and '"prune":null' not in spec and '"prune":0.0,' not in spec)


@torch.compiler.disable(reason="a tolerance, or pruning, needs numbers, or statistics= that stand for them")  # type: ignore[untyped-decorator]
def _outside(packed: Packed) -> Any:
    """Return the result of a call that is run outside of the graph that a compiler is making."""
    return attend_result(**arguments_of(packed.tensors, packed.text, packed.offsets))


def _chooses(spec: AttentionSpec | None, tensors: list[Tensor]) -> bool:
    """Whether the method is to be chosen by the tensors' numbers, which then must be there.

    Raises:
        UnsupportedProblemError: They have none, or carry tangents.
    """
    if spec is None or not spec.chooses:
        return False
    if has_tangents(tensors) or _without_numbers(tensors):
        refuse_choice(spec)
    return True


def _chosen(packed: Packed, tensors: list[Tensor]) -> Result:
    """Run a method that chooses; its parts are calls of `attend_result`, recorded like any other."""
    from korder.dispatch.choosing import run_choice

    given, request = make_request(**arguments_of(tensors, packed.text, packed.offsets), measured=False)
    if request.problem.statistics is None:
        plain = make_request(**arguments_of([x.detach() for x in tensors], packed.text, packed.offsets))[1]
        request = replace(request, problem=plain.problem)
    return run_choice(default_registry(), attend_result, given, request)


def _run_op(packed: Packed, tensors: list[Tensor]) -> list[Tensor]:
    """Return output, lse and what else the op returns; autograd knows of it."""
    if not torch.compiler.is_dynamo_compiling() and in_transform():
        return list(Attend.apply(packed.text, tuple(packed.offsets), *tensors))
    save = torch.is_grad_enabled() and any([x.requires_grad for x in tensors])  # noqa: C419 - a compiler traces it
    return list(attend_op(tensors, packed.text, packed.offsets, save))


def _recorded(packed: Packed, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return output and lse by recorded operations, which carry tangents."""
    request = request_of(tensors, packed.text, packed.offsets)
    return composite(prepared_for(request, packed.text, False).selection.plan, request.operands)


def _like_query(x: Tensor, query: Tensor) -> Tensor:
    """(b, h, n, ..) back to the query's own leading axes."""
    return x if query.ndim == 4 else x.reshape((*query.shape[:-1], *x.shape[3:]))


def _autocast(tensors: list[Tensor]) -> list[Tensor]:
    """Return the tensors in the dtype of autocast where that is on, as PyTorch's own attention does."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors]


def _without_numbers(tensors: list[Tensor]) -> bool:
    """Whether the tensors have no numbers to look at: they are traced, or stand for many."""
    fake = sys.modules.get("torch._subclasses.fake_tensor")
    return (
        in_transform()
        or tensors[0].device.type == "meta"
        or (fake is not None and any(isinstance(x, fake.FakeTensor) for x in tensors))
    )


class _Recorder:
    """Calls kernels through the op, so that autograd knows of every attempt; holds their outputs with their graph."""

    def __init__(self, packed: Packed, tensors: list[Tensor]) -> None:
        self.packed, self.tensors = packed, tensors
        self.attempts: list[tuple[KernelOutput, list[Tensor]]] = []

    def __call__(self, prepared: Prepared, request: Request, save: bool) -> KernelOutput:
        """Run the plan that was chosen, by the backend that was chosen."""
        selection = prepared.selection
        rank = prepared.plans.index(selection.plan)
        text = self.packed.with_choice(request.problem.statistics, rank, selection.backend.name)
        outputs = attend_op(self.tensors, text, self.packed.offsets, save)
        output, lse, *rest = [x.detach() for x in outputs]
        approximate = selection.plan.method != "exact"
        found = KernelOutput(output, lse, **(dict(zip(CERTIFIED, rest, strict=False)) if approximate else {}))
        self.attempts.append((found, outputs))
        return found

    def graph_of(self, found: KernelOutput) -> list[Tensor]:
        """Return the outputs of an attempt with their graph."""
        return next(outputs for output, outputs in self.attempts if output is found)


def _result(packed: Packed, tensors: list[Tensor], *, certify: bool) -> Result:
    """Run a call as `korder.attend_result` does, recorded."""
    given, request = make_request(**arguments_of([x.detach() for x in tensors], packed.text, packed.offsets))
    recorder = _Recorder(packed, tensors)
    save = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    outcome = run(default_registry(), request, save=save, certify=certify, forward=recorder)
    output, lse = recorder.graph_of(outcome.output)[:2]
    result = make_result(default_registry(), given, request, outcome)
    return replace(result, output=as_given(given, output), lse=as_given(given, lse))
