"""Every method for free on any Array API namespace; new hardware starts here and replaces methods one at a time."""

from __future__ import annotations

from typing import Any, ClassVar

from korder.errors import KernelError
from korder.methods.exact import ExactKernel
from korder.methods.polynomial import PolynomialKernel
from korder.planning.plan import Plan
from korder.spi.availability import Availability
from korder.spi.backend import API_VERSION, Backend, Kernel
from korder.spi.capabilities import Capabilities, MethodSupport

__all__ = ["ExactKernel", "NamespaceBackend", "PolynomialKernel"]


class NamespaceBackend(Backend):
    """A backend made of the generic methods over one Array API namespace.

    Subclass it, set `name`, `array_kinds`, and return the namespace from `namespace()`.
    """

    api_version: ClassVar[int] = API_VERSION
    exact_kernel: ClassVar[type[ExactKernel]] = ExactKernel
    polynomial_kernel: ClassVar[type[PolynomialKernel]] = PolynomialKernel

    def namespace(self) -> Any:
        """Return the Array API namespace; imported here and not before."""
        raise NotImplementedError

    def availability(self) -> Availability:
        """Available wherever it was installed."""
        return Availability.yes()

    def capabilities(self) -> Capabilities:
        """Return what the generic methods can do."""
        exact = MethodSupport(
            "exact",
            masks=frozenset({"full", "causal", "window", "ordered"}),
            biases=frozenset({"key", "full"}),
            weights=frozenset({"cp", "full"}),
            key_masks=True,
            backward=True,
        )
        polynomial = MethodSupport(
            "polynomial",
            masks=frozenset({"full", "causal", "window", "ordered"}),
            biases=frozenset({"key"}),
            weights=frozenset({"cp", "full"}),
            key_masks=True,
            backward=True,
            closed_form=frozenset({"full"}),
            state=True,
            pruned=frozenset({"full", "causal", "window", "ordered"}),
        )
        return Capabilities(
            orders=frozenset(range(1, 7)),
            dtypes=frozenset({"float32", "float64"}),
            devices=frozenset({"cpu"}),
            methods=(exact, polynomial),
            grouped_heads=True,
            accumulation=frozenset({"float32", "float64"}),
        )

    def compile(self, plan: Plan) -> Kernel:
        """Return the generic kernel of the plan's method."""
        kernels: dict[str, type[ExactKernel] | type[PolynomialKernel]] = {
            "exact": self.exact_kernel,
            "polynomial": self.polynomial_kernel,
        }
        if plan.method not in kernels:
            raise KernelError(f"backend {self.name!r} has no kernel for method {plan.method!r}.")
        return kernels[plan.method](self.namespace(), plan)
