"""C4: backward returns the gradients of the exact method, those that were asked for, through the output and lse."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.checks_value import sum_dtype
from korder.conformance.claims import CORE_ORDERS, KEY_OFFSETS, Claims, combinations, everything, shifted, variants
from korder.conformance.limits import GRADIENT, agree, as_dtype, largest_of, require, within_ratio
from korder.conformance.oracle import WAYS, Transform, gradients, narrowed
from korder.conformance.records import Check
from korder.conformance.subject import Found, Subject, named_gradients
from korder.dispatch.arrays import dtype_name
from korder.spi import NEEDS

Array = Any


def upstream(case: Case) -> tuple[Array, Array]:
    """Return gradients of output (b, h, n, e) and lse (b, h, n) that follow from the case's name."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()) + 1)
    rows = case.query.shape[:3]
    output = as_dtype(rng.standard_normal((*rows, case.values[0].shape[3])), case.dtype)
    return output, as_dtype(rng.standard_normal(rows), case.dtype)


def matches_closed_form(
    subject: Subject, case: Case, pair: tuple[Array, Array | None] | None = None, transform: Transform | None = None
) -> None:
    """Raise unless every gradient is the closed form's; `transform` is that of the polynomial method."""
    output_gradient, lse_gradient = pair or upstream(case)
    result, found = subject.backward(case, output_gradient, lse_gradient)
    given = (output_gradient, lse_gradient)
    compare_gradients(subject, case, named_gradients(found), given, transform, condition=rounding_of(result))


def rounding_of(result: Found) -> float:
    """Return what the limit of gradients is multiplied by: weights made again from lse carry its rounding."""
    return max(GRADIENT, largest_of(result.lse))


def compare_gradients(
    subject: Subject,
    case: Case,
    found: dict[str, Array],
    pair: tuple[Array, Array | None],
    transform: Transform | None = None,
    *,
    condition: float,
) -> None:
    """Raise unless gradients are those of the oracle, by the ratio rule of each operand."""
    exact = gradients(case, *pair, transform=transform)
    plain = [gradients(case, *pair, dtype=sum_dtype(case), transform=transform, way=way) for way in WAYS]
    require(
        set(found) == set(exact),
        "backward did not return the gradients of the operands that were given.",
        expected=", ".join(sorted(exact)),
        got=", ".join(sorted(found)),
    )
    for name, wanted in exact.items():
        within_ratio(
            f"gradient of {name}",
            subject.arrays.numpy(found[name]),
            [narrowed(each[name], case.dtype) for each in plain],
            wanted,
            dtype=case.dtype,
            condition=condition,
        )


def through_output(subject: Subject, case: Case) -> None:
    """A loss that does not use lse."""
    matches_closed_form(subject, case, (upstream(case)[0], None))


def through_lse(subject: Subject, case: Case) -> None:
    """A loss of lse alone."""
    output_gradient, lse_gradient = upstream(case)
    matches_closed_form(subject, case, (np.zeros_like(output_gradient), lse_gradient))


def only_what_is_needed(subject: Subject, case: Case) -> None:
    """Each group of gradients alone is what it is among all of them, and nothing else comes with it."""
    pair = upstream(case)
    _, whole = subject.backward(case, *pair)
    everything_found = named_gradients(whole)
    for need in [*({need} for need in sorted(NEEDS)), {"query", "values"}, set[str]()]:
        _, part = subject.backward(case, *pair, needs=frozenset(need))
        found = named_gradients(part)
        wanted = {name for name in everything_found if name.split("[")[0] in need}
        require(
            set(found) == wanted,
            "backward returned other gradients than those that were asked for.",
            expected=f"for needs={sorted(need)}: {', '.join(sorted(wanted)) or 'None everywhere'}",
            got=", ".join(sorted(found)) or "None everywhere",
        )
        for name in wanted:
            got, same = (subject.arrays.numpy(x[name]) for x in (found, everything_found))
            agree(f"gradient of {name} with needs={sorted(need)}", got, same, dtype=case.dtype, slack=8.0)


