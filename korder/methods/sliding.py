"""Sums over intervals that slide along the tokens, never by subtraction: what has left one leaves no rounding in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Sum = TypeVar("Sum")


class SlidingSums(Generic[Sum]):
    """Sums over intervals [start, stop) whose two ends only grow.

    An interval is cut at an anchor. What lies after it is summed as it comes. What lies before it is kept as sums from
    a few points up to the anchor, their distances halving towards the interval's start; once the last point has been
    passed, half of the next gap is summed again. An interval beyond the anchor sets a new one, and all is summed anew.

    Args:
        total: The sum over [start, stop).
        merge: The sum of two sums.
        empty: The sum over nothing.
        step: How far the intervals usually move; the smallest distance of two points.

    Cost:
        Every token is summed about 2 + log2(length / step) / 2 times; `kept_sums` at a time.
    """

    def __init__(
        self, total: Callable[[int, int], Sum], merge: Callable[[Sum, Sum], Sum], empty: Sum, step: int
    ) -> None:
        self._total, self._merge, self._empty, self._step = total, merge, empty, step
        self._points: list[tuple[int, Sum]] = []  # the anchor itself first, the point nearest to the start last
        self._newer = empty
        self._stop: int | None = None

    def over(self, start: int, stop: int) -> Sum:
        """Return the sum over [start, stop)."""
        if self._stop is not None and self._stop < stop:
            self.append(stop, self._total(self._stop, stop))
        self._stop = stop
        while self._points and self._points[-1][0] < start:
            self._points.pop()
        if not self._points:
            self._points, self._newer = [(stop, self._empty)], self._empty
        point, older = self._points[-1]
        while point > start:
            earlier = start if point - start <= self._step else (start + point) // 2
            older = self._merge(self._total(earlier, point), older)
            point = earlier
            self._points.append((point, older))
        return self._merge(older, self._newer)

    def append(self, stop: int, part: Sum) -> None:
        """Add the sum from the last interval's stop to this one, where the caller has it at hand."""
        self._newer, self._stop = self._merge(self._newer, part), stop


def kept_sums(length: int, step: int) -> int:
    """Return the most sums that are kept for intervals of some length, the newer and the returned one included."""
    return max(length // max(step, 1), 1).bit_length() + 5
