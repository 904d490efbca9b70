"""The oracle: order-k attention by its definition in float64, dense and differentiable; liveness by loops.

Shares nothing with the kernels: no tiles, no online softmax, no bounds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import korder
from korder.spi import Operands, Plan
from korder_jax.backend import JaxBackend

Array = Any
QUERIES, LENGTHS, WIDTH, VALUES = 11, (7, 5, 3), 6, 4


@dataclass(frozen=True)
class Case:
    """A problem with arrays in the kernel layout; float64 numpy."""

    spec: korder.AttentionSpec
    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    key_masks: tuple[Array | None, ...]
    weight: Any = None
    query_offset: int = 0
    key_offsets: tuple[int, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def variables(self) -> tuple[Any, ...]:
        """The operands that carry gradients."""
        return self.query, self.keys, self.values, self.biases, self.weight

    def operands(self, dtype: str = "float64") -> Operands:
        """The operands as a kernel takes them."""
        arrays = jax.tree.map(lambda x: jnp.asarray(x, dtype), self.variables)
        masks = jax.tree.map(jnp.asarray, self.key_masks)
        query, keys, values, biases, weight = arrays
        return Operands(query, keys, values, masks, biases, weight, self.query_offset, self.key_offsets)

    def plan(self, dtype: str = "float64", *, small: bool = False) -> Plan:
        """The first plan, in tiles of a few rows and keys if they are to be small."""
        weight = tuple(u.shape for u in self.weight) if isinstance(self.weight, tuple) else self.weight
        plan = korder.plan(
            self.spec,
            query=self.query.shape,
            keys=[key.shape for key in self.keys],
            values=[value.shape for value in self.values],
            weight=weight,
            biases=[None if bias is None else bias.shape for bias in self.biases],
            key_masks=[None if mask is None else mask.shape for mask in self.key_masks],
            dtype=dtype,
        )[0]
        if small and plan.polynomial is not None:
            plan = replace(plan, polynomial=replace(plan.polynomial, chunk=4))
        elif small and plan.tiling is not None:
            outer = (2,) * len(plan.tiling.folded)
            tiling = replace(plan.tiling, queries=4, folded=outer, keys=3, heads=1, looped=(0,))
            plan = replace(plan, tiling=tiling)
        return plan

    def kernel(self, dtype: str = "float64", *, small: bool = False) -> Any:
        """The kernel of the first plan, which the backend must take."""
        return _compiled(self.plan(dtype, small=small))

    def live(self) -> Array:
        """Which tuples a query may attend to by its position: (n, m1, .., mk)."""
        lengths = [key.shape[2] for key in self.keys]
        found = np.zeros((self.query.shape[2], *lengths), bool)
        offsets = self.key_offsets or (0,) * len(lengths)
        for i, *js in product(range(found.shape[0]), *map(range, lengths)):
            positions = [j + offset for j, offset in zip(js, offsets, strict=True)]
            found[(i, *js)] = _sees(self.spec.mask, i + self.query_offset, positions)
        return found

    def reference(self, exp: Any = jnp.exp) -> tuple[Array, Array]:
        """Output and lse by the definition."""
        return jax.jit(lambda variables: dense(self, variables, exp))(self.variables)

    def reference_gradients(self, output: Array, lse: Array, exp: Any = jnp.exp) -> tuple[Any, ...]:
        """Output and lse by the definition, and the gradients of the variables, given those of output and lse."""

        @jax.jit
        def both(variables: tuple[Any, ...]) -> tuple[Any, ...]:
            found, pull = jax.vjp(lambda x: dense(self, x, exp), variables)
            return *found, pull((output, jnp.where(jnp.isfinite(found[1]), lse, 0.0)))[0]

        return both(self.variables)


@lru_cache(maxsize=64)
def _compiled(plan: Plan) -> Any:
    """The kernel of a plan, one for all tests, so that XLA compiles it once."""
    assert not JaxBackend().unsupported_reasons(plan)
    return JaxBackend().compile(plan)


def _sees(mask: Any, position: int, keys: list[int]) -> bool:
    if mask.kind == "full":
        return True
    if mask.kind == "ordered":
        return all(a < b for a, b in pairwise([*keys, position + 1]))
    sizes = getattr(mask, "sizes", (10**9,) * len(keys))
    return all(position - size < key <= position for key, size in zip(keys, sizes, strict=True))


def random_case(
    order: int = 2,
    *,
    mask: Any = None,
    method: Any = None,
    biases: tuple[str | None, ...] = (),
    key_masks: bool = False,
    weight: str | None = None,
    spread: float = 1.0,
    heads: tuple[int, int] = (4, 2),
    query_offset: int = 0,
    key_offsets: tuple[int, ...] = (),
    width: int = WIDTH,
    **spec: Any,
) -> Case:
    """Return a random case: batch 2, grouped heads, every length another prime, another tensor in every place."""
    rng = np.random.default_rng(order)
    lengths, h, g = LENGTHS[:order], *heads
    widths = [width + t + 1 if weight else width for t in range(order)]
    shapes = {"key": (2, h, 1), "full": (2, h, QUERIES), "shared": (1, 1, 1)}
    made: Any = None
    if weight == "cp":
        made = tuple(rng.standard_normal((size, 5)) / size**0.5 for size in (width, *widths))
    elif weight == "full":
        made = rng.standard_normal((width, *widths)) / np.prod(widths) ** 0.5
    kinds = biases or (None,) * order
    method = method or korder.Exact()
    return Case(
        korder.AttentionSpec(
            order=order,
            mask=mask or korder.Full(),
            method=method,
            score="kronecker" if weight else "khatri_rao",
            **spec,
        ),
        spread * rng.standard_normal((2, h, QUERIES, width)),
        tuple(spread * rng.standard_normal((2, g, m, w)) for m, w in zip(lengths, widths, strict=True)),
        tuple(rng.standard_normal((2, g, m, VALUES)) for m in lengths),
        tuple(
            None if kind is None else rng.standard_normal((*shapes[kind], m))
            for kind, m in zip(kinds, lengths, strict=True)
        ),
        tuple(rng.random((2, g, m)) < 0.7 if key_masks else None for m in lengths),
        made,
        query_offset,
        key_offsets or (0,) * order,
    )


def dense(case: Case, variables: tuple[Any, ...], exp: Any = jnp.exp) -> tuple[Array, Array]:
    """Return output and lse of these variables; zeros and -inf for a query with nothing to attend to.

    `exp` stands for what takes the place of exp on scores; biases are then factors of their own.
    """
    query, keys, values, biases, weight = variables
    order, share = len(keys), query.shape[1] // keys[0].shape[1]
    modes = "uvw"[:order]
    keys, values = ([jnp.repeat(x, share, axis=1) for x in group] for group in (keys, values))
    if isinstance(weight, tuple):
        query, keys = query @ weight[0], [key @ u for key, u in zip(keys, weight[1:], strict=True)]
    if weight is None or isinstance(weight, tuple):
        scores = jnp.einsum(",".join(["bhil", *(f"bh{m}l" for m in modes)]) + f"->bhi{modes}", query, *keys)
    else:
        columns = "opq"[:order]
        sides = ["bhil", f"l{columns}", *(f"bh{m}{c}" for m, c in zip(modes, columns, strict=True))]
        scores = jnp.einsum(",".join(sides) + f"->bhi{modes}", query, weight, *keys)
    scores = scores * case.spec.score_factor(case.query.shape[-1])
    live, factor = jnp.asarray(case.live())[None, None], jnp.ones(())
    for t in range(order):
        axes = tuple(3 + s for s in range(order) if s != t)
        if biases[t] is not None and exp is jnp.exp:
            scores = scores + jnp.expand_dims(biases[t], axes)
        elif biases[t] is not None:
            factor = factor * jnp.exp(jnp.expand_dims(biases[t], axes))
        if case.key_masks[t] is not None:
            live = live & jnp.expand_dims(jnp.repeat(case.key_masks[t], share, axis=1)[:, :, None], axes)
    tuples = tuple(range(3, 3 + order))
    live = jnp.broadcast_to(live, scores.shape)
    top = jax.lax.stop_gradient(jnp.max(jnp.where(live, scores, -jnp.inf), axis=tuples, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0.0) if exp is jnp.exp else jnp.zeros_like(top)
    weights = jnp.where(live, exp(jnp.where(live, scores - top, 0.0)) * factor, 0.0)
    total = jnp.sum(weights, axis=tuples)
    empty = ~jnp.any(live, axis=tuples)
    safe = jnp.where(empty, 1.0, total)
    output = jnp.einsum(",".join([f"bhi{modes}", *(f"bh{m}e" for m in modes)]) + "->bhie", weights, *values)
    lse = jnp.where(empty, -jnp.inf, jnp.log(safe) + top.reshape(safe.shape))
    return jnp.where(empty[..., None], 0.0, output / safe[..., None]), lse


def largest_error(found: Any, wanted: Any) -> float:
    """Return the largest error of any array relative to its largest entry; infinities and NaN must agree."""
    errors = [0.0]
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    for x, y in ((np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in pairs):
        assert x.shape == y.shape
        finite = np.isfinite(y)
        np.testing.assert_array_equal(np.isfinite(x), finite)
        np.testing.assert_array_equal(x[~finite], y[~finite])
        scale = max(np.max(np.abs(y[finite]), initial=0.0), 1e-30)
        errors.append(np.max(np.abs(x[finite] - y[finite]), initial=0.0) / scale)
    return max(errors)
