"""C2: the exact method returns the oracle's numbers, for everything that is claimed, by the ratio rule."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.claims import CORE_ORDERS, KEY_OFFSETS, Claims, combinations, everything, respelt, variants
from korder.conformance.limits import within_ratio
from korder.conformance.oracle import WAYS, answer, narrowed
from korder.conformance.records import Check
from korder.conformance.subject import Found, Subject

Array = Any
MASK_OFFSETS: dict[str, dict[str, Any]] = {
    "offsets": {"query_offset": 4, "key_offsets": KEY_OFFSETS},
    "late keys": {"query_offset": 0, "key_offsets": (2, 3, 1, 0, 0, 0)},
    "negative offsets": {"query_offset": -3, "key_offsets": (-5, -4, -6, -3, -3, -3)},
}
FAR = 2**40


def matches_oracle(subject: Subject, case: Case, found: Found | None = None) -> None:
    """Raise unless output and lse are the oracle's."""
    found = found or subject.forward(case)
    exact, dtype, lse_dtype = answer(case), sum_dtype(case), case.good_to(found.dtypes["lse"])
    plain = [answer(case, dtype, way=way) for way in WAYS]
    outputs = [narrowed(each.output, case.dtype) for each in plain]
    within_ratio("output", found.output, outputs, exact.output, dtype=case.dtype)
    within_ratio("lse", found.lse, [narrowed(each.lse, lse_dtype) for each in plain], exact.lse, dtype=lse_dtype)


def sum_dtype(case: Case) -> Any:
    """Return the numpy type that a case is summed in."""
    return np.dtype(case.problem().accumulation).type


def _core(claims: Claims) -> Iterable[Case]:
    if "full" in claims.masks("exact"):
        for order in claims.orders(*CORE_ORDERS):
            yield claims.case("", order)
            yield claims.case("small blocks", order, small_blocks=True)


def _orders(claims: Claims) -> Iterable[Case]:
    for order in claims.orders(4, 5, 6):
        for mask in claims.masks("exact"):
            yield claims.case("", order, mask=mask, small_blocks=order % 2 == 0)


def _masks(claims: Claims) -> Iterable[Case]:
    for mask in claims.masks("exact"):
        for order in claims.orders(*CORE_ORDERS) if mask != "full" else ():
            yield claims.case("", order, mask=mask)
            yield claims.case("small blocks", order, mask=mask, small_blocks=True)


def _offsets(claims: Claims) -> Iterable[Case]:
    for mask in claims.masks("exact"):
        for order in claims.orders(*CORE_ORDERS) if mask != "full" else ():
            for label, options in MASK_OFFSETS.items():
                yield claims.case(label, order, mask=mask, small_blocks=order == 2, **options)


def offsets_belong_to_the_call(subject: Subject, case: Case) -> None:
    """One kernel, called with several offsets, gives each its own rows; far positions count by their difference."""
    kernel = subject.kernel(case)
    for query_offset, far in ((5, 0), (0, 0), (3, FAR), (-2, -FAR)):
        offsets = tuple(offset + far for offset in KEY_OFFSETS[: case.order])
        moved = replace(case, query_offset=query_offset + far, key_offsets=offsets)
        matches_oracle(subject, moved, subject.forward(moved, kernel=kernel))


def _one_kernel(claims: Claims) -> Iterable[Case]:
    for mask in claims.masks("exact"):
        for order in claims.orders(2) if mask != "full" else ():
            yield claims.case("several calls", order, mask=mask)


def _options(*labels: str) -> Any:
    """Return cases of those variants, under the full mask and, if claimed, the causal one."""

    def cases(claims: Claims) -> Iterable[Case]:
        masks = [mask for mask in claims.masks("exact") if mask in ("full", "causal")]
        for label, options in variants(claims, "exact").items():
            for order in claims.orders(*CORE_ORDERS) if label in labels else ():
                for mask in masks:
                    yield claims.case(label, order, mask=mask, **options)
                yield claims.case(f"{label} small blocks", order, mask=masks[-1], small_blocks=True, **options)

    return cases


