"""What the PyTorch backend claims; its kernels load, and with them torch, when a plan is compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from korder.spi import Availability, Capabilities, Kernel, NamespaceBackend, Plan


class TorchBackend(NamespaceBackend):
    """PyTorch on the CPU; 16-bit operands are computed in float32."""

    name: ClassVar[str] = "torch"
    array_kinds: ClassVar[frozenset[str]] = frozenset({"torch"})
    priority: ClassVar[int] = 100

    def namespace(self) -> Any:
        """Return torch under its Array API name space."""
        import array_api_compat.torch as xp

        return xp

    def availability(self) -> Availability:
        """Available if torch is installed."""
        return Availability.of_packages("torch", remedy="pip install 'korder[torch]'")

    def capabilities(self) -> Capabilities:
        """Return the generic capabilities, with 16-bit operands as well."""
        generic = super().capabilities()
        return replace(generic, dtypes=generic.dtypes | {"float16", "bfloat16"})

    def compile(self, plan: Plan) -> Kernel:
        """Return the kernel of the plan's method."""
        from korder_torch.exact import TorchExactKernel
        from korder_torch.polynomial import TorchPolynomialKernel

        if plan.method == "exact":
            return TorchExactKernel(self.namespace(), plan)
        return TorchPolynomialKernel(self.namespace(), plan)
