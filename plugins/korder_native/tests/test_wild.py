"""Operands that are not finite or could overflow: only the key heads that have them go to korder's generic kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from reference import ISAS, Case, every_gradient, random_case, upstream

import korder
from korder.spi import NEEDS, Operands, OutputGradients
from korder_native import exact
from korder_native.key_heads import KeyHead

CASE = random_case(9, (4, 13), batch=3, heads=(4, 2), biases=("shared", "key"), key_masks=True)
SPOILED = (1, 1)
"""Batch and key head; its query heads are 2 and 3."""


def spoil(case: Case, place: str, number: float) -> Operands:
    """The operands with one number changed in a place that belongs to the spoiled head."""
    operands = case.operands
    if place == "query":
        return replace(operands, query=changed(operands.query, (1, 3, 4, 2), number))
    if place == "bias":
        bias = np.broadcast_to(operands.biases[1], (3, 4, 1, 13))
        return replace(operands, biases=(operands.biases[0], changed(bias, (1, 2, 0, 5), number)))
    arrays = getattr(operands, place)
    masks = tuple(np.array(mask) for mask in operands.key_masks)
    masks[1][1, 1, 5] = True
    return replace(operands, key_masks=masks, **{place: (arrays[0], changed(arrays[1], (1, 1, 5, 2), number))})


def changed(array: Any, where: tuple[int, ...], number: float) -> Any:
    found = array.copy()
    found[where] = number
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The problems that the generic kernel gets from now on."""
    problems: list[Any] = []
    right = exact.ExactKernel

    def generic(xp: Any, plan: Any) -> Any:
        problems.append(plan.problem)
        return right(xp, plan)

    monkeypatch.setattr(exact, "ExactKernel", generic)
    return problems


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e302])
@pytest.mark.parametrize("place", ["query", "keys", "values", "bias"])
def test_only_the_spoiled_head_is_the_generic_kernel_s(
    place: str, number: float, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands, kernel = spoil(CASE, place, number), CASE.kernel(isa)
    with np.errstate(all="ignore"):
        whole = korder.spi.ExactKernel(np_namespace(), CASE.plan)
        wanted = whole.forward(operands, save=True)
        given = OutputGradients(*upstream(CASE))
        gradients = whole.backward(operands, wanted, given, needs=NEEDS)
    problems = counted(monkeypatch)
    found = kernel.forward(operands, save=True)
    closed = place == "bias" and number == -np.inf
    assert [(p.batch, p.heads, p.groups) for p in problems] == ([] if closed else [(1, 2, 1)])
    assert_close(found.output, wanted.output)
    assert_close(found.lse, wanted.lse)
    problems.clear()
    mine = kernel.backward(operands, wanted, given, needs=NEEDS)
    assert len(problems) == (0 if closed else 1)
    for got, truth in zip(every_gradient(mine), every_gradient(gradients), strict=True):
        assert got.shape == truth.shape
        assert_close(got, truth)
    clean = kernel.forward(replace(operands, **clean_parts(operands)), save=False).output
    others = np.ones(clean.shape[:2], bool)
    others[1, 2:] = False
    assert np.array_equal(found.output[others], clean[others])


def clean_parts(operands: Operands) -> dict[str, Any]:
    finite = lambda x: np.where(np.abs(x) < 1e100, x, 0.0)  # noqa: E731
    parts: dict[str, Any] = {name: tuple(map(finite, getattr(operands, name))) for name in ("keys", "values", "biases")}
    return {**parts, "query": finite(operands.query)}


def assert_close(got: Any, wanted: Any) -> None:
    finite = np.isfinite(wanted)
    assert np.array_equal(np.isnan(got), np.isnan(wanted))
    assert np.array_equal(got[~finite], wanted[~finite], equal_nan=True)
    assert np.allclose(got[finite], wanted[finite], rtol=1e-11, atol=1e-12)


def np_namespace() -> Any:
    import array_api_compat.numpy as xp

    return xp


def test_a_gradient_that_is_not_finite_is_the_generic_kernel_s_in_its_head_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, (of_output, of_lse) = CASE.kernel(), upstream(CASE)
    saved = kernel.forward(CASE.operands, save=True)
    problems = counted(monkeypatch)
    given = OutputGradients(changed(of_output, (2, 0, 3, 1), np.inf), of_lse)
    found = kernel.backward(CASE.operands, saved, given, needs=NEEDS)
    assert [(p.batch, p.heads, p.groups) for p in problems] == [(1, 2, 1)]
    clean = kernel.backward(CASE.operands, saved, OutputGradients(of_output, of_lse), needs=NEEDS)
    assert not np.isfinite(found.query[2, 0, 3]).all()
    assert np.array_equal(found.query[:2], clean.query[:2])
    assert np.array_equal(found.keys[0][2, 1], clean.keys[0][2, 1])


def test_what_a_mask_hides_spoils_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    operands, problems = CASE.operands, counted(monkeypatch)
    masks = tuple(np.array(mask) for mask in operands.key_masks)
    masks[1][1, 1, 5] = False
    hidden = spoil(CASE, "keys", np.nan)
    found = CASE.kernel().forward(replace(hidden, key_masks=masks), save=False)
    wanted = CASE.kernel().forward(replace(operands, key_masks=masks), save=False)
    assert problems == []
    assert np.array_equal(found.output, wanted.output)


@pytest.mark.parametrize("threads", [1, 3])
def test_marks_of_large_operands_read_by_several_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "thread_count", lambda: threads)
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, h, n, 96)).astype("f4") for h, n in ((2, 3), (1, 7001), (1, 7001)))
    case = Case(korder.AttentionSpec(order=1), query, (key,), (value,), (None,), (None,), dtype="float32")
    problems, kernel = counted(monkeypatch), case.kernel()
    for row in (0, 3500, 7000):
        for column in (0, 95):
            spoiled = replace(case.operands, values=(changed(value, (1, 0, row, column), np.nan),))
            found = kernel.forward(spoiled, save=False)
            assert len(problems) == 1
            assert np.isfinite(found.output[0]).all()
            assert np.isnan(found.output[1, :, :, column]).all()
            problems.clear()


def test_tensors_of_bfloat16_too() -> None:
    torch = pytest.importorskip("torch")
    x = [torch.randn(2, 2, n, 8).bfloat16() for n in (5, 7, 7)]
    x[2][1, 0, 3] = torch.nan
    x = [tensor.requires_grad_() for tensor in x]
    output = korder.attend(x[0], (x[1],), (x[2],), backend="native")
    other = korder.attend(x[0], (x[1],), (x[2],), backend="torch")
    assert torch.equal(output.isnan(), other.isnan())
    assert torch.isnan(output[1, 0]).all()
    assert torch.isfinite(output[0]).all()
    for got, wanted in zip(*(torch.autograd.grad(y.float().sum(), x) for y in (output, other)), strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())


def test_a_head_is_a_problem_of_its_own() -> None:
    head = KeyHead(*SPOILED, share=2)
    part = head.operands(CASE.operands)
    assert part.query.shape == (1, 2, 9, 5)
    assert part.keys[1].shape == (1, 1, 13, 5)
    assert part.biases[0].shape == (1, 1, 9, 4)
    assert part.biases[1].shape == (1, 2, 1, 13)
    assert np.array_equal(part.query, CASE.query[1:2, 2:4])
    assert (head.plan(CASE.plan).problem.heads, head.plan(CASE.plan).problem.groups) == (2, 1)
