"""Lazy Kronecker and Khatri-Rao products, where a user wants the matrix view without the matrix.

The identity behind every fast method here: (U1 (.) U2)^T (V1 (.) V2) = (U1^T V1) * (U2^T V2), so a product over all
tuples of rows is a product of small matrices. Both classes use it, and multiply without forming themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod
from typing import Any

import array_api_compat

from korder.errors import ShapeError

Array = Any


class LazyOperator:
    """A matrix known by its factors: `shape`, `@`, `.T`, `to_dense()`."""

    # numpy would otherwise broadcast itself over the operator in `array @ operator`
    __array_ufunc__ = None
    __array_priority__ = 1000

    def __init__(self, factors: Sequence[Array]) -> None:
        self.factors = tuple(factors)
        if not self.factors:
            raise ShapeError(f"{type(self).__name__} needs at least one factor.", expected="matrices", got="none")
        for index, factor in enumerate(self.factors):
            if getattr(factor, "ndim", None) != 2:
                raise ShapeError(
                    f"factor {index} of {type(self).__name__} must be a matrix.",
                    expected="two axes",
                    got=f"shape {getattr(factor, 'shape', None)}",
                )
        self.xp = array_api_compat.array_namespace(*self.factors)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        raise NotImplementedError

    @property
    def T(self) -> LazyOperator:  # noqa: N802 - the array libraries' name
        """The transpose, lazy as well."""
        raise NotImplementedError

    def to_dense(self) -> Array:
        """Return the matrix itself; rows are in row-major order of the tuples."""
        raise NotImplementedError

    def _apply(self, right: Array) -> Array:
        raise NotImplementedError

    def __matmul__(self, right: Any) -> Any:
        if isinstance(right, LazyOperator):
            fits = right.shape[0] == self.shape[1]
        elif not hasattr(right, "shape"):
            return NotImplemented
        else:
            fits = len(right.shape) in (1, 2) and right.shape[0] == self.shape[1]
        if not fits:
            raise ShapeError(
                "the operands of @ do not fit.",
                expected=f"a vector or matrix with {self.shape[1]} rows on the right of {self!r}",
                got=f"shape {tuple(right.shape)}",
            )
        if isinstance(right, LazyOperator):
            return self._compose(right)
        if right.ndim == 1:
            return self._apply(right[:, None])[:, 0]
        return self._apply(right)

    def __rmatmul__(self, left: Array) -> Array:
        shape = getattr(left, "shape", None)
        if shape is None:
            return NotImplemented
        if len(shape) not in (1, 2) or shape[-1] != self.shape[0]:
            raise ShapeError(
                "the operands of @ do not fit.",
                expected=f"a vector or matrix with {self.shape[0]} columns on the left of {self!r}",
                got=f"shape {tuple(shape)}",
            )
        if len(shape) == 1:
            return self.T @ left
        return (self.T @ left.T).T

    def _compose(self, right: LazyOperator) -> Any:
        return self._apply(right.to_dense())

    def _same_rows(self, right: LazyOperator) -> bool:
        """Whether the factors can be multiplied pair by pair."""
        pairs = zip(self.factors, right.factors, strict=False)
        return len(self.factors) == len(right.factors) and all(a.shape[1] == b.shape[0] for a, b in pairs)

    def __repr__(self) -> str:
        sizes = ", ".join("x".join(map(str, factor.shape)) for factor in self.factors)
        return f"{type(self).__name__}({sizes}; shape {self.shape})"


class Kronecker(LazyOperator):
    """The Kronecker product of matrices.

    Shapes:
        factors (m_t, d_t); the operator (m1 * .. * mk, d1 * .. * dk), row-major as numpy.kron.
    Cost:
        `@` with c columns contracts one factor at a time, never forming the product.
    """

    def __init__(self, *factors: Array) -> None:
        super().__init__(factors)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return prod(f.shape[0] for f in self.factors), prod(f.shape[1] for f in self.factors)

    @property
    def T(self) -> Kronecker:  # noqa: N802 - the array libraries' name
        """The Kronecker product of the transposes."""
        return Kronecker(*(factor.T for factor in self.factors))

    def to_dense(self) -> Array:
        """Return the matrix itself, of prod(m_t) * prod(d_t) elements."""

        def kron(a: Array, b: Array) -> Array:
            product = a[:, None, :, None] * b[None, :, None, :]
            return self.xp.reshape(product, (a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]))

        return reduce(kron, self.factors)

    def _apply(self, right: Array) -> Array:
        columns = right.shape[1]
        done = 1
        for number, factor in enumerate(self.factors):
            rest = prod(f.shape[1] for f in self.factors[number + 1 :])
            block = self.xp.reshape(right, (done, factor.shape[1], rest * columns))
            right = self.xp.matmul(factor, block)
            done *= factor.shape[0]
        return self.xp.reshape(right, (done, columns))

    def _compose(self, right: LazyOperator) -> Any:
        if isinstance(right, (Kronecker, KhatriRao)) and self._same_rows(right):
            return type(right)(*(a @ b for a, b in zip(self.factors, right.factors, strict=True)))
        return super()._compose(right)


class KhatriRao(LazyOperator):
    """The column-wise Kronecker (Khatri-Rao) product of matrices: row (j1, .., jk) is the product of their rows.

    Shapes:
        factors (m_t, d), one d; the operator (m1 * .. * mk, d), rows in row-major order of (j1, .., jk).
    Cost:
        `K.T @ L` with another Khatri-Rao product of the same lengths is sum_t m_t d d' by the identity above.

    Example:
        >>> import numpy as np
        >>> a, b = np.ones((3, 2)), np.full((4, 2), 2.0)
        >>> (KhatriRao(a, b).T @ KhatriRao(a, b)).tolist()
        [[48.0, 48.0], [48.0, 48.0]]
    """

    def __init__(self, *factors: Array) -> None:
        super().__init__(factors)
        widths = {factor.shape[1] for factor in self.factors}
        if len(widths) != 1:
            raise ShapeError(
                "the factors of a Khatri-Rao product must have the same number of columns.",
                expected=f"{self.factors[0].shape[1]} columns, as factor 0 has",
                got=", ".join(str(factor.shape[1]) for factor in self.factors),
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return prod(f.shape[0] for f in self.factors), self.factors[0].shape[1]

    @property
    def T(self) -> TransposedKhatriRao:  # noqa: N802 - the array libraries' name
        """The transpose, which multiplies by contracting one mode at a time."""
        return TransposedKhatriRao(*self.factors)

    def to_dense(self) -> Array:
        """Return the matrix itself, of prod(m_t) * d elements."""

        def columns(a: Array, b: Array) -> Array:
            return self.xp.reshape(a[:, None, :] * b[None, :, :], (a.shape[0] * b.shape[0], a.shape[1]))

        return reduce(columns, self.factors)

    def _apply(self, right: Array) -> Array:
        """Fold the outer modes into the right-hand side; the last mode is one matrix product for each outer tuple."""
        *outer, last = self.factors
        if not outer:
            return self.xp.matmul(last, right)
        folded = KhatriRao(*outer).to_dense()
        product = self.xp.matmul(last[None, :, :], folded[:, :, None] * right[None, :, :])
        return self.xp.reshape(product, (self.shape[0], right.shape[1]))


class TransposedKhatriRao(LazyOperator):
    """The transpose of a Khatri-Rao product; obtained as `KhatriRao(...).T`."""

    def __init__(self, *factors: Array) -> None:
        super().__init__(factors)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self.factors[0].shape[1], prod(f.shape[0] for f in self.factors)

    @property
    def T(self) -> KhatriRao:  # noqa: N802 - the array libraries' name
        """The Khatri-Rao product itself."""
        return KhatriRao(*self.factors)

    def to_dense(self) -> Array:
        """Return the matrix itself."""
        return KhatriRao(*self.factors).to_dense().T

    def _apply(self, right: Array) -> Array:
        columns, width = right.shape[1], self.shape[0]
        lengths = tuple(factor.shape[0] for factor in self.factors)
        # The last mode first, by a matrix product; then one mode at a time, each keeping its own column apart.
        block = self.xp.reshape(right, (prod(lengths[:-1]), lengths[-1], columns))
        block = self.xp.matmul(self.factors[-1].T[None, :, :], block)  # (outer, d, c)
        for t in range(len(lengths) - 2, -1, -1):
            factor = self.factors[t]
            block = self.xp.reshape(block, (prod(lengths[:t]), lengths[t], width, columns))
            block = self.xp.sum(block * factor[None, :, :, None], axis=1)
        return self.xp.reshape(block, (width, columns))

    def _compose(self, right: LazyOperator) -> Any:
        if isinstance(right, KhatriRao):
            same = [a.shape[0] == b.shape[0] for a, b in zip(self.factors, right.factors, strict=False)]
            if len(self.factors) == len(right.factors) and all(same):
                grams = (a.T @ b for a, b in zip(self.factors, right.factors, strict=True))
                return reduce(lambda x, y: x * y, grams)
        if isinstance(right, Kronecker):
            pairs = list(zip(self.factors, right.factors, strict=False))
            if len(self.factors) == len(right.factors) and all(a.shape[0] == b.shape[0] for a, b in pairs):
                return KhatriRao(*(b.T @ a for a, b in pairs)).T
        return super()._compose(right)
