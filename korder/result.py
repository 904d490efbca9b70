"""What comes back: the arrays, who computed them by which plan, and how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from korder.planning.plan import Plan

if TYPE_CHECKING:
    from korder.dispatch.select import Rejection

Array = Any
ROW_FIELDS = ("bound", "approximation", "rounding", "lse_bound", "score_range")
"""The arrays of a certificate that have an entry for every row."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """A rigorous bound on the error of an approximate result, for every row.

    Shapes:
        bound, approximation, rounding, lse_bound (b, h, n), leading axes as the query's; score_range (b, h, n, 2).
    """

    bound: Array
    """approximation + rounding: absolute, largest over channels, never below the true error."""
    approximation: Array
    """Error of replacing exp by the polynomial."""
    rounding: Array
    """Error of computing the polynomial in floating point."""
    lse_bound: Array
    """Bound on the absolute error of lse."""
    score_range: Array
    """Rigorous lower and upper bound of every row's live scores, biases left out."""
    kind: str
    """Which certificate gave the bound of most rows: "moment" or "sup"; "rounding" of an exact part; "merged" after
    `merge` of parts that differ."""
    estimate: Array | None = None
    """Measured error of a few rows, (rows, 2): row position in the flattened (b, h, n) and its largest error. An
    estimate of the rest, not a bound."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who computed a result, by which plan, and what was turned down on the way."""

    backend: str
    plan: Plan
    rejected: tuple[Rejection, ...] = ()
    replanned: tuple[str, ...] = ()
    """Why the first plan was not the last: one sentence per degree extended or plan replaced."""
    candidates: tuple[str, ...] = ()
    """What `Split` and `Auto` chose from, with the seconds that were predicted, the choice first."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer of `attend_result`.

    Shapes:  output (b, h, n, e); lse (b, h, n), natural log, -inf for a query with nothing to attend to.
    """

    output: Array
    lse: Array
    certificate: Certificate | None = None
    provenance: Provenance | None = None
