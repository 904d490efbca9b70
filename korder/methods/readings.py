"""Records and small sums of the polynomial method: readings of score powers, tables read against, what a pass keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import comb
from typing import Any

from korder.methods.factors import Plane, assemble
from korder.problem import Problem

Array = Any
FinishedRows = tuple[Array, Array, Array, Array]
"""Output (c, e), mean polynomial (c,), moments (c, degree + 1) and magnitude (c,) of a block of rows, float64."""


@dataclass(frozen=True, slots=True)
class Reading:
    """The score's powers at a block of rows, weighted by values: means over tuples of x^s [W, 1].

    Shapes:  sums[s] (c, e + 1); absolute[s] (c,), the same of the absolute monomial terms; float64.
    """

    sums: list[Array]
    absolute: list[Array]


@dataclass(frozen=True, slots=True)
class ReadTable:
    """What queries are read against, one entry per degree, normalised to entries of at most 1.

    Shapes:  values[s] (r_s, e + 1) and absolute[s] (r_s, 1) in the compute dtype; factors 0-d float64.
    """

    values: list[Array]
    absolute: list[Array]
    factors: list[Array]
    absolute_factors: list[Array]


@dataclass(frozen=True, slots=True)
class Progress:
    """Counts tokens of one call and tells a listener the share that is done."""

    total: int
    listener: Callable[[float], None] | None
    done: list[int]

    def advance(self, tokens: int) -> None:
        """Note that some more tokens are done."""
        if self.listener is not None:
            self.done[0] += tokens
            self.listener(min(1.0, self.done[0] / max(self.total, 1)))

    def finish(self) -> None:
        """Note that all is done."""
        if self.listener is not None:
            self.listener(1.0)


class RowCollector:
    """Collects blocks of rows (c, ..) of every batch entry and head, in any order of heads, into (b, h, n, ..)."""

    def __init__(
        self, xp: Any, problem: Problem, place: Any, trailing: tuple[int, ...] = (), dtype: Any = None
    ) -> None:
        self.xp, self.problem, self.place, self.trailing, self.dtype = xp, problem, place, trailing, dtype
        self._pieces: dict[tuple[int, int], list[Array]] = {}

    def put(self, batch: int, head: int, start: int, rows: Array) -> None:
        """Add the rows from `start` on; the blocks of one head come in order."""
        assert start >= 0
        self._pieces.setdefault((batch, head), []).append(rows)

    def result(self) -> Array:
        """Return all rows."""
        return assemble(self.xp, self._pieces, self.problem, self.place, self.trailing, self.dtype)


@dataclass(slots=True)
class Kept:
    """What a forward pass leaves for a later one: statistics of every plane and, if they are saved, its key states."""

    save: bool
    states: list[Array] = field(default_factory=list)
    scales: list[Array] = field(default_factory=list)
    maxima: list[Array] = field(default_factory=list)

    def close(self, xp: Any, plane: Plane, scales: Array, states: list[Array]) -> None:
        """Note a plane's statistics and the states (r, e + 1) of its modes."""
        if self.save:
            self.states.append(xp.stack(states, axis=0))
        zero = xp.zeros_like(scales[0, 0])
        known = [zero if key.bias_maximum is None else key.bias_maximum for key in plane.keys]
        self.scales.append(scales)
        self.maxima.append(xp.stack(known, axis=0))

    def row_maxima(self, xp: Any, problem: Problem) -> Array:
        """Return what the biases' maxima add to lse: (b, h, 1)."""
        total = xp.reshape(xp.sum(xp.stack(self.maxima, axis=0), axis=1), (problem.batch, -1, 1))
        shared = xp.broadcast_to(total, (problem.batch, total.shape[1], problem.heads // total.shape[1]))
        return xp.reshape(shared, (problem.batch, problem.heads, 1))

    def residuals(self, xp: Any, centre: Array) -> dict[str, Array]:
        """Return centre (b, h, n), scales (planes, k + 1, w), maxima (planes, k), states (planes, k, r, e + 1)."""
        lists = {"scales": self.scales, "maxima": self.maxima, "states": self.states}
        return {"centre": centre, **{name: xp.stack(arrays, axis=0) for name, arrays in lists.items()}}


def centred_coefficients(values: tuple[float, ...], shift: Array) -> list[Array]:
    """Return the coefficients of x^s in the polynomial of (x + shift), one array per s."""
    degree = len(values) - 1
    powers = _powers(shift, degree)
    return [
        sum_arrays([values[m] * comb(m, s) * powers[m - s] for m in range(s, degree + 1)]) for s in range(degree + 1)
    ]


def centred_powers(powers_of_x: list[Array], shift: Array) -> list[Array]:
    """Return (x + shift)^m for every m, given x^s (or their means) for every s."""
    powers = _powers(shift, len(powers_of_x) - 1)
    return [sum_arrays([comb(m, s) * powers[m - s] * powers_of_x[s] for s in range(m + 1)]) for m in range(len(powers))]


def finish_rows(xp: Any, values: tuple[float, ...], reading: Reading, centre: Array, live: Array) -> FinishedRows:
    """Return what a block of rows comes to.

    Args:
        xp: Array API namespace.
        values: Coefficients of the polynomial of the centred score.
        reading: What the rows read.
        centre: (c,), the centres of their scores.
        live: (c,) bool, whether they see a tuple.
    """
    coefficients = centred_coefficients(values, -centre)
    total = sum_arrays([c[:, None] * x for c, x in zip(coefficients, reading.sums, strict=True)])
    mean = total[:, -1]
    safe = xp.where(live, mean, xp.ones_like(mean))
    output = xp.where(live[:, None], total[:, :-1] / safe[:, None], xp.zeros_like(total[:, :-1]))
    moments = centred_powers([x[:, -1] for x in reading.sums], -centre)
    absolute = centred_powers(reading.absolute, xp.abs(centre))
    magnitude = sum_arrays([abs(c) * x for c, x in zip(values, absolute, strict=True)]) / safe
    zero = xp.zeros_like(mean)
    stacked = xp.stack([xp.where(live, x, zero) for x in moments], axis=1)
    return output, xp.where(live, mean, zero), stacked, xp.where(live, magnitude, zero)


def _powers(x: Array, degree: int) -> list[Array]:
    powers = [x * 0.0 + 1.0]
    for _ in range(degree):
        powers.append(powers[-1] * x)
    return powers


def sum_arrays(arrays: list[Array]) -> Array:
    """Return the sum of one or more arrays."""
    result = arrays[0]
    for array in arrays[1:]:
        result = result + array
    return result


def prod_arrays(arrays: list[Array]) -> Array:
    """Return the elementwise product of one or more arrays."""
    result = arrays[0]
    for array in arrays[1:]:
        result = result * array
    return result


def nonzero(xp: Any, x: Array) -> Array:
    """Return x with ones in place of zeros: a divisor."""
    return xp.where(x == 0.0, xp.ones_like(x), x)
