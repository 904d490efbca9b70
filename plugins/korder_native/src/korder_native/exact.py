"""The exact method by the C++ kernels: checks that they apply, hands over addresses, and narrows what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite, prod
from typing import Any

from korder.spi import ExactKernel, KernelOutput, OperandGradients, Operands, OutputGradients, Plan
from korder_native import _native
from korder_native.arrays import (
    NUMBERS,
    address,
    cast,
    dense,
    mask_view,
    namespace,
    new,
    quietly,
    readable,
    summed_to,
    thread_count,
    view,
)

Array = Any
_KINDS = {"full": 0, "causal": 1, "window": 2, "ordered": 3}
_LIMITS = {"float32": 2.0**120, "float64": 2.0**1000}
"""Above it something could overflow on the way to a result that does not."""


@dataclass(frozen=True, slots=True)
class Laid:
    """Operands as the kernels read them, the contracted mode last. Holds what the addresses point at."""

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    key_masks: tuple[Array | None, ...]
    biases: tuple[Array | None, ...]


class NativeExactKernel:
    """Order-k attention to rounding, orders 1 to 4, on NumPy arrays and PyTorch tensors.

    Cost:     2 n m1..mk (d + e) flop a head forward, three times that backward, times the live share of the tuples.
    Numerics: running maximum; sums in `problem.accumulation`; weights to 1e-7 or 3e-18 relative. Operands with NaN,
        infinities or products that could overflow go to korder's generic kernel, which selects row by row.
    """

    def __init__(self, plan: Plan, isa: str = "") -> None:
        assert plan.tiling is not None
        self.plan = plan
        self.problem = plan.problem
        self.kernels = _native.kernels(isa)
        self.modes = [t for t in range(self.problem.order) if t != plan.tiling.contracted] + [plan.tiling.contracted]

    @property
    def workspace_bytes(self) -> int:
        """Bytes beyond inputs and outputs that a forward takes, on as many threads as it would now."""
        problem = self.problem
        narrow = 0 if problem.dtype == problem.accumulation else problem.batch * problem.heads * problem.queries
        return int(self.kernels.forward_bytes(self._call())) + narrow * problem.value_width * 4 + 4096

    def residual_shapes(self, operands: Operands) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of lse, and of the output before it is narrowed, which backward wants."""
        problem = self.problem
        rows = (problem.batch, problem.heads, problem.queries)
        shapes: dict[str, tuple[tuple[int, ...], str]] = {"lse": (rows, problem.accumulation)}
        if problem.dtype != problem.accumulation:
            shapes["output"] = ((*rows, problem.value_width), problem.accumulation)
        return shapes

    def forward(self, operands: Operands, *, save: bool, residuals: dict[str, object] | None = None) -> KernelOutput:
        """Compute output and lse; the exact method has no statistics for `residuals` to fix."""
        laid = self._laid(operands)
        if not self._is_tame(laid):
            with quietly(operands.query):
                return self._generic(operands.query).forward(operands, save=save, residuals=residuals)
        problem = self.problem
        rows = (problem.batch, problem.heads, problem.queries)
        output = new(laid.query, (*rows, problem.value_width), problem.accumulation)
        lse = new(laid.query, rows, problem.accumulation)
        call = self._call(laid, operands)
        call.set_results(address(output), address(lse))
        self.kernels.forward(call)
        narrow = cast(output, operands.query.dtype)
        kept = {"output": output} if narrow.dtype != output.dtype else {}
        return KernelOutput(narrow, lse, residuals=kept if save else None)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names; scores are computed again from lse."""
        laid = self._laid(operands)
        if not self._is_tame(laid, grads.output):
            with quietly(operands.query):
                return self._generic(operands.query).backward(operands, saved, grads, needs=needs)
        wide = getattr(namespace(laid.query), self.problem.accumulation)
        output = dense(cast((saved.residuals or {}).get("output", saved.output), wide))
        lse = dense(cast(saved.lse, wide))
        of_lse = None if grads.lse is None else dense(cast(grads.lse, wide))
        of_output = readable(cast(grads.output, operands.query.dtype))
        found = self._new_gradients(laid, needs)
        call = self._call(laid, operands)
        call.set_results(address(output), address(lse))
        call.set_gradients(
            view(of_output),
            address(of_lse),
            address(found.query),
            *([address(x) for x in arrays] for arrays in (found.keys, found.values, found.biases)),
        )
        self.kernels.backward(call)
        return self._handed_back(found, operands)

    def _new_gradients(self, laid: Laid, needs: frozenset[str]) -> OperandGradients:
        """Return zeros for the gradients that are wanted, the contracted mode last, biases with all of their axes."""
        problem, like = self.problem, laid.query

        def zeros(wanted: bool, *shape: int) -> Array | None:
            return new(like, shape, problem.accumulation, zeros=True) if wanted else None

        lengths = [problem.lengths[t] for t in self.modes]
        keys = (problem.batch, problem.groups)
        rows = (problem.batch, problem.heads)
        return OperandGradients(
            query=zeros("query" in needs, *rows, problem.queries, problem.query_width),
            keys=tuple(zeros("keys" in needs, *keys, m, problem.query_width) for m in lengths),
            values=tuple(zeros("values" in needs, *keys, m, problem.value_width) for m in lengths),
            biases=tuple(
                zeros("biases" in needs and bias is not None, *rows, self._bias_rows(t), m)
                for t, m, bias in zip(self.modes, lengths, laid.biases, strict=True)
            ),
        )

    def _bias_rows(self, t: int) -> int:
        return self.problem.queries if self.problem.biases and self.problem.biases[t] == "full" else 1

    def _handed_back(self, found: OperandGradients, operands: Operands) -> OperandGradients:
        """Return the gradients in the user's order of modes, and in the shapes and dtype of the operands."""
        dtype, none = operands.query.dtype, (None,) * self.problem.order

        def narrow(array: Array | None) -> Array | None:
            return None if array is None else cast(array, dtype)

        def back(arrays: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
            by_mode = dict(zip(self.modes, arrays, strict=True))
            return tuple(by_mode[t] for t in range(self.problem.order))

        biases = zip(back(found.biases), operands.biases or none, strict=True)
        return OperandGradients(
            query=narrow(found.query),
            keys=tuple(map(narrow, back(found.keys))),
            values=tuple(map(narrow, back(found.values))),
            biases=tuple(None if x is None or like is None else narrow(summed_to(x, like.shape)) for x, like in biases),
        )

    def _generic(self, like: Array) -> ExactKernel:
        return ExactKernel(namespace(like), self.plan)

    def _laid(self, operands: Operands) -> Laid:
        none = (None,) * self.problem.order
        masks, biases = operands.key_masks or none, operands.biases or none

        def ordered(arrays: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
            return tuple(None if arrays[t] is None else readable(arrays[t]) for t in self.modes)

        return Laid(
            readable(operands.query), ordered(operands.keys), ordered(operands.values), ordered(masks), ordered(biases)
        )

    def _call(self, laid: Laid | None = None, operands: Operands | None = None) -> Any:
        """Return the numbers of a call, and the addresses of its operands where they are given."""
        problem, mask = self.problem, self.problem.spec.mask
        call = _native.Call()
        call.order, call.before = problem.order, self.modes[-1]
        call.kind, call.number = _KINDS[mask.kind], NUMBERS[problem.dtype]
        call.wide = problem.accumulation == "float64"
        call.threads = thread_count()
        call.batch, call.heads, call.groups = problem.batch, problem.heads, problem.groups
        call.queries, call.width, call.value_width = problem.queries, problem.query_width, problem.value_width
        call.scale = float(problem.scale)
        sizes = getattr(mask, "sizes", (0,) * problem.order)
        kinds = problem.biases or (None,) * problem.order
        for place, t in enumerate(self.modes):
            call.set_mode(place, problem.lengths[t], sizes[t], kinds[t] == "full")
        if laid is not None and operands is not None:
            offsets = operands.key_offsets or (0,) * problem.order
            call.set_operands(
                view(laid.query),
                [view(x) for x in laid.keys],
                [view(x) for x in laid.values],
                [mask_view(x) for x in laid.key_masks],
                [None if x is None else view(x) for x in laid.biases],
                operands.query_offset,
                [offsets[t] for t in self.modes],
            )
        return call

    def _is_tame(self, laid: Laid, gradient: Array | None = None) -> bool:
        """Return whether no score, product of values or gradient can be NaN, infinite, or near it."""
        problem = self.problem
        largest = self._largest(laid.query) * max(1.0, abs(problem.scale))
        keys = [self._largest(x, mask) for x, mask in zip(laid.keys, laid.key_masks, strict=True)]
        values = [self._largest(x, mask) for x, mask in zip(laid.values, laid.key_masks, strict=True)]
        biases = sum(self._largest(x, closes=True) for x in laid.biases if x is not None)
        scores = problem.query_width * prod(max(1.0, x) for x in (largest, *keys)) + biases
        products = max(1, problem.tuples) * prod(max(1.0, x) for x in values)
        if gradient is not None:
            products *= max(1.0, self._largest(readable(cast(gradient, laid.query.dtype)))) * problem.value_width
            products *= max(1, problem.queries) * prod(max(1.0, x) for x in (largest, *keys))
        return max(scores, products) < _LIMITS[problem.accumulation] and isfinite(scores + products)

    def _largest(self, array: Array, mask: Array | None = None, *, closes: bool = False) -> float:
        """Return the largest magnitude among the keys that a mask leaves, infinity if there is a NaN."""
        batch, heads, length, width = array.shape
        call = _native.Call()
        call.batch, call.number = batch, NUMBERS[self.problem.dtype]
        found = self.kernels.largest(call, view(array), heads, length, width, closes, mask_view(mask))
        return inf if found != found else float(found)
