"""The oracle: order-k attention and its gradients by their definitions, dense, in any dtype; liveness tuple by tuple.

Shares nothing with the kernels: no tiles, no online softmax, no folding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from typing import Any

import numpy as np

import korder
from korder.spi import NEEDS, KernelOutput, OperandGradients, Operands, OutputGradients, Plan
from korder_native import _native
from korder_native.exact import NativeExactKernel

Array = Any
ALL_ISAS = [name for name in _native.known_names() if _native.runs_here(name)]
"""Every instruction set that this machine has, best first."""
ISAS = [name for name in ALL_ISAS if not _native.kernels(name).narrows]
"""Those with kernels of their own for everything; the others have them for products of bfloat16."""
EXACT = "longdouble"
"""What the truth is computed in."""
RATIO = 4.0
"""Error of a kernel over the error of a plain evaluation in the same dtype."""


@dataclass(frozen=True)
class Case:
    """A problem with arrays in the kernel layout, float64; `dtype` is what kernel and plain evaluation compute in."""

    spec: korder.AttentionSpec
    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    key_masks: tuple[Array | None, ...]
    biases: tuple[Array | None, ...]
    query_offset: int = 0
    key_offsets: tuple[int, ...] = ()
    dtype: str = "float64"

    def cast(self, dtype: str) -> Case:
        """The same problem with its numbers rounded to a dtype."""
        rounded = lambda x: None if x is None else x.astype(dtype).astype("f8")  # noqa: E731
        keys, values, biases = (tuple(map(rounded, xs)) for xs in (self.keys, self.values, self.biases))
        return replace(self, query=rounded(self.query), keys=keys, values=values, biases=biases, dtype=dtype)

    @cached_property
    def operands(self) -> Operands:
        """The operands as a kernel takes them."""
        made = lambda x: None if x is None else x.astype(self.dtype)  # noqa: E731
        keys, values, biases = (tuple(map(made, xs)) for xs in (self.keys, self.values, self.biases))
        return Operands(
            made(self.query), keys, values, self.key_masks, biases, None, self.query_offset, self.key_offsets
        )

    @cached_property
    def plan(self) -> Plan:
        """The first plan."""
        return self.plan_in(self.dtype)

    def plan_in(self, dtype: str) -> Plan:
        """The first plan in a dtype that NumPy may not have."""
        shape = lambda x: None if x is None else x.shape  # noqa: E731
        return korder.plan(
            self.spec,
            query=self.query.shape,
            keys=[x.shape for x in self.keys],
            values=[x.shape for x in self.values],
            key_masks=[shape(x) for x in self.key_masks],
            biases=[shape(x) for x in self.biases],
            dtype=dtype,
        )[0]

    def kernel(self, isa: str = "") -> NativeExactKernel:
        """The kernel of the first plan on an instruction set."""
        return NativeExactKernel(self.plan, isa)

    @cached_property
    def live(self) -> Array:
        """Which tuples each query may attend to, (b, h, n, m1, .., mk)."""
        lengths = [key.shape[2] for key in self.keys]
        found = np.ones((*self.query.shape[:3], *lengths), bool)
        for i, *js in product(range(self.query.shape[2]), *map(range, lengths)):
            found[(slice(None), slice(None), i, *js)] = self._allowed(i, js)
        for t, mask in enumerate(self.key_masks):
            if mask is not None:
                found &= _along(
                    np.repeat(mask, self.share // (mask.shape[1] // self.groups or 1), 1)[:, :, None], t, self
                )
        return found

    def _allowed(self, i: int, js: list[int]) -> bool:
        place = i + self.query_offset
        places = [j + offset for j, offset in zip(js, self.key_offsets or (0,) * len(js), strict=True)]
        mask = self.spec.mask
        if mask.kind == "ordered":
            return all(a < b for a, b in pairwise(places)) and places[-1] <= place
        if mask.kind == "window":
            return all(place - w < p <= place for p, w in zip(places, mask.sizes, strict=True))
        return mask.kind == "full" or all(p <= place for p in places)

    @property
    def groups(self) -> int:
        return self.keys[0].shape[1]

    @property
    def share(self) -> int:
        return self.query.shape[1] // self.groups

    def evaluate(self, dtype: str = EXACT) -> tuple[Array, Array]:
        """Output and lse by the definition, computed in a dtype."""
        weights, total, top = self._weights(dtype)
        letters = _letters(len(self.keys))
        values = [self._by_head(v, dtype) for v in self.values]
        rule = f"bhi{letters}," + ",".join(f"bh{c}z" for c in letters) + "->bhiz"
        output = np.einsum(rule, weights, *values, optimize=True)
        empty = total == 0
        with np.errstate(divide="ignore"):
            lse = np.where(empty, -np.inf, top + np.log(np.where(empty, 1, total)))
        return output / np.where(empty, 1, total)[..., None].astype(dtype), lse

    def differentiate(self, output: Array, lse: Array, dtype: str = EXACT) -> OperandGradients:
        """Gradients of sum(output gradient * output) + sum(lse gradient * lse), all of them, by the closed form."""
        order, letters = len(self.keys), _letters(len(self.keys))
        weights, total, _ = self._weights(dtype)
        weights = weights / np.where(total == 0, 1, total).astype(dtype)[(..., *(None,) * order)]
        query = self.query.astype(dtype)
        keys, values = ([self._by_head(x, dtype) for x in xs] for xs in (self.keys, self.values))
        output, lse = output.astype(dtype), np.where(total == 0, 0, lse).astype(dtype)
        rows = lambda xs: ",".join(f"bh{c}z" for c in letters)  # noqa: E731
        of_weights = np.einsum(f"bhiz,{rows(values)}->bhi{letters}", output, *values, optimize=True)
        delta = np.einsum(f"bhi{letters},bhi{letters}->bhi", weights, of_weights) - lse
        scores = weights * (of_weights - delta[(..., *(None,) * order)])
        scale = np.dtype(dtype).type(self.plan.problem.scale)

        def of_mode(cube: Array, left: Array, arrays: list[Array], t: int) -> Array:
            others = [s for s in range(order) if s != t]
            terms = "".join(f",bh{letters[s]}z" for s in others)
            rule = f"bhi{letters},bhiz{terms}->bh{letters[t]}z"
            return self._by_group(np.einsum(rule, cube, left, *(arrays[s] for s in others), optimize=True))

        of_query = scale * np.einsum(f"bhi{letters},{rows(keys)}->bhiz", scores, *keys, optimize=True)
        return OperandGradients(
            query=of_query,
            keys=tuple(scale * of_mode(scores, query, keys, t) for t in range(order)),
            values=tuple(of_mode(weights, output, values, t) for t in range(order)),
            biases=tuple(None if x is None else self._of_bias(scores, x, t) for t, x in enumerate(self.biases)),
        )

    def _of_bias(self, scores: Array, bias: Array, t: int) -> Array:
        others = tuple(3 + s for s in range(len(self.keys)) if s != t)
        found = scores.sum(axis=others)
        return found.sum(axis=tuple(a for a in range(3) if bias.shape[a] == 1), keepdims=True)

    def _weights(self, dtype: str) -> tuple[Array, Array, Array]:
        """exp(score - largest), the sum of a row, and the largest score."""
        letters = _letters(len(self.keys))
        query = self.query.astype(dtype) * np.dtype(dtype).type(self.plan.problem.scale)
        rule = "bhiz," + ",".join(f"bh{c}z" for c in letters) + f"->bhi{letters}"
        scores = np.einsum(rule, query, *(self._by_head(k, dtype) for k in self.keys), optimize=True)
        for t, bias in enumerate(self.biases):
            if bias is not None:
                scores = scores + _along(bias.astype(dtype), t, self)
        scores = np.where(self.live, scores, -np.inf)
        axes = tuple(range(3, scores.ndim))
        top = scores.max(axis=axes, initial=-np.inf)
        finite = np.where(np.isfinite(top), top, 0).astype(dtype)
        weights = np.exp(scores - finite[(..., *(None,) * len(axes))])
        return weights, weights.sum(axis=axes), finite

    def _by_head(self, x: Array, dtype: str) -> Array:
        return np.repeat(x, self.share, axis=1).astype(dtype)

    def _by_group(self, x: Array) -> Array:
        return x.reshape(x.shape[0], self.groups, self.share, *x.shape[2:]).sum(axis=2)


def _letters(order: int) -> str:
    return "pqrs"[:order]


def _along(x: Array, t: int, case: Case) -> Array:
    """(b, h, n, m_t), some of them 1, as (b, h, n, 1 .., m_t, .. 1)."""
    order = len(case.keys)
    return x.reshape(*x.shape[:3], *(1,) * t, x.shape[3], *(1,) * (order - 1 - t))


def random_case(
    rows: int,
    lengths: tuple[int, ...],
    *,
    seed: int = 0,
    mask: Any = None,
    width: int = 5,
    value_width: int = 3,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    key_masks: bool = False,
    biases: tuple[str | None, ...] = (),
    size: float = 1.0,
    query_offset: int = 0,
    key_offsets: tuple[int, ...] = (),
) -> Case:
    """A problem with a different tensor in every place; bias kinds are key, full, shared."""
    rng = np.random.default_rng(seed)
    (h, g), order = heads, len(lengths)
    shapes = {"key": lambda m: (1, h, 1, m), "full": lambda m: (batch, h, rows, m), "shared": lambda m: (1, 1, rows, m)}
    none = (None,) * order
    masked = mask is not None and mask.kind != "full"
    return Case(
        korder.AttentionSpec(order=order, mask=mask or korder.Full()),
        size * rng.standard_normal((batch, h, rows, width)),
        tuple(rng.standard_normal((batch, g, m, width)) for m in lengths),
        tuple(rng.standard_normal((batch, g, m, value_width)) for m in lengths),
        tuple(rng.random((batch, g, m)) > 0.25 for m in lengths) if key_masks else none,
        tuple(
            None if kind is None else rng.standard_normal(shapes[kind](m))
            for kind, m in zip(biases or none, lengths, strict=True)
        ),
        query_offset,
        key_offsets or ((0,) * order if masked else ()),
    )


def assert_forward(case: Case, found: KernelOutput) -> None:
    """Assert that output and lse are within the ratio of a plain evaluation in the case's dtype."""
    exact, plain = case.evaluate(), case.evaluate(case.dtype)
    for got, truth, simple in zip((found.output, found.lse), exact, plain, strict=True):
        assert_near(np.asarray(got), truth, simple, case.dtype)


