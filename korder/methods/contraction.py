"""Executes the pairwise steps of a plan, and their adjoints, in any Array API namespace: permute, reshape, matmul."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from korder.planning.plan import ContractionStep

Array = Any


def contract(xp: Any, steps: Sequence[ContractionStep], operands: Sequence[Array]) -> Array:
    """Return the result of all steps; a single operand and no steps return the operand."""
    return trace_contraction(xp, steps, operands)[0]


def trace_contraction(
    xp: Any, steps: Sequence[ContractionStep], operands: Sequence[Array]
) -> tuple[Array, list[tuple[Array, Array]]]:
    """Return the result, and the two operands of every step, which the adjoint wants."""
    current = list(operands)
    trace = []
    for step in steps:
        left, right = (current[position] for position in step.operands)
        trace.append((left, right))
        current = [x for position, x in enumerate(current) if position not in step.operands]
        current.append(pairwise(xp, step.subscripts, left, right))
    return current[0], trace


def adjoint_contraction(
    xp: Any, steps: Sequence[ContractionStep], trace: Sequence[tuple[Array, Array]], cotangent: Array
) -> list[Array]:
    """Return the gradient of every operand, given that of the result."""
    current = [cotangent]
    for step, (left, right) in zip(reversed(steps), reversed(trace), strict=True):
        inputs, result = step.subscripts.split("->")
        first, second = inputs.split(",")
        gradient = current.pop()
        pair = {
            step.operands[0]: pairwise(xp, f"{result},{second}->{first}", gradient, right),
            step.operands[1]: pairwise(xp, f"{result},{first}->{second}", gradient, left),
        }
        for position in sorted(pair):
            current.insert(position, pair[position])
    return current


def pairwise(xp: Any, subscripts: str, left: Array, right: Array) -> Array:
    """Return one pairwise contraction; every letter of an operand stands in the other operand or in the result.

    Cost: a product where nothing is summed, a product and a sum where one operand has no axis of its own, else one
    batched matrix product.

    Example:
        >>> import numpy as np
        >>> pairwise(np, "ij,jk->ki", np.ones((2, 3)), np.ones((3, 5))).shape
        (5, 2)
    """
    inputs, result = subscripts.split("->")
    first, second = inputs.split(",")
    summed = [letter for letter in first if letter in second and letter not in result]
    if not summed:
        return _aligned(xp, left, first, result) * _aligned(xp, right, second, result)
    if all(letter in second for letter in first) or all(letter in first for letter in second):
        return _multiply_and_sum(xp, (left, first), (right, second), summed, result)
    return _matrix_product(xp, (left, first), (right, second), summed, result)


def _aligned(xp: Any, x: Array, letters: str, target: str) -> Array:
    """Permute to the order of `target`, with axes of length one for the letters that `x` lacks."""
    order = [letters.index(letter) for letter in target if letter in letters]
    if order != list(range(len(order))):
        x = xp.permute_dims(x, tuple(order))
    shape = iter(x.shape)
    return xp.reshape(x, tuple(next(shape) if letter in letters else 1 for letter in target))


def _multiply_and_sum(
    xp: Any, left: tuple[Array, str], right: tuple[Array, str], summed: list[str], result: str
) -> Array:
    larger, smaller = (left, right) if len(left[1]) >= len(right[1]) else (right, left)
    letters = larger[1]
    terms = larger[0] * _aligned(xp, smaller[0], smaller[1], letters)
    total = xp.sum(terms, axis=tuple(letters.index(letter) for letter in summed))
    return _aligned(xp, total, "".join(letter for letter in letters if letter not in summed), result)


def _matrix_product(
    xp: Any, left: tuple[Array, str], right: tuple[Array, str], summed: list[str], result: str
) -> Array:
    sizes = dict(zip(left[1] + right[1], left[0].shape + right[0].shape, strict=True))
    batch = [letter for letter in left[1] if letter in right[1] and letter in result]
    rows = [letter for letter in left[1] if letter not in right[1]]
    columns = [letter for letter in right[1] if letter not in left[1]]

    def packed(x: Array, letters: str, *groups: list[str]) -> Array:
        x = _aligned(xp, x, letters, "".join("".join(group) for group in groups))
        head = tuple(sizes[letter] for letter in groups[0])
        return xp.reshape(x, (*head, *(prod(sizes[letter] for letter in group) for group in groups[1:])))

    product = packed(left[0], left[1], batch, rows, summed) @ packed(right[0], right[1], batch, summed, columns)
    found = [*batch, *rows, *columns]
    product = xp.reshape(product, tuple(sizes[letter] for letter in found))
    return _aligned(xp, product, "".join(found), result)
