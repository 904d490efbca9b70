"""How an answer may be computed: exactly, or by the polynomial method. A method enters this file when it runs."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from korder.spec.base import SpecModel


class Exact(SpecModel):
    """The sum over all tuples, to rounding. Cost: 2 n m1..mk (d + e) flop."""

    kind: Literal["exact"] = "exact"


class Polynomial(SpecModel):
    """The exponential replaced by a polynomial of the score, through r = C(d + degree, degree) features.

    Cost: 2 (k + 1) n r (e + 1) flop, linear in n.
    Source: Alman & Song, arXiv 2310.04064.
    """

    kind: Literal["polynomial"] = "polynomial"
    degree: Annotated[int, Field(ge=0, le=64, strict=True)] | None = None
    """Degree of the polynomial. Alone: that degree, unchecked. With a tolerance: fixed, and checked."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest allowed error, relative to the range of the value products. Alone: the degree is chosen."""
    coefficients: Literal["taylor", "minimax"] = "taylor"
    """"taylor" about each row's mean score, or "minimax" in relative error on an interval."""
    interval: Annotated[float, Field(gt=0, le=64)] | None = None
    """Half-width, in score units, of the interval of the minimax coefficients; the certified range when None."""
    on_exceed: Literal["raise", "exact", "warn"] = "raise"
    """What to do when the certificate misses the tolerance."""
    estimate_rows: Annotated[int, Field(ge=0, strict=True)] = 0
    """Rows computed exactly as well, for an estimate of the error beside the certificate."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.degree is None and self.tolerance is None:
            raise ValueError("give a degree, a tolerance, or both")
        if self.interval is not None and self.coefficients == "taylor":
            raise ValueError("an interval belongs to coefficients = 'minimax'")
        return self


Method = Annotated[Exact | Polynomial, Field(discriminator="kind")]
