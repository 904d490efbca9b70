"""The backward against the closed form of the gradient: tails, masks, biases, what is wanted, and shapes by chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ISAS, Case, assert_backward, every_gradient, random_case, upstream
from test_forward import MASKS, case_by_chance, mask_of

import korder
from korder.spi import NEEDS, OutputGradients
from korder_native import exact

RATIO = 16.0
"""Gradients sum as many terms again as outputs, and the weights carry the rounding of lse: room over the plain form."""


def assert_right(case: Case, isa: str) -> None:
    for dtype in ("float32", "float64"):
        narrow = case.cast(dtype)
        assert_backward(narrow, narrow.kernel(isa), RATIO)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 5, 6, 7, 8, 9, 47, 48, 49, 64, 65, 131])
def test_every_number_of_rows(rows: int, isa: str) -> None:
    assert_right(random_case(rows, (3, 11), batch=1, heads=(2, 1)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("keys", [1, 5, 6, 7, 15, 16, 17, 31, 33, 47, 48, 49, 97, 130])
def test_every_number_of_keys(keys: int, isa: str) -> None:
    assert_right(random_case(7, (2, keys), batch=1, heads=(1, 1)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 64])
def test_every_width(width: int, isa: str) -> None:
    assert_right(random_case(7, (2, 19), width=width, value_width=65 - width, batch=1, heads=(1, 1)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_with_everything(mask: str, order: int, isa: str) -> None:
    lengths = ((37,), (11, 23), (5, 13, 7), (5, 3, 7, 4))[order - 1]
    for kinds in (("full", "key", "shared", None), ("key", "full", None, "shared")):
        options: dict[str, Any] = {"mask": mask_of(mask, order), "key_masks": True, "biases": kinds[:order]}
        assert_right(random_case(13, lengths, query_offset=3, key_offsets=(1, 0, 2, -1)[:order], **options), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_several_blocks_and_chunks_of_keys(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 2):
        monkeypatch.setattr(exact, "thread_count", lambda threads=threads: threads)
        wide = random_case(7, (1, 703), width=600, value_width=450, batch=1, heads=(1, 1), biases=(None, "key"))
        assert_backward(wide.cast("float32"), wide.cast("float32").kernel(isa), RATIO)


def test_only_what_is_wanted_is_computed() -> None:
    case = random_case(9, (4, 13), biases=("full", "key"), key_masks=True)
    kernel = case.kernel()
    saved = kernel.forward(case.operands, save=True)
    given = OutputGradients(*upstream(case))
    everything = kernel.backward(case.operands, saved, given, needs=NEEDS)
    for name in ("query", "keys", "values", "biases"):
        one = kernel.backward(case.operands, saved, given, needs=frozenset({name}))
        for other in ("query", "keys", "values", "biases"):
            found, wanted = getattr(one, other), getattr(everything, other)
            if other == name:
                pairs = [(found, wanted)] if name == "query" else zip(found, wanted, strict=True)
                assert all(np.array_equal(x, y) for x, y in pairs)
            else:
                assert found is None or found == (None, None)


def test_rows_that_see_nothing_give_and_get_zeros() -> None:
    case = random_case(9, (4, 13), mask=korder.Causal(), query_offset=-5)
    kernel = case.kernel()
    saved = kernel.forward(case.operands, save=True)
    found = kernel.backward(case.operands, saved, OutputGradients(*upstream(case)), needs=NEEDS)
    assert np.all(saved.lse[:, :, :5] == -np.inf)
    assert np.all(found.query[:, :, :5] == 0)
    assert all(np.isfinite(x).all() for x in every_gradient(found))


def test_a_masked_nan_does_not_leak_into_gradients() -> None:
    case = random_case(9, (4, 13), key_masks=True)
    kernel = case.kernel()
    given = OutputGradients(*upstream(case))
    clean = kernel.backward(case.operands, kernel.forward(case.operands, save=True), given, needs=NEEDS)
    spoil = lambda x, mask: np.where(np.repeat(mask[..., None], x.shape[-1], -1), x, np.nan)  # noqa: E731
    keys, values = (
        tuple(spoil(x, mask) for x, mask in zip(xs, case.key_masks, strict=True)) for xs in (case.keys, case.values)
    )
    assert any(np.isnan(x).any() for x in keys)
    spoiled = replace(case.operands, keys=keys, values=values)
    found = kernel.backward(spoiled, kernel.forward(spoiled, save=True), given, needs=NEEDS)
    for got, wanted in zip(every_gradient(found), every_gradient(clean), strict=True):
        assert np.array_equal(got, wanted)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_shapes_by_chance(data: st.DataObject) -> None:
    assert_right(case_by_chance(data, 60, 2), data.draw(st.sampled_from(ISAS)))
