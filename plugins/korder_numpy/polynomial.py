"""The polynomial kernel for NumPy: the generic one, its array operations in place and laid out for BLAS."""

from __future__ import annotations

from korder.spi import PolynomialKernel


class NumpyPolynomialKernel(PolynomialKernel):
    """The polynomial method on NumPy arrays."""
