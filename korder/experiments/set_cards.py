"""The game SET as one order-2 attention layer: which of the dealt cards take part in a SET, and with which two.

A card has 4 attributes with 3 values each; three cards are a SET when every attribute sums to 0 modulo 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, product
from math import cos, log, pi

import numpy as np
from numpy.typing import NDArray

from korder.experiments.inputs import FloatArray, Inputs
from korder.spec.runs import SetCardsData

ATTRIBUTES = (
    ("one", "two", "three"),
    ("red", "green", "purple"),
    ("solid", "striped", "open"),
    ("diamond", "oval", "rectangle"),
)
VALUES = 3
COLUMNS = 3  # of one attribute: the cosine of a sum of three angles has CP rank 3
GAP = 1.0 - cos(2.0 * pi / VALUES)  # what one mismatched attribute costs, in units of the sharpness
Card = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the attention layer says about a table of cards."""

    in_a_set: tuple[bool, ...]
    sets: frozenset[frozenset[int]]


def deal(data: SetCardsData) -> tuple[Card, ...]:
    """Return the cards on the table, dealt from the 81 without repeats."""
    deck = list(product(range(VALUES), repeat=len(ATTRIBUTES)))
    return tuple(random.Random(data.seed).sample(deck, data.table))


def describe(card: Card) -> str:
    """Return a card in words: "two red striped ovals"."""
    words = " ".join(names[value] for names, value in zip(ATTRIBUTES, card, strict=True))
    return words + ("s" if card[0] else "")


def sharpness(cards: int) -> float:
    """Return the factor on every cosine: all tuples that do not match then weigh at most 1/4 of one that does."""
    return log(4.0 * cards**2) / GAP


def build(data: SetCardsData) -> Inputs:
    """Return the layer's query, keys and values.

    The score of a query card and two key cards is the sharpness times the sum over attributes of
    cos(2 pi (x + y + z) / 3): largest, 4 times the sharpness, just where every attribute sums to 0 modulo 3.
    The first values are the identity and the second ones, so row i of the output is the chance of each card to be
    the first partner of card i.

    Shapes:  query, keys (cards, 12); values (cards, cards).
    Source:  arXiv 2310.04064, triple detection; the decomposition of the cosine of a sum into products is ours:
             cos(a + b + c) = 4/3 sum_m (-1)^m cos(a - f_m) cos(b - f_m) cos(c - f_m) with f_m = m pi / 3.
    """
    cards = np.asarray(deal(data), dtype=np.float64)
    shifts = np.arange(COLUMNS) * pi / COLUMNS
    angles = (2.0 * pi / VALUES) * cards[:, :, None] - shifts  # (cards, attributes, columns)
    waves = np.cos(angles).reshape(len(cards), -1)
    signs = np.tile((-1.0) ** np.arange(COLUMNS), len(ATTRIBUTES))
    query = sharpness(len(cards)) * (4.0 / COLUMNS) * signs * waves
    as_float32: Callable[[FloatArray], FloatArray] = lambda array: array.astype(np.float32)  # noqa: E731
    return Inputs(
        query=as_float32(query),
        keys=(as_float32(waves), as_float32(waves)),
        values=(np.eye(len(cards), dtype=np.float32), np.ones((len(cards), len(cards)), dtype=np.float32)),
    )


def matches(lse: FloatArray) -> NDArray[np.int64]:
    """Return for each card the number of its matching tuples, itself taken three times not counted.

    exp(lse - highest score) is that number, plus 1 because a card taken three times sums to 0 as well, plus at most
    1/4 from all others. Each SET counts twice, its two other cards in either order. A method that is far off may give
    any lse; no card matches more often than there are tuples.
    """
    excess = lse.astype(np.float64) - len(ATTRIBUTES) * sharpness(len(lse))
    return np.floor(np.exp(np.minimum(excess, 2 * log(len(lse)))) - 0.5).astype(np.int64)


def verdict(lse: FloatArray, tuples: NDArray[np.integer]) -> Verdict:
    """Return what lse and the most probable tuples say.

    Shapes:  lse (cards,); tuples (cards, count, 2), most probable first, count > the largest number of matches.
    """
    counts = matches(lse)
    found = set()
    for card, count in enumerate(counts):
        # The card itself, taken twice, is among the count + 1 matching tuples; it makes no SET.
        partners = [tuple(int(j) for j in pair) for pair in tuples[card, : count + 1]]
        found |= {frozenset((card, *pair)) for pair in partners if pair != (card, card)}
    return Verdict(tuple(bool(count > 0) for count in counts), frozenset(found))


def brute_force(cards: tuple[Card, ...]) -> Verdict:
    """Return the truth, by looking at every three cards."""
    sets = frozenset(
        frozenset(three)
        for three in combinations(range(len(cards)), 3)
        if all(sum(cards[i][a] for i in three) % VALUES == 0 for a in range(len(ATTRIBUTES)))
    )
    return Verdict(tuple(any(card in three for three in sets) for card in range(len(cards))), sets)
