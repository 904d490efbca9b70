"""How an answer may be computed: exactly, or by the polynomial method. A method enters this file when it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from korder.spec.base import AsInteger, SpecModel, conflict


class Exact(SpecModel):
    """The sum over all tuples, to rounding. Cost: 2 n m1..mk (d + e) flop."""

    kind: Literal["exact"] = "exact"


class Polynomial(SpecModel):
    """The exponential replaced by a polynomial of the score, through r = C(d + degree, degree) features.

    Cost: 2 (k + 1) n r (e + 1) flop, linear in n.
    Source: Alman & Song, arXiv 2310.04064.
    """

    _example: ClassVar[Mapping[str, Any]] = {"degree": 4}

    kind: Literal["polynomial"] = "polynomial"
    degree: Annotated[int, Field(ge=0, le=64, strict=True), AsInteger] | None = None
    """Degree of the polynomial. Alone: that degree, unchecked. With a tolerance: fixed, and checked."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest allowed error, relative to the range of the value products. Alone: the degree is chosen."""
    coefficients: Literal["taylor", "minimax"] = "taylor"
    """"taylor" about each row's mean score, or "minimax" in relative error on an interval."""
    interval: Annotated[float, Field(gt=0, le=64)] | None = None
    """Half-width, in score units, of the interval of the minimax coefficients; the certified range when None."""
    on_exceed: Literal["raise", "exact", "warn"] = "raise"
    """What to do when the certificate misses the tolerance."""
    gradient: Literal["consistent", "closed_form"] = "consistent"
    """"consistent", of the function computed, or "closed_form", softmax's with the polynomial's weights; full mask."""
    prune: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Most that monomials left out may add to a tuple's weight, 0 to keep all; a lone tolerance chooses when None."""
    estimate_rows: Annotated[int, Field(ge=0, strict=True), AsInteger] = 0
    """Rows computed exactly as well, for an estimate of the error beside the certificate."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.degree is None and self.tolerance is None:
            raise conflict(
                "a polynomial needs a degree, a tolerance, or both",
                expected="for example degree = 4, or tolerance = 1e-3",
                got="neither",
            )
        if self.interval is not None and self.coefficients == "taylor":
            raise conflict("an interval belongs to coefficients = 'minimax'", expected="coefficients = 'minimax'")
        if self.on_exceed != "raise" and self.tolerance is None:
            raise conflict("on_exceed belongs to a tolerance", expected="a tolerance, or no on_exceed")
        if self.prune and self.tolerance is not None and self.prune >= self.tolerance:
            raise conflict(
                "what is pruned alone would use up the tolerance",
                expected=f"prune below tolerance = {self.tolerance:g}",
                got=f"prune = {self.prune:g}",
            )
        if self.prune and self.gradient == "closed_form":
            raise conflict(
                "gradient = 'closed_form' needs all monomials",
                expected="gradient = 'consistent', or prune = 0",
                got=f"prune = {self.prune:g}",
            )
        return self


class Split(SpecModel):
    """The polynomial method for most tuples, the exact one for those that hold an outlier, merged by lse.

    Outliers are the queries and keys whose typical scores stand far above their head's median; how far is chosen by
    predicted cost, from none (polynomial alone) to all (exact alone).

    Cost: that of `Polynomial` for the rest, and 2 n m1..mk (d + e) c / m_t flop for c outliers of mode t.
    """

    _example: ClassVar[Mapping[str, Any]] = {"tolerance": 1e-3}

    kind: Literal["split"] = "split"
    tolerance: Annotated[float, Field(gt=0, lt=1)]
    """Largest allowed error, relative to the range of the value products."""
    on_exceed: Literal["raise", "exact", "warn"] = "raise"
    """What to do when the certificate misses the tolerance."""


class Auto(SpecModel):
    """The method that is predicted to be fastest: exact, polynomial or split for a tolerance, exact without one.

    Cost: that of what is chosen; a tolerance that the choice misses is met by the exact method.
    """

    kind: Literal["auto"] = "auto"
    tolerance: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Largest allowed error, relative to the range of the value products; None allows rounding only."""


Method = Annotated[Exact | Polynomial | Split | Auto, Field(discriminator="kind")]
