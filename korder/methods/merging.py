"""Parts over disjoint sets of tuples become the whole by their lse: `korder.merge`, certificates included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from korder.result import Certificate, Result

Array = Any


def merge_outputs(xp: Any, outputs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Return the merged output and the merged lse.

    Shapes:
        outputs (b, h, n, e); lses (b, h, n), -inf where a part has no tuple, and then its output does not matter.
    """
    wide = max((lse.dtype for lse in lses), key=lambda dtype: xp.finfo(dtype).bits)
    lses = [xp.astype(lse, wide) for lse in lses]
    highest = lses[0]
    for lse in lses[1:]:
        highest = xp.maximum(highest, lse)
    empty = xp.isinf(highest) & (highest < 0)
    shift = xp.where(empty, xp.zeros_like(highest), highest)
    shares = [xp.exp(lse - shift) for lse in lses]
    total = sum(shares[1:], shares[0])
    safe = xp.where(empty, xp.ones_like(total), total)
    terms = [
        xp.astype(_selected(xp, output, lse), total.dtype) * (share / safe)[..., None]
        for output, lse, share in zip(outputs, lses, shares, strict=True)
    ]
    merged = sum(terms[1:], terms[0])
    lse = xp.where(empty, highest, shift + xp.log(safe))
    return xp.astype(merged, outputs[0].dtype), lse


def _live(lse: Array) -> Array:
    return lse != -float("inf")


def _selected(xp: Any, output: Array, lse: Array) -> Array:
    """The output with zeros in the rows of a part that has no tuple."""
    return xp.where(_live(lse)[..., None], output, xp.zeros_like(output))


def merge_certificates(xp: Any, parts: Sequence[Result], lse: Array) -> Certificate | None:
    """Return the certificate of the merged result, None if no part has one.

    With part errors b_i and lse errors at most s, the weights are off by at most 2 tanh(s / 2) in sum, so the merged
    error is at most max b_i + tanh(s / 2) * (largest difference between the outputs of two parts). A part counts unless
    it has no tuple at all, however small its weight came out: its own lse may be what is wrong.
    """
    known = [part.certificate for part in parts]
    if all(certificate is None for certificate in known):
        return None
    zero = xp.zeros_like(_first_bound(known))

    def largest(name: str) -> Array:
        worst = zero
        for certificate, part in zip(known, parts, strict=True):
            if certificate is not None:
                worst = xp.maximum(worst, xp.where(_live(part.lse), getattr(certificate, name), zero))
        return worst

    shift = largest("lse_bound")
    approximation = largest("approximation") + _moved(xp, parts, shift)
    rounding = largest("rounding") + _own_rounding(xp, parts, zero)
    unit = float(xp.finfo(lse.dtype).eps)
    finite = xp.where(xp.isfinite(lse), xp.abs(lse), xp.zeros_like(lse))
    low, high = _range(xp, known, zero)
    kinds = [certificate.kind for certificate in known if certificate is not None]
    return Certificate(
        bound=approximation + rounding,
        approximation=approximation,
        rounding=rounding,
        lse_bound=shift + (len(parts) + 8) * unit * (1.0 + xp.astype(finite, zero.dtype)),
        score_range=xp.stack([low, high], axis=-1),
        kind=kinds[0] if len(set(kinds)) == 1 else "merged",
    )


def _first_bound(certificates: Sequence[Certificate | None]) -> Array:
    """Return the bound of the first certificate there is."""
    return next(certificate.bound for certificate in certificates if certificate is not None)


def _moved(xp: Any, parts: Sequence[Result], shift: Array) -> Array:
    """Bound of what weights that are off may move the output by: tanh(shift / 2) times the spread of the parts."""
    like = xp.astype(parts[0].output, shift.dtype)
    low, high = xp.full_like(like, float("inf")), xp.full_like(like, -float("inf"))
    alive = xp.zeros_like(shift)
    for part in parts:
        output, live = xp.astype(part.output, shift.dtype), _live(part.lse)
        low = xp.minimum(low, xp.where(live[..., None], output, xp.full_like(output, float("inf"))))
        high = xp.maximum(high, xp.where(live[..., None], output, xp.full_like(output, -float("inf"))))
        alive = alive + xp.astype(live, shift.dtype)
    several = (alive > 1) & (shift > 0)  # one part alone has all the weight, however it is off
    gap = xp.where(several[..., None], high, xp.zeros_like(high)) - xp.where(
        several[..., None], low, xp.zeros_like(low)
    )
    gap = xp.max(gap, axis=-1)
    return xp.where(several, xp.tanh(shift / 2) * gap, xp.zeros_like(shift))


def _cast(xp: Any, output: Array) -> Array:
    """The output, or where it has 16 bits one of 32: the last cast to 16 bits does not count in any certificate."""
    return output if xp.finfo(output.dtype).bits >= 32 else xp.astype(output, xp.float32)


def _own_rounding(xp: Any, parts: Sequence[Result], zero: Array) -> Array:
    """Bound of the rounding of the merge itself: a few units in the last place of the largest output of a part."""
    unit = max(float(xp.finfo(array.dtype).eps) for part in parts for array in (part.lse, _cast(xp, part.output)))
    largest = zero
    for part in parts:
        sizes = xp.max(xp.abs(_selected(xp, part.output, part.lse)), axis=-1)
        largest = xp.maximum(largest, xp.astype(sizes, zero.dtype))
    return (len(parts) + 8) * unit * largest


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
