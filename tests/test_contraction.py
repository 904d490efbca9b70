"""Pairwise contraction of any namespace: steps, adjoints, and the subscripts of any order, against numpy's einsum."""

from __future__ import annotations

from itertools import pairwise as neighbours
from typing import Any

import array_api_compat.numpy as compat_numpy
import array_api_strict
import numpy as np
import pytest

from korder.methods.contraction import adjoint_contraction, contract, pairwise, trace_contraction
from korder.planning.expression import fold_subscripts, gate_subscripts
from korder.planning.path import contraction_steps

SIZES = dict(zip("bghijkmnopaeluvwxyz", (2, 3, 5, 7, 2, 3, 4, 2, 3, 2, 3, 4, 5, 2, 3, 4, 2, 3, 2), strict=True))
PAIRS = ["ij,jk->ik", "ij,jk->ki", "bij,bkj->bik", "il,al->ail", "ail,al->il", "al,ail->il", "bij,b->bij", "bi,bi->b",
         "ij,kl->lkji", "bijk,bkj->bi", "abc,cbd->dab"]  # fmt: skip


def arrays(subscripts: str, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    terms = subscripts.split("->")[0].split(",")
    sizes = SIZES | {"c": 3, "d": 2}
    return [rng.standard_normal([sizes[letter] for letter in term]) for term in terms]


@pytest.mark.parametrize("xp", [compat_numpy, array_api_strict], ids=["numpy", "strict"])
@pytest.mark.parametrize("subscripts", PAIRS)
def test_pairs(subscripts: str, xp: Any) -> None:
    left, right = arrays(subscripts)
    found = pairwise(xp, subscripts, xp.asarray(left), xp.asarray(right))
    assert np.allclose(np.asarray(found), np.einsum(subscripts, left, right), rtol=0, atol=1e-13)


def expressions() -> list[str]:
    folds = [
        fold_subscripts(order, contracted, full_weight=full)
        for order in range(2, 5)
        for contracted in range(order)
        for full in (False, True)
    ]
    gates = [gate_subscripts(order, contracted) for order in (3, 4) for contracted in range(order)]
    return [*folds, *gates, "bghil,bgjl,bgkl->bghijk", "bghia,auv,bgju,bgkv->bghijk", "bghijk,bgke,bgje->bghie"]


@pytest.mark.parametrize("subscripts", expressions())
def test_paths_compute_the_expression(subscripts: str) -> None:
    operands = arrays(subscripts)
    steps = contraction_steps(subscripts, tuple(x.shape for x in operands))
    assert len(steps) == len(operands) - 1
    found = contract(compat_numpy, steps, operands)
    expected = np.einsum(subscripts, *operands, optimize="greedy")
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) <= 1e-12 * np.max(np.abs(expected))
    assert steps[-1].size == expected.size


@pytest.mark.parametrize("subscripts", [s for s in expressions() if len(s) < 60])
def test_adjoint_is_the_transpose(subscripts: str) -> None:
    operands = arrays(subscripts)
    steps = contraction_steps(subscripts, tuple(x.shape for x in operands))
    result, trace = trace_contraction(compat_numpy, steps, operands)
    cotangent = np.random.default_rng(3).standard_normal(result.shape)
    gradients = adjoint_contraction(compat_numpy, steps, trace, cotangent)
    assert [x.shape for x in gradients] == [x.shape for x in operands]
    # The result is linear in each operand: <cotangent, result> is <gradient, operand> for every one.
    inner = float(np.sum(cotangent * result))
    for position, (operand, gradient) in enumerate(zip(operands, gradients, strict=True)):
        assert float(np.sum(operand * gradient)) == pytest.approx(inner, rel=1e-10)
        moved = list(operands)
        moved[position] = np.random.default_rng(position).standard_normal(operand.shape)
        elsewhere = float(np.sum(cotangent * contract(compat_numpy, steps, moved)))
        assert float(np.sum(moved[position] * gradient)) == pytest.approx(elsewhere, rel=1e-9, abs=1e-9)


def test_a_single_operand_needs_no_step() -> None:
    assert contraction_steps("bghil->bghil", ((1, 1, 1, 4, 5),)) == ()
    operand = np.ones((2, 3))
    assert contract(compat_numpy, (), [operand]) is operand


def test_the_path_multiplies_small_operands_first() -> None:
    steps = contraction_steps(fold_subscripts(4, 3), ((1, 1, 1, 50, 8), (1, 1, 3, 8), (1, 1, 5, 8), (1, 1, 7, 8)))
    sizes = [step.size for step in steps]
    assert all(before < after for before, after in neighbours(sizes))
    assert sum(step.flops for step in steps) < 1.1 * sizes[-1]
