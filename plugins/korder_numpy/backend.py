"""What the NumPy backend claims, and its kernels: the generic methods with in-place and BLAS-friendly overrides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from korder.spi import Capabilities, NamespaceBackend
from korder_numpy.exact import NumpyExactKernel
from korder_numpy.polynomial import NumpyPolynomialKernel


class NumpyBackend(NamespaceBackend):
    """NumPy on the CPU; float16 operands are computed in float32."""

    name: ClassVar[str] = "numpy"
    array_kinds: ClassVar[frozenset[str]] = frozenset({"numpy"})
    priority: ClassVar[int] = 0
    exact_kernel = NumpyExactKernel
    polynomial_kernel = NumpyPolynomialKernel

    def namespace(self) -> Any:
        """Return numpy under its Array API name space."""
        import array_api_compat.numpy as xp

        return xp

    def capabilities(self) -> Capabilities:
        """Return the generic capabilities, with float16 operands as well."""
        generic = super().capabilities()
        return replace(generic, dtypes=generic.dtypes | {"float16"})
