"""Gradients of the polynomial method, its statistics held constant: of the function that forward computed, or those of
exact attention with the polynomial's weights in place of the softmax (the closed form).
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from array_api_compat import device

from korder.methods.block_passes import FeatureBlock
from korder.methods.factors import Factor, Plane, planes
from korder.methods.readings import nonzero, prod_arrays
from korder.methods.sight import live_rows
from korder.planning.polynomial import feature_count
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
    """Collects the gradients that are wanted of all planes, block by block, and puts them into the operands' layout."""

    def __init__(self, xp: Any, problem: Problem, operands: Operands, needs: frozenset[str]) -> None:
        self.xp = xp
        self.problem = problem
        self.operands = operands
        self.needs = needs
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
        if "query" not in self.needs:
            return
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
        if "keys" in self.needs:
            self._put(self._keys[mode], place, start, rows, dtype)
        if "values" in self.needs:
            self._put(self._values[mode], place, start, values, dtype)
        if "biases" in self.needs and self.operands.biases and self.operands.biases[mode] is not None:
            self._put(self._biases[mode], (plane.batch, plane.heads[0]), start, biases, xp.float64)

    def _put(self, store: Blocks, place: tuple[int, int], start: int, rows: Array, dtype: Any) -> None:
        """Keep a block; blocks of planes that share their keys meet at the same start and are added."""
        blocks = store.setdefault(place, {})
        known = blocks.get(start)
        blocks[start] = self.xp.astype(rows if known is None else known + rows, dtype)

    def _add_weight(self, position: int, factor: Factor, raw: Array, gradient: Array) -> None:
        if factor.projection.matrix is None or "weight" not in self.needs:
            return
        xp = self.xp
        part = xp.matmul(xp.astype(raw, xp.float64), xp.permute_dims(xp.astype(gradient, xp.float64), (1, 0)))
        known = self._weight[position]
        self._weight[position] = part if known is None else known + part

    def gradients(self) -> OperandGradients:
        """Return what was collected, in the operands' dtype and layout; None where it was not asked for."""
        order, operands, needs = self.problem.order, self.operands, self.needs
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
        """Return the blocks as one array like an operand, and let go of them: not all are to be there twice."""
        batch, heads = like.shape[:2]
        blocks = self._in_order(store, [(b, h) for b in range(batch) for h in range(heads)])
        store.clear()
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

    Cost:      4 (k + 1) n r (e + 1) flop, twice forward's; features are built again. With the r' features of a degree
               more, the closed form costs 4 (k + 1) n r' (e + 1) + 2 n r (e + 1).
    Numerics:  as forward; centre, column scales and bias maxima come from the saved residuals.
    """
    xp, problem = kernel.xp, kernel.problem
    residuals = saved.residuals
    if residuals is None:
        raise ValueError("backward needs the output of forward(..., save=True)")
    store = GradientStore(xp, problem, operands, needs)
    if problem.batch == 0:
        return store.gradients()
    rows = RowGradients(kernel, operands, saved, grads)
    kernels = [kernel] if kernel.polynomial.gradient == "consistent" else [kernel, _antiderivative(kernel)]
    for index, plane in enumerate(planes(xp, problem, operands, residuals["maxima"])):
        statistics = (residuals["centre"], residuals["scales"][index, ...], residuals["states"][index, ...])
        kind = problem.spec.mask.kind
        if kind == "causal":
            from korder.methods.running_gradients import causal_plane_backward

            assert len(kernels) == 1, "capabilities refuse the closed form under this mask"
            causal_plane_backward(kernel, operands, plane, statistics, rows, store)
        elif kind == "window":
            from korder.methods.window_gradients import window_plane_backward

            window_plane_backward(kernel, operands, plane, statistics, rows, store)
        elif kind == "ordered":
            from korder.methods.ordered_gradients import ordered_plane_backward

            ordered_plane_backward(kernel, operands, plane, statistics, rows, store)
        else:
            _plane_backward(kernels, plane, statistics, rows, store, needs)
    return store.gradients()


def _antiderivative(kernel: PolynomialKernel) -> PolynomialKernel:
    """Return the kernel of the polynomial R, of a degree more, whose derivative is the kernel's P.

    Differentiated through the score, a sum of weights R(x) becomes one of P(x): the closed form of softmax's gradient
    with the weights that forward used. Differentiating P itself would put P' in their place.
    """
    polynomial = kernel.polynomial
    values = (0.0, *(c / (m + 1) for m, c in enumerate(polynomial.values)))
    features = feature_count(kernel.table.width, polynomial.degree + 1)
    raised = replace(polynomial, degree=polynomial.degree + 1, values=values, features=features)
    return type(kernel)(kernel.xp, replace(kernel.plan, polynomial=raised))


def _plane_backward(
    kernels: list[PolynomialKernel],
    plane: Plane,
    statistics: tuple[Array, Array, Array],
    rows: RowGradients,
    store: GradientStore,
    needs: frozenset[str],
) -> None:
    """Add a plane's gradients: those of values and weights through the first kernel, of columns through the last."""
    widest = kernels[-1]
    xp, order = widest.xp, widest.problem.order
    centre, scales, states = statistics
    counts = [nonzero(xp, states[t, 0, -1]) for t in range(order)]
    means = [_widened(widest, plane, t, scales, states[t, ...]) / counts[t] for t in range(order)]
    mean_gradients = _query_backward(kernels, plane, (centre, scales), means, rows, store)
    if not needs & KEY_SIDE:
        return
    monomials = widest.monomial_weights(scales)
    mean_gradients = [gradient * monomials[: gradient.shape[0], :] for gradient in mean_gradients]
    for t in range(order):
        state_gradients = []
        for gradient in mean_gradients:
            others = [means[s][: gradient.shape[0], :] for s in range(order) if s != t]
            state_gradients.append(prod_arrays([gradient, *others]) / counts[t])
        _key_backward(kernels, plane, t, scales[t + 1, ...], state_gradients, store)


