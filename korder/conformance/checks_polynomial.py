"""C5: the polynomial method in two parts, kernel against the polynomial of its degree and that against its certificate.

The certificate is computed here by korder, from what the kernel returned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from korder.conformance.arrays import ArrayKind
from korder.conformance.cases import Case
from korder.conformance.checks_gradient import compare_gradients, differentiable, upstream
from korder.conformance.checks_value import MASK_OFFSETS, sum_dtype
from korder.conformance.claims import Claims, combinations, everything, variants, with_spec
from korder.conformance.limits import CENTRE, GRADIENT, MAGNITUDE, agree, as_dtype, require, unit, within_ratio
from korder.conformance.oracle import WAYS, answer, narrowed
from korder.conformance.polynomial_truth import Truth, centre_of, transform_of, truth_of
from korder.conformance.records import Check
from korder.conformance.subject import Found, Subject, named_gradients
from korder.spec import Polynomial

Array = Any
ORDERS = (1, 2, 3)


def _made(subject: Subject, case: Case) -> tuple[Found, Truth, list[Truth], float]:
    """Return what the kernel returned, the truth, a plain evaluation, and the condition of the worst row."""

    def make() -> tuple[Found, Truth, list[Truth], float]:
        found = subject.forward(case, save=True)
        for name in ("normaliser", "moments", "magnitude"):
            require(
                getattr(found, name) is not None,
                "an approximate kernel returned nothing to certify its result with.",
                expected="normaliser, moments and magnitude",
                got=f"no {name}",
            )
        transform = transform_of(case, found)
        truth = truth_of(case, transform)
        return found, truth, [truth_of(case, transform, sum_dtype(case), way) for way in WAYS], _condition(truth)

    made: tuple[Found, Truth, list[Truth], float] = subject.remembered("polynomial", case, make)
    return made


def _condition(truth: Truth) -> float:
    sizes = np.asarray(truth.magnitude, dtype=np.float64)
    return CENTRE * float(np.max(sizes[np.isfinite(sizes)], initial=1.0))


def output_matches(subject: Subject, case: Case) -> None:
    """The output is that of the polynomial, its limit grown by the condition of the monomial sum."""
    found, truth, plain, condition = _made(subject, case)
    shown = [narrowed(each.output, case.dtype) for each in plain]
    within_ratio("output", found.output, shown, truth.output, dtype=case.dtype, condition=condition)


def normaliser_matches(subject: Subject, case: Case) -> None:
    """The normaliser is the sum of the polynomial over live tuples."""
    found, truth, plain, condition = _made(subject, case)
    dtype = case.good_to(found.dtypes["normaliser"])
    within_ratio(
        "normaliser",
        found.normaliser,
        [each.normaliser for each in plain],
        truth.normaliser,
        dtype=dtype,
        condition=condition,
    )


def moments_match(subject: Subject, case: Case) -> None:
    """The moments are the means of the powers of the centred score."""
    found, truth, plain, condition = _made(subject, case)
    terms = np.abs(np.asarray(transform_of(case, found).coefficients))
    dtype = case.good_to(found.dtypes["moments"])
    require(found.moments.shape == truth.moments.shape, "moments have the wrong shape.",
            expected=str(truth.moments.shape), got=str(found.moments.shape))  # fmt: skip
    simple = [each.moments * terms for each in plain]
    within_ratio("moments", found.moments * terms, simple, truth.moments * terms, dtype=dtype, condition=condition)


def magnitude_matches(subject: Subject, case: Case) -> None:
    """The magnitude is the sum of absolute monomial terms over the sum of the polynomial."""
    found, truth, _, _ = _made(subject, case)
    wanted = np.asarray(truth.magnitude, dtype=np.float64)
    require(
        found.magnitude.shape == wanted.shape and bool(np.allclose(found.magnitude, wanted, rtol=MAGNITUDE, atol=0.0)),
        "the magnitude is not the sum of absolute monomial terms over the normaliser.",
        expected=f"within {MAGNITUDE:g} of {_few(wanted)}",
        got=_few(found.magnitude),
    )


def _few(x: Array) -> str:
    return np.array2string(np.ravel(x)[:4], precision=5)


def certificate_holds(subject: Subject, case: Case) -> None:
    """The certificate made from the kernel's numbers is never below the error of its output and lse."""
    from array_api_compat import numpy as xp

    from korder.methods.certificates import certify

    found, truth, _, _ = _made(subject, case)
    kernel = subject.kernel(case)
    declared: Any = getattr(kernel, "rounding_unit", None)
    require(
        isinstance(declared, float) and 0.0 < declared < 0.25,
        "an approximate kernel must declare the rounding unit of its block sums.",
        expected="kernel.rounding_unit, a float above 0 and below 0.25",
        got=repr(declared),
    )
    plain = Subject(subject.backend, subject.claims, ArrayKind("numpy", "cpu", _certified_array))
    raw = found.raw
    arrays = {name: subject.arrays.in_numpy(getattr(raw, name)) for name in
              ("output", "lse", "normaliser", "moments", "magnitude")}  # fmt: skip
    certificate = certify(
        xp, subject.plan(case), plain.operands(case), replace(raw, residuals=None, **arrays), rounding_unit=declared
    )
    exact = answer(case)
    cast = 0.0 if case.dtype in ("float32", "float64") else 0.51 * unit(case.dtype, float(np.max(np.abs(exact.output))))
    live = exact.lse != -np.inf
    with np.errstate(invalid="ignore"):
        lse_error = np.where(live, np.abs(found.lse - exact.lse), 0.0)
    _bounded("output", np.abs(found.output - exact.output).max(-1), np.asarray(certificate.bound) + cast)
    _bounded("polynomial", np.abs(truth.output - exact.output).max(-1), np.asarray(certificate.bound))
    _bounded("lse", lse_error, np.asarray(certificate.lse_bound))
    useful = float(np.mean(np.isfinite(np.asarray(certificate.bound))))
    require(useful == 1.0, "the certificate says nothing.", expected="finite bounds", got=f"{useful:.0%} of the rows")


