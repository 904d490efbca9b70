"""Gradients where rows see some of the keys: what their blocks share, and the causal form.

Under a causal mask rows are walked backwards, states shrink by subtraction, their gradients grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from korder.methods.block_passes import FeatureBlock
from korder.methods.factors import Plane
from korder.methods.feature_gradients import GradientStore, KeyPart, RowGradients, split_reading
from korder.methods.readings import centred_coefficients, prod_arrays
from korder.methods.running import Pace, ProductRows, Seen, Stream, keys_block, runs
from korder.spi.operands import Operands

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any
KeyGradients = tuple[Array, Array]
"""The gradients of a block of keys' scaled columns (w, c), and their readings (c, e + 1) float64."""
Running = Callable[[Array, Array], tuple[Array, Array]]
"""(terms (c, rho, e + 1), carry) -> (running sums and carry, the sum of all)."""


def causal_plane_backward(
    kernel: PolynomialKernel,
    operands: Operands,
    plane: Plane,
    statistics: tuple[Array, Array, Array],
    rows: RowGradients,
    store: GradientStore,
) -> None:
    """Add a plane's gradients to the store.

    Numerics:  the state before a block is the one after it less the block's own sum, both float64.
    """
    xp, scales = kernel.xp, statistics[1]
    pace = kernel.pace(operands, scales)
    walk = kernel.way_back(plane, pace, statistics, rows)
    for start, stop in reversed(list(walk.blocks())):
        of_queries, of_keys = walk.block(start, stop)
        for head, query, gradient in zip(plane.heads, plane.queries, of_queries, strict=True):
            raw = query.operand_columns(xp, start, stop)
            store.add_query(plane, head, start, raw, kernel.normalise_columns(gradient, scales[0, ...]))
        for t, shift in enumerate(pace.shifts):
            _store_keys(kernel, plane, t, pace, (start + shift, stop + shift), of_keys.pop(0), store)
    for t, flow in enumerate(walk.flows()):
        _store_early_keys(kernel, plane, t, pace, flow, store)
        _store_unseen(kernel, plane, t, pace, store)


class CausalWalk:
    """The rows of a plane in blocks, the last one first: states shrink, and their gradients, the flows, grow."""

    def __init__(
        self,
        kernel: PolynomialKernel,
        plane: Plane,
        pace: Pace,
        statistics: tuple[Array, Array, Array],
        rows: RowGradients,
    ) -> None:
        order, states = kernel.problem.order, statistics[2]
        self._kernel, self._plane, self._pace = kernel, plane, pace
        self._centre, self._rows = statistics[0], rows
        self._carries = [states[t, ...] for t in range(order)]
        self._flows = [kernel.xp.zeros_like(states[t, ...]) for t in range(order)]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield the blocks of rows, the first one first."""
        return self._kernel.blocks(self._kernel.problem.queries)

    def block(self, start: int, stop: int) -> tuple[list[Array], list[KeyGradients]]:
        """Return the gradients of the heads' columns (w, c), and for each mode those of the keys of these rows."""
        kernel, pace = self._kernel, self._pace
        places = [(start + shift, stop + shift) for shift in pace.shifts]
        streams = [keys_block(kernel, self._plane, t, pace, *place) for t, place in enumerate(places)]
        seen = [_before(kernel, carry, part) for carry, part in zip(self._carries, streams, strict=True)]
        self._carries = [part.state for part in seen]
        counts = ProductRows(kernel, seen).counts()
        block = RowsBack(kernel, self._plane, pace, (start, stop), counts, self._centre, self._rows)
        reads = [KeyReads(kernel, part) for part in streams]
        self._flows = read_runs(block, seen, reads, self._flows, kernel.reverse_running, queries=True)
        return block.gradients(), [reads.pop(0).gradients() for _ in places]

    def flows(self) -> list[Array]:
        """Return what the rows so far add to the gradients of the states, (r, e + 1) for each mode."""
        return self._flows


def _before(kernel: PolynomialKernel, carry: Array, part: Stream) -> Seen:
    state = carry - kernel.product(part.features, part.weighted)
    return Seen(state, state[:, -1:], part)


