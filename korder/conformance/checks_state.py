"""C5, decoding: a state fed in pieces reads as the polynomial over all of its keys, for those who claim states."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from array_api_compat import device

from korder.conformance.cases import Case
from korder.conformance.checks_value import sum_dtype
from korder.conformance.claims import Claims, with_spec
from korder.conformance.limits import CENTRE, MAGNITUDE, agree, require, within_ratio
from korder.conformance.oracle import WAYS, narrowed
from korder.conformance.polynomial_truth import transform_of, truth_of
from korder.conformance.records import Check
from korder.conformance.subject import Subject
from korder.spi import Operands

Array = Any
CUTS = (0, 0, 1, 3)
"""Where the pieces of the keys begin; the first is empty."""


def state_matches(subject: Subject, case: Case) -> None:
    """A reading of all keys is the polynomial's, and extending a state leaves it as it was."""
    kernel: Any = subject.kernel(case)
    require(
        callable(getattr(kernel, "states", None)),
        "a kernel whose method claims a state must have states().",
        expected="kernel.states() with empty, extend, read",
        got=f"a {type(kernel).__name__} without it",
    )
    states, operands = kernel.states(), subject.operands(case)
    with np.errstate(all="ignore"):
        state = states.empty(device(operands.query))
        for start, stop in zip(CUTS, (*CUTS[1:], None), strict=True):
            early, state = state, states.extend(state, *_piece(operands, slice(start, stop)))
        before = subject.read(states.read(early, operands.query))
        states.extend(early, *_piece(operands, slice(0, 2)))
        after = subject.read(states.read(early, operands.query))
        found = subject.read(states.read(state, operands.query))
    for name in ("output", "lse"):
        agree(f"{name} of a state that was extended", getattr(after, name), getattr(before, name), dtype="float64")
    transform = transform_of(case, found)
    truth = truth_of(case, transform)
    plain = [truth_of(case, transform, sum_dtype(case), way) for way in WAYS]
    sizes = np.asarray(truth.magnitude, dtype=np.float64)
    condition = CENTRE * float(np.max(sizes[np.isfinite(sizes)], initial=1.0))
    shown = [narrowed(each.output, case.dtype) for each in plain]
    within_ratio("output", found.output, shown, truth.output, dtype=case.dtype, condition=condition)
    sums = [each.normaliser for each in plain]
    within_ratio("normaliser", found.normaliser, sums, truth.normaliser, dtype="float64", condition=condition)
    require(
        bool(np.allclose(found.magnitude, sizes, rtol=MAGNITUDE, atol=0.0)),
        "the magnitude is not the sum of absolute monomial terms over the normaliser.",
        expected=f"within {MAGNITUDE:g} of {sizes.max():g}",
        got=f"{np.max(found.magnitude):g}",
    )


def _piece(operands: Operands, part: slice) -> tuple[tuple[Array, ...], ...]:
    """Return keys, values and masks of a part of every mode."""
    keys, values = (tuple(x[:, :, part, :] for x in arrays) for arrays in (operands.keys, operands.values))
    return keys, values, tuple(None if mask is None else mask[:, :, part] for mask in operands.key_masks)


def _cases(claims: Claims) -> Iterable[Case]:
    """Yield cases whose sums are float64, as those of states are."""
    support = claims.method("polynomial")
    if support is None or not support.state:
        return
    for order in claims.orders(1, 2, 3):
        for dtype in claims.dtypes if order == 2 else claims.dtypes[:1]:
            if claims.accumulates(dtype, "float64"):
                case = claims.case("state", order, method="polynomial", dtype=dtype, key_masks=support.key_masks)
                yield with_spec(case, policy={"precision": "float64"})


CHECKS = (
    Check(
        "C5.10",
        "polynomial.state",
        "A state that was fed in pieces reads as the polynomial over all keys, and is a value.",
        state_matches,
        _cases,
    ),
)
