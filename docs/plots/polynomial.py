"""Draws the plots of docs/method_polynomial.md: `python docs/plots/polynomial.py`, some minutes on a quiet machine.

Writes polynomial_error.svg, polynomial_time.svg and polynomial_crossover.svg beside this file, or into `--output`.
`--quick` takes smaller sizes, to see that it runs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

import korder
from korder.experiments.benchmark_figures import median_seconds
from korder.experiments.benchmark_polynomial import make_tokens

BLUE, ORANGE, GREEN, GREY = "#2c6fbb", "#d9730d", "#2e8b57", "#777777"
WIDTH = 16
DEGREES = (2, 4, 6)
mpl.rcParams["svg.hashsalt"] = "korder"  # equal figures make equal files


def figure(title: str, panels: int) -> tuple[Figure, Sequence[Any]]:
    """Return a figure with panels side by side, both axes logarithmic."""
    drawn = Figure(figsize=(4.2 * panels, 3.8), layout="constrained")
    drawn.suptitle(title, fontsize=10)
    axes = drawn.subplots(1, panels, squeeze=False)[0]
    for axis in axes:
        axis.grid(True, which="major", linewidth=0.4, color="#cccccc")
        axis.set_xscale("log")
        axis.set_yscale("log")
    return drawn, axes


def draw_error(quick: bool) -> Figure:
    """Largest error and largest certificate of a result, over the value range, against the size of scores."""
    sizes = np.geomspace(0.05, 1.0, 4 if quick else 12)
    n = 32 if quick else 128
    drawn, (axis,) = figure(f"order 2, n = {n}, d = 8, normal tokens, float64", 1)
    for degree, colour in zip(DEGREES, (BLUE, ORANGE, GREEN), strict=True):
        errors, bounds = [], []
        for rms in sizes:
            tokens = make_tokens("numpy", 2, n, 8, float(rms), dtype="float64")
            found = tokens.attend(korder.Polynomial(degree=degree), "numpy")
            exact = tokens.attend(korder.Exact(), "numpy")
            span = float(np.prod([np.ptp(value, axis=0).max() for value in tokens.values]))
            errors.append(np.abs(found.output - exact.output).max() / span)
            bounds.append(found.certificate.bound.max() / span)
        axis.plot(sizes, errors, color=colour, label=f"degree {degree}: error")
        axis.plot(sizes, bounds, color=colour, linestyle="--", label="its certificate")
    axis.set_xlabel("root mean square of scores")
    axis.set_ylabel("error over the range of values")
    axis.legend(fontsize=7)
    return drawn


def time_of(order: int, n: int, method: Any, *, rows: int | None = None) -> float:
    """Return the seconds of a call; with `rows` those of so many queries, times n over their number."""
    tokens = make_tokens("numpy", order, n, WIDTH, 0.3)
    taken = tokens if rows is None or rows >= n else tokens.rows(rows)
    spec = korder.AttentionSpec(order=order, method=method)
    (found,) = median_seconds(
        3, lambda: korder.attend(taken.query, taken.keys, taken.values, spec=spec, backend="numpy")
    )
    return found * n / taken.query.shape[0]


def draw_time(quick: bool) -> Figure:
    """Time against n, exact and polynomial, one panel for each order."""
    drawn, axes = figure(f"NumPy, float32, d = e = {WIDTH}; dashed: exact from a part of its rows", 3)
    tops = {1: 15, 2: 15, 3: 14} if not quick else {1: 6, 2: 6, 3: 6}
    whole = {1: 13, 2: 9, 3: 7} if not quick else {1: 5, 2: 5, 3: 5}
    for order, axis in zip((1, 2, 3), axes, strict=True):
        lengths = [2**p for p in range(5, tops[order] + 1)]
        exact = [n for n in lengths if n <= 2 ** whole[order]]
        beyond = [n for n in lengths if 2 ** whole[order] <= n <= 2 ** (whole[order] + 3)]
        axis.plot(exact, [time_of(order, n, korder.Exact()) for n in exact], color=GREY, label="exact")
        rows = {1: 1024, 2: 16, 3: 1}[order]
        guessed = [time_of(order, n, korder.Exact(), rows=rows) for n in beyond]
        axis.plot(beyond, guessed, color=GREY, linestyle="--")
        for degree, colour in zip((2, 4), (BLUE, ORANGE), strict=True):
            method = korder.Polynomial(degree=degree)
            axis.plot(lengths, [time_of(order, n, method) for n in lengths], color=colour, label=f"degree {degree}")
        axis.set_title(f"order {order}", fontsize=9)
        axis.set_xlabel("n")
    axes[0].set_ylabel("seconds")
    axes[0].legend(fontsize=7)
    return drawn


def draw_crossover(quick: bool) -> Figure:
    """From which n on the polynomial method has fewer flop than the exact one: ((k + 1) r / 2)^(1 / k), d = e."""
    drawn, axes = figure("tokens from which the polynomial method needs fewer flop, by count", 3)
    for order, axis in zip((1, 2, 3), axes, strict=True):
        widths = np.arange(4, 129, 31 if quick else 1)
        for degree, colour in zip(DEGREES, (BLUE, ORANGE, GREEN), strict=True):
            points = [((order + 1) * comb(int(d) + degree, degree) / 2) ** (1 / order) for d in widths]
            axis.plot(widths, points, color=colour, label=f"degree {degree}")
        axis.set_title(f"order {order}", fontsize=9)
        axis.set_xlabel("d")
    axes[0].set_ylabel("n")
    axes[0].legend(fontsize=7)
    return drawn


PLOTS = {"polynomial_error": draw_error, "polynomial_time": draw_time, "polynomial_crossover": draw_crossover}


def main() -> None:
    """Draw every plot."""
    options = argparse.ArgumentParser(description="Draw the plots of docs/method_polynomial.md.")
    options.add_argument("--output", type=Path, default=Path(__file__).parent)
    options.add_argument("--quick", action="store_true")
    given = options.parse_args()
    for name, draw in PLOTS.items():
        draw(given.quick).savefig(given.output / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
