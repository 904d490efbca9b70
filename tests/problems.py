"""Random problems in which every length differs, d != e, and every place holds a tensor of its own."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from korder.problem import Problem, Shapes, make_problem
from korder.spec import AttentionSpec
from korder.spi import Operands
from tests.oracle import oracle_attention, oracle_scores

Array = Any
LENGTHS = (7, 5, 3, 2, 2, 2)
"""Lengths of the modes, primes unlike the number of queries; small primes run out after the third mode."""


@dataclass(frozen=True)
class Case:
    """One problem with its operands, as numpy arrays in the kernel layout (b, h, n, width)."""

    spec: AttentionSpec
    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...] = ()
    key_masks: tuple[Array | None, ...] = ()
    weight: Array | tuple[Array, ...] | None = None
    query_offset: int = 0
    key_offsets: tuple[int, ...] = ()
    extras: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Name of the operands' dtype."""
        return str(self.query.dtype)

    @property
    def shapes(self) -> Shapes:
        """The shapes of the operands."""
        weight = self.weight
        shape = tuple(u.shape for u in weight) if isinstance(weight, tuple) else getattr(weight, "shape", None)
        return Shapes(
            query=self.query.shape,
            keys=tuple(key.shape for key in self.keys),
            values=tuple(value.shape for value in self.values),
            weight=shape,
            biases=tuple(None if bias is None else bias.shape for bias in self.biases),
            key_masks=tuple(None if mask is None else mask.shape for mask in self.key_masks),
            offsets_given=True,
        )

    def problem(self) -> Problem:
        """The checked problem of these operands."""
        return make_problem(self.spec, self.shapes, self.dtype)

    def operands(self, asarray: Any = lambda x: x) -> Operands:
        """The operands as a kernel takes them, each array through `asarray`."""
        order = len(self.keys)

        def each(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(None if x is None else asarray(x) for x in arrays) or (None,) * order

        masks = tuple(m if m is None or m.ndim == 3 else m[:, None, :] for m in self.key_masks)
        weight = each(self.weight) if isinstance(self.weight, tuple) else self.weight
        return Operands(
            query=asarray(self.query),
            keys=each(self.keys),
            values=each(self.values),
            key_masks=each(masks),
            biases=each(self.biases),
            weight=asarray(weight) if weight is not None and not isinstance(weight, tuple) else weight,
            query_offset=self.query_offset,
            key_offsets=self.key_offsets or (0,) * order,
        )

    def with_spec(self, **changes: Any) -> Case:
        """The same operands under a changed spec."""
        data = {name: getattr(self.spec, name) for name in type(self.spec).model_fields} | changes
        return replace(self, spec=AttentionSpec(**data))

    def astype(self, dtype: str) -> Case:
        """The same operands rounded to another dtype."""

        def cast(x: Any) -> Any:
            if isinstance(x, tuple):
                return tuple(map(cast, x))
            return x if x is None else x.astype(dtype)

        return replace(
            self,
            query=cast(self.query),
            keys=cast(self.keys),
            values=cast(self.values),
            biases=cast(self.biases),
            weight=cast(self.weight),
        )

    def _exact_arguments(self) -> dict[str, Any]:
        return {
            "scale": self.spec.score_factor(self.query.shape[-1]),
            "mask": self.spec.mask,
            "weight": self.weight,
            "biases": self.biases or None,
            "key_masks": self.key_masks or None,
            "query_offset": self.query_offset,
            "key_offsets": self.key_offsets or None,
        }

    def oracle(self, transform: Any = None) -> tuple[Array, Array]:
        """Output and lse of the oracle."""
        return oracle_attention(self.query, self.keys, self.values, transform=transform, **self._exact_arguments())

    def plain(self) -> tuple[Array, Array]:
        """Output and lse of a plain dense evaluation in the operands' dtype (sums of 16-bit operands in float32).

        Live tuples are taken from the oracle's scores, their scores and everything after are computed in the dtype.
        """
        live = oracle_scores(self.query, self.keys, **self._exact_arguments()) != -np.inf
        wide = self.astype("float32") if self.dtype == "float16" else self
        output, lse = _plain(wide, live)
        return output.astype(self.dtype), lse


def _plain(case: Case, live: Array) -> tuple[Array, Array]:
    order, share = len(case.keys), case.query.shape[1] // case.keys[0].shape[1]
    modes = "uvwxyz"[:order]
    keys, values = ([np.repeat(x, share, axis=1) for x in group] for group in (case.keys, case.values))
    query, weight = case.query, case.weight
    if isinstance(weight, tuple):
        query, keys = query @ weight[0], [key @ u for key, u in zip(keys, weight[1:], strict=True)]
    if weight is None or isinstance(weight, tuple):
        subscripts = ",".join(["bhil", *(f"bh{m}l" for m in modes)]) + f"->bhi{modes}"
        scores = np.einsum(subscripts, query, *keys)
    else:
        columns = "opqrst"[:order]
        subscripts = ",".join(["bhil", f"l{columns}", *(f"bh{m}{c}" for m, c in zip(modes, columns, strict=True))])
        scores = np.einsum(f"{subscripts}->bhi{modes}", query, weight, *keys, optimize="greedy")
    scores = scores * scores.dtype.type(case.spec.score_factor(case.query.shape[-1]))
    for t, bias in enumerate(case.biases or ()):
        if bias is not None:
            scores = scores + np.expand_dims(bias, tuple(3 + s for s in range(order) if s != t))
    scores = np.where(live, scores, scores.dtype.type(-np.inf)).reshape(*scores.shape[:3], -1)
    top = np.max(scores, axis=-1, keepdims=True, initial=-np.inf)
    top = np.where(np.isfinite(top), top, top.dtype.type(0))
    weights = np.exp(scores - top)
    total = np.sum(weights, axis=-1, keepdims=True)
    products = np.einsum(",".join(f"bh{m}e" for m in modes) + f"->bh{modes}e", *values)
    products = products.reshape(*products.shape[:2], -1, products.shape[-1])
    safe = np.where(total == 0, total.dtype.type(1), total)
    lse = np.where(total == 0, total.dtype.type(-np.inf), np.log(safe) + top)[..., 0]
    return (weights @ products) / safe, lse


def random_case(
    order: int = 2,
    *,
    seed: int = 0,
    dtype: str = "float64",
    batch: int = 2,
    heads: int = 4,
    groups: int = 2,
    queries: int = 11,
    lengths: tuple[int, ...] | None = None,
    query_width: int = 6,
    key_widths: tuple[int, ...] | None = None,
    value_width: int = 4,
    spread: float = 1.0,
    weight: str | None = None,
    rank: int = 5,
    biases: tuple[str | None, ...] | None = None,
    key_masks: tuple[bool, ...] | None = None,
    query_offset: int = 0,
    key_offsets: tuple[int, ...] = (),
    **spec: Any,
) -> Case:
    """Return a random problem; arguments that are not named here go to the spec (mask, scale, policy, method).

    Args:
        weight: None, "cp" or "full".
        biases: Per mode None, "key" (n axis of 1), "full", or "shared" (1 in the batch, head and n axes).
        key_masks: Per mode, whether some keys are masked: (b, m) in even modes, (b, g, m) in odd ones.
        spread: Standard deviation of queries and keys.
    """
    rng = np.random.default_rng(seed)
    lengths = lengths or LENGTHS[:order]
    widths = key_widths or tuple(query_width + t + 1 if weight else query_width for t in range(order))

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(dtype)

    bias_shapes = {"key": (batch, heads, 1), "full": (batch, heads, queries), "shared": (1, 1, 1)}
    factors = (
        tuple((normal(width, rank) / width**0.5).astype(dtype) for width in (query_width, *widths))
        if weight == "cp"
        else None
    )
    full = normal(query_width, *widths) / np.prod(widths) ** 0.5 if weight == "full" else None
    return Case(
        spec=AttentionSpec(order=order, score="kronecker" if weight else "khatri_rao", **spec),
        query=normal(batch, heads, queries, query_width) * np.dtype(dtype).type(spread),
        keys=tuple(
            normal(batch, groups, m, width) * np.dtype(dtype).type(spread)
            for m, width in zip(lengths, widths, strict=True)
        ),
        values=tuple(normal(batch, groups, m, value_width) for m in lengths),
        biases=tuple(
            None if kind is None else normal(*bias_shapes[kind], m)
            for kind, m in zip(biases or (), lengths if biases else (), strict=True)
        ),
        key_masks=tuple(
            (rng.random((batch, m) if t % 2 == 0 else (batch, groups, m)) < 0.7) if wanted else None
            for t, (wanted, m) in enumerate(zip(key_masks or (), lengths if key_masks else (), strict=True))
        ),
        weight=factors if factors is not None else None if full is None else full.astype(dtype),
        query_offset=query_offset,
        key_offsets=key_offsets,
    )
