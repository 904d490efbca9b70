"""Gradients of ordered tuples: positions are walked backwards, iterated sums come from those kept at a few of them.

With g(i) the gradient of M_k(i), which row i reads, those of M_t(i) and E_t(i) are

    L_k(i) = L_k(i + 1) + g(i),    L_t(i) = L_t(i + 1) + L_{t+1}(i + 1) * E_{t+1}(i + 1)
    dE_t(i) = L_t(i) * M_{t-1}(i - 1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from korder.methods.factors import Plane
from korder.methods.feature_gradients import GradientStore, RowGradients
from korder.methods.ordered import OrderedRows, OrderedSums, passed, position_blocks
from korder.methods.running import Pace, runs
from korder.methods.running_gradients import KeyReads, RowsBack, cut_part, unseen_part
from korder.spi.operands import Operands

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any


def ordered_plane_backward(
    kernel: PolynomialKernel,
    operands: Operands,
    plane: Plane,
    statistics: tuple[Array, Array, Array],
    rows: RowGradients,
    store: GradientStore,
) -> None:
    """Add a plane's gradients to the store.

    Cost:  forward's sums are made about 1 + log2(blocks) / 2 times, and as many states kept as blocks can be halved.
    """
    centre, scales, _ = statistics
    pace = Pace.of(kernel, operands, scales)
    blocks = list(position_blocks(kernel, operands))
    points = _Points(kernel, plane, pace, blocks)
    flows = [state for state, _ in points.before(0).states]
    for number in reversed(range(len(blocks))):
        start, stop = blocks[number]
        block = OrderedRows(kernel, plane, pace, points.before(number), (start, stop))
        reader = None
        if start >= 0:
            reader = RowsBack(kernel, plane, pace, (start, stop), block.counts(), centre, rows)
        reads = [KeyReads(kernel, part) for part in block.streams]
        new = [_read_run(block, reader, reads, flows, run) for run in runs(kernel, stop - start)]
        flows = [kernel.xp.concat(list(parts), axis=0) for parts in zip(*new, strict=True)]
        if reader is not None:
            reader.store_queries(store)
        for t, (low, high) in enumerate(block.places):
            read, length = reads.pop(0), plane.keys[t].length
            first, last = min(max(low, 0), length), min(max(high, 0), length)
            if first < last:
                part = read.part(plane, t, pace, (low, high))
                store.add_keys(plane, t, first, cut_part(part, first - low, last - low))
            del read
        del block, reader, new  # before the next block is built
    for t, (shift, key) in enumerate(zip(pace.shifts, plane.keys, strict=True)):
        end = min(max(kernel.problem.queries + shift, 0), key.length)
        if end < key.length:
            store.add_keys(plane, t, end, unseen_part(kernel, plane, t, (end, key.length)))


def _read_run(
    block: OrderedRows, reader: RowsBack | None, reads: list[KeyReads], flows: list[Array], run: tuple[int, int, int]
) -> list[Array]:
    """Handle one run of features; return its flows, L_t at the block's first position and R_t there for t < k."""
    kernel, xp = block.kernel, block.kernel.xp
    _, start, stop = run
    states, _ = block.states(start, stop)
    last = len(states) - 1
    terms = xp.zeros_like(states[-1]) if reader is None else reader.read(run, states[-1])
    new: list[Array] = []
    flow = None
    for t in range(last, -1, -1):
        carry = xp.astype(flows[t][start:stop, :], kernel.dtype)
        if flow is not None:
            terms = flow * block.chosen(t + 1, kernel.running_terms(block.streams[t + 1].run(start, stop)))
        flow, total = kernel.reverse_running(terms, carry)
        new.insert(0, flows[t][start:stop, :] + xp.astype(total, xp.float64))
        if t < last:  # a key is followed by later positions only
            flow = xp.concat([flow[1:, ...], carry[None, :, :]], axis=0)
        if t == 0:
            reads[0].add(start, stop, flow)
            continue
        shifted = xp.concat([block.carry(t - 1, start, stop)[None, :, :], states[t - 1][:-1, ...]], axis=0)
        reads[t].add(start, stop, block.chosen(t, flow * shifted))
    return new


class _Points:
    """The iterated sums before any block, asked for from the last block to the first.

    Kept before a few blocks, whose distances halve towards the one that was asked for last; those before the others
    are made again from the nearest.
    """

    def __init__(self, kernel: PolynomialKernel, plane: Plane, pace: Pace, blocks: list[tuple[int, int]]) -> None:
        self._kernel, self._plane, self._pace, self._blocks = kernel, plane, pace, blocks
        self._kept = [(0, OrderedSums.none(kernel, plane))]

    def before(self, number: int) -> OrderedSums:
        """Return the sums before a block."""
        while self._kept[-1][0] > number:
            self._kept.pop()
        place, sums = self._kept[-1]
        while place < number:
            middle = (place + number + 1) // 2
            for passing in self._blocks[place:middle]:
                sums = passed(OrderedRows(self._kernel, self._plane, self._pace, sums, passing))
            place = middle
            self._kept.append((place, sums))
        return sums
