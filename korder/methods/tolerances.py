"""Whether a certificate meets a tolerance, which is relative to the range of a head's value products."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import device

from korder.methods.statistics import product_range
from korder.result import Certificate
from korder.spi.operands import Operands

Array = Any


@dataclass(frozen=True, slots=True)
class ToleranceCheck:
    """How a certificate stands against a tolerance: `met` if both ratios are at most 1."""

    met: bool
    ratio: float
    """Largest part over what the tolerance allows it; 0 if no row counts."""
    part: str
    """The part of the worst row: "approximation" or "rounding"."""
    batch: int
    head: int
    row: int
    value: float
    """The worst part of the worst row, absolute."""
    allowed: float
    """What the tolerance allows there."""
    rounding_alone: bool = False
    """Whether rounding misses by itself: then no higher degree can meet the tolerance, a wider dtype may."""

    def __str__(self) -> str:
        where = f"in batch {self.batch}, head {self.head}, row {self.row}"
        return f"{self.part} {self.value:.3g} {where}, where {self.allowed:.3g} is allowed"


@np.errstate(all="ignore")
def meets_tolerance(xp: Any, certificate: Certificate, operands: Operands, tolerance: float) -> ToleranceCheck:
    """Return whether approximation <= tolerance * value range and rounding <= tolerance * largest value product.

    Both references are the largest over channels of the row's head. Rows with no live tuple are exempt, and where an
    operand holds NaN or infinity so are rows with NaN; a NaN that came out of finite operands misses.
    """
    return check_parts(xp, certificate, head_values(xp, operands), _all_finite(xp, operands), tolerance)


@np.errstate(all="ignore")
def check_parts(
    xp: Any, certificate: Certificate, references: tuple[Array, Array], finite: bool, tolerance: float
) -> ToleranceCheck:
    """Return how a certificate stands, given value range and largest value product (b, h); `finite`: all operands."""
    spread, largest = references
    parts = [certificate.approximation, certificate.rounding]
    if finite:
        parts = [xp.where(xp.isnan(part), xp.full_like(part, float("inf")), part) for part in parts]
    approximation = _worst_row(xp, "approximation", parts[0], tolerance * spread)
    rounding = _worst_row(xp, "rounding", parts[1], tolerance * largest)
    worst = rounding if rounding.ratio > approximation.ratio else approximation
    return replace(worst, rounding_alone=not rounding.met)


@np.errstate(all="ignore")
def missing_rows(xp: Any, certificate: Certificate, operands: Operands, tolerance: float) -> Array:
    """Return which rows' approximation is not known to be within the tolerance: (b, h, n) bool."""
    spread, _ = head_values(xp, operands)
    return xp.logical_not(certificate.approximation <= tolerance * spread[:, :, None])


def _all_finite(xp: Any, operands: Operands) -> bool:
    """Whether no operand holds NaN or infinity, masked keys and biases of -inf left out."""
    weight = operands.weight
    arrays = [operands.query, *(weight if isinstance(weight, tuple) else () if weight is None else (weight,))]
    masks = operands.key_masks or (None,) * len(operands.keys)
    for pair, mask in zip(zip(operands.keys, operands.values, strict=True), masks, strict=True):
        arrays += [array if mask is None else xp.where(mask[..., None], array, xp.zeros_like(array)) for array in pair]
    biases = [bias for bias in operands.biases or () if bias is not None]
    arrays += [xp.where(bias == -float("inf"), xp.zeros_like(bias), bias) for bias in biases]
    return all(bool(xp.all(xp.isfinite(array))) for array in arrays)


def _worst_row(xp: Any, part: str, bound: Array, allowed: Array) -> ToleranceCheck:
    batch, heads, rows = bound.shape
    if batch * heads * rows == 0:
        return ToleranceCheck(True, 0.0, part, 0, 0, 0, 0.0, 0.0)
    allowed = xp.broadcast_to(allowed[:, :, None], bound.shape)
    counts = xp.logical_and(bound > 0.0, xp.logical_not(xp.isnan(allowed)))
    ratio = xp.where(counts, bound / xp.where(allowed > 0.0, allowed, xp.ones_like(allowed)), xp.zeros_like(bound))
    ratio = xp.where(xp.logical_and(counts, allowed == 0.0), xp.full_like(ratio, float("inf")), ratio)
    flat = int(xp.argmax(xp.reshape(ratio, (-1,))))
    b, h, i = flat // (heads * rows), flat // rows % heads, flat % rows
    at = (b, h, i)
    found = float(ratio[at])
    return ToleranceCheck(found <= 1.0, found, part, *at, float(bound[at]), float(allowed[at]))


def head_values(xp: Any, operands: Operands) -> tuple[Array, Array]:
    """Return the range of value products and the largest absolute one, over all live keys: (b, h) float64 each."""
    batch, heads = operands.query.shape[:2]
    shared = heads // operands.values[0].shape[1]
    spreads, sizes = [], []
    for b in range(batch):
        for h in range(heads):
            extremes = tuple(_mode_extremes(xp, operands, t, b, h, h // shared) for t in range(len(operands.values)))
            low, high = product_range(xp, extremes, operands.values[0].shape[3])
            spreads.append(xp.max(high - low))
            sizes.append(xp.max(xp.maximum(xp.abs(low), xp.abs(high))))
    if not spreads:
        empty = xp.zeros((batch, heads), dtype=xp.float64, device=device(operands.query))
        return empty, empty
    return xp.reshape(xp.stack(spreads), (batch, heads)), xp.reshape(xp.stack(sizes), (batch, heads))


def _mode_extremes(xp: Any, operands: Operands, mode: int, batch: int, head: int, group: int) -> Array:
    """Return the largest values and largest negatives over one mode's live keys: (2 e, 1) float64, -inf for none."""
    values = xp.astype(operands.values[mode][batch, group, ...], xp.float64)
    if values.shape[0] == 0:
        return xp.full((2 * values.shape[1], 1), -float("inf"), dtype=xp.float64, device=device(values))
    minus = xp.full_like(values[:1, :], -float("inf"))
    live = None
    mask = operands.key_masks[mode] if operands.key_masks else None
    bias = operands.biases[mode] if operands.biases else None
    if mask is not None:
        live = mask[batch, group if mask.shape[1] > 1 else 0, ...]
    if bias is not None:
        row = bias[batch if bias.shape[0] > 1 else 0, head if bias.shape[1] > 1 else 0, 0, ...]
        finite = row != -float("inf")
        live = finite if live is None else xp.logical_and(live, finite)
    both = []
    for signed in (values, -values):
        seen = signed if live is None else xp.where(live[:, None], signed, minus)
        both.append(xp.max(seen, axis=0))
    return xp.concat(both, axis=0)[:, None]