def assert_near(got: Array, truth: Array, plain: Array, dtype: str, ratio: float = RATIO) -> None:
    """Assert error(got) <= ratio * error(plain) + 1 unit in the last place of the largest entry."""
    assert got.shape == truth.shape
    finite = np.isfinite(truth)
    assert np.array_equal(got[~finite], truth[~finite], equal_nan=True)
    if not finite.any():
        return
    largest = np.max(np.abs(truth[finite]))
    allowed = ratio * np.max(np.abs(plain[finite].astype(EXACT) - truth[finite])) + np.spacing(largest.astype(dtype))
    error = np.max(np.abs(got[finite].astype(EXACT) - truth[finite]))
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}, largest {largest:.3e}"


def upstream(case: Case, seed: int = 9) -> tuple[Array, Array]:
    """Made-up gradients of output and lse, in the case's dtype."""
    rng = np.random.default_rng(seed)
    rows = case.query.shape[:3]
    width = case.values[0].shape[-1]
    return rng.standard_normal((*rows, width)).astype(case.dtype), rng.standard_normal(rows).astype(case.dtype)


def every_gradient(gradients: OperandGradients) -> list[Array]:
    """All gradients that are there, in a fixed order."""
    return [x for x in (gradients.query, *gradients.keys, *gradients.values, *gradients.biases) if x is not None]


def assert_backward(case: Case, kernel: NativeExactKernel, ratio: float = RATIO) -> None:
    """Assert that every gradient is within the ratio of the closed form in the case's dtype."""
    saved = kernel.forward(case.operands, save=True)
    given = upstream(case)
    found = every_gradient(kernel.backward(case.operands, saved, OutputGradients(*given), needs=NEEDS))
    exact, plain = (every_gradient(case.differentiate(*given, dtype)) for dtype in (EXACT, case.dtype))
    for got, truth, simple in zip(found, exact, plain, strict=True):
        assert_near(np.asarray(got), truth, simple, case.dtype, ratio)
