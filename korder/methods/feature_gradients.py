"""Gradients of the polynomial method: those of the function that forward computed, its statistics held constant."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING, Any

from korder.methods.factors import Factor, Plane, planes
from korder.methods.readings import centred_coefficients, nonzero, prod_arrays
from korder.methods.sight import live_rows
from korder.problem import Problem
from korder.spi.operands import KernelOutput, OperandGradients, Operands, OutputGradients

if TYPE_CHECKING:
    from korder.methods.polynomial import PolynomialKernel

Array = Any
Blocks = dict[tuple[int, int], dict[int, Array]]
"""Per (batch, head): blocks of rows by their first row."""
KeyPart = tuple[Array, Array, Array, Array]
"""Columns of a key operand (d_t, c), and gradients: factor's columns (w, c), values (c, e), weights (c,)."""
KEY_SIDE = frozenset({"keys", "values", "biases", "weight"})


class GradientStore:
    """Collects the gradients of all planes, block by block, and puts them into the operands' layout."""

    def __init__(self, xp: Any, problem: Problem, operands: Operands) -> None:
        self.xp = xp
        self.problem = problem
        self.operands = operands
        order = problem.order
        self._query: Blocks = {}
        self._keys: list[Blocks] = [{} for _ in range(order)]
        self._values: list[Blocks] = [{} for _ in range(order)]
        self._biases: list[Blocks] = [{} for _ in range(order)]
        self._weight: list[Array | None] = [None] * (order + 1)

    def add_query(self, plane: Plane, head: int, start: int, raw: Array, gradient: Array) -> None:
        """Add the gradient (w, c) of a query factor's columns from row `start` on; `raw` are the operand's columns."""
        query = plane.queries[plane.heads.index(head)]
        self._add_weight(0, query, raw, gradient)
        rows = self.xp.permute_dims(query.projection.adjoint(self.xp, gradient), (1, 0))
        self._put(self._query, (plane.batch, head), start, rows, self.operands.query.dtype)

    def add_keys(self, plane: Plane, mode: int, start: int, part: KeyPart) -> None:
        """Add the gradients of keys from `start` on; every key of the array comes in exactly one block of its plane."""
        xp, key = self.xp, plane.keys[mode]
        raw, gradient, values, weights = part
        self._add_weight(mode + 1, key, raw, gradient)
        stop = start + raw.shape[1]
        rows = xp.permute_dims(key.projection.adjoint(xp, gradient), (1, 0))
        biases = (weights * key.token_weights(xp, start, stop))[:, None]
        if key.live is not None:
            live = key.live[start:stop, None]
            rows, values, biases = (xp.where(live, x, xp.zeros_like(x)) for x in (rows, values, biases))
        place, dtype = (plane.batch, plane.group), self.operands.keys[mode].dtype
        self._put(self._keys[mode], place, start, rows, dtype)
        self._put(self._values[mode], place, start, values, dtype)
        self._put(self._biases[mode], (plane.batch, plane.heads[0]), start, biases, xp.float64)

    def _put(self, store: Blocks, place: tuple[int, int], start: int, rows: Array, dtype: Any) -> None:
        """Keep a block; blocks of planes that share their keys meet at the same start and are added."""
        blocks = store.setdefault(place, {})
        known = blocks.get(start)
        blocks[start] = self.xp.astype(rows if known is None else known + rows, dtype)

    def _add_weight(self, position: int, factor: Factor, raw: Array, gradient: Array) -> None:
        if factor.projection.matrix is None:
            return
        xp = self.xp
        part = xp.matmul(xp.astype(raw, xp.float64), xp.permute_dims(xp.astype(gradient, xp.float64), (1, 0)))
        known = self._weight[position]
        self._weight[position] = part if known is None else known + part

    def gradients(self, needs: frozenset[str]) -> OperandGradients:
        """Return what was collected, in the operands' dtype and layout; None where it was not asked for."""
        order, operands = self.problem.order, self.operands
        nothing: tuple[Array | None, ...] = (None,) * order
        return OperandGradients(
            query=self._laid_out(self._query, operands.query) if "query" in needs else None,
            keys=self._modes(self._keys, operands.keys) if "keys" in needs else nothing,
            values=self._modes(self._values, operands.values) if "values" in needs else nothing,
            biases=tuple(self._bias(t) for t in range(order)) if "biases" in needs else nothing,
            weight=self._weights() if "weight" in needs else None,
        )

    def _modes(self, stores: list[Blocks], like: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(self._laid_out(store, array) for store, array in zip(stores, like, strict=True))

    def _laid_out(self, store: Blocks, like: Array) -> Array:
        batch, heads = like.shape[:2]
        blocks = self._in_order(store, [(b, h) for b in range(batch) for h in range(heads)])
        return self.xp.reshape(self.xp.concat(blocks, axis=0), like.shape) if blocks else self.xp.zeros_like(like)

    def _in_order(self, store: Blocks, places: list[tuple[int, int]]) -> list[Array]:
        return [store[place][start] for place in places if place in store for start in sorted(store[place])]

    def _bias(self, mode: int) -> Array | None:
        xp = self.xp
        bias = self.operands.biases[mode] if self.operands.biases else None
        store = self._biases[mode]
        if bias is None or not store:
            return None if bias is None else xp.zeros_like(bias)
        gradient = xp.concat(self._in_order(store, sorted(store)), axis=0)
        gradient = xp.reshape(gradient, (self.problem.batch, -1, bias.shape[3]))
        for axis in (0, 1):
            if bias.shape[axis] == 1:
                gradient = xp.sum(gradient, axis=axis, keepdims=True)
        return xp.astype(gradient[:, :, None, :], bias.dtype)

    def _weights(self) -> Array | tuple[Array, ...] | None:
        weight, xp = self.operands.weight, self.xp
        if weight is None:
            return None
        likes = weight if isinstance(weight, tuple) else (weight,)
        found = []
        for like, part in zip(likes, self._weight, strict=False):
            found.append(xp.zeros_like(like) if part is None else xp.astype(xp.reshape(part, like.shape), like.dtype))
        return tuple(found) if isinstance(weight, tuple) else found[0]


class RowGradients:
    """The gradient of every row's unnormalised sums, divided by the row's sum of weights."""

    def __init__(
        self, kernel: PolynomialKernel, operands: Operands, saved: KernelOutput, grads: OutputGradients
    ) -> None:
        xp = kernel.xp
        assert saved.residuals is not None
        self.xp, self.saved, self.grads = xp, saved, grads
        self.live, log_weights = live_rows(xp, kernel.problem, operands, saved.residuals["maxima"])
        assert saved.normaliser is not None
        mean = saved.normaliser / xp.exp(xp.where(self.live, log_weights, xp.zeros_like(log_weights)))
        self.mean = xp.where(self.live, mean, xp.ones_like(mean))
        self.turned = False

    def turned_round(self) -> RowGradients:
        """Return the same rows with the last one first."""
        other = copy(self)
        other.turned = not self.turned
        return other

    def block(self, batch: int, head: int, start: int, stop: int) -> Array:
        """Return [G, g_lse - sum_c G out] / mean polynomial (stop - start, e + 1), float64; 0 in dead rows."""
        xp = self.xp
        if self.turned:
            start, stop = (self.live.shape[2] - row for row in (stop, start))
        at = (batch, head, slice(start, stop))
        gradient = xp.astype(self.grads.output[(*at, slice(None))], xp.float64)
        output = xp.astype(self.saved.output[(*at, slice(None))], xp.float64)
        last = -xp.sum(gradient * output, axis=1)
        if self.grads.lse is not None:
            last = last + xp.astype(self.grads.lse[at], xp.float64)
        both = xp.concat([gradient, last[:, None]], axis=1) / self.mean[at][:, None]
        both = xp.where(self.live[at][:, None], both, xp.zeros_like(both))
        return xp.flip(both, axis=0) if self.turned else both


def backward(
    kernel: PolynomialKernel, operands: Operands, saved: KernelOutput, grads: OutputGradients, needs: frozenset[str]
) -> OperandGradients:
    """Return the gradients that `needs` names.

    Cost:      4 (k + 1) n r (e + 1) flop, twice forward's; features are built again.
    Numerics:  as forward; centre, column scales and bias maxima come from the saved residuals.
    """
    xp, problem = kernel.xp, kernel.problem
    residuals = saved.residuals
    if residuals is None:
        raise ValueError("backward needs the output of forward(..., save=True)")
    store = GradientStore(xp, problem, operands)
    if problem.batch == 0:
        return store.gradients(needs)
    rows = RowGradients(kernel, operands, saved, grads)
    for index, plane in enumerate(planes(xp, problem, operands, residuals["maxima"])):
        statistics = (residuals["centre"], residuals["scales"][index, ...], residuals["states"][index, ...])
        kind = problem.spec.mask.kind
        if kind == "causal":
            from korder.methods.running_gradients import causal_plane_backward

            causal_plane_backward(kernel, operands, plane, statistics, rows, store)
        elif kind == "window":
            from korder.methods.window_gradients import window_plane_backward

            window_plane_backward(kernel, operands, plane, statistics, rows, store)
        elif kind == "ordered":
            from korder.methods.ordered_gradients import ordered_plane_backward

            ordered_plane_backward(kernel, operands, plane, statistics, rows, store)
        else:
            _plane_backward(kernel, plane, statistics, rows, store, needs)
    return store.gradients(needs)


def _plane_backward(
    kernel: PolynomialKernel,
    plane: Plane,
    statistics: tuple[Array, Array, Array],
    rows: RowGradients,
    store: GradientStore,
    needs: frozenset[str],
) -> None:
    xp, order = kernel.xp, kernel.problem.order
    centre, scales, states = statistics
    counts = [nonzero(xp, states[t, 0, -1]) for t in range(order)]
    means = [states[t, ...] / counts[t] for t in range(order)]
    mean_gradient = _query_backward(kernel, plane, (centre, scales), means, rows, store)
    if not needs & KEY_SIDE:
        return
    mean_gradient = mean_gradient * kernel.monomial_weights(scales)
    for t in range(order):
        others = [means[s] for s in range(order) if s != t]
        state_gradient = prod_arrays([mean_gradient, *others]) / counts[t]
        _key_backward(kernel, plane, t, scales[t + 1, ...], state_gradient, store)


def _query_backward(
    kernel: PolynomialKernel,
    plane: Plane,
    statistics: tuple[Array, Array],
    means: list[Array],
    rows: RowGradients,
    store: GradientStore,
) -> Array:
    """Add the query's gradients; return that of the mean products, without monomial weights: (r, e + 1) float64."""
    xp = kernel.xp
    centre, scales = statistics
    product = prod_arrays(means)
    table = kernel.normalised(product, xp.zeros_like(product[:, :1]), scales)
    collected: list[Array] = [xp.zeros_like(x, dtype=xp.float64) for x in table.values]
    for head, query in zip(plane.heads, plane.queries, strict=True):
        for start, stop in kernel.blocks(query.length):
            raw = query.operand_columns(xp, start, stop)
            columns = kernel.normalise_columns(query.projection.apply(xp, raw), scales[0, ...])
            features = kernel.features(columns)
            gradient = rows.block(plane.batch, head, start, stop)
            shares = centred_coefficients(kernel.polynomial.values, -centre[plane.batch, head, start:stop])
            parts = []
            for s, share in enumerate(shares):
                weighted = share[:, None] * gradient
                power = xp.astype(weighted * kernel.scale_sign**s, kernel.dtype)
                collected[s] = kernel.product(features[kernel.table.rows(s), :], power, collected[s])
                spread = xp.astype(weighted * table.factors[s], kernel.dtype)
                parts.append(xp.matmul(table.values[s], xp.permute_dims(spread, (1, 0))))
            adjoint = kernel.adjoint(columns, features, xp.concat(parts, axis=0))
            store.add_query(plane, head, start, raw, kernel.normalise_columns(adjoint, scales[0, ...]))
    return xp.concat(collected, axis=0)


def _key_backward(
    kernel: PolynomialKernel, plane: Plane, mode: int, scale: Array, state_gradient: Array, store: GradientStore
) -> None:
    xp, key = kernel.xp, plane.keys[mode]
    largest = nonzero(xp, xp.max(xp.abs(state_gradient)))
    normalised = xp.astype(state_gradient / largest, kernel.dtype)
    for start, stop in kernel.blocks(key.length):
        raw = key.operand_columns(xp, start, stop)
        columns = kernel.normalise_columns(key.projection.apply(xp, raw), scale)
        features = kernel.features(columns)
        weighted = plane.values_and_weights(xp, mode, start, stop)
        spread = xp.matmul(normalised, xp.permute_dims(weighted, (1, 0)))
        adjoint = kernel.adjoint(columns, features, spread)
        read = kernel.product(xp.permute_dims(features, (1, 0)), normalised) * largest
        gradient = kernel.normalise_columns(adjoint, scale) * xp.astype(largest, kernel.dtype)
        store.add_keys(plane, mode, start, (raw, gradient, *split_reading(xp, plane, mode, (start, stop), read)))


def split_reading(xp: Any, plane: Plane, mode: int, tokens: tuple[int, int], read: Array) -> tuple[Array, Array]:
    """Return the gradients of values (c, e) and weights (c,), given that of [w v, w] (c, e + 1)."""
    weights = plane.keys[mode].token_weights(xp, *tokens)[:, None]
    values = xp.astype(plane.live_values(xp, mode, *tokens), xp.float64)
    return read[:, :-1] * weights, xp.sum(read[:, :-1] * values, axis=1) + read[:, -1]
