"""The exact method by the C++ kernels: checks that they apply, hands over addresses, and narrows what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
from korder_native.key_heads import KeyHead

Array = Any
_KINDS = {"full": 0, "causal": 1, "window": 2, "ordered": 3}


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

    Cost:     2 n m1..mk (d + e) flop a head forward, 2.5 times that backward, times the live share of the tuples.
    Numerics: running maximum; sums in `problem.accumulation`; weights to 1e-7 or 3e-18 relative, in bfloat16 rounded
        to it forward where the processor multiplies it and `policy.precision` is "input". Key heads whose
        operands are NaN, infinite or near overflow go to korder's generic kernel, which selects row by row; so does a
        whole call that does not fit the memory limit.
    """

    def __init__(self, plan: Plan, isa: str = "") -> None:
        assert plan.tiling is not None
        self.plan = plan
        self.problem = plan.problem
        self.kernels = _native.kernels(isa)
        self.modes = [t for t in range(self.problem.order) if t != plan.tiling.contracted] + [plan.tiling.contracted]
        self.limit = int(self.problem.spec.policy.memory_limit)

    @property
    def workspace_bytes(self) -> int:
        """Bytes beyond inputs and outputs that a call takes at most, on the threads of now; never above the limit."""
        return min(max(self.forward_bytes, self.backward_bytes), self.limit)

    @property
    def forward_bytes(self) -> int:
        """Bytes beyond inputs and outputs that the kernels take forward."""
        beside, sizes = self._beside_forward(), []
        for narrow in (True, False):  # which of them it is, operands say
            call = self._shaped_call(beside)
            call.narrow = call.narrow and narrow
            sizes.append(int(self.kernels.forward_bytes(call)))
        return max(sizes) + beside

    @property
    def backward_bytes(self) -> int:
        """Bytes beyond inputs and outputs that the kernels take backward, all gradients wanted."""
        beside = self._beside_backward()
        calls = (
            self._shaped_call(beside, stride) for stride in (0, 1)
        )  # whether heads share biases, plans do not know
        return max(int(self.kernels.backward_bytes(call)) for call in calls) + beside

    def _beside_forward(self) -> int:
        """Bytes of the output before it is narrowed, and a little for Python."""
        problem = self.problem
        rows = problem.batch * problem.heads * problem.queries
        return 4096 + (rows * problem.value_width * self._item() if problem.dtype != problem.accumulation else 0)

    def _beside_backward(self) -> int:
        """Bytes of gradients before they are narrowed, or summed over what shares a bias."""
        problem = self.problem
        rows, keys = problem.batch * problem.heads, problem.batch * problem.groups
        narrow = problem.dtype != problem.accumulation
        numbers = 0
        if narrow:
            numbers += rows * problem.queries * problem.query_width
            numbers += keys * sum(problem.lengths) * (problem.query_width + problem.value_width)
        for t, length in enumerate(problem.lengths):
            if problem.biases and problem.biases[t] is not None and (narrow or problem.biases[t] == "key"):
                numbers += rows * self._bias_rows(t) * length
        return 4096 + numbers * self._item()

    def _item(self) -> int:
        return 8 if self.problem.accumulation == "float64" else 4

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
        laid, beside, problem = self._laid(operands), self._beside_forward(), self.problem
        call = self._call(beside)
        self._set_operands(call, laid, operands)
        marks = self._marks(call, beside, backward=False)
        if marks.all():
            with quietly(operands.query):
                return ExactKernel(namespace(laid.query), self.plan).forward(operands, save=save, residuals=residuals)
        rows = (problem.batch, problem.heads, problem.queries)
        output = new(laid.query, (*rows, problem.value_width), problem.accumulation)
        lse = new(laid.query, rows, problem.accumulation)
        call.set_results(address(output), address(lse))
        self.kernels.forward(call)
        for head in KeyHead.all_marked(marks, problem):
            with quietly(operands.query):
                found = self._generic(head, laid).forward(head.operands(operands), save=True)
            head.rows(output)[...] = (found.residuals or {}).get("output", found.output)
            head.rows(lse)[...] = found.lse
        narrow = cast(output, operands.query.dtype)
        kept = {"output": output} if narrow.dtype != output.dtype else {}
        return KernelOutput(narrow, lse, residuals=kept if save else None)

    def backward(
        self, operands: Operands, saved: KernelOutput, grads: OutputGradients, *, needs: frozenset[str]
    ) -> OperandGradients:
        """Compute the gradients that `needs` names; scores are computed again from lse."""
        laid, beside = self._laid(operands), self._beside_backward()
        wide = getattr(namespace(laid.query), self.problem.accumulation)
        output = dense(cast((saved.residuals or {}).get("output", saved.output), wide))
        lse = dense(cast(saved.lse, wide))
        of_lse = None if grads.lse is None else dense(cast(grads.lse, wide))
        of_output = readable(cast(grads.output, operands.query.dtype))
        found = self._new_gradients(laid, needs)
        call = self._call(beside)
        self._set_operands(call, laid, operands)
        call.set_results(address(output), address(lse))
        call.set_gradients(
            view(of_output),
            address(of_lse),
            address(found.query),
            *([address(x) for x in arrays] for arrays in (found.keys, found.values)),
            [None if x is None else view(x) for x in found.biases],
        )
        marks = self._marks(call, beside, backward=True)
        if marks.all():
            with quietly(operands.query):
                return ExactKernel(namespace(laid.query), self.plan).backward(operands, saved, grads, needs=needs)
        self.kernels.backward(call)
        for head in KeyHead.all_marked(marks, self.problem):
            with quietly(operands.query):
                generic = self._generic(head, laid)
                own = generic.backward(head.operands(operands), head.saved(saved), head.gradients(grads), needs=needs)
                self._add(found, own, head)
        return self._handed_back(found, operands)

    def _marks(self, call: Any, beside: int, *, backward: bool) -> Array:
        """Return the heads that the kernels leave alone, (batch, key head): all of them if memory is too short.

        Forward, scores that are too steep for the way back to find them again keep a call from products of bfloat16.
        """
        marks = np.zeros((self.problem.batch, self.problem.groups), np.uint8)
        wild, steep = self.kernels.find_wild(call, backward, marks.ctypes.data)
        call.narrow = call.narrow and not steep
        needed = (self.kernels.backward_bytes if backward else self.kernels.forward_bytes)(call)
        if needed + beside > self.limit:
            return np.ones_like(marks)
        if wild:
            call.skip(marks.ctypes.data)
        return marks

    def _generic(self, head: KeyHead, laid: Laid) -> ExactKernel:
        return ExactKernel(namespace(laid.query), head.plan(self.plan))

    def _add(self, found: OperandGradients, own: OperandGradients, head: KeyHead) -> None:
        """Add what the generic kernel found of one head, whose modes are in the user's order."""
        wide = getattr(namespace(own.query), self.problem.accumulation)

        def add(to: Array | None, part: Array | None) -> None:
            if to is not None and part is not None:
                to[:, : part.shape[1]] += cast(part, wide)

        def of(array: Array | None, part: Any) -> Array | None:
            return None if array is None else part(array)

        add(of(found.query, head.rows), own.query)
        for place, t in enumerate(self.modes):
            add(of(found.keys[place], head.keys), own.keys[t])
            add(of(found.values[place], head.keys), own.values[t])
            add(of(found.biases[place], head.rows), own.biases[t] if own.biases else None)

    def _new_gradients(self, laid: Laid, needs: frozenset[str]) -> OperandGradients:
        """Return zeros for the gradients that are wanted, the contracted mode last, biases of keys for every head."""
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
                zeros("biases" in needs and bias is not None, *self._bias_heads(bias, t), self._bias_rows(t), m)
                for t, m, bias in zip(self.modes, lengths, laid.biases, strict=True)
            ),
        )

    def _bias_heads(self, bias: Array, t: int) -> tuple[int, ...]:
        """Batches and heads of a bias's gradient: its own where queries differ, else all, to be summed later."""
        own = bias is not None and self._by_row(t)
        return tuple(bias.shape[:2]) if own else (self.problem.batch, self.problem.heads)

    def _by_row(self, t: int) -> bool:
        return bool(self.problem.biases) and self.problem.biases[t] == "full"

    def _bias_rows(self, t: int) -> int:
        return self.problem.queries if self._by_row(t) else 1

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

    def _laid(self, operands: Operands) -> Laid:
        none = (None,) * self.problem.order
        masks, biases = operands.key_masks or none, operands.biases or none

        def ordered(arrays: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
            return tuple(None if arrays[t] is None else readable(arrays[t]) for t in self.modes)

        return Laid(
            readable(operands.query), ordered(operands.keys), ordered(operands.values), ordered(masks), ordered(biases)
        )

    def _call(self, beside: int) -> Any:
        """Return the numbers of a call that takes some bytes beside the kernels' own."""
        problem, mask = self.problem, self.problem.spec.mask
        call = _native.Call()
        call.order, call.before = problem.order, self.modes[-1]
        call.kind, call.number = _KINDS[mask.kind], NUMBERS[problem.dtype]
        call.wide = problem.accumulation == "float64"
        call.narrow = problem.dtype == "bfloat16" and problem.spec.policy.precision == "input"
        call.threads, call.memory = thread_count(), max(self.limit - beside, 0)
        call.batch, call.heads, call.groups = problem.batch, problem.heads, problem.groups
        call.queries, call.width, call.value_width = problem.queries, problem.query_width, problem.value_width
        call.scale = float(problem.scale)
        sizes = getattr(mask, "sizes", (0,) * problem.order)
        for place, t in enumerate(self.modes):
            call.set_mode(place, problem.lengths[t], sizes[t], self._by_row(t))
        return call

    def _set_operands(self, call: Any, laid: Laid, operands: Operands) -> None:
        offsets = operands.key_offsets or (0,) * self.problem.order
        call.set_operands(
            view(laid.query),
            [view(x) for x in laid.keys],
            [view(x) for x in laid.values],
            [mask_view(x) for x in laid.key_masks],
            [None if x is None else view(x) for x in laid.biases],
            operands.query_offset,
            [offsets[t] for t in self.modes],
        )

    def _shaped_call(self, beside: int, stride: int = 0) -> Any:
        """Return a call with everything that the problem has, at no address, to ask what it would take."""
        problem, call = self.problem, self._call(beside)
        somewhere = (1, stride, stride, stride, stride)
        masks, biases = problem.key_masks or (False,) * problem.order, problem.biases or (None,) * problem.order
        every = [somewhere] * problem.order
        given = [[somewhere if x[t] else None for t in self.modes] for x in (masks, biases)]
        call.set_operands(somewhere, every, every, *given, 0, [0] * problem.order)
        call.set_gradients(somewhere, None, 1, [1] * problem.order, [1] * problem.order, given[1])
        return call