def _dtypes(claims: Claims) -> Iterable[Case]:
    for dtype in claims.dtypes[1:]:
        for order in claims.orders(*CORE_ORDERS) if claims.accumulates(dtype) else ():
            for mask in claims.masks("exact"):
                yield claims.case("", order, mask=mask, dtype=dtype)


def _precision(claims: Claims) -> Iterable[Case]:
    for dtype in claims.dtypes:
        for precision in ("float32", "float64"):
            if claims.accumulates(dtype, precision):
                for order in claims.orders(2):
                    yield claims.case(
                        f"sums {precision}", order, dtype=dtype, spec={"policy": {"precision": precision}}
                    )


def _scales(claims: Claims) -> Iterable[Case]:
    for order in claims.orders(*CORE_ORDERS):
        for scale in ("inverse_sqrt_dim", "inverse_dim", 0.7, -0.4, 0.0):
            yield claims.case(f"scale={scale}", order, spec={"scale": scale})


def _together(claims: Claims) -> Iterable[Case]:
    if claims.method("exact") is None:
        return
    for mask in claims.masks("exact"):
        for order in claims.orders(2, 3):
            yield claims.case("everything", order, mask=mask, **everything(claims, "exact"))
    if claims.full:
        yield from combinations(claims, "exact")


def _sizes(claims: Claims) -> Iterable[Case]:
    for order in claims.orders(2):
        yield claims.case("one batch", order, batch=1, heads=2, groups=2, queries=13, value_width=9)
        case = claims.case("value wider than score", order, query_width=2, value_width=11)
        yield case
        yield respelt(case, "turned", keys=case.keys[::-1], values=case.values[::-1])


CHECKS = (
    Check(
        "C2.1",
        "value.core",
        "Orders 1, 2 and 3 with the full mask, exact, in the widest float claimed, return the oracle's output and lse.",
        matches_oracle,
        _core,
        level="core",
    ),
    Check("C2.2", "value.orders", "So do higher orders that are claimed.", matches_oracle, _orders),
    Check("C2.3", "value.masks", "Every claimed mask closes exactly the tuples that it names.", matches_oracle, _masks),
    Check(
        "C2.4", "value.offsets", "Positions are index + offset, for queries and each mode.", matches_oracle, _offsets
    ),
    Check(
        "C2.5",
        "value.one_kernel",
        "Offsets belong to the call: one kernel takes any, as large as 2^40.",
        offsets_belong_to_the_call,
        _one_kernel,
    ),
    Check(
        "C2.6",
        "value.biases",
        "Biases are added to the scores; axes of 1 are shared.",
        matches_oracle,
        _options("key biases", "full biases", "one bias of each"),
    ),
    Check(
        "C2.7",
        "value.weights",
        "A Kronecker weight, full or in CP form, makes the score; widths may differ.",
        matches_oracle,
        _options("cp weight", "full weight"),
    ),
    Check("C2.8", "value.key_masks", "Masked keys are left out.", matches_oracle, _options("key masks")),
    Check(
        "C2.9",
        "value.heads",
        "Query head i reads key head i // (h // g).",
        matches_oracle,
        _options("one key head", "as many key heads"),
    ),
    Check("C2.10", "value.dtypes", "Every claimed dtype keeps to the ratio rule.", matches_oracle, _dtypes),
    Check(
        "C2.11", "value.precision", "Sums are made in the dtype that the policy asks for.", matches_oracle, _precision
    ),
    Check("C2.12", "value.scale", "The scale is the spec's: 1/sqrt(d), 1/d or a number.", matches_oracle, _scales),
    Check("C2.13", "value.sizes", "Widths and lengths are independent of each other.", matches_oracle, _sizes),
    Check(
        "C2.14",
        "value.together",
        "What is claimed holds together too; the full level runs every claimed combination.",
        matches_oracle,
        _together,
    ),
)
