"""How fast backends do the kinds of work that plans count: a shipped table, and one that a machine measured of itself.

Rates rank plans and nothing else; a wrong one costs time, never accuracy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from math import isfinite
from pathlib import Path

from korder.errors import SpecError
from korder.planning.plan import Plan

FILE_VARIABLE = "KORDER_RATES"


@dataclass(frozen=True, slots=True)
class Rates:
    """What a backend does in a second, and what a call costs before it does anything."""

    exact: float
    """Flop of the exact method."""
    exponentials: float
    """Exponentials of the exact method, beside its flop."""
    polynomial: float
    """Flop of the polynomial method under the full mask, where the sums of its features stay in a cache."""
    wide: float
    """The same where there are too many."""
    running: float
    """Flop of the polynomial method where states run along with the rows."""
    rows: float
    """How many rows' time an exact call of one row takes: some of its work is the same for any number of them."""
    exact_call: float
    """Seconds of an exact call with no work in it."""
    call: float
    """Seconds of a polynomial call with no work in it, its certificate included."""


NAMES = tuple(field.name for field in fields(Rates))
SHIPPED: Mapping[str, Rates] = {
    # measured by `korder bench --calibrate` on 2 cores with AVX2, float32
    "numpy": Rates(
        exact=1.1e11,
        exponentials=1.8e8,
        polynomial=9.0e9,
        wide=9.0e9,
        running=1.7e8,
        rows=1.0,
        exact_call=7e-4,
        call=8e-3,
    ),
    "torch": Rates(
        exact=6.8e10,
        exponentials=1.2e9,
        polynomial=9.1e9,
        wide=3.9e9,
        running=9.7e7,
        rows=34.0,
        exact_call=1.4e-3,
        call=2e-2,
    ),
    "native": Rates(
        exact=1.1e11,
        exponentials=2.0e9,
        polynomial=5.0e10,
        wide=4.1e10,
        running=2.2e9,
        rows=4.0,
        exact_call=2.3e-4,
        call=3.7e-3,
    ),
    # the same on one H200, float32; its calls are what takes the time
    "cuda": Rates(
        exact=2.8e13,
        exponentials=5.1e9,
        polynomial=4.0e10,
        wide=2.0e10,
        running=1.0e8,
        rows=1.0,
        exact_call=2.5e-3,
        call=2.9e-2,
    ),
    # not measured
    "jax": Rates(
        exact=5.0e10,
        exponentials=1.0e9,
        polynomial=2.0e10,
        wide=2.0e10,
        running=1.0e9,
        rows=34.0,
        exact_call=1e-3,
        call=5e-3,
    ),
}
IN_CACHE = 2**20
"""Elements of a head's key states up to which they are taken to stay in a cache."""
CHECKING = 1.0
"""What looking for rows that miss takes beside a polynomial part, in polynomial calls with no work in them."""
CERTIFYING = 0.75
"""What certifying and merging an exact part takes, likewise."""
OTHERS = SHIPPED["numpy"]
"""For a backend that nobody measured."""


def rates_file() -> Path:
    """Return where the machine's own rates are kept: `KORDER_RATES`, or a file in the user's configuration."""
    named = os.environ.get(FILE_VARIABLE)
    if named:
        return Path(named)
    base = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(base) / "korder" / "rates.json"


def rates_of(backend: str) -> Rates:
    """Return the rates of a backend: measured here, shipped, or those of NumPy."""
    path = rates_file()
    stamp = path.stat().st_mtime_ns if path.is_file() else 0
    return _measured(path, stamp).get(backend) or SHIPPED.get(backend, OTHERS)


@lru_cache(maxsize=4)
def _measured(path: Path, stamp: int) -> dict[str, Rates]:
    """Return what the file holds; `stamp` is when it was written, 0 for no file."""
    return read_rates(path) if stamp else {}


def read_rates(path: Path) -> dict[str, Rates]:
    """Return the rates by backend that a file holds.

    Raises:
        SpecError: Not a table of positive numbers, one per field of `Rates`.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        found = {str(backend): Rates(**{name: float(row[name]) for name in NAMES}) for backend, row in data.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _unreadable(path, f"{type(error).__name__}: {error}") from None
    for backend, rates in found.items():
        wrong = [name for name, value in asdict(rates).items() if not (isfinite(value) and value > 0.0)]
        if wrong:
            raise _unreadable(path, f"{backend}.{wrong[0]} = {getattr(rates, wrong[0])!r}")
    return found


def _unreadable(path: Path, got: str) -> SpecError:
    return SpecError(
        f"{path} does not hold machine rates.",
        code="rates-invalid",
        expected=f"a JSON object: backend -> {', '.join(NAMES)}, all positive",
        got=got,
        hint="`korder bench --calibrate` writes it anew; without it the shipped table is used.",
    )


def predicted_seconds(plan: Plan, backends: tuple[str, ...]) -> float:
    """Return how long a plan is expected to take; `backends` are those of its parts, or its own."""
    return sum(map(part_seconds, plan.parts, backends)) if plan.parts else whole_seconds(plan, *backends)


def part_seconds(plan: Plan, backend: str) -> float:
    """Return how long a plan is expected to take as a part of a split, with what is done there besides."""
    besides = CERTIFYING if plan.polynomial is None else CHECKING
    return besides * rates_of(backend).call + whole_seconds(plan, backend)


def whole_seconds(plan: Plan, backend: str) -> float:
    """Return how long a plan is expected to take by itself."""
    rates, cost = rates_of(backend), plan.cost
    if plan.polynomial is None:
        work = cost.flops / rates.exact + cost.exponentials / rates.exponentials
        rows = max(plan.problem.queries, 1)
        return rates.exact_call + work * (rows + rates.rows - 1.0) / rows
    if plan.problem.spec.mask.kind != "full":
        return rates.call + cost.flops / rates.running
    return rates.call + cost.flops / (rates.polynomial if plan.polynomial.state <= IN_CACHE else rates.wide)
