"""The roofline of `korder bench --plot`: what rows reach, beside what products and memory allow.

A point's bytes are those that have to move whatever the kernel does: operands read once, results written once. Its flop
are those of its products on live tuples. What is copied or computed twice counts in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from korder.errors import SpecError
from korder.experiments.benchmark_cases import Case
from korder.experiments.benchmark_figures import CEILING_FLOPS, Point
from korder.spec import Causal

FORMATS = (".pdf", ".png", ".svg")
Work = Callable[[], object]
_SIZES = {"bfloat16": 2, "float32": 4, "float64": 8}
_COLOURS = {"float32": "#2980b9", "float64": "#c0392b", "bfloat16": "#1e8449"}
_MARKERS = "osD^v<>phX*P"


@dataclass(frozen=True, slots=True)
class Roofs:
    """The rate of the best product in each dtype, in flop per second, and of a copy in memory, in bytes per second."""

    products: Mapping[str, float]
    bandwidth: float


def measured_roofs(
    turns: Callable[..., list[float]], products: Mapping[str, Sequence[Work]], copied: int, threads: int
) -> Roofs:
    """Return the roofs from products of CEILING_FLOPS in each dtype and a copy on many threads, by who takes turns.

    A copied byte counts twice, as it is read and as it is written.
    """
    parts = [np.ones(copied // threads, np.uint8) for _ in range(2 * threads)]
    with ThreadPoolExecutor(threads) as pool:
        copy: Work = lambda: list(pool.map(np.copyto, parts[:threads], parts[threads:]))  # noqa: E731
        *seconds, of_copy = turns(*(work for works in products.values() for work in works), copy)
    times = iter(seconds)
    rates = {dtype: CEILING_FLOPS / min(next(times) for _ in works) for dtype, works in products.items()}
    return Roofs(rates, 2 * threads * parts[0].nbytes / of_copy)


def point_of(name: str, case: Case, seconds: float, *, backward: bool = False) -> Point:
    """Return where a timing of an exact case stands, its backward counted as six products."""
    flops = (3 if backward else 1) * 2.0 * _live_tuples(case) * _width(case)
    return Point(name, case.plan.problem.dtype, flops / moved_bytes(case, backward=backward), flops / seconds)


def _width(case: Case) -> int:
    return case.plan.problem.query_width + case.plan.problem.value_width


def _live_tuples(case: Case) -> float:
    """Tuples of all rows that a mask leaves; under the causal mask those of self-attention."""
    problem = case.plan.problem
    heads = float(problem.batch * problem.heads)
    if isinstance(problem.spec.mask, Causal):
        return heads * sum(float(i) ** problem.order for i in range(1, problem.queries + 1))
    return heads * problem.queries * problem.tuples


def moved_bytes(case: Case, *, backward: bool = False) -> int:
    """Return the bytes of what a call reads and writes.

    Forward: query, keys and values in, output and lse out. Backward: these five and the output's gradient in, the
    gradients of query, keys and values out.
    """
    problem = case.plan.problem
    rows, keys = problem.batch * problem.heads * problem.queries, problem.batch * problem.groups * sum(problem.lengths)
    operands = (rows * problem.query_width + keys * _width(case)) * _SIZES[problem.dtype]
    output = rows * problem.value_width * _SIZES[problem.dtype]
    lse = rows * _SIZES[problem.accumulation]
    return 2 * operands + 2 * output + lse if backward else operands + output + lse


def check_plot(path: Path) -> None:
    """Raise a SpecError if no plot could be written there; before anything is measured."""
    if find_spec("matplotlib") is None:
        raise SpecError(
            "a plot needs matplotlib.",
            code="plot-unavailable",
            expected="the extra korder[plot]",
            got="package 'matplotlib' is not installed",
            hint="pip install 'korder[plot]', or leave out --plot.",
        )
    if path.suffix not in FORMATS or not path.parent.is_dir() or path.is_dir():
        raise SpecError(
            f"no plot can be written to {path}.",
            code="output-unwritable",
            expected=f"a file ending in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, in a directory that exists",
            got=f"--plot {path}",
        )


def draw_roofline(points: Mapping[str, Sequence[Point]], roofs: Roofs, path: Path) -> None:
    """Write the picture of rows by name under their roofs. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no state is shared with the caller's plots.
    figure: Any = Figure(figsize=(9, 6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ridges = [ceiling / roofs.bandwidth for ceiling in roofs.products.values()]
    right = max([point.intensity for found in points.values() for point in found] + [10 * max(ridges)])
    intensities = np.geomspace(min(ridges) / 10, 3 * right, 400)
    for dtype, ceiling in roofs.products.items():
        axes.plot(
            intensities,
            np.minimum(ceiling, roofs.bandwidth * intensities) / 1e9,
            color=_COLOURS[dtype],
            label=f"best product, {dtype}: {ceiling / 1e9:.0f} GF/s",
        )
    for which, (row, found) in enumerate(points.items()):
        for dtype in dict.fromkeys(point.dtype for point in found):
            own = [point for point in found if point.dtype == dtype]
            axes.plot(
                [point.intensity for point in own],
                [point.rate / 1e9 for point in own],
                _MARKERS[which % len(_MARKERS)],
                color=_COLOURS[dtype],
                alpha=0.7,
                label=f"{row}, {dtype}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("flop for each byte of operands and results")
    axes.set_ylabel("GF/s")
    axes.set_title(f"slope: copies in memory, {roofs.bandwidth / 1e9:.0f} GB/s")
    axes.grid(which="both", alpha=0.2)
    axes.legend(fontsize=7, loc="lower right")
    figure.savefig(path, format=path.suffix[1:])


def roofs_text(roofs: Roofs) -> str:
    """Return the roofs on one line."""
    products = ", ".join(f"{dtype} {rate / 1e9:.0f} GF/s" for dtype, rate in roofs.products.items())
    return f"roofs: {products}, memory {roofs.bandwidth / 1e9:.1f} GB/s"