def _widened(kernel: PolynomialKernel, plane: Plane, mode: int, scales: Array, state: Array) -> Array:
    """Return a saved key state with the rows of the kernel's features that it lacks."""
    xp, known, count = kernel.xp, state.shape[0], kernel.table.features
    if known == count:
        return state
    key = plane.keys[mode]
    rest = xp.zeros((count - known, state.shape[1]), dtype=xp.float64, device=device(state))
    for start in range(0, key.length, kernel.polynomial.chunk):  # features are kept, whatever the passes' blocks
        stop = min(start + kernel.polynomial.chunk, key.length)
        features = kernel.features(kernel.scaled(key, scales[mode + 1, ...], start, stop))
        rest = kernel.product(features[known:, :], plane.values_and_weights(xp, mode, start, stop), rest)
    return xp.concat([state, rest], axis=0)


def _query_backward(
    kernels: list[PolynomialKernel],
    plane: Plane,
    statistics: tuple[Array, Array],
    means: list[Array],
    rows: RowGradients,
    store: GradientStore,
) -> list[Array]:
    """Add the query's gradients; return those of the mean products by each kernel, without monomial weights.

    Shapes:  (r, e + 1) float64, r the features of each kernel.
    """
    widest = kernels[-1]
    xp = widest.xp
    centre, scales = statistics
    product = prod_arrays(means)
    table = widest.normalised(product, xp.zeros_like(product[:, :1]), scales)
    entries = widest.laid_out(table.values)
    collected = [kernel.new_sums(table.values) for kernel in kernels]
    for head, query in zip(plane.heads, plane.queries, strict=True):
        for start, stop in widest.blocks(query.length):
            raw = query.operand_columns(xp, start, stop)
            columns = widest.normalise_columns(query.projection.apply(xp, raw), scales[0, ...])
            block = FeatureBlock(widest, columns)
            gradient = rows.block(plane.batch, head, start, stop)
            for kernel, sums in zip(kernels, collected, strict=True):
                shares = kernel.shares(centre[plane.batch, head, start:stop])
                kernel.collect(block, shares, gradient, sums)
            shares = [share * factor for share, factor in zip(shares, table.factors, strict=True)]
            adjoint = widest.columns_gradient(block, entries, gradient, shares)
            store.add_query(plane, head, start, raw, widest.normalise_columns(adjoint, scales[0, ...]))
    return [kernel.joined(sums) for kernel, sums in zip(kernels, collected, strict=True)]


def _key_backward(
    kernels: list[PolynomialKernel],
    plane: Plane,
    mode: int,
    scale: Array,
    state_gradients: list[Array],
    store: GradientStore,
) -> None:
    """Add a mode's gradients: of values and weights by the first kernel's state gradient, of columns by the last's."""
    first, widest = kernels[0], kernels[-1]
    xp, key = widest.xp, plane.keys[mode]
    laid_out = [_laid_out(kernel, gradient) for kernel, gradient in zip(kernels, state_gradients, strict=True)]
    (size, read_table), (column_size, table) = laid_out[0], laid_out[-1]
    for start, stop in widest.blocks(key.length):
        raw = key.operand_columns(xp, start, stop)
        columns = widest.normalise_columns(key.projection.apply(xp, raw), scale)
        block = FeatureBlock(widest, columns)
        adjoint = widest.columns_gradient(block, table, plane.values_and_weights(xp, mode, start, stop))
        read = first.read_sums(block, read_table) * size
        gradient = widest.normalise_columns(adjoint, scale) * xp.astype(column_size, widest.dtype)
        store.add_keys(plane, mode, start, (raw, gradient, *split_reading(xp, plane, mode, (start, stop), read)))


def _laid_out(kernel: PolynomialKernel, gradient: Array) -> tuple[Array, Any]:
    """Return the largest entry of a table (r, e + 1), 0-d, and the table over it as the kernel's passes want it."""
    xp = kernel.xp
    size = nonzero(xp, xp.max(xp.abs(gradient)))
    narrow = xp.astype(gradient / size, kernel.dtype)
    return size, kernel.laid_out([narrow[kernel.table.rows(s), :] for s in range(kernel.table.degree + 1)])


def split_reading(xp: Any, plane: Plane, mode: int, tokens: tuple[int, int], read: Array) -> tuple[Array, Array]:
    """Return the gradients of values (c, e) and weights (c,), given that of [w v, w] (c, e + 1)."""
    weights = plane.keys[mode].token_weights(xp, *tokens)[:, None]
    values = xp.astype(plane.live_values(xp, mode, *tokens), xp.float64)
    return read[:, :-1] * weights, xp.sum(read[:, :-1] * values, axis=1) + read[:, -1]
