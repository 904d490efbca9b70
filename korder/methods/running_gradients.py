"""Gradients of the causal form: rows are walked backwards, states shrink by subtraction, their gradients grow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from korder.methods.factors import Plane
from korder.methods.feature_gradients import GradientStore, KeyPart, RowGradients, split_reading
from korder.methods.readings import centred_coefficients, prod_arrays
from korder.methods.running import Pace, Stream, block_counts, keys_block, runs, stream
from korder.spi.operands import Operands

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any


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
    xp, order = kernel.xp, kernel.problem.order
    centre, scales, states = statistics
    pace = Pace.of(kernel, operands, scales)
    carries = [(states[t, ...], states[t, :, -1:]) for t in range(order)]
    flows = [xp.zeros_like(states[t, ...]) for t in range(order)]
    for start, stop in reversed(list(kernel.blocks(kernel.problem.queries))):
        streams = [stream(kernel, plane, t, pace, start, stop) for t in range(order)]
        carries = [_before(kernel, carry, part) for carry, part in zip(carries, streams, strict=True)]
        block = _Block(kernel, plane, pace, streams, carries, start, stop)
        flows = block.walk(centre, rows, flows)
        block.store_queries(store)
        for t in range(order):
            block.store_keys(store, t)
        del block, streams  # before the next block is built
    for t in range(order):
        _store_early_keys(kernel, plane, t, pace, flows[t], store)
        _store_unseen(kernel, plane, t, pace, store)


def _before(kernel: PolynomialKernel, carry: tuple[Array, Array], part: Stream) -> tuple[Array, Array]:
    state = carry[0] - kernel.product(part.features, part.weighted)
    return state, state[:, -1:]


class _Block:
    """One block of rows on the way back."""

    def __init__(
        self,
        kernel: PolynomialKernel,
        plane: Plane,
        pace: Pace,
        streams: list[Stream],
        carries: list[tuple[Array, Array]],
        start: int,
        stop: int,
    ) -> None:
        xp = kernel.xp
        self.kernel, self.plane, self.pace, self.streams, self.carries = kernel, plane, pace, streams, carries
        self.start, self.stop = start, stop
        self.raws = [query.operand_columns(xp, start, stop) for query in plane.queries]
        self.columns = [
            kernel.normalise_columns(query.projection.apply(xp, raw), pace.scales[0, ...])
            for query, raw in zip(plane.queries, self.raws, strict=True)
        ]
        self.features = [kernel.features(columns) for columns in self.columns]
        self._query_gradients: list[list[Array]] = [[] for _ in plane.heads]
        self._key_gradients: list[list[Array]] = [[] for _ in streams]
        self._reads: list[Array | None] = [None] * len(streams)

    def walk(self, centre: Array, rows: RowGradients, flows: list[Array]) -> list[Array]:
        """Go through the runs of features; return the flows (gradients of the states) before this block."""
        kernel, xp = self.kernel, self.kernel.xp
        counts = block_counts(kernel, self.streams, self.carries)
        gradients, shares = [], []
        for head in self.plane.heads:
            block = rows.block(self.plane.batch, head, self.start, self.stop) / counts[:, None]
            gradients.append(block)
            values = kernel.polynomial.values
            shares.append(centred_coefficients(values, -centre[self.plane.batch, head, self.start : self.stop]))
        new: list[list[Array]] = [[] for _ in flows]
        for s, start, stop in runs(kernel, self.stop - self.start):
            weighted = [
                xp.astype(share[s][:, None] * gradient * self.pace.factors[s], kernel.dtype)
                for share, gradient in zip(shares, gradients, strict=True)
            ]
            begun = self._run(s, start, stop, weighted, [flow[start:stop, :] for flow in flows])
            for store, part in zip(new, begun, strict=True):
                store.append(part)
        return [xp.concat(store, axis=0) for store in new]

    def _run(self, s: int, start: int, stop: int, weighted: list[Array], flows: list[Array]) -> list[Array]:
        """Handle one run of features; return its flows before the block (rho, e + 1)."""
        kernel, xp = self.kernel, self.kernel.xp
        offset = kernel.table.offsets[s]
        weights = self.pace.weights[s][start - offset : stop - offset, :1]
        states = [
            kernel.running_state(
                part.features[start:stop, :], part.weighted, xp.astype(carry[start:stop, :], kernel.dtype)
            )
            for part, (carry, _) in zip(self.streams, self.carries, strict=True)
        ]
        product = prod_arrays(states)
        product_gradient = None
        for found, features, gradient in zip(self._query_gradients, self.features, weighted, strict=True):
            query = features[start:stop, :] * weights
            found.append(kernel.running_dot(product, gradient) * weights)
            part = xp.permute_dims(query, (1, 0))[:, :, None] * gradient[:, None, :]
            product_gradient = part if product_gradient is None else product_gradient + part
        begun = []
        for t, (part, flow) in enumerate(zip(self.streams, flows, strict=True)):
            others = [state for u, state in enumerate(states) if u != t]
            terms = prod_arrays([product_gradient, *others])
            arriving, total = kernel.reverse_running(terms, xp.astype(flow, kernel.dtype))
            self._key_gradients[t].append(kernel.running_dot(arriving, part.weighted))
            read = kernel.running_read(part.features[start:stop, :], arriving)
            self._reads[t] = read if self._reads[t] is None else self._reads[t] + read
            begun.append(flow + xp.astype(total, xp.float64))
        return begun

    def store_queries(self, store: GradientStore) -> None:
        """Hand over the gradients of the queries."""
        kernel, scale = self.kernel, self.pace.scales[0, ...]
        for head, raw, columns, features, parts in zip(
            self.plane.heads, self.raws, self.columns, self.features, self._query_gradients, strict=True
        ):
            gradient = kernel.adjoint(columns, features, kernel.xp.concat(parts, axis=0))
            store.add_query(self.plane, head, self.start, raw, kernel.normalise_columns(gradient, scale))

    def store_keys(self, store: GradientStore, mode: int) -> None:
        """Hand over the gradients of the keys that this block brought into sight, those inside the array."""
        kernel, pace = self.kernel, self.pace
        first, last = self.start + pace.shifts[mode], self.stop + pace.shifts[mode]
        low, high = max(first, 0) - first, min(last, self.plane.keys[mode].length) - first
        if low >= high:
            return
        gradient = kernel.xp.concat(self._key_gradients[mode], axis=0)
        part = _key_part(kernel, self.plane, mode, pace, (first, last), self.streams[mode], gradient, self._reads[mode])
        raw, columns, values, weights = part
        store.add_keys(
            self.plane,
            mode,
            first + low,
            (raw[:, low:high], columns[:, low:high], values[low:high, :], weights[low:high]),
        )


def _key_part(
    kernel: PolynomialKernel,
    plane: Plane,
    mode: int,
    pace: Pace,
    tokens: tuple[int, int],
    part: Stream,
    features_gradient: Array,
    read: Array,
) -> KeyPart:
    xp = kernel.xp
    gradient = kernel.adjoint(part.columns, part.features, features_gradient)
    gradient = kernel.normalise_columns(gradient, pace.scales[mode + 1, ...])
    raw = plane.keys[mode].operand_columns(xp, *tokens)
    return raw, gradient, *split_reading(xp, plane, mode, tokens, read * pace.shrinks[mode])


def _store_early_keys(
    kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, flow: Array, store: GradientStore
) -> None:
    """Hand over the gradients of the keys before the first row's own, which every row sees."""
    xp = kernel.xp
    end = min(max(pace.shifts[mode], 0), plane.keys[mode].length)
    narrow = xp.astype(flow, kernel.dtype)
    for start, stop in kernel.blocks(end):
        part = keys_block(kernel, plane, mode, pace, start, stop)
        gradient = xp.matmul(narrow, xp.permute_dims(part.weighted, (1, 0)))
        read = kernel.product(xp.permute_dims(part.features, (1, 0)), narrow)
        store.add_keys(plane, mode, start, _key_part(kernel, plane, mode, pace, (start, stop), part, gradient, read))


def _store_unseen(kernel: PolynomialKernel, plane: Plane, mode: int, pace: Pace, store: GradientStore) -> None:
    """Hand over zeros for the keys after the last row, which nobody sees."""
    xp, key = kernel.xp, plane.keys[mode]
    start = min(max(kernel.problem.queries + pace.shifts[mode], 0), key.length)
    if start == key.length:
        return
    raw = key.operand_columns(xp, start, key.length)
    gradient = xp.zeros_like(key.projection.apply(xp, raw))
    values = xp.zeros_like(plane.live_values(xp, mode, start, key.length))
    store.add_keys(plane, mode, start, (raw, gradient, values, xp.zeros_like(key.token_weights(xp, start, key.length))))
