"""The forward against the definition: every tail of a tile, masks, biases, sizes of scores, and shapes by chance."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ISAS, Case, assert_forward, random_case

import korder
from korder_native import _native, arrays, exact

MASKS: dict[str, Any] = {
    "full": korder.Full(),
    "causal": korder.Causal(),
    "window": korder.Window(sizes=(4, 7, 5, 6)),
    "ordered": korder.Ordered(),
}


def mask_of(name: str, order: int) -> Any:
    return korder.Window(sizes=MASKS[name].sizes[:order]) if name == "window" else MASKS[name]


@pytest.fixture(autouse=True)
def _nan_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are written into memory full of NaN, so that what is not written is seen."""

    def new(like: Any, shape: Any, dtype: str, *, zeros: bool = False) -> Any:
        return np.zeros(shape, dtype) if zeros else np.full(shape, np.nan, dtype)

    monkeypatch.setattr(exact, "new", new)


def assert_right(case: Case, isa: str) -> None:
    for dtype in ("float32", "float64"):
        narrow = case.cast(dtype)
        assert_forward(narrow, narrow.kernel(isa).forward(narrow.operands, save=False))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", range(1, 18))
def test_every_number_of_rows(rows: int, isa: str) -> None:
    assert_right(random_case(rows, (3, 11), batch=1, heads=(1, 1)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("keys", [*range(1, 50), 95, 96, 97])
def test_every_number_of_keys(keys: int, isa: str) -> None:
    assert_right(random_case(7, (2, keys), batch=1, heads=(1, 1)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [*range(1, 36), 64, 80])
def test_every_width(width: int, isa: str) -> None:
    assert_right(random_case(7, (2, 19), width=width, value_width=81 - width, batch=1, heads=(1, 1)), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_with_everything(mask: str, order: int, isa: str) -> None:
    lengths = ((37,), (11, 23), (5, 13, 7), (5, 3, 7, 4))[order - 1]
    kinds = ("full", "key", "shared", None)[:order]
    options: dict[str, Any] = {"mask": mask_of(mask, order), "key_masks": True, "biases": kinds}
    assert_right(random_case(13, lengths, query_offset=3, key_offsets=(1, 0, 2, -1)[:order], **options), isa)


@pytest.mark.parametrize("lengths", [(9, 30), (30, 9), (4, 17, 6), (17, 4, 6), (4, 6, 17)])
def test_an_ordered_chain_with_any_mode_contracted(lengths: tuple[int, ...]) -> None:
    assert_right(random_case(19, lengths, mask=korder.Ordered(), key_offsets=(2, 0, 5)[: len(lengths)]), "")


@pytest.mark.parametrize("isa", ISAS)
def test_several_blocks_and_chunks_of_keys(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in (1, 2):
        monkeypatch.setattr(exact, "thread_count", lambda threads=threads: threads)
        wide = random_case(7, (1, 1203), width=600, value_width=450, batch=1, heads=(1, 1), mask=korder.Causal())
        long = replace(wide, query_offset=1195)
        case = long.cast("float32")
        assert_forward(case, case.kernel(isa).forward(case.operands, save=False))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_few_rows_share_the_outer_keys_among_threads(rows: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "thread_count", lambda: 3)
    case = random_case(rows, (301, 310), width=32, value_width=32, batch=1, heads=(1, 1), key_masks=True).cast(
        "float32"
    )
    assert_forward(case, case.kernel(isa).forward(case.operands, save=False))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1e4, 1e-4, 1e-38])
def test_scores_of_any_size(size: float, isa: str) -> None:
    for order in (1, 2):
        assert_right(random_case(9, (4, 21)[-order:], size=size), isa)


@pytest.mark.parametrize("isa", ISAS)
def test_denormal_values(isa: str) -> None:
    case = random_case(9, (23,)).cast("float32")
    tiny = replace(case, values=tuple(1e-40 * v for v in case.values)).cast("float32")
    assert 0 < np.max(np.abs(tiny.values[0])) < np.finfo("float32").tiny
    assert_forward(tiny, tiny.kernel(isa).forward(tiny.operands, save=False))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_exponential(dtype: str, isa: str) -> None:
    wide = dtype == "float64"
    lowest = np.log(np.finfo(dtype).tiny)
    x = np.concatenate([np.linspace(lowest, 0, 20011), -np.geomspace(1e-9, 1, 4001), [0.0]]).astype(dtype)
    got = x.copy()
    _native.kernels(isa).exponential(wide, arrays.address(got), got.size)
    exact_ = np.exp(x.astype(np.longdouble))
    # A score's own rounding does |x| / 2 units to e^x; without fused multiplications as much comes on top.
    assert np.all(np.abs(got / exact_ - 1) < (2.5 + np.abs(x)) * np.finfo(dtype).eps)
    closed = np.array([-np.inf, -1e30, 2 * lowest], dtype)
    _native.kernels(isa).exponential(wide, arrays.address(closed), closed.size)
    assert np.array_equal(closed, np.zeros(3))


def case_by_chance(data: st.DataObject, most_rows: int, most_batch: int) -> Case:
    """Draw a problem of any order, mask, shape and form."""
    order = data.draw(st.integers(1, 4))
    most = (60, 14, 7, 5)[order - 1]
    groups, share = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    offsets = st.integers(-9, 9)
    return random_case(
        data.draw(st.integers(0, most_rows)),
        tuple(data.draw(st.lists(st.integers(0, most), min_size=order, max_size=order))),
        seed=data.draw(st.integers(0, 99)),
        mask=mask_of(data.draw(st.sampled_from(list(MASKS))), order),
        width=data.draw(st.integers(1, 20)),
        value_width=data.draw(st.integers(1, 20)),
        batch=data.draw(st.integers(0, most_batch)),
        heads=(groups * share, groups),
        key_masks=data.draw(st.booleans()),
        biases=tuple(data.draw(st.sampled_from(["key", "full", "shared", None])) for _ in range(order)),
        query_offset=data.draw(offsets),
        key_offsets=tuple(data.draw(offsets) for _ in range(order)),
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_shapes_by_chance(data: st.DataObject) -> None:
    assert_right(case_by_chance(data, 20, 3), data.draw(st.sampled_from(ISAS)))


def test_more_rows_than_are_kept_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are worked on in slabs, each of which meets every chunk of keys."""
    for threads in (1, 2):
        monkeypatch.setattr(exact, "thread_count", lambda threads=threads: threads)
        rng = np.random.default_rng(0)
        query, key, value = (
            rng.standard_normal((1, h, n, 9)).astype("f4") for h, n in ((2, 4500), (1, 70000), (1, 70000))
        )
        key[:, :, 3:-3] = key[:, :, :1]  # few distinct keys, so that the answer is a short sum
        value[:, :, 3:-3] = value[:, :, :1]
        case = Case(korder.AttentionSpec(order=1), query, (key,), (value,), (None,), (None,), dtype="float32")
        found = case.kernel().forward(case.operands, save=False)
        scores = np.einsum("bhid,bjd->bhij", query.astype("f8") / 3, key[:, 0, np.r_[:3, -3:0]].astype("f8"))
        weights = np.exp(scores) * np.array([70000 - 5, 1, 1, 1, 1, 1])
        wanted = np.einsum("bhij,bje->bhie", weights, value[:, 0, np.r_[:3, -3:0]].astype("f8"))
        assert np.allclose(found.output, wanted / weights.sum(-1)[..., None], rtol=0, atol=2e-4)
