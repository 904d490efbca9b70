"""A backend under test on one array kind and device: kernels for cases, called with numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from korder.conformance.arrays import ArrayKind
from korder.conformance.cases import Case
from korder.conformance.claims import Claims
from korder.conformance.limits import require
from korder.dispatch.arrays import dtype_name
from korder.spi import NEEDS, Backend, Kernel, KernelOutput, OperandGradients, Operands, OutputGradients, Plan

Array = Any
ROWS = ("output", "lse", "normaliser", "moments", "magnitude")
REMEMBERED = 1024
"""Results kept: above the cases of the full level of one check, since checks run one after the other."""


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What a kernel returned: its own record, and the same as float64 numpy arrays with the names of their dtypes."""

    raw: KernelOutput
    output: Array
    lse: Array
    dtypes: dict[str, str]
    normaliser: Array = None
    moments: Array = None
    magnitude: Array = None


class Subject:
    """A backend with what it claims, on one array kind and device.

    Args:
        backend: The backend.
        claims: What it claims, on this device.
        arrays: The array kind.
    """

    def __init__(self, backend: Backend, claims: Claims, arrays: ArrayKind) -> None:
        self.backend = backend
        self.claims = claims
        self.arrays = arrays
        self.kept: dict[tuple[str, str], Any] = {}
        self.kernels: dict[Plan, Kernel] = {}

    def plan(self, case: Case) -> Plan:
        """Return the plan of a case, which the backend must take."""
        plan = case.plan()
        reasons = self.backend.unsupported_reasons(plan)
        require(
            not reasons,
            f"a problem within what backend {self.backend.name!r} claims was refused.",
            expected=f"no reasons against {plan.problem.describe()}",
            got="; ".join(map(str, reasons)),
        )
        return plan

    def kernel(self, case: Case) -> Kernel:
        """Return the compiled kernel of a case; as in dispatch, one for all problems that are the same."""
        self.arrays.check(case.dtype)
        plan = self.plan(case)
        if plan not in self.kernels:
            while len(self.kernels) >= REMEMBERED:
                del self.kernels[next(iter(self.kernels))]
            self.kernels[plan] = self.backend.compile(plan)
        return self.kernels[plan]

    def operands(self, case: Case, *, strided: bool = False) -> Operands:
        """Return the operands of a case as the kernel takes them."""
        make = self.arrays.strided if strided else self.arrays.array

        def each(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(None if x is None else make(x, case.dtype) for x in arrays)

        weight = case.weight
        if weight is not None:
            weight = each(weight) if isinstance(weight, tuple) else make(weight, case.dtype)
        return Operands(
            query=make(case.query, case.dtype),
            keys=each(case.keys),
            values=each(case.values),
            key_masks=each(case.key_masks),
            biases=each(case.biases),
            weight=weight,
            query_offset=case.query_offset,
            key_offsets=case.key_offsets,
        )

    def forward(self, case: Case, *, kernel: Kernel | None = None, save: bool = False, residuals: Any = None) -> Found:
        """Return the result of a case."""
        kernel = kernel or self.kernel(case)
        with np.errstate(all="ignore"):
            return self.read(kernel.forward(self.operands(case), save=save, residuals=residuals))

    def read(self, raw: KernelOutput) -> Found:
        """Return a kernel's output as numpy arrays."""
        arrays = {name: getattr(raw, name) for name in ROWS if getattr(raw, name) is not None}
        return Found(
            raw=raw,
            dtypes={name: dtype_name(array) for name, array in arrays.items()},
            **{name: self.arrays.numpy(array) for name, array in arrays.items()},
        )

    def backward(
        self,
        case: Case,
        output_gradient: Array,
        lse_gradient: Array | None,
        *,
        needs: frozenset[str] = NEEDS,
        found: Found | None = None,
    ) -> tuple[Found, OperandGradients]:
        """Return the result of a case, unless it was saved before, and the gradients for those given in numpy."""
        kernel, operands = self.kernel(case), self.operands(case)
        with np.errstate(all="ignore"):
            found = found or self.read(kernel.forward(operands, save=True))
            grads = self.upstream(case, found, output_gradient, lse_gradient)
            return found, kernel.backward(operands, found.raw, grads, needs=needs)

    def upstream(self, case: Case, found: Found, output_gradient: Array, lse_gradient: Array | None) -> OutputGradients:
        """Return upstream gradients in the dtypes of the outputs, that of lse in one that can be made here."""
        dtype = found.dtypes["lse"] if self.arrays.can_make(found.dtypes["lse"]) else "float32"
        lse = None if lse_gradient is None else self.arrays.array(lse_gradient, dtype)
        return OutputGradients(self.arrays.array(output_gradient, case.dtype), lse)

    def remembered(self, what: str, case: Case, make: Callable[[], Any]) -> Any:
        """Return what `make` returned for this case before; a few checks look at the same result."""
        key = (what, case.name)
        if key not in self.kept:
            if len(self.kept) >= REMEMBERED:
                self.kept.clear()
            self.kept[key] = make()
        return self.kept[key]


def named_gradients(gradients: OperandGradients) -> dict[str, Array]:
    """Return the gradients that are there, by operand name."""
    named = {"query": gradients.query}
    for name in ("keys", "values", "biases"):
        named |= {f"{name}[{t}]": x for t, x in enumerate(getattr(gradients, name))}
    weight = gradients.weight
    named |= {f"weight[{t}]": x for t, x in enumerate(weight)} if isinstance(weight, tuple) else {"weight": weight}
    return {name: x for name, x in named.items() if x is not None}
