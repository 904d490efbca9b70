"""A spec with shapes, dtype, device and statistics: all that planning may know. Operands are checked here, once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from korder.errors import OperandError, ShapeError, SpecError
from korder.spec import AttentionSpec, Full

Shape = tuple[int, ...]
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")
ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Shapes:
    """The shapes of the operands as the user gave them; `weight` is one shape (full) or several (CP factors)."""

    query: Shape
    keys: tuple[Shape, ...]
    values: tuple[Shape, ...]
    weight: Shape | tuple[Shape, ...] | None = None
    biases: tuple[Shape | None, ...] = ()
    key_masks: tuple[Shape | None, ...] = ()
    offsets_given: bool = False


@dataclass(frozen=True, slots=True)
class OutlierLevel:
    """What is left to the polynomial method when the keys above a threshold are set aside.

    Counts are those of the worst head, rounded up so that plans are met again: keys to powers of two, rows more finely.
    """

    threshold: float
    """Outlying keys have a typical score of more than this many times the median of their head and mode."""
    keys: tuple[int, ...]
    """Outlying keys, per mode."""
    missing: tuple[int, ...]
    """Rows that are expected to miss the tolerance at degrees 2, 4, 6, .."""


@dataclass(frozen=True, slots=True)
class ScoreStatistics:
    """A few floats measured from the arrays, rounded outward to two digits; they choose plans, never certificates.

    All are in score units, largest (or lowest) over heads and rows with a live tuple.
    """

    score_low: float
    """Lower bound of every score, biases left out."""
    score_high: float
    """Upper bound of every score, biases left out."""
    half_width: float
    """Largest distance of a score bound of a row from the row's centre."""
    rms: float
    """Largest root of the mean squared centred score of a row; 0 when it was not measured."""
    levels: tuple[OutlierLevel, ...] = ()
    """Ways to set outliers aside, lowest threshold first; measured for methods that choose among them."""
    columns: tuple[float, ...] = ()
    """Of each column, the largest absolute term that it adds to a score; empty where there are too many columns."""
    centres: tuple[float, float] = (0.0, 0.0)
    """The lowest and the highest centre of a row."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What a plan is made for. Lengths in elements; hashable, so that plans can be cached."""

    spec: AttentionSpec
    batch: int
    heads: int
    groups: int
    queries: int
    lengths: tuple[int, ...]
    query_width: int
    key_widths: tuple[int, ...]
    value_width: int
    dtype: str
    device: str = "cpu"
    weight: str = "none"  # "none" | "cp" | "full"
    weight_rank: int = 0  # columns of the CP factors; 0 without them
    biases: tuple[str | None, ...] = ()  # per mode: None | "key" (n axis of 1) | "full"
    key_masks: tuple[bool, ...] = ()
    statistics: ScoreStatistics | None = None

    @property
    def order(self) -> int:
        """Number of key modes."""
        return len(self.lengths)

    @property
    def tuples(self) -> int:
        """Tuples of keys that one query faces before masks: m1 * .. * mk."""
        return prod(self.lengths)

    @property
    def scale(self) -> float:
        """The number that multiplies every score."""
        return self.spec.score_factor(self.query_width)

    @property
    def accumulation(self) -> str:
        """Dtype of sums: the widest of float32, the operands' and the policy's.

        Products are in it too, but for 16-bit operands that a backend multiplies as they are while the policy's
        precision is "input".
        """
        wide = self.dtype == "float64" or self.spec.policy.precision == "float64"
        return "float64" if wide else "float32"

    @property
    def score_width(self) -> int:
        """Columns of the Khatri-Rao form of the score: d, the CP rank, or the width of a full weight's expansion."""
        if self.weight == "cp":
            return self.weight_rank
        return prod(self.key_widths) if self.weight == "full" else self.query_width

    def describe(self) -> str:
        """Return one line: what, how large, in which dtype."""
        lengths = " x ".join(str(m) for m in self.lengths)
        return (
            f"order={self.order}, method={self.spec.method.kind}, mask={self.spec.mask.kind}, score={self.spec.score}, "
            f"batch={self.batch}, heads={self.heads}/{self.groups}, n={self.queries}, m={lengths}, "
            f"d={self.query_width}, e={self.value_width}, dtype={self.dtype} on {self.device}"
        )


@lru_cache(maxsize=256)
def make_problem(
    spec: AttentionSpec, shapes: Shapes, dtype: str, device: str = "cpu", statistics: ScoreStatistics | None = None
) -> Problem:
    """Check every shape against every other and return the problem.

    Raises:
        ShapeError: Shapes that do not fit; the message names the operand and both shapes.
        OperandError: A dtype that is not a float, or a weight where the score form takes none.
        SpecError: The number of keys is not the spec's order.
    """
    _check_counts(spec, shapes)
    check_dtype("every operand", dtype)
    _check_leading(shapes)
    batch_axes, heads, groups = _head_layout(shapes)
    _check_lengths_and_widths(shapes)
    weight, rank = _check_weight(spec, shapes)
    _check_alignment(spec, shapes)
    leading = shapes.query[:-2]
    queries = shapes.query[-2]
    return Problem(
        spec=spec,
        batch=prod(batch_axes),
        heads=heads,
        groups=groups,
        queries=queries,
        lengths=tuple(key[-2] for key in shapes.keys),
        query_width=shapes.query[-1],
        key_widths=tuple(key[-1] for key in shapes.keys),
        value_width=shapes.values[0][-1],
        dtype=dtype,
        device=device,
        weight=weight,
        weight_rank=rank,
        biases=_check_biases(shapes, leading, queries),
        key_masks=_check_key_masks(shapes, batch_axes, groups),
        statistics=statistics,
    )


