"""One call as a list of tensors, a text and a few integers: what a custom op, and a tracing compiler, can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from korder.dispatch.arrays import checked_backend_name, each_mode, read_operands, resolve_spec
from korder.dispatch.request import make_request
from korder.dispatch.run import Request
from korder.errors import OperandError
from korder.problem import OutlierLevel, ScoreStatistics
from korder.spec import AttentionSpec
from korder.spi.operands import OperandGradients


@dataclass(frozen=True, slots=True)
class Packed:
    """The tensors of a call, in the order query, keys, values, weight, biases, key masks, and everything else."""

    tensors: list[Tensor]
    text: str
    offsets: list[int]
    """1, query offset and key offsets; 0 if none was given (an op's list should never be empty)."""

    def with_choice(self, statistics: ScoreStatistics | None, rank: int, backend: str) -> str:
        """Return the text of this call, to be run by one backend and from the plan of a rank on."""
        shape, _, spec, _ = self.text.split("\n", 3)
        shape = f"{rank} {shape.split(' ', 1)[1]}"
        return "\n".join([shape, _statistics_text(statistics), spec, backend])


@dataclass(frozen=True, slots=True)
class Layout:
    """What the text of a call says."""

    spec: AttentionSpec | None
    rank: int
    """Of the best plan that may be taken."""
    order: int
    values: int
    """Values given; another number than the order is for the problem to refuse."""
    factors: int
    """CP factors of the weight; 0 for a full weight, -1 for none."""
    biases: tuple[bool, ...]
    """Which modes have one; empty if there are none."""
    key_masks: tuple[bool, ...]
    statistics: ScoreStatistics | None
    backend: str

    @property
    def names(self) -> list[str]:
        """What each tensor is called in the user's call."""
        weights = ["weight"] if self.factors == 0 else [f"weight[{t}]" for t in range(self.factors)]
        biases = [f"biases[{t}]" for t, given in enumerate(self.biases) if given]
        masks = [f"key_masks[{t}]" for t, given in enumerate(self.key_masks) if given]
        return [
            "query",
            *(f"keys[{t}]" for t in range(self.order)),
            *(f"values[{t}]" for t in range(self.values)),
            *weights,
            *biases,
            *masks,
        ]

    @property
    def groups(self) -> list[str]:
        """The name that `needs` of a kernel has for each tensor."""
        return [name.split("[")[0] for name in self.names]


def pack(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    spec: AttentionSpec | None,
    weight: Tensor | Sequence[Tensor] | None,
    biases: Sequence[Tensor | None] | None,
    key_masks: Sequence[Tensor | None] | None,
    query_offset: int | None,
    key_offsets: Sequence[int] | None,
    statistics: ScoreStatistics | None,
    backend: str,
) -> Packed:
    """Return a call packed; plain Python without a look at values or shapes, so that a compiler can trace it.

    Raises:
        OperandError: Something that is not a tensor, or of the wrong type.
    """
    keys, values = each_mode(keys, "keys"), each_mode(values, "values")
    biases = each_mode(biases, "biases") if biases is not None else ()
    key_masks = each_mode(key_masks, "key_masks") if key_masks is not None else ()
    weights: list[Any] = []
    factors = -1
    if weight is not None:
        many = isinstance(weight, (tuple, list))
        weights, factors = [*weight] if many else [weight], len(weight) if many else 0
    tensors = [query, *keys, *values, *weights]
    tensors += [x for x in biases if x is not None]
    tensors += [x for x in key_masks if x is not None]
    offsets = [0]
    if query_offset is not None or key_offsets is not None:
        offsets = [1, query_offset or 0, *(key_offsets if key_offsets is not None else [0] * len(keys))]
    if not all([isinstance(x, Tensor) for x in tensors]):  # noqa: C419 - a compiler traces lists, not generators
        read_operands(query, keys, values, weight=weight, biases=biases or None, key_masks=key_masks or None)
    if statistics is not None and not isinstance(statistics, ScoreStatistics):
        raise OperandError(
            "statistics must be what measure returns.", expected="korder.measure(...)", got=repr(statistics)
        )
    spec = None if spec is None else resolve_spec(spec, len(keys), weighted=factors >= 0)
    shape = f"0 {len(keys)} {len(values)} {factors} {_bits(biases)} {_bits(key_masks)}"
    text = "\n".join(
        [shape, _statistics_text(statistics), "" if spec is None else spec.text, checked_backend_name(backend)]
    )
    return Packed(tensors, text, offsets)


def _bits(entries: Sequence[Any]) -> str:
    return "-" + "".join(["0" if x is None else "1" for x in entries])


def _statistics_text(statistics: ScoreStatistics | None) -> str:
    if statistics is None:
        return ""
    rows = [[statistics.score_low, statistics.score_high, statistics.half_width, statistics.rms]]
    rows += [[*statistics.centres, *statistics.columns]]
    rows += [[x.threshold, len(x.keys), *x.keys, *x.missing] for x in statistics.levels]
    return "|".join([" ".join([repr(number) for number in row]) for row in rows])


def _read_statistics(text: str) -> ScoreStatistics:
    first, second, *rows = (row.split() for row in text.split("|"))
    low, high, half_width, rms = map(float, first)
    lowest, highest, *columns = map(float, second)
    levels = []
    for threshold, count, *numbers in rows:
        found = tuple(map(int, numbers))
        levels.append(OutlierLevel(float(threshold), found[: int(count)], found[int(count) :]))
    return ScoreStatistics(low, high, half_width, rms, tuple(levels), tuple(columns), (lowest, highest))


@lru_cache(maxsize=256)
def read_text(text: str) -> Layout:
    """Return what the text of a call says."""
    shape, known, spec, backend = text.split("\n", 3)
    rank, order, values, factors, biases, masks = shape.split(" ")
    return Layout(
        spec=AttentionSpec.model_validate_json(spec) if spec else None,
        rank=int(rank),
        order=int(order),
        values=int(values),
        factors=int(factors),
        biases=tuple(bit == "1" for bit in biases[1:]),
        key_masks=tuple(bit == "1" for bit in masks[1:]),
        statistics=_read_statistics(known) if known else None,
        backend=backend,
    )


def arguments_of(tensors: Sequence[Tensor], text: str, offsets: Sequence[int]) -> dict[str, Any]:
    """Return the arguments of `attend` that a packed call was made of."""
    layout = read_text(text)
    remaining = iter(tensors)
    query = next(remaining)
    keys = tuple(next(remaining) for _ in range(layout.order))
    values = tuple(next(remaining) for _ in range(layout.values))
    weight: Any = None
    if layout.factors >= 0:
        weight = next(remaining) if layout.factors == 0 else tuple(next(remaining) for _ in range(layout.factors))
    biases = tuple(next(remaining) if given else None for given in layout.biases)
    key_masks = tuple(next(remaining) if given else None for given in layout.key_masks)
    return {
        "query": query,
        "keys": keys,
        "values": values,
        "spec": layout.spec,
        "weight": weight,
        "biases": biases or None,
        "key_masks": key_masks or None,
        "query_offset": offsets[1] if offsets[0] else None,
        "key_offsets": tuple(offsets[2:]) if offsets[0] else None,
        "statistics": layout.statistics,
        "backend": layout.backend,
    }


def request_of(tensors: Sequence[Tensor], text: str, offsets: Sequence[int]) -> Request:
    """Return the request of a packed call, checked but not measured.

    Raises:
        ShapeError, SpecError, OperandError: As `attend`.
    """
    return make_request(**arguments_of(tensors, text, offsets), measured=False)[1]


def gradients_of(tensors: Sequence[Tensor], layout: Layout, found: OperandGradients) -> list[Tensor | None]:
    """Return a kernel's gradients in the order and the shapes of the tensors of the call, None for masks."""
    weight = found.weight
    weights = (
        list(weight) if isinstance(weight, tuple) else [weight] * (1 if layout.factors == 0 else max(layout.factors, 0))
    )
    biases = [x for x, given in zip(found.biases, layout.biases, strict=False) if given]
    gradients = [found.query, *found.keys, *found.values, *weights, *biases]
    batch = tensors[0].shape[:-3]
    masks = [None] * (len(tensors) - len(gradients))
    return [_shaped(x, like, batch) for x, like in zip([*gradients, *masks], tensors, strict=True)]


def _shaped(gradient: Tensor | None, like: Tensor, batch: Sequence[int]) -> Tensor | None:
    """Return a gradient in the shape of its tensor; a bias that was the same for batch entries gets their sum."""
    if gradient is None or gradient.numel() == like.numel():
        return None if gradient is None else gradient.reshape(like.shape)
    return gradient.reshape((*batch, *gradient.shape[1:])).sum_to_size(like.shape)