def _certified_array(x: Array, dtype: str, device: str) -> Array:
    """Return an operand for the certificate, which is computed in numpy whatever the kind of the backend."""
    with np.errstate(over="ignore"):
        return x.astype("float32" if dtype == "bfloat16" else dtype)


def _bounded(name: str, found: Array, bound: Array) -> None:
    worst = np.unravel_index(int(np.argmax(found - bound)), found.shape)
    require(
        bool(np.all(found <= bound)),
        f"the error of the {name} is above its certificate.",
        expected=f"at most {float(bound[worst]):.3e} in row {tuple(map(int, worst))}",
        got=f"{float(found[worst]):.3e}",
    )


def residuals_fix_statistics(subject: Subject, case: Case) -> None:
    """With the residuals of an earlier call, other operands are computed about that call's centre."""
    kernel = subject.kernel(case)
    first = subject.forward(case, kernel=kernel, save=True)
    require(first.raw.residuals is not None, "save=True kept nothing.", expected="residuals", got="None")
    moved = replace(case, query=as_dtype(1.25 * case.query + 0.125, case.dtype))
    second = subject.forward(moved, kernel=kernel, residuals=first.raw.residuals)
    dtype = case.good_to(first.dtypes["lse"])
    agree("centre under residuals", centre_of(moved, second), centre_of(case, first), dtype=dtype, slack=64.0)
    again = subject.forward(case, kernel=kernel, residuals=first.raw.residuals)
    agree("output under its own residuals", again.output, first.output, dtype=case.dtype, slack=8.0)


def backward_matches(subject: Subject, case: Case) -> None:
    """Gradients are those that the plan names: of the polynomial with its centre held constant, or the closed form."""
    pair = upstream(case)
    if case.spec.polynomial is not None and case.spec.polynomial.gradient == "consistent":
        found, truth, _, _ = _made(subject, case)
        _, given = subject.backward(case, *pair, found=found)
        transform = transform_of(case, found)
    else:
        found, given = subject.backward(case, *pair)
        transform = transform_of(case, found)
        truth = truth_of(case, transform)
    condition = GRADIENT * _condition(truth)
    compare_gradients(subject, case, named_gradients(given), pair, transform, condition=condition)


def sum_is_positive(subject: Subject, case: Case) -> None:
    """A finite sum that is not positive, in a row with a live tuple, raises; whether it is depends on the centre."""
    try:
        found = subject.forward(case)
    except ArithmeticError:
        return
    lowest = float("nan") if found.normaliser is None else float(np.min(found.normaliser))
    require(
        lowest > 0.0,
        "a polynomial that sums to a number that is not positive must raise.",
        expected="AccuracyError, or another ArithmeticError",
        got=f"normaliser {lowest:g}",
    )


def _claimed(claims: Claims) -> tuple[str, ...]:
    return claims.masks("polynomial")


def _cases(claims: Claims) -> Iterable[Case]:
    for mask in _claimed(claims):
        for order in claims.orders(*ORDERS):
            for number, (label, options) in enumerate(variants(claims, "polynomial").items()):
                if order != 2 and number % 3 and not claims.full:
                    continue
                yield claims.case(label, order, method="polynomial", mask=mask, small_blocks=number % 2 == 0, **options)
        for order in claims.orders(2):
            for label, offsets in MASK_OFFSETS.items() if mask != "full" else ():
                yield claims.case(label, order, method="polynomial", mask=mask, **offsets)
            yield claims.case("everything", order, method="polynomial", mask=mask, **everything(claims, "polynomial"))
    yield from _degrees(claims)
    if claims.full:
        yield from combinations(claims, "polynomial")