def read_runs(
    block: RowsBack, seen: list[Seen], reads: list[KeyReads], flows: list[Array], running: Running, *, queries: bool
) -> list[Array]:
    """Go through the runs of features; return the flows (gradients of the states) with the block's rows added.

    Args:
        block: The rows.
        seen: What they see of each mode.
        reads: For each mode the keys that the block settles; takes their gradients.
        flows: (r, e + 1) float64, the rows before this block, in the order of the walk.
        running: `reverse_running` where rows are walked backwards and `running_sums` where forwards.
        queries: Whether the gradients of the queries are wanted.
    """
    new = [
        _read_run(block, seen, reads, flows, running, run, queries=queries) for run in runs(block.kernel, block.tokens)
    ]
    return [block.kernel.xp.concat(list(parts), axis=0) for parts in zip(*new, strict=True)]


def _read_run(
    block: RowsBack,
    seen: list[Seen],
    reads: list[KeyReads],
    flows: list[Array],
    running: Running,
    run: tuple[int, int, int],
    *,
    queries: bool,
) -> list[Array]:
    """Handle one run of features; return its flows (rho, e + 1) with the block's rows added."""
    kernel, xp = block.kernel, block.kernel.xp
    _, start, stop = run
    states = [part.states(kernel, start, stop) for part in seen]
    gradient = block.read(run, prod_arrays(states) if queries else None)
    new = []
    for t, (flow, read) in enumerate(zip(flows, reads, strict=True)):
        terms = prod_arrays([gradient, *(state for u, state in enumerate(states) if u != t)])
        each, total = running(terms, xp.astype(flow[start:stop, :], kernel.dtype))
        read.add(start, stop, each)
        new.append(flow[start:stop, :] + xp.astype(total, xp.float64))
    return new


class RowsBack:
    """A block of rows on the way back: its query features, and the gradients of its readings and of these features."""

    def __init__(
        self,
        kernel: PolynomialKernel,
        plane: Plane,
        pace: Pace,
        block: tuple[int, int],
        counts: Array,
        centre: Array,
        rows: RowGradients,
    ) -> None:
        xp = kernel.xp
        self.kernel, self.plane, self.pace = kernel, plane, pace
        self.start, self.tokens = block[0], block[1] - block[0]
        self.raws = [query.operand_columns(xp, *block) for query in plane.queries]
        self.columns = [
            kernel.normalise_columns(query.projection.apply(xp, raw), pace.scales[0, ...])
            for query, raw in zip(plane.queries, self.raws, strict=True)
        ]
        self.features = [kernel.features(columns) for columns in self.columns]
        self._gradients = [rows.block(plane.batch, head, *block) / counts[:, None] for head in plane.heads]
        values = kernel.polynomial.values
        self._shares = [
            centred_coefficients(values, -centre[plane.batch, head, block[0] : block[1]]) for head in plane.heads
        ]
        self._found: list[list[Array]] = [[] for _ in plane.heads]

    def read(self, run: tuple[int, int, int], product: Array | None) -> Array:
        """Return the gradient (c, rho, e + 1) of the products of states; given these, note that of the features."""
        s, start, stop = run
        kernel, xp = self.kernel, self.kernel.xp
        offset = kernel.table.offsets[s]
        weights = self.pace.weights[s][start - offset : stop - offset, :1]
        total = None
        for found, features, gradient, shares in zip(
            self._found, self.features, self._gradients, self._shares, strict=True
        ):
            weighted = xp.astype(shares[s][:, None] * gradient * self.pace.factors[s], kernel.dtype)
            if product is not None:
                found.append(kernel.running_dot(product, weighted) * weights)
            part = kernel.running_terms((features[start:stop, :] * weights, weighted))
            total = part if total is None else total + part
        return total

    def gradients(self) -> list[Array]:
        """Return the gradients of the heads' scaled columns (w, c)."""
        kernel = self.kernel
        return [
            kernel.adjoint(columns, features, kernel.xp.concat(parts, axis=0))
            for columns, features, parts in zip(self.columns, self.features, self._found, strict=True)
        ]

    def store_queries(self, store: GradientStore) -> None:
        """Hand over the gradients of the queries."""
        for head, raw, gradient in zip(self.plane.heads, self.raws, self.gradients(), strict=True):
            scaled = self.kernel.normalise_columns(gradient, self.pace.scales[0, ...])
            store.add_query(self.plane, head, self.start, raw, scaled)


