"""What a backend claims, as the source of cases: only what is claimed is asked for, and core is asked of everyone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from korder.conformance.cases import Case, Options, random_case
from korder.conformance.limits import as_dtype
from korder.problem import FLOAT_DTYPES, ScoreStatistics
from korder.spec import AttentionSpec, Polynomial
from korder.spi.capabilities import Capabilities, MethodSupport

CORE_ORDERS = (1, 2, 3)
MASKS: dict[str, Any] = {
    "full": {"kind": "full"},
    "causal": {"kind": "causal"},
    "window": {"kind": "window"},
    "ordered": {"kind": "ordered"},
}
WINDOWS = (4, 6, 5, 3, 3, 3)
KEY_OFFSETS = (6, 2, 5, 1, 0, 2)
DEGREES = {1: 5, 2: 4, 3: 2}
PRUNED_MASS = 0.1
"""What may be left out: far more than rounding, and as much as makes a third of the monomials go at least."""
_WIDTHS = ("float64", "float32", "bfloat16", "float16")
_FEW_HEADS: dict[str, Any] = {"heads": 2, "queries": 7}
_SMALL: dict[str, Any] = {"query_width": 2, "value_width": 3, "queries": 11}
_SMALLER: dict[str, Any] = {"heads": 4, "queries": 6}
"""For high orders in every combination, where a score tensor of order 6 is 420 tuples for each row: two query heads
to a key head, so that a wrong grouping is seen."""


@dataclass(frozen=True, slots=True)
class Claims:
    """Capabilities on one device, and how far to go.

    Args:
        facts: What the backend says of itself.
        device: The device that cases are made for.
        full: Whether every claimed combination is wanted.
    """

    facts: Capabilities
    device: str
    full: bool = False

    @property
    def widest(self) -> str:
        """The widest float claimed; float32 where none is."""
        return next((dtype for dtype in _WIDTHS if dtype in self.facts.dtypes), "float32")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The claimed dtypes, widest first."""
        return tuple(dtype for dtype in _WIDTHS if dtype in self.facts.dtypes and dtype in FLOAT_DTYPES)

    def method(self, name: str) -> MethodSupport | None:
        """Return what is claimed of a method, None if nothing."""
        return self.facts.method(name)

    def methods(self) -> tuple[str, ...]:
        """Return the claimed methods that the kit knows."""
        return tuple(name for name in ("exact", "polynomial") if self.method(name) is not None)

    def orders(self, *wanted: int) -> tuple[int, ...]:
        """Return those of the wanted orders that are claimed; of all claimed ones when none is named."""
        return tuple(order for order in wanted or range(1, 7) if order in self.facts.orders)

    def masks(self, method: str) -> tuple[str, ...]:
        """Return the claimed masks of a method, in the kit's order."""
        support = self.method(method)
        return tuple(mask for mask in MASKS if support is not None and mask in support.masks)

    def accumulates(self, dtype: str, precision: str = "input") -> bool:
        """Return whether the sums of a dtype under a precision are among those claimed."""
        wide = dtype == "float64" or precision == "float64"
        return ("float64" if wide else "float32") in self.facts.accumulation

    def case(
        self,
        label: str,
        order: int,
        *,
        method: str = "exact",
        mask: str = "full",
        dtype: str | None = None,
        spec: dict[str, Any] | None = None,
        **options: Any,
    ) -> Case:
        """Return a random case within these claims.

        Args:
            label: What is special about it; order, method, mask and dtype are added to the name.
            order: Number of modes.
            method: "exact" or "polynomial".
            mask: Kind of mask.
            dtype: The widest when None.
            spec: Further keys of the spec.
            options: Fields of `Options`.
        """
        dtype = dtype or self.widest
        shape = {"mask": mask_of(mask, order)} | method_spec(method, order) | (spec or {})
        parts = (method, f"order={order}", mask, dtype, label, self.device if self.device != "cpu" else "")
        name = " ".join(part for part in parts if part)
        score = "kronecker" if options.get("weight") else "khatri_rao"
        if order > len(CORE_ORDERS) or (method == "polynomial" and order > 2):
            options = _SMALL | options
        if method == "polynomial":
            options = _FEW_HEADS | options
        heads = options.get("heads", 4)
        options.setdefault("groups", heads // 2 if self.facts.grouped_heads and heads % 2 == 0 else heads)
        made = AttentionSpec(order=order, score=score, **shape)
        return random_case(name, made, dtype, self.device, Options(**options))


def mask_of(kind: str, order: int) -> dict[str, Any]:
    """Return the mask of a kind as a spec takes it."""
    found: dict[str, Any] = MASKS[kind] | ({"sizes": WINDOWS[:order]} if kind == "window" else {})
    return found


def method_spec(method: str, order: int) -> dict[str, Any]:
    """Return the keys of a spec that name a method; the polynomial one gets scores that suit its degree."""
    if method == "exact":
        return {}
    return {"method": Polynomial(degree=DEGREES.get(order, 2)), "scale": 0.15}


def respelt(case: Case, label: str, **changes: Any) -> Case:
    """Return a case with some of its parts replaced, under another name."""
    return replace(case, name=f"{case.name} {label}".strip(), **changes)


def with_spec(case: Case, **changes: Any) -> Case:
    """Return the same operands under a changed spec."""
    data = {name: getattr(case.spec, name) for name in type(case.spec).model_fields} | changes
    return replace(case, spec=AttentionSpec(**data))


def variants(claims: Claims, method: str) -> dict[str, dict[str, Any]]:
    """Return the options that exercise what is claimed of a method beside masks, by label; "" is none of them."""
    support = claims.method(method)
    if support is None:
        return {}
    found: dict[str, dict[str, Any]] = {"": {}}
    if "key" in support.biases:
        found["key biases"] = {"biases": ("key", "shared", "key", "shared", "key", "shared")}
    if "full" in support.biases:
        found["full biases"] = {"biases": ("full",) * 6}
    if {"key", "full"} <= support.biases:
        found["one bias of each"] = {"biases": ("full", None, "key", None, "shared", "full")}
    found |= {f"{form} weight": {"weight": form} for form in ("cp", "full") if form in support.weights}
    if support.key_masks:
        found["key masks"] = {"key_masks": True}
    if claims.facts.grouped_heads:
        found["one key head"] = {"heads": 3, "groups": 1}
        found["as many key heads"] = {"heads": 3, "groups": 3}
    return found


def everything(claims: Claims, method: str) -> dict[str, Any]:
    """Return options that use all that is claimed of a method at once."""
    support = claims.method(method)
    assert support is not None
    bias = "full" if "full" in support.biases else "key"
    options: dict[str, Any] = {"key_masks": support.key_masks}
    if support.biases:
        options["biases"] = (bias, "key" if "key" in support.biases else None, "shared" if bias == "key" else None)
    if "cp" in support.weights:
        options["weight"] = "cp"
    return options


def shifted(mask: str, **offsets: Any) -> dict[str, Any]:
    """Return offsets where a mask looks at positions, nothing for the full one."""
    return {} if mask == "full" else offsets


def combinations(claims: Claims, method: str) -> Iterable[Case]:
    """Yield every claimed combination of order, mask, dtype and variant, in blocks of both kinds.

    A polynomial of 16-bit operands stops at order 3: above it would only look again at sums in float32.
    """
    for dtype in claims.dtypes:
        if not claims.accumulates(dtype):
            continue
        short = method == "polynomial" and dtype not in ("float64", "float32")
        for order in claims.orders(*(CORE_ORDERS if short else ())):
            for mask in claims.masks(method):
                for number, (label, options) in enumerate(variants(claims, method).items()):
                    offsets = shifted(mask, query_offset=4, key_offsets=KEY_OFFSETS) if number % 2 else {}
                    size = _SMALLER if order > len(CORE_ORDERS) else {}
                    extra = {"small_blocks": number % 3 == order % 3, **size, **offsets, **options}
                    yield claims.case(f"{label} combined", order, method=method, mask=mask, dtype=dtype, **extra)


def uneven(case: Case) -> Case:
    """Return a case whose columns matter less and less, in an order of its own, with the plan that this allows."""
    width = case.query.shape[-1]
    sizes = np.roll(0.4 ** np.arange(width), 2)
    case = replace(case, query=as_dtype(case.query * sizes, case.dtype))
    peaks = [np.max(np.abs(x), axis=(0, 1, 2)) for x in (case.query, *case.keys)]
    terms = np.prod(peaks, axis=0) * 2.0
    reach = float(np.sum(terms)) / 2.0
    columns = tuple(float(x) for x in terms / reach)
    measured = ScoreStatistics(-2.0, 2.0, 2.0, 0.5, columns=columns, centres=(-0.2, 0.2))
    method = Polynomial(degree=4, prune=PRUNED_MASS)
    return replace(with_spec(case, scale=1.0 / reach, method=method), statistics=measured)


def inside_masks(claims: Claims, method: str) -> tuple[str, ...]:
    """Return the simplest claimed mask of a method and the causal one, those that are claimed."""
    masks = claims.masks(method)
    return tuple(mask for mask in masks if mask in ("full", "causal")) or masks[:1]