def check_dtype(name: str, dtype: str) -> None:
    """Raise `OperandError` unless a dtype is one of the real floating-point ones."""
    if dtype not in FLOAT_DTYPES:
        raise OperandError(
            f"{name} must be a real floating-point array.",
            code="dtype-unsupported",
            expected=f"one of {', '.join(FLOAT_DTYPES)}",
            got=dtype,
            hint="convert it first, for example query.astype('float32').",
        )


def _check_counts(spec: AttentionSpec, shapes: Shapes) -> None:
    if not shapes.keys:
        raise ShapeError(
            "at least one key matrix is needed.",
            code="keys-missing",
            expected="keys: a tuple with one array per mode",
            got="an empty tuple",
        )
    if len(shapes.keys) != len(shapes.values):
        raise ShapeError(
            "keys and values must be tuples of the same length.",
            code="modes-mismatch",
            expected=f"{len(shapes.keys)} values, one per key matrix",
            got=f"{len(shapes.values)} values",
            hint="values[t] pairs with keys[t] position by position.",
        )
    if len(shapes.keys) != spec.order:
        raise SpecError(
            "the spec's order must equal the number of key matrices.",
            code="order-mismatch",
            expected=f"{spec.order} key matrices, because the spec says order={spec.order}",
            got=f"{len(shapes.keys)} key matrices",
            hint="the query does not count: order 2 means two key matrices.",
        )
    for name, group in (("biases", shapes.biases), ("key_masks", shapes.key_masks)):
        if group and len(group) != len(shapes.keys):
            raise ShapeError(
                f"{name} must have one entry per mode; an entry may be None.",
                code="modes-mismatch",
                expected=f"{len(shapes.keys)} entries",
                got=f"{len(group)} entries",
            )


def _named(shapes: Shapes) -> list[tuple[str, Shape]]:
    named = [("query", shapes.query)]
    named += [(f"keys[{t}]", shape) for t, shape in enumerate(shapes.keys)]
    return named + [(f"values[{t}]", shape) for t, shape in enumerate(shapes.values)]


def _check_leading(shapes: Shapes) -> None:
    dims = len(shapes.query)
    for name, shape in _named(shapes):
        if len(shape) < 2:
            raise ShapeError(
                f"{name} must have at least two axes.",
                expected="(length, width), (heads, length, width) or (batch, heads, length, width)",
                got=f"{name}.shape == {shape}",
            )
        if len(shape) != dims:
            raise ShapeError(
                f"query and {name} must have the same number of axes.",
                expected=f"{dims} axes, because query.shape == {shapes.query}",
                got=f"{name}.shape == {shape}",
            )
        if shape[:-3] != shapes.query[:-3]:
            raise ShapeError(
                f"query and {name} must have the same batch axes.",
                expected=f"batch axes {shapes.query[:-3]}, as in query.shape == {shapes.query}",
                got=f"batch axes {shape[:-3]} in {name}.shape == {shape}",
            )
        if shape[-1] < 1:
            raise ShapeError(f"{name} must have at least one column.", expected="width >= 1", got=f"shape {shape}")


def _head_layout(shapes: Shapes) -> tuple[Shape, int, int]:
    """Return the batch axes, query heads and key/value heads."""
    if len(shapes.query) == 2:
        return (), 1, 1
    heads, groups = shapes.query[-3], shapes.keys[0][-3]
    for name, shape in _named(shapes)[1:]:
        if shape[-3] != groups:
            raise ShapeError(
                "all keys and values must have the same number of heads.",
                code="heads-mismatch",
                expected=f"{groups} heads, as in keys[0].shape == {shapes.keys[0]}",
                got=f"{shape[-3]} heads in {name}.shape == {shape}",
            )
    if groups == 0 or heads == 0 or heads % groups:
        raise ShapeError(
            "the number of key/value heads must divide the number of query heads.",
            code="heads-mismatch",
            expected=f"a divisor of h = {heads}, both at least 1",
            got=f"g = {groups}",
            hint="query head i reads key/value head i // (h // g).",
        )
    return shapes.query[:-3], heads, groups


