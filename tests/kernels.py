"""The exact kernels under test, each with its namespace, and plans with blocks of any size."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import array_api_compat.numpy as compat_numpy
import array_api_compat.torch as compat_torch
import array_api_strict
import numpy as np

from korder.methods.exact import ExactKernel
from korder.planning.exact import exact_plan
from korder.planning.plan import Plan
from korder.spi import NEEDS, KernelOutput, OperandGradients, OutputGradients
from korder_numpy.exact import NumpyExactKernel
from korder_torch.exact import TorchExactKernel
from tests.problems import Case

Array = Any


@dataclass(frozen=True)
class Subject:
    """A kernel class over a namespace, called with numpy arrays."""

    name: str
    xp: Any
    kernel: type[ExactKernel]

    def asarray(self, x: Array) -> Array:
        """An array of the subject's own kind."""
        return x if self.xp is compat_numpy else self.xp.asarray(x)

    def forward(self, case: Case, plan: Plan | None = None, *, save: bool = False) -> KernelOutput:
        """Output and lse of a case."""
        kernel = self.kernel(self.xp, plan or exact_plan(case.problem()))
        with self._warnings():
            return kernel.forward(case.operands(self.asarray), save=save)

    def backward(
        self,
        case: Case,
        output_gradient: Array,
        lse_gradient: Array | None = None,
        *,
        plan: Plan | None = None,
        needs: frozenset[str] = NEEDS,
    ) -> OperandGradients:
        """Gradients of a case."""
        kernel = self.kernel(self.xp, plan or exact_plan(case.problem()))
        operands = case.operands(self.asarray)
        grads = OutputGradients(
            self.asarray(output_gradient), None if lse_gradient is None else self.asarray(lse_gradient)
        )
        with self._warnings():
            saved = kernel.forward(operands, save=True)
            return kernel.backward(operands, saved, grads, needs=needs)

    def _warnings(self) -> AbstractContextManager[object]:
        # The generic kernel leaves numpy's warnings about NaN to the caller; that of numpy must raise none.
        return np.errstate(all="ignore") if self.kernel is ExactKernel else nullcontext()


GENERIC = Subject("generic-numpy", compat_numpy, ExactKernel)
STRICT = Subject("generic-strict", array_api_strict, ExactKernel)
NUMPY = Subject("numpy", compat_numpy, NumpyExactKernel)
TORCH = Subject("torch", compat_torch, TorchExactKernel)
SUBJECTS = (GENERIC, STRICT, NUMPY, TORCH)


def plan_with(case: Case, **tiling: Any) -> Plan:
    """The exact plan of a case with parts of its tiling replaced; `folded` may be one number for every mode."""
    plan = exact_plan(case.problem())
    assert plan.tiling is not None
    folded = tiling.get("folded")
    if isinstance(folded, int):
        tiling["folded"] = (folded,) * len(plan.tiling.folded)
    return replace(plan, tiling=replace(plan.tiling, **tiling))


def flat(operands: Any) -> dict[str, Array]:
    """Operands or their gradients by name, without those that are None."""
    named = {"query": operands.query}
    for name in ("keys", "values", "biases"):
        named |= {f"{name}[{t}]": x for t, x in enumerate(getattr(operands, name))}
    weight = operands.weight
    named |= {f"weight[{t}]": x for t, x in enumerate(weight)} if isinstance(weight, tuple) else {"weight": weight}
    return {name: np.asarray(x) for name, x in named.items() if x is not None}