def _degrees(claims: Claims) -> Iterable[Case]:
    """Yield other degrees, other coefficients and narrower dtypes."""
    for mask in _claimed(claims):
        for order in claims.orders(2):
            for degree in (0, 1, 2, 7):
                spec: dict[str, Any] = {"method": Polynomial(degree=degree)}
                yield claims.case(f"degree={degree}", order, method="polynomial", mask=mask, spec=spec, query_width=3)
            minimax: dict[str, Any] = {"method": Polynomial(degree=3, coefficients="minimax", interval=2.0)}
            yield claims.case("minimax", order, method="polynomial", mask=mask, spec=minimax)
            for dtype in claims.dtypes[1:]:
                if claims.accumulates(dtype):
                    yield claims.case("", order, method="polynomial", mask=mask, dtype=dtype)


def _certified(claims: Claims) -> Iterable[Case]:
    """Yield the cases whose certificate says something: a degree that is good for the scores."""
    for case in _cases(claims):
        if "degree=0" not in case.name and "degree=1" not in case.name:
            yield case


def _backward(claims: Claims) -> Iterable[Case]:
    if differentiable(claims, "polynomial"):
        for case in _cases(claims):
            if claims.full or "offsets" not in case.name:
                yield case


def _closed_form(claims: Claims) -> Iterable[Case]:
    """Yield the same cases with the closed form, where that is claimed."""
    support = claims.method("polynomial")
    for case in _backward(claims):
        method = case.spec.polynomial
        if support is not None and method is not None and case.spec.mask.kind in support.closed_form:
            closed = with_spec(case, method=method.model_copy(update={"gradient": "closed_form"}))
            yield replace(closed, name=f"{case.name} closed form")


def _few_cases(claims: Claims) -> Iterable[Case]:
    for mask in _claimed(claims):
        for order in claims.orders(*ORDERS):
            yield claims.case("residuals", order, method="polynomial", mask=mask)


def _negative(claims: Claims) -> Iterable[Case]:
    for mask in _claimed(claims):
        for order in claims.orders(1):
            for side in (1.0, -1.0):
                label = f"one score far {'above' if side > 0 else 'below'}"
                case = claims.case(label, order, method="polynomial", mask=mask, batch=1, query_offset=2)
                keys = np.zeros_like(case.keys[0])
                keys[:, :, 0, :] = side
                case = replace(case, query=np.ones_like(case.query), keys=(keys,))
                minimax = Polynomial(degree=1, coefficients="minimax", interval=0.5)
                for method in (minimax, Polynomial(degree=3)):
                    made = with_spec(case, method=method, scale=8.0)
                    yield replace(made, name=f"{case.name} {method.coefficients}")


def _check(number: str, name: str, behaviour: str, run: Callable[[Subject, Any], None], cases: Any = _cases) -> Check:
    return Check(number, name, behaviour, run, cases)


CHECKS = (
    _check(
        "C5.1",
        "polynomial.output",
        "The output is that of the polynomial of the plan's degree and coefficients.",
        output_matches,
    ),
    _check(
        "C5.2",
        "polynomial.normaliser",
        "The normaliser is the polynomial's sum over live tuples, and fits lse.",
        normaliser_matches,
    ),
    _check("C5.3", "polynomial.moments", "The moments are the means of powers 0 to degree.", moments_match),
    _check(
        "C5.4",
        "polynomial.magnitude",
        "The magnitude is the sum of absolute monomial terms over the normaliser.",
        magnitude_matches,
    ),
    _check(
        "C5.5",
        "polynomial.certificate",
        "The certificate that korder makes of these and the declared rounding unit holds against the exact answer.",
        certificate_holds,
        _certified,
    ),
    _check(
        "C5.6",
        "polynomial.residuals",
        "The residuals of an earlier call fix the statistics of a later one.",
        residuals_fix_statistics,
        _few_cases,
    ),
    _check(
        "C5.7",
        "polynomial.gradient",
        "Gradients are those of the polynomial, its statistics held constant.",
        backward_matches,
        _backward,
    ),
    _check(
        "C5.8",
        "polynomial.positive",
        "A sum that is not positive raises an ArithmeticError.",
        sum_is_positive,
        _negative,
    ),
    _check(
        "C5.9",
        "polynomial.closed_form",
        "Where the closed form of gradients is asked for, they are the exact method's with the polynomial's weights.",
        backward_matches,
        _closed_form,
    ),
)
