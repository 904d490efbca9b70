"""What goes into a kernel and what comes out. Arrays are of the backend's own kind, laid out (b, h, n, width)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Array = Any


@dataclass(frozen=True, slots=True)
class Operands:
    """The arrays of one call, checked and in the kernel layout.

    Shapes:
        query (b, h, n, d); keys[t] (b, g, m_t, d_t); values[t] (b, g, m_t, e);
        key_masks[t] bool (b, 1 or g, m_t) or None, True = may be attended to;
        biases[t] (1 or b, 1 or h, 1 or n, m_t) or None;
        weight None, one array (d, d1, .., dk), or a tuple of k + 1 CP factors (d_t, rank).
    """

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    key_masks: tuple[Array | None, ...]
    biases: tuple[Array | None, ...]
    weight: Array | tuple[Array, ...] | None = None
    query_offset: int = 0
    key_offsets: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KernelOutput:
    """The result of `forward`.

    Shapes:
        output (b, h, n, e) in the operands' dtype; lse (b, h, n) natural log, float32 or wider, -inf for an empty row.
        Approximate methods also fill: normaliser (b, h, n), the sum of the polynomial over live tuples, each weighted
        by its key-only biases less their maxima, so that lse = centre + ln normaliser + the maxima;
        moments (b, h, n, degree + 1), means over live tuples of the powers 0, 1, .. of the centred score;
        magnitude (b, h, n), the sum of the absolute monomial terms of every c_m (x - centre)^m over the normaliser.
        Where a plan leaves monomials out, each of these is of the powers of the score as far as they are kept.
        residuals: a mapping of whatever the kernel's `backward` (or a later `forward`) wants, None when not saved.
    """

    output: Array
    lse: Array
    normaliser: Array | None = None
    moments: Array | None = None
    magnitude: Array | None = None
    residuals: dict[str, Array] | None = None


@dataclass(frozen=True, slots=True)
class OutputGradients:
    """Gradients of a loss with respect to the outputs; `lse` may be None (zero)."""

    output: Array
    lse: Array | None = None


@dataclass(frozen=True, slots=True)
class OperandGradients:
    """Gradients with respect to the operands; None where they were not asked for."""

    query: Array | None
    keys: tuple[Array | None, ...]
    values: tuple[Array | None, ...]
    biases: tuple[Array | None, ...]
    weight: Array | tuple[Array, ...] | None = None


NEEDS = frozenset({"query", "keys", "values", "biases", "weight"})
"""The names that `Kernel.backward(needs=...)` understands."""
