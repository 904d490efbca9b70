"""What rounding may cost an exact result, for certificates of answers that are partly exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from korder.methods.certificates import final_unit, value_sizes
from korder.methods.statistics import row_bounds
from korder.problem import Problem
from korder.result import Certificate
from korder.spi.operands import KernelOutput, Operands

Array = Any
TERMS = 512
"""Terms that a kernel's sums may lose one unit each of: blocks of at most 256, joined in a wider or compensated way."""


@np.errstate(all="ignore")
def certify_exact(xp: Any, problem: Problem, operands: Operands, output: KernelOutput) -> Certificate:
    """Return the certificate of an exact result: no approximation, and rounding of scores, sums and output.

    Shapes:    see `korder.result.Certificate`; all float64.
    Cost:      O(n (d + e)).
    Numerics:  A score of `width` products may be off by (width + k + 8) units of the row's reach, which moves the
               weights; sums lose at most `TERMS` units, which is more than the conformance kit lets a kernel lose.
    """
    added = _largest_biases(xp, operands)
    # Biases, which may differ between queries, only hide keys here: bounds over all that they might show hold as well.
    problem = replace(problem, biases=(None,) * problem.order)
    operands = replace(operands, biases=(None,) * problem.order)
    bounds = row_bounds(xp, problem, operands)
    live = output.lse != -float("inf")
    spread, sizes, largest, _ = value_sizes(xp, problem, operands, output)
    unit = 0.5 * float(xp.finfo(getattr(xp, problem.accumulation)).eps)
    zero = xp.zeros_like(sizes)
    moved = (problem.score_width + problem.order + 8) * unit * (bounds.reach + added) + bounds.perturbation
    rounding = xp.tanh(moved) * spread + TERMS * unit * sizes + final_unit(xp, problem) * largest
    logarithm = xp.where(live, xp.astype(output.lse, xp.float64), zero)
    lse_bound = moved + 2.0 * TERMS * unit + 4.0 * float(xp.finfo(output.lse.dtype).eps) * (1.0 + xp.abs(logarithm))
    return Certificate(
        bound=xp.where(live, rounding, zero),
        approximation=zero,
        rounding=xp.where(live, rounding, zero),
        lse_bound=xp.where(live, lse_bound, zero),
        score_range=xp.stack([xp.where(live, bounds.low, zero), xp.where(live, bounds.high, zero)], axis=3),
        kind="rounding",
    )


def _largest_biases(xp: Any, operands: Operands) -> float:
    """Return the sum over modes of the largest finite absolute bias."""
    total = 0.0
    for bias in operands.biases:
        if bias is not None and all(bias.shape):
            total += float(xp.max(xp.where(xp.isfinite(bias), xp.abs(bias), xp.zeros_like(bias))))
    return total
