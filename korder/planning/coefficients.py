"""Polynomials that stand in for exp: Taylor and relative minimax, with rigorous bounds of P(x) / exp(x) on an interval.

Plain floats; numpy serves the small linear systems of the exchange algorithm and nothing else.
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, factorial, inf, log, pi, sqrt

import numpy as np

Coefficients = tuple[float, ...]
"""Coefficients of 1, x, x^2, .."""

_EXCHANGES = 60
_EVALUATION = 1e-12  # relative slack for evaluating a polynomial of moderate degree in float64


def taylor_coefficients(degree: int) -> Coefficients:
    """Return 1/m! for m up to `degree`; an even degree is positive on the whole line."""
    return tuple(1.0 / factorial(m) for m in range(degree + 1))


@lru_cache(maxsize=256)
def minimax_coefficients(degree: int, half_width: float) -> Coefficients:
    """Return the polynomial of smallest relative error against exp on [-half_width, half_width].

    Numerics: Remez exchange in the Chebyshev basis, stopped when the levelled error is within 0.1 % of the largest.
    """
    nodes = -np.cos(pi * np.arange(degree + 2) / (degree + 1))
    grid = -np.cos(pi * np.arange(60 * (degree + 2) + 1) / (60 * (degree + 2)))
    series = np.zeros(degree + 1)
    for _ in range(_EXCHANGES):
        series, level = _levelled(nodes, degree, half_width)
        errors = np.polynomial.chebyshev.chebval(grid, series) * np.exp(-half_width * grid) - 1.0
        extrema = _alternating_extrema(errors, degree + 2)
        if extrema is None or np.max(np.abs(errors)) <= 1.001 * abs(level):
            break
        nodes = grid[extrema]
    powers = np.polynomial.chebyshev.cheb2poly(series)
    powers = np.concatenate([powers, np.zeros(degree + 1 - len(powers))])
    return tuple(float(c) / half_width**m for m, c in enumerate(powers))


def _levelled(nodes: np.ndarray, degree: int, half_width: float) -> tuple[np.ndarray, float]:
    """Return the Chebyshev series whose relative error alternates with one size at the nodes, and that size."""
    basis = np.polynomial.chebyshev.chebvander(nodes, degree) * np.exp(-half_width * nodes)[:, None]
    signs = (-1.0) ** np.arange(degree + 2)
    solution = np.linalg.solve(np.concatenate([basis, signs[:, None]], axis=1), np.ones(degree + 2))
    return solution[:-1], float(solution[-1])


def _alternating_extrema(errors: np.ndarray, count: int) -> list[int] | None:
    """Return one extremum per run of equal sign, weaker ends dropped until `count` remain; None if there are fewer."""
    edges = np.flatnonzero(np.diff(np.sign(errors)) != 0) + 1
    runs = np.split(np.arange(len(errors)), edges)
    extrema = [int(run[np.argmax(np.abs(errors[run]))]) for run in runs]
    while len(extrema) > count:
        extrema.pop(0 if abs(errors[extrema[0]]) < abs(errors[extrema[-1]]) else -1)
    return extrema if len(extrema) == count else None


@lru_cache(maxsize=256)
def critical_points(coefficients: Coefficients) -> tuple[float, ...]:
    """Return the points where P(x) / exp(x) can turn: the roots of P' - P, real parts of complex ones included.

    Numerics: at an inexact root the ratio is wrong to second order only; a point too many does no harm, since every
    value taken inside the range is attained.
    """
    degree = len(coefficients) - 1
    if degree == 0:
        return ()
    if coefficients == taylor_coefficients(degree):
        return (0.0,)  # P' - P = -x^degree / degree!; its multiple root defeats a root finder
    shifted = [(m + 1) * coefficients[m + 1] if m < degree else 0.0 for m in range(degree + 1)]
    difference = [a - b for a, b in zip(shifted, coefficients, strict=True)]
    return tuple(sorted({float(root.real) for root in np.roots(difference[::-1])}))


def evaluate(coefficients: Coefficients, x: float) -> float:
    """Return P(x)."""
    total = 0.0
    for c in reversed(coefficients):
        total = total * x + c
    return total


def ratio_range(coefficients: Coefficients, low: float, high: float) -> tuple[float, float]:
    """Return rigorous bounds of P(x) / exp(x) on [low, high]."""
    points = [low, high, *(x for x in critical_points(coefficients) if low < x < high)]
    ratios = [evaluate(coefficients, x) * exp(-x) for x in points]
    return min(ratios) - _EVALUATION * max(map(abs, ratios)), max(ratios) + _EVALUATION * max(map(abs, ratios))


def relative_error(coefficients: Coefficients, half_width: float) -> float:
    """Return a rigorous bound of |P(x) / exp(x) - 1| on [-half_width, half_width]."""
    low, high = ratio_range(coefficients, -half_width, half_width)
    return max(1.0 - low, high - 1.0)


def coefficients_of(kind: str, degree: int, half_width: float | None) -> Coefficients:
    """Return the coefficients that a kind, "taylor" or "minimax", names."""
    if kind == "taylor":
        return taylor_coefficients(degree)
    if half_width is None:
        raise ValueError("minimax coefficients need an interval")
    return minimax_coefficients(degree, half_width)


def shift_bound(low: float, high: float) -> float:
    """Return tanh(ln(high / low) / 4): the most a softmax shifts, relative to the value range.

    `low` and `high` bound the ratios of the weights. Sharp: attained by two tuples; infinite where low <= 0.
    """
    if not low > 0.0:
        return inf
    root = sqrt(high / low)
    return (root - 1.0) / (root + 1.0)


def taylor_remainder(degree: int, half_width: float) -> float:
    """Return the least C with |exp(x) - T_degree(x)| <= C |x|^degree on [-half_width, half_width]."""
    if half_width > 30.0:
        # exp(x) / x^degree bounds the positive side; kept in logarithms against overflow
        return exp(min(half_width - degree * log(half_width), 700.0))
    term, total = 1.0 / factorial(degree), 0.0
    for m in range(1, 200):
        term *= half_width / (degree + m)
        total += term
    return total


@lru_cache(maxsize=1024)
def moment_constants(coefficients: Coefficients, half_width: float) -> tuple[tuple[float, float, int], ...]:
    """Return triples (A, C, p), p even, with |P(x) - exp(x)| <= A + C x^p on [-half_width, half_width].

    Numerics: between grid points and turning points P / exp is monotone, so the larger end bounds a cell rigorously.
    """
    points = np.linspace(-half_width, half_width, 2001)
    turning = [x for x in critical_points(coefficients) if abs(x) < half_width]
    points = np.unique(np.concatenate([points, np.asarray(turning, dtype=float)]))
    ratios = np.polynomial.polynomial.polyval(points, np.asarray(coefficients)) * np.exp(-points)
    ends = np.abs(ratios - 1.0) + _EVALUATION * (1.0 + np.abs(ratios))
    errors = np.exp(points[1:]) * np.maximum(ends[1:], ends[:-1])
    nearest = np.where(points[1:] * points[:-1] <= 0, 0.0, np.minimum(np.abs(points[1:]), np.abs(points[:-1])))
    constants = []
    for fraction in (0.02, 0.1, 0.25, 0.5, 0.75, 1.0):
        floor = float(np.max(errors[nearest <= fraction * half_width]))
        above = errors > floor
        for power in range(2, len(coefficients), 2):
            slope = float(np.max((errors[above] - floor) / nearest[above] ** power)) if np.any(above) else 0.0
            constants.append((floor, slope, power))
    return tuple(constants) or ((float(np.max(errors)), 0.0, 0),)
