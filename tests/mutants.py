"""What a mutant is: a backend over numpy that is wrong in one named way, with the checks that must catch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from korder.spi import (
    Kernel,
    KernelOutput,
    NamespaceBackend,
    OperandGradients,
    Operands,
    OutputGradients,
    Plan,
)

Array = Any
Forward = Callable[[Plan, Kernel, Operands, bool, Any], KernelOutput]
Backward = Callable[..., OperandGradients]


def call_forward(plan: Plan, kernel: Kernel, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
    return kernel.forward(operands, save=save, residuals=residuals)


def call_backward(
    plan: Plan, kernel: Kernel, operands: Operands, saved: KernelOutput, grads: OutputGradients, needs: frozenset[str]
) -> OperandGradients:
    return kernel.backward(operands, saved, grads, needs=needs)


@dataclass(frozen=True)
class Mutant:
    """One way to be wrong.

    Args:
        wrong: What is wrong, in words.
        caught: Ids of the checks that must catch it, every one of them.
        forward: What stands in for the kernel's forward.
        backward: What stands in for its backward.
        compiled: What the kernel is made of: gets the plan and the generic kernel.
        facts: Attributes and methods of the backend that are replaced.
        declares: Whether the kernel says how much memory it takes.
    """

    wrong: str
    caught: tuple[str, ...]
    forward: Forward = call_forward
    backward: Backward = call_backward
    compiled: Callable[[Plan, Callable[[Plan], Any]], Any] = lambda plan, make: make(plan)
    facts: dict[str, Any] = field(default_factory=dict)
    declares: bool = True

    def backend(self) -> NamespaceBackend:
        """Return the backend that is wrong in this way."""
        made: NamespaceBackend = type("MutantBackend", (_Backend,), {"mutant": self, **self.facts})()
        return made


class MutantKernel:
    """The generic kernel with one thing changed."""

    def __init__(self, mutant: Mutant, plan: Plan, inner: Any) -> None:
        self.mutant, self.plan, self.inner = mutant, plan, inner
        for name in ("workspace_bytes", "rounding_unit") if mutant.declares else ("rounding_unit",):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def forward(self, operands: Operands, *, save: bool, residuals: Any = None) -> KernelOutput:
        return self.mutant.forward(self.plan, self.inner, operands, save, residuals)

    def states(self) -> Any:
        return self.inner.states()

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        return self.mutant.backward(self.plan, self.inner, operands, saved, grads, needs)


class _Backend(NamespaceBackend):
    name: ClassVar[str] = "mutant"
    array_kinds: ClassVar[frozenset[str]] = frozenset({"numpy"})
    mutant: ClassVar[Mutant]

    def namespace(self) -> Any:
        import array_api_compat.numpy as xp

        return xp

    def compile(self, plan: Plan) -> Any:
        return MutantKernel(self.mutant, plan, self.mutant.compiled(plan, super().compile))


def before(change: Callable[[Plan, Operands], Operands]) -> Forward:
    """A forward that looks at changed operands."""

    def forward(plan: Plan, kernel: Kernel, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
        return kernel.forward(change(plan, operands), save=save, residuals=residuals)

    return forward


def after(change: Callable[[Plan, Operands, KernelOutput], KernelOutput]) -> Forward:
    """A forward whose result is changed."""

    def forward(plan: Plan, kernel: Kernel, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
        return change(plan, operands, kernel.forward(operands, save=save, residuals=residuals))

    return forward


def after_backward(change: Callable[[OperandGradients], OperandGradients]) -> Backward:
    """A backward whose gradients are changed."""

    def backward(plan: Plan, kernel: Kernel, operands: Operands, *rest: Any) -> OperandGradients:
        return change(call_backward(plan, kernel, operands, *rest))

    return backward


def stretched(x: Array, length: int) -> Array:
    """The rows of another mode, as many as this mode has."""
    return np.take(x, np.arange(length) % max(x.shape[2], 1), axis=2)


def swapped(name: str) -> Callable[[Plan, Operands], Operands]:
    def change(plan: Plan, operands: Operands) -> Operands:
        arrays = getattr(operands, name)
        turned = tuple(stretched(y, x.shape[2]) for x, y in zip(arrays, arrays[::-1], strict=True))
        same = {x.shape[-1] for x in arrays} == {arrays[0].shape[-1]}
        changed: dict[str, Any] = {name: turned if same else arrays}
        return replace(operands, **changed)

    return change


def reuse_first_mode(plan: Plan, operands: Operands) -> Operands:
    if len({key.shape[-1] for key in operands.keys}) > 1:
        return operands
    keys = tuple(stretched(operands.keys[0], key.shape[2]) for key in operands.keys)
    return replace(operands, keys=keys)


def scaled(factor: Callable[[Plan], float]) -> Callable[[Plan, Operands], Operands]:
    def change(plan: Plan, operands: Operands) -> Operands:
        return replace(operands, query=operands.query * operands.query.dtype.type(factor(plan)))

    return change


def with_mask(kind: str, **changes: Any) -> Callable[[Plan, Callable[[Plan], Any]], Any]:
    """A kernel compiled for another mask than the plan's, where that is of a kind."""

    def compiled(plan: Plan, make: Callable[[Plan], Any]) -> Any:
        spec = plan.problem.spec
        if spec.mask.kind != kind or plan.polynomial is not None:
            return make(plan)
        other = spec.model_copy(update={"mask": changes["mask"]})
        return make(replace(plan, problem=replace(plan.problem, spec=other)))

    return compiled


def by_key_head(pick: Callable[[int, int, int], int]) -> Callable[[Plan, Operands], Operands]:
    """Keys and values spread over the query heads by a wrong rule (head, heads, groups) -> key head."""

    def change(plan: Plan, operands: Operands) -> Operands:
        heads, groups = plan.problem.heads, plan.problem.groups
        chosen = [pick(head, heads, groups) for head in range(heads)]
        return replace(
            operands,
            keys=tuple(x[:, chosen] for x in operands.keys),
            values=tuple(x[:, chosen] for x in operands.values),
            key_masks=tuple(m if m is None or m.shape[1] == 1 else m[:, chosen] for m in operands.key_masks),
        )

    return change


class ForwardOf:
    """One kernel's forward with another's backward."""

    def __init__(self, forward: Any, backward: Any) -> None:
        self.forward, self.backward = forward.forward, backward.backward
        self.rounding_unit = getattr(backward, "rounding_unit", None)


def ungrouped(plan: Plan, make: Callable[[Plan], Any]) -> Any:
    """A forward that gets keys by query head."""
    wide = replace(plan, problem=replace(plan.problem, groups=plan.problem.heads))
    return ForwardOf(make(wide), make(plan))


def with_gradient(option: str) -> Any:
    """A kernel whose backward takes another option than the plan's, where the mask allows it."""

    def compiled(plan: Plan, make: Callable[[Plan], Any]) -> Any:
        if plan.polynomial is None or plan.problem.spec.mask.kind != "full":
            return make(plan)
        return make(replace(plan, polynomial=replace(plan.polynomial, gradient=option)))

    return compiled


def polynomial_values(change: Callable[[tuple[float, ...]], tuple[float, ...]]) -> Any:
    def compiled(plan: Plan, make: Callable[[Plan], Any]) -> Any:
        if plan.polynomial is None:
            return make(plan)
        return make(replace(plan, polynomial=replace(plan.polynomial, values=change(plan.polynomial.values))))

    return compiled
