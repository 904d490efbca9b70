"""The methods written in plain differentiable operations, for derivatives that a kernel's backward does not give.

The generic kernels change nothing in place, so autograd records them: second derivatives and forward mode come from
there. Memory is that of every tile at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from korder.errors import UnsupportedProblemError
from korder.methods.exact import ExactKernel
from korder.methods.layout import Layout
from korder.methods.polynomial import PolynomialKernel
from korder.planning.plan import Plan
from korder.spi.operands import NEEDS, KernelOutput, OperandGradients, Operands, OutputGradients

Pull = Callable[[tuple[Tensor, Tensor]], tuple[Tensor, ...]]


class _RecordedExactKernel(ExactKernel):
    """The generic exact kernel, which looks at values apart from the graph."""

    def is_tame(self, layout: Layout, *cotangents: Tensor) -> bool:
        apart = {field.name: _physical(getattr(layout, field.name)) for field in fields(layout)}
        return super().is_tame(Layout(**apart), *(_physical(cotangent) for cotangent in cotangents))


class _RecordedPolynomialKernel(PolynomialKernel):
    """The generic polynomial kernel, which looks at values apart from the graph."""

    def check_normaliser(self, mean: Tensor, live: Tensor) -> None:
        # the kernel that ran before it has checked what can be told row by row
        if not any(_functorch.is_functorch_wrapped_tensor(x) for x in (mean, live)):
            super().check_normaliser(mean.detach(), live)


def composite(plan: Plan, operands: Operands) -> tuple[Tensor, Tensor]:
    """Return output and lse of a plan by operations that autograd records, in reverse and in forward mode.

    Shapes:    as a kernel's output.
    Numerics:  Statistics of the polynomial method are taken from the detached operands: constants, as in a kernel.
    """
    import array_api_compat.torch as xp

    if has_closed_form(plan):
        raise UnsupportedProblemError(
            "the closed form of the gradient has no forward-mode derivative: it is that of no function.",
            code="forward-mode",
            expected='reverse mode, or gradient="consistent"',
            got='operands with tangents, and gradient="closed_form"',
        )
    if plan.method == "exact":
        found = _RecordedExactKernel(xp, plan).forward(operands, save=False)
    else:
        kernel = _RecordedPolynomialKernel(xp, plan)
        found = _about_constants(kernel, operands, save=False)
    return found.output, found.lse


def has_closed_form(plan: Plan) -> bool:
    """Return whether a plan's gradients are not those of the function that it computes."""
    return plan.polynomial is not None and plan.polynomial.gradient == "closed_form"


def composite_gradients(plan: Plan, operands: Operands, grads: OutputGradients) -> OperandGradients:
    """Return the gradients of a polynomial plan, all of them, by operations that autograd records.

    Numerics:  as `composite`.
    """
    import array_api_compat.torch as xp

    kernel = _RecordedPolynomialKernel(xp, plan)
    return kernel.backward(operands, _about_constants(kernel, operands, save=True), grads, needs=NEEDS)


def _about_constants(kernel: PolynomialKernel, operands: Operands, *, save: bool) -> KernelOutput:
    with torch.no_grad():
        statistics = kernel.forward(_detached_operands(operands), save=True).residuals
    return kernel.forward(operands, save=save, residuals=statistics)


def has_tangents(tensors: Sequence[Tensor]) -> bool:
    """Return whether forward-mode derivatives are being taken: a kernel would drop them without a word."""
    if _transforms_forward():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def in_forward_mode() -> bool:
    """Return whether there may be tangents, for tensors that cannot be asked."""
    return _transforms_forward() or forward_ad._current_level >= 0


def _transforms_forward() -> bool:
    stack = _functorch.get_interpreter_stack() or ()
    return any(interpreter.key() == _functorch.TransformType.Jvp for interpreter in stack)


def in_transform() -> bool:
    """Return whether a transform of torch.func is at work."""
    return _functorch.peek_interpreter_stack() is not None


def _physical(x: Any) -> Any:
    """Return the numbers themselves, without graph, tangents or the wrappers of torch.func."""
    if isinstance(x, tuple):
        return tuple(_physical(item) for item in x)
    if not isinstance(x, Tensor):
        return x
    while _functorch.is_functorch_wrapped_tensor(x):
        x = _functorch.get_unwrapped(x)
    return x.detach()


def _detached_operands(operands: Operands) -> Operands:
    named = ("query", "keys", "values", "biases", "weight")
    return replace(operands, **{name: _detached(getattr(operands, name)) for name in named})


def _detached(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_detached(item) for item in x)
    return x.detach() if isinstance(x, Tensor) else x
