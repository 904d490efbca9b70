"""C5.11: plans of the polynomial method that leave monomials out are computed with those that they keep."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from korder.conformance.cases import Case
from korder.conformance.checks_gradient import differentiable
from korder.conformance.checks_polynomial import (
    backward_matches,
    certificate_holds,
    magnitude_matches,
    moments_match,
    normaliser_matches,
    output_matches,
)
from korder.conformance.claims import Claims, uneven
from korder.conformance.records import Check
from korder.conformance.subject import Subject


def pruned_matches(subject: Subject, case: Case) -> None:
    """Everything is that of the kept monomials: numbers, certificate and, where a backward is claimed, gradients."""
    for matches in (output_matches, normaliser_matches, moments_match, magnitude_matches, certificate_holds):
        matches(subject, case)
    if differentiable(subject.claims, "polynomial"):
        backward_matches(subject, case)


def _cases(claims: Claims) -> Iterable[Case]:
    support = claims.method("polynomial")
    if support is None:
        return
    for mask in (mask for mask in claims.masks("polynomial") if mask in support.pruned):
        for order in claims.orders(1, 2, 3):
            for dtype in claims.dtypes if order == 2 else claims.dtypes[:1]:
                if claims.accumulates(dtype):
                    small: dict[str, Any] = {
                        "small_blocks": order == 2,
                        "key_masks": support.key_masks,
                        "query_width": 5,
                    }
                    case = claims.case("pruned", order, method="polynomial", mask=mask, dtype=dtype, **small)
                    yield uneven(case)


CHECKS = (
    Check(
        "C5.11",
        "polynomial.pruned",
        "A plan that leaves monomials out is computed with those that it keeps, and no others.",
        pruned_matches,
        _cases,
    ),
)
