"""What theory says of a size of problem: whether attention to a small error can be near-linear, asymptotically."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, comb, inf, isfinite, lgamma, log
from numbers import Integral, Real

from korder.errors import SpecError
from korder.planning.explain import count

MARK = "asymptotic, and conditional on SETH where it says that nothing faster exists; it chooses nothing"


@dataclass(frozen=True, slots=True)
class Regime:
    """Where a problem stands to the threshold of the polynomial method, in the setting of its proof.

    That setting: n tokens, width ceil(ln n), scale 1 / width, an error of 1 / n.
    """

    queries: int
    order: int
    entry_bound: float
    threshold: float
    """(ln n) ** (1 / (k + 1)): entries that grow more slowly allow near-linear time, entries that do not, do not."""
    score_bound: float
    """entry_bound ** (k + 1), the largest score."""
    ratio: float
    """score_bound over ln n; the threshold is at 1."""
    degree: int
    """Least even degree of the exponential's Taylor polynomial whose remainder bound is 1 / n."""
    features: int
    """C(width + degree, degree)."""
    cost_ratio: float
    """Flop of the polynomial method over those of the exact one, 2 n^(k+1) (2 width)."""

    @property
    def bounded(self) -> bool:
        """Whether the entries are below the threshold."""
        return self.entry_bound < self.threshold

    def explain(self) -> str:
        """Return the report as a person reads it."""
        side = "below" if self.bounded else "not below"
        rows = (
            ("entries", f"up to {self.entry_bound:.4g}, {side} (ln n)^(1/{self.order + 1}) = {self.threshold:.4g}"),
            ("scores", f"up to {self.score_bound:.4g}, {self.ratio:.3g} of ln n"),
            ("degree", f"{_text(self.degree)} for an error of 1 / n, {_text(self.features)} features"),
            ("cost", f"{self.cost_ratio:.3g} of the exact method"),
            ("note", MARK),
        )
        return "\n".join(f"{name:>8}  {text}" for name, text in rows)


def regime(n: int, order: int, entry_bound: float) -> Regime:
    """Return where n tokens with entries up to a bound stand to the threshold of near-linear time.

    Below (ln n) ** (1 / (k + 1)) order-k attention takes n ** (1 + o(1)) time; at and above a multiple of it there is
    no n ** (k + 1 - Omega(1)) algorithm under SETH. Real sizes are decided by cost and certificate, not by this.

    Args:
        n: Tokens, at least 2.
        order: k, from 1 to 6.
        entry_bound: Largest absolute entry of queries and keys at a scale of 1 / width; for another scale, times
            (scale width) ** (1 / (k + 1)).

    Raises:
        SpecError: A number out of range.

    Cost:    O(log degree).
    Source:  Alman & Song, arXiv 2310.04064; its threshold is for k = 2, that of other orders is stated there. The
             degree is from the Taylor remainder e^L L^(g+1) / (g+1)!.

    Example:
        >>> found = regime(10_000, 2, 1.0)
        >>> round(found.threshold, 2), found.bounded, found.degree
        (2.1, True, 8)
    """
    _check("n", n, Integral, 2, inf)
    _check("order", order, Integral, 1, 6)
    _check("entry_bound", entry_bound, Real, 0.0, 1e40)
    n, order, bound = int(n), int(order), float(entry_bound)
    logarithm = log(n)
    width, scores = ceil(logarithm), bound ** (order + 1)
    degree = _degree(scores, logarithm)
    features = comb(width + degree, width)
    polynomial = 2 * (order + 1) * n * features * (width + 1)
    return Regime(
        queries=n,
        order=order,
        entry_bound=bound,
        threshold=logarithm ** (1.0 / (order + 1)),
        score_bound=scores,
        ratio=scores / logarithm,
        degree=degree,
        features=features,
        cost_ratio=_ratio(polynomial, 2 * n ** (order + 1) * 2 * width),
    )


def _check(name: str, value: object, kind: type, low: float, high: float) -> None:
    ok = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
    if not ok or not isfinite(value if kind is Real else 0.0):  # type: ignore[arg-type]
        what = "an integer" if kind is Integral else "a number"
        most = "" if high == inf else f" and at most {high:g}"
        raise SpecError(f"{name} is out of range.", expected=f"{what}, at least {low:g}{most}", got=repr(value))


def _degree(scores: float, logarithm: float) -> int:
    """Return the least even g with e^L L^(g+1) / (g+1)! <= exp(-logarithm), in logarithms."""
    if scores == 0.0:
        return 0

    def enough(half: int) -> bool:
        terms = 2 * half + 1
        return scores + terms * log(scores) - lgamma(terms + 1.0) <= -logarithm

    # below g = L the bound is above 1, and from there on it falls
    low, high = max(int(scores) // 2 - 1, -1), max(int(scores), 1)
    while not enough(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return 2 * high


def _ratio(part: int, whole: int) -> float:
    try:
        return float(Fraction(part, whole))
    except OverflowError:
        return inf


def _text(number: int) -> str:
    digits = len(str(number)) if number < 10**300 else 0
    return count(number) if 0 < digits <= 300 else "more than 1e+300"
