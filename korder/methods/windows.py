"""Windows in the polynomial method: what all rows of a block see, as a sum that slides, and what comes and goes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from korder.methods.factors import Plane
from korder.methods.readings import Progress
from korder.methods.running import (
    Pace,
    Seen,
    State,
    Stream,
    add_states,
    empty_state,
    keys_block,
    keys_state,
    stream_state,
)
from korder.methods.sliding import SlidingSums

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any


def row_blocks(kernel: PolynomialKernel, pace: Pace) -> Iterator[tuple[int, int]]:
    """Yield blocks of rows; under windows none is longer than the shortest, so that every block has keys to share."""
    step = min((kernel.polynomial.chunk, *pace.windows))
    for start in range(0, kernel.problem.queries, step):
        yield start, min(start + step, kernel.problem.queries)


class WindowKeys:
    """The keys of one mode under a window of w, as rows go by.

    Rows [a, b) all see the keys [b - w, a), positions being those of rows; row a + q sees the keys of [a, b) up to its
    own, and those of [a - w + 1, b - w) from the q-th on. Nothing is subtracted, so a row's sums hold no rounding, and
    no NaN, of keys that have left its window.
    """

    def __init__(self, kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, progress: Progress) -> None:
        self._kernel, self._plane, self._mode, self._pace = kernel, plane, mode, pace
        self._length = plane.keys[mode].length
        self._stop = 0
        self.empty = empty_state(kernel, plane)

        def total(start: int, stop: int) -> State:
            return keys_state(kernel, plane, mode, pace, (start, stop))

        step = min(kernel.polynomial.chunk, pace.windows[mode])
        self._shared = SlidingSums(total, add_states, self.empty, step)

    @property
    def last(self) -> Array:
        """Nothing: backward walks forwards too."""
        return self.empty[0][:0, :]

    def block(self, start: int, stop: int) -> Seen:
        """Return what rows start..stop see."""
        first, last = start + self._pace.shifts[self._mode], stop + self._pace.shifts[self._mode]
        window = self._pace.windows[self._mode]
        shared = self._shared.over(self._inside(last - window), self._inside(first))
        self._stop = self._inside(last)
        leaving = self._keys(first - window + 1, last - window + 1)
        xp, final = self._kernel.xp, leaving.weighted[-1:, :]
        still = leaving.features, xp.concat([leaving.weighted[:-1, :], xp.zeros_like(final)], axis=0)
        return Seen(*shared, self._keys(first, last), leaving, still)

    def take(self, seen: Seen) -> None:
        """Add what the last block brought into sight."""
        self._shared.append(self._stop, stream_state(self._kernel, seen.arriving))

    def _keys(self, first: int, last: int) -> Stream:
        return keys_block(self._kernel, self._plane, self._mode, self._pace, first, last)

    def _inside(self, position: int) -> int:
        return min(max(position, 0), self._length)
