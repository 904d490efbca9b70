"""Draws plot.png: the dealt cards with their SETs, or lse and the certified bounds of any other run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from korder.experiments import set_cards
from korder.experiments.placement import to_numpy
from korder.spec.runs import SetCardsData

if TYPE_CHECKING:
    from korder.experiments.attend import Report

_COLOURS = ("#c0392b", "#1e8449", "#6c3483")
_HATCHES = (None, "||||", None)
_FRAMES = ("#e67e22", "#2980b9", "#16a085", "#8e44ad", "#d4ac0d", "#7f8c8d", "#cb4335", "#2e4053")
_MOST_LETTERS = 6
_POINTS = 4000


def draw(report: Report, path: Path) -> None:
    """Write the picture of a report as PNG. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own, without pyplot: no state is shared with the caller's plots.
    figure: Any = Figure(figsize=(9, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if isinstance(report.run.data, SetCardsData) and report.verdict is not None:
        _draw_cards(figure, set_cards.deal(report.run.data), report.verdict)
    else:
        _draw_rows(figure, report)
    figure.savefig(path, format="png")


def _draw_cards(figure: Any, cards: Sequence[set_cards.Card], verdict: set_cards.Verdict) -> None:
    columns = int(np.ceil(np.sqrt(len(cards) * 4 / 3)))
    lines = int(np.ceil(len(cards) / columns))
    axes = figure.add_subplot()
    axes.set_xlim(-0.1, columns + 0.1)
    axes.set_ylim(-lines * 0.8 - 0.1, 0.1)
    axes.set_aspect("equal")
    axes.axis("off")
    sets = sorted(tuple(sorted(three)) for three in verdict.sets)
    for position, card in enumerate(cards):
        letters = [which for which, three in enumerate(sets) if position in three]
        left, top = position % columns, -(position // columns) * 0.8
        _draw_card(axes, left, top, position, card, letters)
    taking_part = sum(verdict.in_a_set)
    axes.set_title(
        f"{len(cards)} cards, {len(sets)} SETs found by one order-2 attention layer\n"
        f"{taking_part} cards take part in one; equal letters mark a SET"
    )


def _draw_card(axes: Any, left: float, top: float, position: int, card: set_cards.Card, letters: list[int]) -> None:
    from matplotlib.patches import FancyBboxPatch

    frame = _FRAMES[letters[0] % len(_FRAMES)] if letters else "#bbbbbb"
    axes.add_patch(
        FancyBboxPatch(
            (left + 0.06, top - 0.7),
            0.86,
            0.62,
            boxstyle="round,pad=0.0,rounding_size=0.06",
            facecolor="white",
            edgecolor=frame,
            linewidth=2.6 if letters else 1.0,
        )
    )
    count = card[0] + 1
    for symbol in range(count):
        _draw_symbol(axes, left + 0.49 + (symbol - (count - 1) / 2) * 0.25, top - 0.34, card)
    axes.text(left + 0.1, top - 0.12, str(position + 1), fontsize=6, va="top", color="#666666")
    for place, which in enumerate(letters[:_MOST_LETTERS]):
        colour = _FRAMES[which % len(_FRAMES)]
        axes.text(left + 0.16 + 0.12 * place, top - 0.66, _letter(which), fontsize=8, color=colour, weight="bold")
    if len(letters) > _MOST_LETTERS:
        axes.text(left + 0.88, top - 0.66, f"+{len(letters) - _MOST_LETTERS}", fontsize=6, ha="right")


def _draw_symbol(axes: Any, x: float, y: float, card: set_cards.Card) -> None:
    from matplotlib.patches import Ellipse, Polygon, Rectangle

    colour, shading, shape = _COLOURS[card[1]], card[2], card[3]
    style: dict[str, Any] = {
        "edgecolor": colour,
        "facecolor": colour if shading == 0 else "none",
        "hatch": _HATCHES[shading],
        "linewidth": 1.2,
    }
    wide, high = 0.09, 0.16
    if shape == 0:
        axes.add_patch(Polygon([(x - wide, y), (x, y + high), (x + wide, y), (x, y - high)], **style))
    elif shape == 1:
        axes.add_patch(Ellipse((x, y), 2 * wide, 2 * high, **style))
    else:
        axes.add_patch(Rectangle((x - wide, y - high), 2 * wide, 2 * high, **style))


def _letter(which: int) -> str:
    """A, B, .. Z, A1, B1, .."""
    return chr(ord("A") + which % 26) + (str(which // 26) if which >= 26 else "")


def _draw_rows(figure: Any, report: Report) -> None:
    certificate = report.result.certificate
    lse = to_numpy(report.result.lse).astype(np.float64).reshape(-1)
    upper = figure.add_subplot(2 if certificate is not None else 1, 1, 1)
    chosen = _spread(lse.size)
    upper.plot(chosen, np.where(np.isfinite(lse[chosen]), lse[chosen], np.nan), ".", markersize=2, color="#2980b9")
    upper.set_ylabel("lse")
    upper.set_title(report.plan.problem.describe(), fontsize=7)
    if certificate is None:
        upper.set_xlabel("row")
        return
    lower = figure.add_subplot(2, 1, 2, sharex=upper)
    bound = to_numpy(certificate.bound).astype(np.float64).reshape(-1)
    lower.plot(chosen, _positive(bound[chosen]), ".", markersize=2, color="#c0392b", label="certified bound")
    if report.measured is not None:
        errors = _positive(report.measured.errors)
        lower.plot(report.measured.positions, errors, "kx", label="measured error")
    lower.set_yscale("log")
    lower.set_ylabel("error of the output")
    lower.set_xlabel("row")
    lower.legend(loc="best")


def _positive(values: Any) -> Any:
    """What a logarithmic axis can show; the rest is left out."""
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _spread(size: int) -> Any:
    return np.unique(np.linspace(0, max(size - 1, 0), min(size, _POINTS)).astype(int))
