"""Pairwise contraction steps found by opt_einsum from shapes alone; the only module that imports it."""

from __future__ import annotations

from functools import lru_cache
from math import prod

from korder.planning.plan import ContractionStep

Shape = tuple[int, ...]


@lru_cache(maxsize=256)
def contraction_steps(subscripts: str, shapes: tuple[Shape, ...]) -> tuple[ContractionStep, ...]:
    """Return the steps of the cheapest pairwise path; none for a single operand.

    Args:
        subscripts: Einsum subscripts with an explicit result, for example "il,al,bl->iabl".
        shapes: One shape per operand.

    Cost:   The search is optimal up to eight operands; results are cached.

    Example:
        >>> [step.subscripts for step in contraction_steps("il,al,bl->iabl", ((9, 4), (5, 4), (3, 4)))]
        ['al,bl->abl', 'il,abl->iabl']
    """
    inputs, result = subscripts.split("->")
    terms = inputs.split(",")
    if len(terms) == 1:
        return ()
    pairs = zip("".join(terms), (size for shape in shapes for size in shape), strict=True)
    return tuple(_steps(terms, result, dict(pairs), _path(subscripts, shapes)))


def _path(subscripts: str, shapes: tuple[Shape, ...]) -> list[tuple[int, ...]]:
    if len(shapes) == 2:
        return [(0, 1)]
    import opt_einsum  # here, so that importing korder does not import it

    path, _ = opt_einsum.contract_path(subscripts, *shapes, shapes=True, optimize="optimal")
    return [tuple(pair) for pair in path]


def _steps(terms: list[str], result: str, sizes: dict[str, int], path: list[tuple[int, ...]]) -> list[ContractionStep]:
    steps = []
    remaining = list(terms)
    for number, pair in enumerate(path):
        chosen = [remaining[position] for position in pair]
        remaining = [term for position, term in enumerate(remaining) if position not in pair]
        last = number == len(path) - 1
        kept = result if last else _kept(chosen, remaining, result)
        remaining.append(kept)
        size = prod(sizes[letter] for letter in kept)
        summed = set("".join(chosen)) - set(kept)
        flops = size * prod(sizes[letter] for letter in summed) * (2 if summed else 1)
        steps.append(ContractionStep(tuple(pair), f"{','.join(chosen)}->{kept}", flops, size))
    return steps


def _kept(chosen: list[str], remaining: list[str], result: str) -> str:
    """Letters that a later step or the result still needs, those of the result first and in its order."""
    present = set("".join(chosen))
    needed = set("".join(remaining)) - set(result)
    return "".join(letter for letter in result if letter in present) + "".join(sorted(present & needed))
