"""Mutants that break the contract: gradients, the polynomial method's numbers, purity, threads, memory, claims."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np

from korder.methods.states import PolynomialStates
from korder.spi import (
    NEEDS,
    Availability,
    Kernel,
    KernelOutput,
    NamespaceBackend,
    OperandGradients,
    Operands,
    Plan,
    PolynomialKernel,
    Reason,
)
from tests.mutants import Mutant, after, after_backward, polynomial_values, with_gradient

Array = Any


def without_last_key(found: OperandGradients) -> OperandGradients:
    last = found.keys[-1]
    return replace(found, keys=(*found.keys[:-1], None if last is None else np.zeros_like(last)))


def without_lse(plan: Plan, kernel: Kernel, operands: Operands, saved: Any, grads: Any, needs: Any) -> OperandGradients:
    return kernel.backward(operands, saved, replace(grads, lse=None), needs=needs)


def lse_always(plan: Plan, kernel: Kernel, operands: Operands, saved: Any, grads: Any, needs: Any) -> OperandGradients:
    """Takes whatever lies in the memory of a gradient that was not given."""
    lse = np.ones_like(saved.lse) if grads.lse is None else grads.lse
    return kernel.backward(operands, saved, replace(grads, lse=lse), needs=needs)


def all_needs(plan: Plan, kernel: Kernel, operands: Operands, saved: Any, grads: Any, needs: Any) -> OperandGradients:
    return kernel.backward(operands, saved, grads, needs=NEEDS)


def unsummed_biases(found: OperandGradients) -> OperandGradients:
    """Gradients of shared biases as if every row had one of its own, of a number that is right in sum."""
    if found.query is None:
        return found
    shape = found.query.shape[:3]
    return replace(
        found,
        biases=tuple(None if b is None else np.broadcast_to(b, (*shape, b.shape[-1])).copy() for b in found.biases),
    )


def bias_means(found: OperandGradients) -> OperandGradients:
    return replace(found, biases=tuple(None if b is None else b * 0.5 for b in found.biases))


def narrow_gradient(found: OperandGradients) -> OperandGradients:
    """Sums kept in half the bits."""
    query = found.query
    if query is None:
        return found
    small = np.float16 if query.dtype != np.float64 else np.float32
    return replace(found, query=query.astype(small).astype(query.dtype))


def wrong_row(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    return found if found.normaliser is None else replace(found, normaliser=np.roll(found.normaliser, 1, axis=2))


def smaller(name: str, factor: float) -> Any:
    def change(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
        array = getattr(found, name)
        changed: dict[str, Any] = {name: None if array is None else array * factor}
        return replace(found, **changed)

    return after(change)


def biased_towards_zero(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    """An output whose error is larger than its certificate admits."""
    return found if plan.polynomial is None else replace(found, output=found.output * 0.5)


def one_degree_less(plan: Plan, kernel: Any, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
    found = kernel.forward(operands, save=save, residuals=residuals)
    if found.moments is None:
        return found
    moments = np.zeros((*found.moments.shape[:-1], found.moments.shape[-1] + 1))
    moments[..., :-1] = found.moments
    return replace(found, moments=moments)


def lower_degree(plan: Plan, make: Any) -> Any:
    if plan.polynomial is None or plan.polynomial.degree == 0:
        return make(plan)
    lower = plan.polynomial.degree - 1
    less = replace(plan.polynomial, degree=lower, values=plan.polynomial.values[:-1])
    return make(replace(plan, polynomial=less))


def all_monomials(plan: Plan, make: Any) -> Any:
    if plan.polynomial is None:
        return make(plan)
    return make(replace(plan, polynomial=replace(plan.polynomial, pruning=None)))


class Unchecked(PolynomialKernel):
    def check_normaliser(self, mean: Array, live: Array) -> None:
        """Lets anything pass."""


class ForgetfulStates(PolynomialStates):
    def extend(self, state: Any, *tokens: Any) -> Any:
        """Starts anew with every piece."""
        return super().extend(self.empty(None), *tokens)


class Forgetful(PolynomialKernel):
    def states(self) -> Any:
        return ForgetfulStates(self)


class SharedStates(PolynomialStates):
    def extend(self, state: Any, *tokens: Any) -> Any:
        """Writes into the sums of the state that it extends."""
        extended = super().extend(state, *tokens)
        for before, after_it in zip(state, extended, strict=True):
            before.sums[...] = after_it.sums
        return extended


class Shared(PolynomialKernel):
    def states(self) -> Any:
        return SharedStates(self)


def no_residuals(plan: Plan, kernel: Kernel, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
    return kernel.forward(operands, save=save, residuals=None)


def scales_in_place(plan: Plan, kernel: Kernel, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
    found = kernel.forward(operands, save=save, residuals=residuals)
    operands.query[...] *= operands.query.dtype.type(plan.problem.scale)
    return found


def upstream_in_place(plan: Plan, kernel: Kernel, operands: Operands, saved: Any, grads: Any, needs: Any) -> Any:
    found = kernel.backward(operands, saved, grads, needs=needs)
    grads.output[...] *= 2
    return found


class SharedScratch:
    """Keeps the operands of the running call in the kernel, as a scratch buffer would."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.rounding_unit = getattr(inner, "rounding_unit", None)
        self.workspace_bytes = inner.workspace_bytes
        self.backward = inner.backward
        self.operands: Any = None

    def forward(self, operands: Operands, *, save: bool, residuals: Any = None) -> KernelOutput:
        self.operands = operands
        self.inner.forward(operands, save=False, residuals=residuals)
        found: KernelOutput = self.inner.forward(self.operands, save=save, residuals=residuals)
        return found


