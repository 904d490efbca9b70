"""The records that a plan is made of, and the table that explains it."""

from __future__ import annotations

from dataclasses import dataclass

from korder.problem import Problem


@dataclass(frozen=True, slots=True)
class ContractionStep:
    """One pairwise step of a contraction: which operands, by which einsum subscripts, at which cost."""

    operands: tuple[int, ...]
    """Positions in the current list of operands; they are removed and the result is appended."""
    subscripts: str
    """Einsum subscripts of this step, for example "il,al->ail"."""
    flops: int
    size: int
    """Elements of the result."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a plan costs, counted and not timed."""

    flops: int
    """Multiplications and additions of the products; exponentials not counted."""
    bytes_moved: int
    """Bytes read and written at least once: operands, outputs and, for features, their tables."""
    peak_memory: int
    """Workspace in bytes beyond inputs and outputs."""
    largest_intermediate: int
    """Elements of the largest array that is neither input nor output."""
    exponentials: int = 0


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the exact method walks the score tensor: which modes are looped, which is contracted, in what blocks."""

    looped: tuple[int, ...]
    """Modes folded into the query, outermost first; empty when every tuple of a head is one tile."""
    contracted: int
    """The mode that the two matrix products run over."""
    queries: int
    """Queries in a tile."""
    folded: tuple[int, ...]
    """Keys of each folded mode in a tile, in ascending mode order without the contracted one."""
    keys: int
    """Keys of the contracted mode in a tile."""
    heads: int = 1
    """Query heads (times batch) in a tile."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """What decides which monomials are kept: those that matter for operands whose columns are as large as these."""

    bounds: tuple[float, ...]
    """Of each column, the largest absolute term that it adds to a score."""
    weights: tuple[float, ...]
    """Of each power of the score, what a unit of it may add to the error."""
    mass: float
    """Largest sum of all that is dropped, relative to the exponential at a row's centre."""

    @property
    def degree(self) -> int:
        """Highest power of the score."""
        return len(self.weights) - 1


@dataclass(frozen=True, slots=True)
class PolynomialPlan:
    """What the polynomial method will do."""

    degree: int
    coefficients: str
    """"taylor" or "minimax"."""
    interval: float | None
    """Half-width of the minimax interval, in score units; None for Taylor."""
    values: tuple[float, ...]
    """The coefficients of 1, x, x^2, .. of the polynomial of the centred score."""
    features: int
    """r = C(width + degree, degree), or fewer where some are pruned."""
    state: int
    """Elements of the summed key states of one head: k r (e + 1)."""
    chunk: int
    """Tokens whose features are built at a time."""
    gradient: str = "consistent"
    """"consistent": that of the function that forward computes; "closed_form": the exact method's, with its weights."""
    pruning: Pruning | None = None
    """What decides which monomials are kept; None for all of them."""


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What is set aside from the polynomial method, and what is left to it."""

    threshold: float
    """Outlying keys have a typical score of more than this many times the median of their head; inf for none."""
    keys: tuple[int, ...]
    """Outlying keys that are made room for, a head and mode."""
    rows: int
    """Rows that are expected to miss the tolerance, a head."""
    degree: int
    """Degree of the polynomial; its certificate decides which rows are computed exactly."""
    prune: float = 0.0
    """How much the monomials that it leaves out may add; 0 where it has all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """HOW to compute a problem: hashable, printable, made without arrays or backends."""

    problem: Problem
    method: str
    cost: Cost
    steps: tuple[ContractionStep, ...] = ()
    tiling: Tiling | None = None
    polynomial: PolynomialPlan | None = None
    split: SplitPlan | None = None
    parts: tuple[Plan, ...] = ()
    """Of a split: the polynomial part, then the exact ones."""
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The method, with the degree or the number of outliers if it has any."""
        if self.split is not None:
            keys = " + ".join(map(str, self.split.keys))
            pruned = " pruned" if self.split.prune else ""
            return f"split: degree {self.split.degree}{pruned}, {keys} keys, {self.split.rows} rows"
        if self.polynomial is None:
            return self.method
        pruned = f", pruned to {self.polynomial.features} features" if self.polynomial.pruning is not None else ""
        return f"{self.method} of degree {self.polynomial.degree}{pruned}"

    def explain(self) -> str:
        """Return a table that a person can read: what is computed, in which steps, at which cost."""
        from korder.planning.explain import explain_plan

        return explain_plan(self)
