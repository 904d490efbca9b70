"""The two things a backend author writes: a `Backend` that answers questions, and a `Kernel` that computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol

from korder.planning.plan import Plan
from korder.spi.availability import Availability
from korder.spi.capabilities import Capabilities, Reason
from korder.spi.operands import KernelOutput, OperandGradients, Operands, OutputGradients

API_VERSION = 1
"""The version of this contract. A backend that speaks another is refused with both numbers."""


class Kernel(Protocol):
    """A compiled plan: pure array functions, safe to call from several threads.

    Optional attributes: `workspace_bytes` (int, bytes beyond inputs and outputs), `rounding_unit` (float, the relative
    rounding error of one block sum of an approximate method), and a method `residual_shapes(operands)`: shape and dtype
    name of everything beside `output` that `forward(save=True)` returns, residuals by their names. Frameworks that
    record or trace need it; of the operands only shapes may be looked at. The first axis of a residual runs over the
    batch, or over the batch and something else with the batch outermost. A kernel whose `MethodSupport` says `state`
    has `states()`, which returns its `StateKernel`.
    """

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, object] | None = None) -> KernelOutput:
        """Compute the output; `save` keeps what backward wants; `residuals` of an earlier call fix its statistics."""
        ...

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Return the gradients that `needs` names, in the operands' dtype."""
        ...


class StateKernel(Protocol):
    """Sums over keys that come one after another, for decoding; what `korder.methods.states` has for every namespace.

    A state is a tuple with one `ModeState` per mode. It is a value: extending it leaves it as it was.
    """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array of a `ModeState`, by name."""
        ...

    def empty(self, place: object) -> Any:
        """Return the state of no keys, on a device."""
        ...

    def extend(self, state: Any, keys: tuple[Any, ...], values: tuple[Any, ...], key_masks: tuple[Any, ...]) -> Any:
        """Return a state with more keys in every mode; shapes as in `Operands`."""
        ...

    def read(self, state: Any, query: Any) -> KernelOutput:
        """Return what queries (b, h, n, d), which see every key of a state, make of it."""
        ...


class Backend(ABC):
    """Who runs a plan. Subclass it, fill the attributes, and register an instance."""

    name: ClassVar[str]
    api_version: ClassVar[int]
    array_kinds: ClassVar[frozenset[str]]
    priority: ClassVar[int] = 0

    @abstractmethod
    def capabilities(self) -> Capabilities:
        """Return static facts; must not touch hardware."""

    @abstractmethod
    def availability(self) -> Availability:
        """Return whether it can run here, now; find packages, do not import them."""

    def unsupported_reasons(self, plan: Plan) -> tuple[Reason, ...]:
        """Return every reason why this plan cannot be run, none if it can."""
        return self.capabilities().refuse(plan)

    @abstractmethod
    def compile(self, plan: Plan) -> Kernel:
        """Return the kernel for a plan that was not refused; may be slow, its result is cached."""