class KeyReads:
    """The gradients of a block of keys, run by run, read off those of the states that the keys were added to."""

    def __init__(self, kernel: PolynomialKernel, part: Stream) -> None:
        self.kernel, self.stream = kernel, part
        self._found: list[Array] = []
        self._read: Array | None = None

    def add(self, start: int, stop: int, flow: Array) -> None:
        """Note what a run's flow (c, rho, e + 1), one for each key, says."""
        features, weighted = self.stream.run(start, stop)
        self._found.append(self.kernel.running_dot(flow, weighted))
        read = self.kernel.running_read(features, flow)
        self._read = read if self._read is None else self._read + read

    def gradients(self) -> KeyGradients:
        """Return the gradients of the scaled columns (w, c), and the readings (c, e + 1)."""
        gradient = self.kernel.xp.concat(self._found, axis=0)
        assert self._read is not None
        return self.kernel.adjoint(self.stream.columns, self.stream.features, gradient), self._read

    def part(self, plane: Plane, mode: int, pace: Pace, tokens: tuple[int, int]) -> KeyPart:
        """Return the gradients of the keys at `tokens`."""
        return key_part(self.kernel, plane, mode, pace, tokens, self.gradients())


def key_part(
    kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, tokens: tuple[int, int], found: KeyGradients
) -> KeyPart:
    """Return the gradients of keys, given those of their scaled columns and their readings."""
    xp = kernel.xp
    gradient = kernel.normalise_columns(found[0], pace.scales[mode + 1, ...])
    raw = plane.keys[mode].operand_columns(xp, *tokens)
    return raw, gradient, *split_reading(xp, plane, mode, tokens, found[1] * pace.shrinks[mode])


def cut_part(part: KeyPart, low: int, high: int) -> KeyPart:
    """Return keys low..high of a part."""
    raw, columns, values, weights = part
    return raw[:, low:high], columns[:, low:high], values[low:high, :], weights[low:high]


def _store_keys(
    kernel: PolynomialKernel,
    plane: Plane,
    mode: int,
    pace: Pace,
    place: tuple[int, int],
    found: KeyGradients,
    store: GradientStore,
) -> None:
    """Hand over the gradients of the keys that a block brought into sight, those inside the array."""
    low, high = max(place[0], 0) - place[0], min(place[1], plane.keys[mode].length) - place[0]
    if low < high:
        part = key_part(kernel, plane, mode, pace, place, found)
        store.add_keys(plane, mode, place[0] + low, cut_part(part, low, high))


def _store_early_keys(
    kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, flow: Array, store: GradientStore
) -> None:
    """Hand over the gradients of the keys before the first row's own, which every row sees."""
    end = min(max(pace.shifts[mode], 0), plane.keys[mode].length)
    narrow = kernel.xp.astype(flow, kernel.dtype)
    for start, stop in kernel.blocks(end):
        store.add_keys(plane, mode, start, shared_part(kernel, plane, mode, pace, (start, stop), narrow))


def shared_part(
    kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, tokens: tuple[int, int], flow: Array
) -> KeyPart:
    """Return the gradients of keys that share one flow (r, e + 1), in the compute dtype."""
    block = FeatureBlock(kernel, kernel.scaled(plane.keys[mode], pace.scales[mode + 1, ...], *tokens))
    weighted = plane.values_and_weights(kernel.xp, mode, *tokens) * pace.shrinks[mode]
    table = kernel.laid_out([flow[kernel.table.rows(s), :] for s in range(kernel.table.degree + 1)])
    found = kernel.columns_gradient(block, table, weighted), kernel.read_sums(block, table)
    return key_part(kernel, plane, mode, pace, tokens, found)


def _store_unseen(kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, store: GradientStore) -> None:
    """Hand over zeros for the keys after the last row, which nobody sees."""
    length = plane.keys[mode].length
    start = min(max(kernel.problem.queries + pace.shifts[mode], 0), length)
    if start < length:
        store.add_keys(plane, mode, start, unseen_part(kernel, plane, mode, (start, length)))


def unseen_part(kernel: PolynomialKernel, plane: Plane, mode: int, tokens: tuple[int, int]) -> KeyPart:
    """Return the gradients of keys that no row sees: zeros."""
    xp, key = kernel.xp, plane.keys[mode]
    raw = key.operand_columns(xp, *tokens)
    values = xp.zeros_like(plane.live_values(xp, mode, *tokens))
    return raw, xp.zeros_like(key.projection.apply(xp, raw)), values, xp.zeros_like(key.token_weights(xp, *tokens))
