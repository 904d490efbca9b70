"""What the JAX backend claims; its kernels load, and with them jax, when a plan is compiled."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from typing import ClassVar

from korder.spi import API_VERSION, Availability, Backend, Capabilities, Kernel, MethodSupport, Plan, Reason

_EXACT = MethodSupport(
    "exact",
    masks=frozenset({"full", "causal", "window", "ordered"}),
    biases=frozenset({"key", "full"}),
    weights=frozenset({"cp", "full"}),
    key_masks=True,
    backward=True,
)
_POLYNOMIAL = replace(_EXACT, name="polynomial", masks=frozenset({"full", "causal"}), biases=frozenset({"key"}))


class JaxBackend(Backend):
    """JAX on whatever devices XLA has here; run on the CPU only. 16-bit operands are computed in float32."""

    name: ClassVar[str] = "jax"
    api_version: ClassVar[int] = API_VERSION
    array_kinds: ClassVar[frozenset[str]] = frozenset({"jax"})
    priority: ClassVar[int] = 100

    def availability(self) -> Availability:
        """Available if jax is installed."""
        return Availability.of_packages("jax", "jaxlib", remedy="pip install jax")

    def capabilities(self) -> Capabilities:
        """Return what the kernels can do, where XLA has devices; float64 operands only while JAX has such arrays."""
        dtypes = {"float16", "bfloat16", "float32"} | ({"float64"} if has_float64() else set())
        return Capabilities(
            orders=frozenset(range(1, 7)),
            dtypes=frozenset(dtypes),
            devices=platforms(),
            methods=(_EXACT, _POLYNOMIAL),
            grouped_heads=True,
            accumulation=frozenset({"float32", "float64"}),
        )

    def unsupported_reasons(self, plan: Plan) -> tuple[Reason, ...]:
        """Return every reason against a plan; of float64 it says which switch is missing."""
        reasons = self.capabilities().refuse(plan)
        return tuple(
            replace(reason, supported=f"{reason.supported}; float64 once jax_enable_x64 is on")
            if (reason.what, reason.got) == ("dtype", "float64")
            else reason
            for reason in reasons
        )

    def compile(self, plan: Plan) -> Kernel:
        """Return the kernel of the plan's method; XLA compiles it at the first call."""
        if plan.method == "exact":
            from korder_jax.exact import JaxExactKernel

            return JaxExactKernel(plan)
        from korder_jax.polynomial import JaxPolynomialKernel

        return JaxPolynomialKernel(plan)


def has_float64() -> bool:
    """Whether JAX makes float64 arrays; read from the environment while jax is not imported."""
    jax = sys.modules.get("jax")
    if jax is None:
        return os.environ.get("JAX_ENABLE_X64", "").lower() in ("1", "true", "yes", "on", "y", "t")
    return bool(jax.config.jax_enable_x64)


def platforms() -> frozenset[str]:
    """Return the CPU and where else XLA has devices, "gpu" or "tpu"; the CPU alone while jax is not imported."""
    jax = sys.modules.get("jax")
    found = [] if jax is None else jax.devices()
    return frozenset({"cpu", *(device.platform for device in found)})
