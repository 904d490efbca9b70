"""Parts over disjoint sets of tuples become the whole by their lse: `korder.merge`, certificates included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from korder.result import Certificate, Result

Array = Any


def merge_outputs(xp: Any, outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array, list[Array]]:
    """Return the merged output, the merged lse, and the weight of each part.

    Shapes:
        outputs (b, h, n, e); lses (b, h, n), -inf where a part has nothing; weights (b, h, n), summing to 1 or all 0.
    """
    highest = lses[0]
    for lse in lses[1:]:
        highest = xp.maximum(highest, lse)
    empty = xp.isinf(highest) & (highest < 0)
    shift = xp.where(empty, xp.zeros_like(highest), highest)
    parts = [xp.exp(lse - shift) for lse in lses]
    total = sum(parts[1:], parts[0])
    weights = [
        xp.where(empty, xp.zeros_like(part), part / xp.where(empty, xp.ones_like(total), total)) for part in parts
    ]
    # A part without a tuple must not matter, whatever its output holds.
    terms = [
        xp.where(
            weight[..., None] == 0, xp.zeros_like(weight)[..., None], weight[..., None] * xp.astype(out, weight.dtype)
        )
        for weight, out in zip(weights, outputs, strict=True)
    ]
    merged = sum(terms[1:], terms[0])
    lse = xp.where(empty, highest, shift + xp.log(xp.where(empty, xp.ones_like(total), total)))
    return xp.astype(merged, outputs[0].dtype), lse, weights


def merge_certificates(xp: Any, parts: Sequence[Result], weights: Sequence[Array]) -> Certificate | None:
    """Return the certificate of the merged result, None if no part has one.

    With part errors b_i and lse errors at most s, the weights are off by at most 2 tanh(s / 2) in sum, so the merged
    error is at most max b_i + tanh(s / 2) * (largest difference between the outputs of two parts).
    """
    known = [part.certificate for part in parts]
    if all(certificate is None for certificate in known):
        return None
    zero = xp.zeros_like(weights[0])

    def largest(name: str) -> Array:
        worst = zero
        for certificate, weight in zip(known, weights, strict=True):
            if certificate is not None:
                worst = xp.maximum(worst, xp.where(weight == 0, zero, getattr(certificate, name)))
        return worst

    lse_bound = largest("lse_bound")
    outputs = [xp.astype(part.output, zero.dtype) for part in parts]
    approximation = largest("approximation") + xp.tanh(lse_bound / 2) * _spread(xp, outputs, weights)
    rounding = largest("rounding") + _own_rounding(xp, outputs, weights)
    low, high = _range(xp, known, zero)
    kinds = [certificate.kind for certificate in known if certificate is not None]
    return Certificate(
        bound=approximation + rounding,
        approximation=approximation,
        rounding=rounding,
        lse_bound=lse_bound,
        score_range=xp.stack([low, high], axis=-1),
        kind=kinds[0] if len(set(kinds)) == 1 else "merged",
    )


def _own_rounding(xp: Any, outputs: Sequence[Array], weights: Sequence[Array]) -> Array:
    """Bound of the rounding of the merge itself: a few units in the last place of the largest output a part brings."""
    unit = xp.finfo(weights[0].dtype).eps
    largest = xp.zeros_like(weights[0])
    for output, weight in zip(outputs, weights, strict=True):
        live = xp.where(weight[..., None] == 0, xp.zeros_like(output), xp.abs(output))
        largest = xp.maximum(largest, xp.max(live, axis=-1))
    return (len(outputs) + 8) * unit * largest


def _spread(xp: Any, outputs: Sequence[Array], weights: Sequence[Array]) -> Array:
    """Largest difference over channels between the outputs of the parts that have tuples."""
    infinity = xp.asarray(float("inf"), dtype=outputs[0].dtype)
    low, high = xp.full_like(outputs[0], float("inf")), xp.full_like(outputs[0], -float("inf"))
    for output, weight in zip(outputs, weights, strict=True):
        dead = weight[..., None] == 0
        low = xp.minimum(low, xp.where(dead, infinity, output))
        high = xp.maximum(high, xp.where(dead, -infinity, output))
    gap = xp.max(high - low, axis=-1)
    return xp.where(xp.isfinite(gap), xp.maximum(gap, xp.zeros_like(gap)), xp.zeros_like(gap))


def _range(xp: Any, certificates: Sequence[Certificate | None], zero: Array) -> tuple[Array, Array]:
    """Union of the score ranges; unbounded where an exact part, which has none, took part."""
    if any(certificate is None for certificate in certificates):
        infinity = xp.full_like(zero, float("inf"))
        return -infinity, infinity
    low, high = zero + float("inf"), zero - float("inf")
    for certificate in certificates:
        assert certificate is not None
        low = xp.minimum(low, certificate.score_range[..., 0])
        high = xp.maximum(high, certificate.score_range[..., 1])
    return low, high
