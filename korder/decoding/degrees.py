"""What a polynomial state is made with: its degree and interval, which no later token can change."""

from __future__ import annotations

from math import isfinite
from typing import Any

import numpy as np

from korder.decoding.tokens import TokenLayout, Tokens
from korder.errors import AccuracyError, SpecError, UnsupportedProblemError
from korder.methods.statistics import intervalprod_arrays, round_outward
from korder.planning.coefficients import coefficients_of, ratio_range, shift_bound
from korder.planning.polynomial import FEATURE_BUDGET, HIGHEST_DEGREE, feature_count
from korder.spec import AttentionSpec, Polynomial

Array = Any


def fixed_method(spec: AttentionSpec, layout: TokenLayout, tokens: Tokens, query_bound: float | None) -> Polynomial:
    """Return the spec's method with the degree and the interval that a state keeps.

    Args:
        spec: A spec with the polynomial method.
        layout: The layout of the tokens.
        tokens: The first tokens, whose ranges stand for those of the later ones.
        query_bound: Bound on the absolute entries of queries, or None.

    Raises:
        SpecError: A tolerance without a degree, or minimax without an interval, and no query bound or key to set it.
        UnsupportedProblemError: A mask or a choice that needs the keys themselves.
        AccuracyError: No degree within the budget of features meets the tolerance over the range of scores.
    """
    method = spec.polynomial
    assert method is not None
    _refuse(spec, method)
    bound = _checked_bound(query_bound)
    width = None if bound is None else score_spread(spec, layout, tokens, bound)
    interval = method.interval
    if method.coefficients == "minimax" and interval is None:
        if not width:
            raise _needs_width("minimax coefficients need an interval.", "interval-missing", "method.interval")
        interval = min(max(width, 1e-3), 64.0)
    degree = method.degree
    if degree is None:
        if not width:
            raise _needs_width(
                "a state keeps one degree, and a tolerance alone names none.", "degree-missing", "a degree"
            )
        degree = _degree(method, layout, interval, width)
    return Polynomial(degree=degree, coefficients=method.coefficients, interval=interval)


def _refuse(spec: AttentionSpec, method: Polynomial) -> None:
    if spec.mask.kind not in ("full", "causal"):
        raise UnsupportedProblemError(
            f"a polynomial state has sums over all keys and forgets none, as a {spec.mask.kind} mask would have it.",
            code="decode-unsupported",
            expected="mask Causal() or Full()",
            got=f"mask={spec.mask.kind}",
            hint="method Exact() keeps the keys themselves and takes every mask.",
        )
    needs_keys = {
        "on_exceed": method.on_exceed == "exact",
        "estimate_rows": method.estimate_rows > 0,
        "prune": bool(method.prune),
    }
    for name, given in needs_keys.items():
        if given:
            raise UnsupportedProblemError(
                f"{name} = {getattr(method, name)!r} needs the keys, which a polynomial state does not keep.",
                code="decode-unsupported",
                expected='on_exceed="raise" or "warn", estimate_rows=0 and prune=0',
                got=f"{name}={getattr(method, name)!r}",
                hint="keep a second state with method Exact() for such queries.",
            )


def _checked_bound(query_bound: Any) -> float | None:
    if query_bound is None:
        return None
    if isinstance(query_bound, bool) or not isinstance(query_bound, int | float | np.number):
        raise SpecError("query_bound must be a number.", expected="a positive number", got=repr(query_bound))
    if not (isfinite(query_bound) and query_bound > 0):
        raise SpecError("query_bound must be positive.", expected="a positive number", got=repr(query_bound))
    return float(query_bound)


def score_spread(spec: AttentionSpec, layout: TokenLayout, tokens: Tokens, bound: float) -> float:
    """Return how far any score may lie from another of its row, for queries within a bound; rounded outward.

    The range of a row is the sum over columns of |q| times the range of the products of keys; 0 without a live key.
    """
    if 0 in tokens.counts:
        return 0.0
    xp = layout.namespace
    with np.errstate(all="ignore"):
        ends = [_ends(xp, key, mask) for key, mask in zip(tokens.keys, tokens.key_masks, strict=True)]
        low, high = intervalprod_arrays(xp, [low for low, _ in ends], [high for _, high in ends])
        ranges = xp.sum(high - low, axis=2)
        live = xp.logical_and(xp.isfinite(ranges), ranges > 0.0)
        widest = float(xp.max(xp.where(live, ranges, xp.zeros_like(ranges)))) if layout.batch else 0.0
    return round_outward(abs(spec.score_factor(layout.width)) * bound * widest, 1)


def _ends(xp: Any, keys: Array, mask: Array | None) -> tuple[Array, Array]:
    """Return the least and the largest entries (b, g, w) of each column over live keys."""
    wide = xp.astype(keys, xp.float64)
    infinite = xp.full_like(wide, float("inf"))
    live = xp.ones_like(wide, dtype=xp.bool) if mask is None else xp.broadcast_to(mask[..., None], wide.shape)
    return xp.min(xp.where(live, wide, infinite), axis=2), xp.max(xp.where(live, wide, -infinite), axis=2)


def _needs_width(message: str, code: str, what: str) -> SpecError:
    return SpecError(
        message,
        code=code,
        expected=f"{what}, or query_bound= and at least one key in the prefill",
        got="neither",
        hint="queries come later; query_bound, a bound on their absolute entries, is all that is known of them.",
    )


def _degree(method: Polynomial, layout: TokenLayout, interval: float | None, width: float) -> int:
    """Return the least degree whose error over the whole range of scores is within the tolerance."""
    step = 2 if method.coefficients == "taylor" else 1
    tolerance = method.tolerance
    assert tolerance is not None
    width = min(width, 300.0)  # where no degree is near, and exp still has a value
    for degree in range(step, HIGHEST_DEGREE + 1, step):
        if feature_count(layout.width, degree) > FEATURE_BUDGET:
            break
        coefficients = coefficients_of(method.coefficients, degree, interval)
        if shift_bound(*ratio_range(coefficients, -width, width)) <= tolerance:
            return degree
    raise AccuracyError(
        f"no degree meets tolerance {tolerance:g} for every query within query_bound.",
        code="no-degree",
        expected=f"a degree with at most {FEATURE_BUDGET} features that meets it on the range of scores",
        got=f"scores {width:g} or more apart, d = {layout.width}",
        hint="give a degree as well: its certificate, which is checked at every query, is far sharper than this range.",
    )
