"""What the C++ backend claims; its kernels load when a plan is compiled."""

from __future__ import annotations

import os
from typing import ClassVar

from korder.spi import API_VERSION, Availability, Backend, Capabilities, Kernel, MethodSupport, Plan

_EXACT = MethodSupport(
    "exact",
    masks=frozenset({"full", "causal", "window", "ordered"}),
    biases=frozenset({"key", "full"}),
    key_masks=True,
    backward=True,
)
_POLYNOMIAL = MethodSupport(
    "polynomial",
    masks=frozenset({"full", "causal"}),
    biases=frozenset({"key"}),
    weights=frozenset({"cp", "full"}),
    key_masks=True,
    backward=True,
    closed_form=frozenset({"full"}),
    pruned=frozenset({"full", "causal"}),
)


def wanted_isa() -> str:
    """Return the instruction set that `KORDER_NATIVE_ISA` names; empty for the best one."""
    return os.environ.get("KORDER_NATIVE_ISA", "")


class NativeBackend(Backend):
    """C++ kernels on the CPU, for arrays and tensors as they lie in memory; bfloat16 is summed in float32."""

    name: ClassVar[str] = "native"
    api_version: ClassVar[int] = API_VERSION
    array_kinds: ClassVar[frozenset[str]] = frozenset({"numpy", "torch"})
    priority: ClassVar[int] = 150

    def capabilities(self) -> Capabilities:
        """Return what the kernels can do."""
        return Capabilities(
            orders=frozenset({1, 2, 3, 4}),
            dtypes=frozenset({"bfloat16", "float32", "float64"}),
            devices=frozenset({"cpu"}),
            methods=(_EXACT, _POLYNOMIAL),
            grouped_heads=True,
            accumulation=frozenset({"float32", "float64"}),
        )

    def availability(self) -> Availability:
        """Available if the compiled part was installed, and runs the instruction set that `KORDER_NATIVE_ISA` names."""
        found = Availability.of_packages(
            "korder_native._native", remedy="install a C++ compiler, then pip install --force-reinstall korder-native"
        )
        wanted = wanted_isa()
        if not found.available or not wanted:
            return found
        from korder_native import _native

        if _native.runs_here(wanted):
            return found
        here = ", ".join(name for name in _native.known_names() if _native.runs_here(name))
        known = wanted in _native.known_names()
        reason = "this processor does not have it" if known else "no kernels are compiled for it"
        return Availability.no(f"KORDER_NATIVE_ISA={wanted}: {reason}", f"unset it, or set it to one of {here}")

    def compile(self, plan: Plan) -> Kernel:
        """Return the kernel of a plan."""
        if plan.method == "polynomial":
            from korder_native.polynomial import NativePolynomialKernel

            return NativePolynomialKernel(plan)
        from korder_native.exact import NativeExactKernel

        return NativeExactKernel(plan, wanted_isa())