class CountsCalls:
    """Adds a little more on every call, as a buffer that is never cleared would."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.calls = inner, itertools.count()
        self.workspace_bytes, self.rounding_unit = inner.workspace_bytes, getattr(inner, "rounding_unit", None)

    def forward(self, operands: Operands, *, save: bool, residuals: Any = None) -> KernelOutput:
        found = self.inner.forward(operands, save=save, residuals=residuals)
        return replace(found, output=found.output * found.output.dtype.type(1.0 + 1e-3 * next(self.calls)))

    def backward(self, *arguments: Any, **named: Any) -> Any:
        return self.inner.backward(*arguments, **named)


def takes_more(plan: Plan, kernel: Any, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
    spare = np.empty(4 * kernel.workspace_bytes, dtype=np.uint8)
    found: KernelOutput = kernel.forward(operands, save=save, residuals=residuals)
    assert spare.size
    return found


def in_place_of_values(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    """One tuple alone: its value is the output, so why copy it."""
    if plan.problem.tuples == 1 and plan.problem.order == 1 and plan.problem.groups == plan.problem.heads:
        return replace(found, output=operands.values[0])
    return found


def keeps_always(plan: Plan, kernel: Kernel, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
    return kernel.forward(operands, save=True, residuals=residuals)


def claiming(**changes: Any) -> dict[str, Any]:
    def capabilities(self: NamespaceBackend) -> Any:
        return replace(NamespaceBackend.capabilities(self), **changes)

    return {"capabilities": capabilities}


_SEEN = itertools.count()


def changing_facts(self: NamespaceBackend) -> Any:
    return replace(NamespaceBackend.capabilities(self), orders=frozenset({1, 2, 3, 4 + next(_SEEN) % 3}))


def refuse_causal(self: NamespaceBackend, plan: Plan) -> tuple[Reason, ...]:
    found = NamespaceBackend.unsupported_reasons(self, plan)
    return (*found, Reason("mask", "causal")) if plan.problem.spec.mask.kind == "causal" else found


CONTRACT: dict[str, Mutant] = {
    "gradient of the last mode missing": Mutant(
        "the last keys get no gradient", ("gradient.masks", "gradient.operands", "gradient.output", "gradient.lse"),
        backward=after_backward(without_last_key),
    ),
    "gradient without lse": Mutant(
        "the gradient of lse is dropped", ("gradient.masks", "gradient.lse"), backward=without_lse
    ),
    "gradient of lse made up": Mutant(
        "a gradient of lse that is not given counts as 1", ("gradient.output",), backward=lse_always
    ),
    "bias gradients halved": Mutant(
        "gradients of biases are too small", ("gradient.operands",), backward=after_backward(bias_means)
    ),
    "bias gradients not summed": Mutant(
        "a shared bias gets a gradient for every row", ("gradient.shapes",), backward=after_backward(unsummed_biases)
    ),
    "gradient too narrow": Mutant(
        "the query's gradient is summed in half the bits", ("gradient.masks", "gradient.dtypes"),
        backward=after_backward(narrow_gradient),
    ),
    "needs ignored": Mutant("every gradient comes back", ("gradient.needs",), backward=all_needs),
    "one coefficient wrong": Mutant(
        "the coefficient of x^2 is 1 % too large",
        ("polynomial.output", "polynomial.normaliser", "polynomial.gradient"),
        compiled=polynomial_values(lambda c: (*c[:2], *(c[2:3] and (c[2] * 1.01,)), *c[3:])),
    ),
    "normaliser of another row": Mutant(
        "the normaliser stands one row too late", ("polynomial.normaliser", "polynomial.moments"), after(wrong_row)
    ),
    "moments too small": Mutant(
        "moments are 1 % too small", ("polynomial.moments",), smaller("moments", 0.99)
    ),
    "magnitude too small": Mutant(
        "the magnitude is half of what it is", ("polynomial.magnitude",), smaller("magnitude", 0.5)
    ),
    "error above the certificate": Mutant(
        "the output is half of what it is", ("polynomial.output", "polynomial.certificate"), after(biased_towards_zero)
    ),
    "degree off by one": Mutant(
        "the highest power is left out", ("polynomial.output", "polynomial.moments"), one_degree_less,
        compiled=lower_degree,
    ),
    "residuals ignored": Mutant(
        "the statistics of an earlier call are measured again", ("polynomial.residuals",), no_residuals
    ),
    "negative sum passes": Mutant(
        "a sum that is not positive is divided by", ("polynomial.positive",), facts={"polynomial_kernel": Unchecked}
    ),
    "closed form ignored": Mutant(
        "the gradient is consistent where the closed form was asked for", ("polynomial.closed_form",),
        compiled=with_gradient("consistent"),
    ),
    "closed form always": Mutant(
        "the gradient is the closed form where the consistent one was asked for", ("polynomial.gradient",),
        compiled=with_gradient("closed_form"),
    ),
    "pruning ignored": Mutant(
        "all monomials are computed with where a plan leaves some out", ("polynomial.pruned",), compiled=all_monomials
    ),
    "state forgets": Mutant(
        "a state has only the keys that came last", ("polynomial.state",), facts={"polynomial_kernel": Forgetful}
    ),
    "state written to": Mutant(
        "extending a state changes it", ("polynomial.state",), facts={"polynomial_kernel": Shared}
    ),
    "input changed": Mutant(
        "the query is scaled in place", ("contract.inputs",), scales_in_place
    ),
    "upstream gradient changed": Mutant(
        "the gradient of the output is used as scratch", ("contract.inputs",), backward=upstream_in_place
    ),
    "not thread-safe": Mutant(
        "the running call's operands are kept in the kernel", ("contract.threads",),
        compiled=lambda plan, make: SharedScratch(make(plan)),
    ),
    "not repeatable": Mutant(
        "a buffer is never cleared", ("contract.repeat",), compiled=lambda plan, make: CountsCalls(make(plan))
    ),
    "wrong dtype": Mutant(
        "float32 operands give a float64 output", ("contract.result",),
        after(lambda plan, x, found: replace(found, output=found.output.astype(np.float64))),
    ),
    "lse too narrow": Mutant(
        "lse comes in 16 bits", ("contract.result",),
        after(lambda plan, x, found: replace(found, lse=found.lse.astype(np.float16))),
    ),
    "keeps always": Mutant("residuals come back although not asked for", ("contract.result",), keeps_always),
    "more memory than declared": Mutant("five times the declared workspace", ("contract.workspace",), takes_more),
    "result aliases an operand": Mutant(
        "the only value is returned as it is", ("contract.alias",), after(in_place_of_values)
    ),
    "refuses nothing": Mutant(
        "takes problems that it does not claim", ("contract.refuses",),
        facts={"unsupported_reasons": lambda self, plan: ()},
    ),
    "refuses what it claims": Mutant(
        "claims the causal mask and refuses it", ("contract.accepts", "value.masks"),
        facts={"unsupported_reasons": refuse_causal},
    ),
    "claims too little": Mutant("orders 1 and 2 alone", ("contract.core",), facts=claiming(orders=frozenset({1, 2}))),
    "claims beyond the contract": Mutant(
        "claims a dtype that korder does not know", ("contract.capabilities",),
        facts=claiming(dtypes=frozenset({"float64", "int8"})),
    ),
    "facts that change": Mutant(
        "claims other orders whenever asked", ("contract.capabilities",), facts={"capabilities": changing_facts}
    ),
    "bad name": Mutant("is called auto", ("contract.name",), facts={"name": "auto"}),
    "old contract": Mutant("speaks version 0 of the contract", ("contract.name",), facts={"api_version": 0}),
    "no reason": Mutant(
        "cannot run, and does not say why", ("contract.availability",),
        facts={"availability": lambda self: Availability.no("")},
    ),
}  # fmt: skip