def shaped_as_operands(subject: Subject, case: Case) -> None:
    """Gradients are laid out like the operands, in their dtype."""
    _, found = subject.backward(case, *upstream(case))
    for group in ("keys", "values", "biases"):
        entries = getattr(found, group)
        require(
            isinstance(entries, tuple) and len(entries) == case.order,
            f"gradients of {group} must be a tuple with one entry per mode.",
            expected=f"{case.order} entries",
            got=repr(type(entries)) if not isinstance(entries, tuple) else f"{len(entries)} entries",
        )
    operands = case.arrays()
    for name, gradient in named_gradients(found).items():
        got = f"{tuple(gradient.shape)} {dtype_name(gradient)}"
        wanted = f"{tuple(operands[name].shape)} {case.dtype}"
        require(got == wanted, f"the gradient of {name} is not shaped like it.", expected=wanted, got=got)


def differentiable(claims: Claims, method: str = "exact") -> bool:
    """Return whether a backward of a method is claimed."""
    support = claims.method(method)
    return support is not None and support.backward


def _masks(claims: Claims) -> Iterable[Case]:
    for mask in claims.masks("exact") if differentiable(claims) else ():
        for order in claims.orders(*CORE_ORDERS):
            offsets = shifted(mask, query_offset=4, key_offsets=KEY_OFFSETS) if order == 2 else {}
            yield claims.case("gradient", order, mask=mask, **offsets)
            yield claims.case("gradient small blocks", order, mask=mask, small_blocks=True, **offsets)


def _operands(claims: Claims) -> Iterable[Case]:
    if not differentiable(claims):
        return
    for label, options in variants(claims, "exact").items():
        for order in claims.orders(*CORE_ORDERS) if label else ():
            yield claims.case(f"gradient {label}", order, small_blocks=order == 2, **options)
    for mask in claims.masks("exact"):
        for order in claims.orders(2):
            yield claims.case("gradient everything", order, mask=mask, **everything(claims, "exact"))
    if claims.full:
        yield from combinations(claims, "exact")


def _plain(claims: Claims) -> Iterable[Case]:
    for mask in claims.masks("exact") if differentiable(claims) else ():
        for order in claims.orders(*CORE_ORDERS) if mask in ("full", "causal") else ():
            yield claims.case("gradient", order, mask=mask)


def _dtypes(claims: Claims) -> Iterable[Case]:
    for dtype in claims.dtypes[1:] if differentiable(claims) else ():
        for order in claims.orders(*CORE_ORDERS) if claims.accumulates(dtype) else ():
            yield claims.case("gradient", order, mask=claims.masks("exact")[-1], dtype=dtype)


def _all_operands(claims: Claims) -> Iterable[Case]:
    for order in claims.orders(*CORE_ORDERS) if differentiable(claims) else ():
        yield claims.case("gradient everything", order, **everything(claims, "exact"))
    for dtype in claims.dtypes[1:] if differentiable(claims) else ():
        for order in claims.orders(2) if claims.accumulates(dtype) else ():
            yield claims.case("gradient everything", order, dtype=dtype, **everything(claims, "exact"))


CHECKS = (
    Check(
        "C4.1",
        "gradient.masks",
        "Gradients of query, keys and values are the closed form's under every claimed mask.",
        matches_closed_form,
        _masks,
    ),
    Check(
        "C4.2",
        "gradient.operands",
        "So are those of biases and weights, with key masks and grouped heads; shared axes are summed.",
        matches_closed_form,
        _operands,
    ),
    Check("C4.3", "gradient.output", "Without a gradient of lse, it counts as zero.", through_output, _plain),
    Check("C4.4", "gradient.lse", "Gradients pass through lse.", through_lse, _plain),
    Check("C4.5", "gradient.dtypes", "Every claimed dtype keeps to the ratio rule.", matches_closed_form, _dtypes),
    Check(
        "C4.6",
        "gradient.needs",
        "backward returns the gradients that `needs` names, None for all others.",
        only_what_is_needed,
        _all_operands,
    ),
    Check(
        "C4.7", "gradient.shapes", "Gradients have the operands' shapes and dtype.", shaped_as_operands, _all_operands
    ),
)