def _check_lengths_and_widths(shapes: Shapes) -> None:
    for t, (key, value) in enumerate(zip(shapes.keys, shapes.values, strict=True)):
        if key[-2] != value[-2]:
            expected = (*value[:-2], key[-2], value[-1])
            raise ShapeError(
                f"keys[{t}] and values[{t}] must have the same length.",
                expected=f"values[{t}].shape == {expected}, because keys[{t}] has m{t + 1} = {key[-2]}",
                got=f"values[{t}].shape == {value}",
                hint="values[t] pairs with keys[t] position by position; check the order of the tuple.",
            )
        if value[-1] != shapes.values[0][-1]:
            raise ShapeError(
                "all values must have the same width.",
                expected=f"e = {shapes.values[0][-1]}, as in values[0].shape == {shapes.values[0]}",
                got=f"e = {value[-1]} in values[{t}].shape == {value}",
            )
        if shapes.weight is None and key[-1] != shapes.query[-1]:
            raise ShapeError(
                f"query and keys[{t}] must have the same width.",
                expected=f"d = {shapes.query[-1]}, as in query.shape == {shapes.query}",
                got=f"d = {key[-1]} in keys[{t}].shape == {key}",
                hint="with score='kronecker' and a weight the widths may differ.",
            )


def _check_weight(spec: AttentionSpec, shapes: Shapes) -> tuple[str, int]:
    weight = shapes.weight
    if (weight is None) != (spec.score == "khatri_rao"):
        raise OperandError(
            "the weight and the score form do not agree.",
            code="weight-mismatch",
            expected="a weight with score='kronecker', none with score='khatri_rao'",
            got=f"score={spec.score!r} and {'no weight' if weight is None else 'a weight'}",
            hint="pass weight=X, an array (d, d1, .., dk) or a tuple of k + 1 CP factors (d_t, rank).",
        )
    if weight is None:
        return "none", 0
    widths = (shapes.query[-1], *(key[-1] for key in shapes.keys))
    if all(isinstance(size, int) for size in weight):
        if weight != widths:
            raise ShapeError(
                "the full weight must have one axis per operand, each as wide as it.",
                expected=f"weight.shape == {widths}",
                got=f"weight.shape == {weight}",
            )
        return "full", 0
    return "cp", _check_factors(weight, widths)  # type: ignore[arg-type]


def _check_factors(factors: tuple[Shape, ...], widths: Shape) -> int:
    names = ("query", *(f"keys[{t}]" for t in range(len(widths) - 1)))
    rank = factors[0][-1] if factors and len(factors[0]) == 2 else 0
    fits = len(factors) == len(widths) and all(
        len(shape) == 2 and shape == (width, rank) for shape, width in zip(factors, widths, strict=True)
    )
    if not fits or rank < 1:
        wanted = ", ".join(f"({width}, rank) for {name}" for name, width in zip(names, widths, strict=True))
        raise ShapeError(
            "the CP factors of the weight must be one matrix per operand, all with the same number of columns.",
            expected=wanted,
            got=", ".join(str(shape) for shape in factors),
        )
    return rank


def _check_alignment(spec: AttentionSpec, shapes: Shapes) -> None:
    if isinstance(spec.mask, Full):
        return
    align = spec.mask.align
    lengths = tuple(key[-2] for key in shapes.keys)
    if shapes.offsets_given and align is not None:
        raise SpecError(
            "offsets and mask.align both say how positions line up.",
            code="alignment-ambiguous",
            expected="one of them",
            got=f"align={align!r} and offsets",
        )
    if any(length != shapes.query[-2] for length in lengths) and align is None and not shapes.offsets_given:
        raise ShapeError(
            f"a {spec.mask.kind} mask over unequal lengths needs to know how positions line up.",
            code="alignment-missing",
            expected=f"equal lengths, mask.align, or query_offset and key_offsets; n = {shapes.query[-2]}",
            got=f"key lengths {lengths}",
            hint='align="end" puts the last query on the last key of each mode.',
        )


def _check_biases(shapes: Shapes, leading: Shape, queries: int) -> tuple[str | None, ...]:
    kinds: list[str | None] = []
    for t, shape in enumerate(shapes.biases or (None,) * len(shapes.keys)):
        if shape is None:
            kinds.append(None)
            continue
        length = shapes.keys[t][-2]
        target = (*leading, queries, length)
        fits = len(shape) == len(target) and shape[-1] == length
        fits = fits and all(size in (1, full) for size, full in zip(shape[:-1], target[:-1], strict=True))
        if not fits:
            raise ShapeError(
                f"biases[{t}] must be broadcastable to the scores of its mode.",
                expected=f"biases[{t}].shape == {target}, or with 1 in any axis but the last",
                got=f"biases[{t}].shape == {shape}",
            )
        kinds.append("full" if shape[-2] == queries and queries != 1 else "key")
    return tuple(kinds)


def _check_key_masks(shapes: Shapes, batch_axes: Shape, groups: int) -> tuple[bool, ...]:
    for t, shape in enumerate(shapes.key_masks):
        length = shapes.keys[t][-2]
        if shape is not None and shape not in ((*batch_axes, length), (*batch_axes, groups, length)):
            raise ShapeError(
                f"key_masks[{t}] must have one entry per key of its mode.",
                expected=f"key_masks[{t}].shape == {(*batch_axes, length)} or {(*batch_axes, groups, length)}",
                got=f"key_masks[{t}].shape == {shape}",
            )
    return tuple(shape is not None for shape in shapes.key_masks) or (False,) * len(shapes.keys)
