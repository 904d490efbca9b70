"""The kit's cases: random operands with unequal prime lengths and a different tensor in every place, as numpy arrays.

Numbers are held in float64 but are numbers of the case's dtype, so that every array kind gets the same ones.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from korder.conformance.limits import as_dtype
from korder.planning.candidates import candidate_plans
from korder.planning.plan import Plan
from korder.problem import Problem, ScoreStatistics, Shapes, make_problem
from korder.spec import AttentionSpec

Array = Any
LENGTHS = (7, 5, 3, 2, 2, 2)
QUERIES = 11
QUERY_WIDTH = 6
VALUE_WIDTH = 4


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One problem with its operands, in the layout of `korder.spi.Operands`.

    Args:
        name: Unlike that of every other case of the same check.
        small_blocks: Whether the plan's blocks are made so small that there are several of everything.
        extra: Whatever the check wants to know of the case.
        statistics: What its plan is made by, where it is not by shapes alone.
    """

    name: str
    spec: AttentionSpec
    dtype: str
    device: str
    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    key_masks: tuple[Array | None, ...]
    weight: Array | tuple[Array, ...] | None = None
    query_offset: int = 0
    key_offsets: tuple[int, ...] = ()
    small_blocks: bool = False
    extra: Any = None
    statistics: ScoreStatistics | None = None

    @property
    def order(self) -> int:
        """Number of modes."""
        return len(self.keys)

    @property
    def scale(self) -> float:
        """The factor on every score."""
        return self.spec.score_factor(self.query.shape[-1])

    def problem(self) -> Problem:
        """Return the checked problem of the operands."""
        weight = self.weight
        shape = tuple(u.shape for u in weight) if isinstance(weight, tuple) else getattr(weight, "shape", None)
        shapes = Shapes(
            query=self.query.shape,
            keys=tuple(key.shape for key in self.keys),
            values=tuple(value.shape for value in self.values),
            weight=shape,
            biases=tuple(None if bias is None else bias.shape for bias in self.biases),
            key_masks=tuple(_mask_shape(mask, self.keys[0].shape[1]) for mask in self.key_masks),
            offsets_given=True,
        )
        return make_problem(self.spec, shapes, self.dtype, self.device, self.statistics)

    def good_to(self, dtype: str) -> str:
        """Return the dtype that a sum is good to: that of the accumulation where it is held in a wider one."""
        return self.problem().accumulation if dtype == "float64" else dtype

    def plan(self) -> Plan:
        """Return the plan that a backend is asked to compile."""
        plan = candidate_plans(self.problem())[0]
        if not self.small_blocks:
            return plan
        if plan.polynomial is not None:
            return replace(plan, polynomial=replace(plan.polynomial, chunk=4))
        assert plan.tiling is not None
        folded = (2,) * len(plan.tiling.folded)
        return replace(plan, tiling=replace(plan.tiling, queries=4, folded=folded, keys=3, heads=1))

    def arrays(self) -> dict[str, Array]:
        """Return every operand that is given, by name."""
        named = {"query": self.query}
        for name in ("keys", "values", "biases", "key_masks"):
            named |= {f"{name}[{t}]": x for t, x in enumerate(getattr(self, name)) if x is not None}
        if isinstance(self.weight, tuple):
            return named | {f"weight[{t}]": x for t, x in enumerate(self.weight)}
        return named if self.weight is None else named | {"weight": self.weight}


def _mask_shape(mask: Array | None, groups: int) -> tuple[int, ...] | None:
    if mask is None:
        return None
    batch, heads, length = mask.shape
    return (batch, length) if heads == 1 and groups != 1 else (batch, heads, length)


@dataclass(frozen=True, slots=True)
class Options:
    """What a random case is made of; lengths and widths are cut to the order.

    Args:
        biases: Per mode None, "key" (n axis of 1), "full", or "shared" (1 in the batch, head and n axes).
        key_masks: Whether some keys are masked, by batch entry in even modes, by key head too in odd ones.
        weight: None, "cp" or "full".
        spread: Standard deviation of queries and keys.
    """

    batch: int = 2
    heads: int = 4
    groups: int = 4
    queries: int = QUERIES
    lengths: tuple[int, ...] = LENGTHS
    query_width: int = QUERY_WIDTH
    value_width: int = VALUE_WIDTH
    key_widths: tuple[int, ...] = ()
    rank: int = 5
    weight: str | None = None
    biases: tuple[str | None, ...] = ()
    key_masks: bool = False
    spread: float = 1.0
    query_offset: int = 0
    key_offsets: tuple[int, ...] = ()
    small_blocks: bool = False


def random_case(name: str, spec: AttentionSpec, dtype: str, device: str, options: Options) -> Case:
    """Return a case whose numbers follow from its name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    order, lengths = spec.order, options.lengths[: spec.order]

    def normal(*shape: int, spread: float = 1.0) -> Array:
        return as_dtype(rng.standard_normal(shape) * spread, dtype)

    batch, heads, groups, queries = options.batch, options.heads, options.groups, options.queries
    widths = options.key_widths[:order] or _key_widths(options, order)
    bias_shapes = {"key": (batch, heads, 1), "full": (batch, heads, queries), "shared": (1, 1, 1)}
    kinds = (options.biases + (None,) * order)[:order]
    return Case(
        name=name,
        spec=spec,
        dtype=dtype,
        device=device,
        query=normal(batch, heads, queries, options.query_width, spread=options.spread),
        keys=tuple(normal(batch, groups, m, w, spread=options.spread) for m, w in zip(lengths, widths, strict=True)),
        values=tuple(normal(batch, groups, m, options.value_width) for m in lengths),
        biases=tuple(
            None if kind is None else normal(*bias_shapes[kind], m) for kind, m in zip(kinds, lengths, strict=True)
        ),
        key_masks=tuple(_some_keys(rng, options, t, m) for t, m in enumerate(lengths)),
        weight=_weight(normal, options, (options.query_width, *widths)),
        query_offset=options.query_offset,
        key_offsets=(options.key_offsets or (0,) * order)[:order],
        small_blocks=options.small_blocks,
    )


def _key_widths(options: Options, order: int) -> tuple[int, ...]:
    if options.weight == "full":
        return (2, 3, 2, 2, 2, 2)[:order]
    return tuple(options.query_width + (t + 1 if options.weight == "cp" else 0) for t in range(order))


def _some_keys(rng: np.random.Generator, options: Options, mode: int, length: int) -> Array | None:
    if not options.key_masks:
        return None
    live = rng.random((options.batch, 1 if mode % 2 == 0 else options.groups, length)) < 0.7
    live[..., :1] = True  # no row is empty by chance; empty rows have a check of their own
    return live


def _weight(normal: Any, options: Options, widths: tuple[int, ...]) -> Any:
    if options.weight == "cp":
        return tuple(normal(width, options.rank, spread=width**-0.5) for width in widths)
    if options.weight == "full":
        return normal(*widths, spread=float(np.prod(widths[1:])) ** -0.5)
    return None
