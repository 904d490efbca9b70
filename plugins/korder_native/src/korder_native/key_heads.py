"""One key head of a problem as a problem of its own: how the generic kernel takes over the heads that need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from korder.spi import KernelOutput, Operands, OutputGradients, Plan, Problem, choose_tiling

Array = Any


@dataclass(frozen=True, slots=True)
class KeyHead:
    """A key head of one batch, with the query heads that read it. Axes of 1 are shared and stay as they are."""

    batch: int
    group: int
    share: int

    @classmethod
    def all_marked(cls, marks: Array, problem: Problem) -> Iterator[KeyHead]:
        """Yield the heads that are marked, (batch, key head)."""
        share = problem.heads // max(problem.groups, 1)
        for batch, group in zip(*marks.nonzero(), strict=True):
            yield cls(int(batch), int(group), share)

    def rows(self, array: Array) -> Array:
        """Return this head's part of an array (b, h, ..)."""
        return self._part(array, self.group * self.share, self.share)

    def keys(self, array: Array) -> Array:
        """Return this head's part of an array (b, g, ..)."""
        return self._part(array, self.group, 1)

    def _part(self, array: Array, first: int, count: int) -> Array:
        batch = slice(None) if array.shape[0] == 1 else slice(self.batch, self.batch + 1)
        return array[batch, slice(None) if array.shape[1] == 1 else slice(first, first + count)]

    def plan(self, plan: Plan) -> Plan:
        """Return the plan of this head alone."""
        problem = replace(plan.problem, batch=1, heads=self.share, groups=1)
        return replace(plan, problem=problem, tiling=choose_tiling(problem))

    def operands(self, operands: Operands) -> Operands:
        """Return this head's operands."""
        return replace(
            operands,
            query=self.rows(operands.query),
            keys=tuple(map(self.keys, operands.keys)),
            values=tuple(map(self.keys, operands.values)),
            key_masks=_given(self.keys, operands.key_masks),
            biases=_given(self.rows, operands.biases),
        )

    def saved(self, saved: KernelOutput) -> KernelOutput:
        """Return this head's part of what a forward returned."""
        kept = None if saved.residuals is None else {name: self.rows(x) for name, x in saved.residuals.items()}
        return KernelOutput(self.rows(saved.output), self.rows(saved.lse), residuals=kept)

    def gradients(self, grads: OutputGradients) -> OutputGradients:
        """Return this head's part of the gradients that come in."""
        return OutputGradients(self.rows(grads.output), None if grads.lse is None else self.rows(grads.lse))


def _given(part: Any, arrays: tuple[Array | None, ...] | None) -> Any:
    return arrays and tuple(None if x is None else part(x) for x in arrays)
