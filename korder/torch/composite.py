"""The methods written in plain differentiable operations, for derivatives that a kernel's backward does not give.

The generic kernels change nothing in place, so autograd records them: second derivatives and forward mode come from
there. Memory is that of every tile at once.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from korder.methods.exact import ExactKernel
from korder.methods.layout import Layout
from korder.methods.polynomial import PolynomialKernel
from korder.planning.plan import Plan
from korder.spi.operands import Operands


class _RecordedExactKernel(ExactKernel):
    """The generic exact kernel, which looks at values apart from the graph."""

    def is_tame(self, layout: Layout, *cotangents: Tensor) -> bool:
        apart = {field.name: _detached(getattr(layout, field.name)) for field in fields(layout)}
        return super().is_tame(Layout(**apart), *(cotangent.detach() for cotangent in cotangents))


def composite(plan: Plan, operands: Operands) -> tuple[Tensor, Tensor]:
    """Return output and lse of a plan by operations that autograd records, in reverse and in forward mode.

    Shapes:    as a kernel's output.
    Numerics:  Statistics of the polynomial method are taken from the detached operands: constants, as in a kernel.
    """
    import array_api_compat.torch as xp

    if plan.method == "exact":
        found = _RecordedExactKernel(xp, plan).forward(operands, save=False)
    else:
        kernel = PolynomialKernel(xp, plan)
        with torch.no_grad():
            statistics = kernel.forward(_detached_operands(operands), save=True).residuals
        found = kernel.forward(operands, save=False, residuals=statistics)
    return found.output, found.lse


def _detached(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(_detached(item) for item in x)
    return x.detach() if isinstance(x, Tensor) else x


def _detached_operands(operands: Operands) -> Operands:
    named = ("query", "keys", "values", "biases", "weight")
    return replace(operands, **{name: _detached(getattr(operands, name)) for name in named})
