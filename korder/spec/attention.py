"""What to compute: the one model that describes an order-k attention, without arrays or frameworks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from korder.spec.base import AsInteger, SpecModel, conflict
from korder.spec.masks import Full, Mask, Window
from korder.spec.methods import Auto, Exact, Method, Polynomial, Split
from korder.spec.policy import Policy

MAX_ORDER = 6


class AttentionSpec(SpecModel):
    """An order-k attention: every query against every tuple of k keys.

    Example:
        >>> AttentionSpec(order=2, mask={"kind": "causal"}).mask
        Causal(kind='causal', align=None)
    """

    _example: ClassVar[Mapping[str, Any]] = {"order": 2}

    order: Annotated[int, Field(ge=1, le=MAX_ORDER, strict=True), AsInteger]
    """Number of key matrices, the query not counted; 1 is ordinary attention."""
    scale: Literal["inverse_sqrt_dim", "inverse_dim"] | Annotated[float, Field(strict=True)] = "inverse_sqrt_dim"
    """Factor on every score: d ** -0.5, the papers' 1 / d, or a number; d is the query's width as given."""
    score: Literal["khatri_rao", "kronecker"] = "khatri_rao"
    """Form of the score; "kronecker" takes a weight operand, full (d, d1, .., dk) or a tuple of CP factors."""
    mask: Mask = Full()
    """Which tuples may be attended to."""
    method: Method = Exact()
    """How the answer may be computed."""
    policy: Policy = Policy()
    """Backends, precision and memory."""

    @model_validator(mode="after")
    def _fits_order(self) -> Self:
        if isinstance(self.mask, Window) and len(self.mask.sizes) != self.order:
            count = len(self.mask.sizes)
            raise conflict(
                f"mask.sizes has {count} window{'s' * (count != 1)}, order = {self.order} needs one per mode",
                expected=f"as many windows as the order, {self.order}",
            )
        return self

    def model_post_init(self, context: Any, /) -> None:
        """Keep the spec as text, where a tracing compiler finds it without running pydantic."""
        self.__dict__["text"] = self.model_dump_json()

    if TYPE_CHECKING:
        text: ClassVar[str]
        """The spec as JSON."""

    def score_factor(self, query_width: int) -> float:
        """Return the number that multiplies every score, for a query of `query_width` columns."""
        if self.scale == "inverse_sqrt_dim":
            return 1.0 / math.sqrt(max(query_width, 1))
        if self.scale == "inverse_dim":
            return 1.0 / max(query_width, 1)
        return float(self.scale)

    @property
    def polynomial(self) -> Polynomial | None:
        """The method if it is the polynomial one, else None."""
        return self.method if isinstance(self.method, Polynomial) else None

    @property
    def tolerance(self) -> float | None:
        """The tolerance of the method; None where it has none, and numbers decide nothing."""
        return None if isinstance(self.method, Exact) else self.method.tolerance

    @property
    def measured(self) -> bool:
        """Whether statistics of the operands are wanted: for a tolerance, or to prune."""
        return self.tolerance is not None or (self.polynomial is not None and bool(self.polynomial.prune))

    @property
    def chooses(self) -> bool:
        """Whether the method is a choice among others that is made by measuring the operands."""
        return isinstance(self.method, Split | Auto) and self.tolerance is not None
