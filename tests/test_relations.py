"""Relations that hold without an oracle, at sizes where tiles are many: the exact kernels against themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from korder.spec import Causal, Full, Ordered, Window
from tests.kernels import GENERIC, NUMPY, Subject, plan_with
from tests.limits import assert_agree
from tests.problems import Case, random_case

SIZES: dict[str, Any] = {"queries": 31, "lengths": (41, 37, 29), "batch": 2, "heads": 2, "groups": 1}
BLOCKS = {"queries": 12, "folded": 13, "keys": 17}
subjects = pytest.mark.parametrize("subject", [NUMPY, GENERIC], ids=lambda s: s.name)


def result(subject: Subject, case: Case) -> tuple[np.ndarray, np.ndarray]:
    found = subject.forward(case, plan_with(case, **BLOCKS))
    return np.asarray(found.output), np.asarray(found.lse)


def same(subject: Subject, one: Case, other: Case) -> None:
    for found, expected in zip(result(subject, one), result(subject, other), strict=True):
        assert_agree(found, expected, dtype=one.dtype)


def case_of(order: int, dtype: str = "float64", **changes: Any) -> Case:
    sizes = SIZES | {"lengths": SIZES["lengths"][:order]} | changes
    return random_case(order, dtype=dtype, **sizes)


@subjects
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_swapping_modes_with_their_values(subject: Subject, order: int, mask: Any, dtype: str) -> None:
    case = case_of(order, dtype, mask=mask)
    turned = replace(case, keys=case.keys[::-1], values=case.values[::-1])
    same(subject, turned, case)


@subjects
@pytest.mark.parametrize("order", [1, 2, 3])
def test_permuting_the_keys_of_a_mode(subject: Subject, order: int) -> None:
    case = case_of(order)
    shuffle = np.random.default_rng(1).permutation(case.keys[0].shape[2])
    keys, values = (
        (group[0][:, :, shuffle], *group[1:]) for group in (case.keys, case.values)
    )  # fmt: skip
    same(subject, replace(case, keys=keys, values=values), case)


@subjects
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_linear_in_the_values_of_each_mode(subject: Subject, mode: int) -> None:
    case = case_of(3, mask=Causal())
    other = case_of(3, mask=Causal(), seed=5).values[mode]

    def with_values(value: np.ndarray) -> np.ndarray:
        values = (*case.values[:mode], value, *case.values[mode + 1 :])
        return result(subject, replace(case, values=values))[0]

    expected = 2.5 * with_values(case.values[mode]) - 0.75 * with_values(other)
    assert_agree(with_values(2.5 * case.values[mode] - 0.75 * other), expected, dtype="float64")


@subjects
@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_a_mode_of_ones_drops_out(subject: Subject, mode: int, mask: Any) -> None:
    case = case_of(3, mask=mask, lengths=(41, 37, 29) if mask.kind == "full" else (29, 31, 37))
    case.keys[mode][...] = 1.0
    case.values[mode][...] = 1.0
    rest = [t for t in range(3) if t != mode]
    smaller = replace(
        case.with_spec(order=2, scale=case.spec.score_factor(6)),
        keys=tuple(case.keys[t] for t in rest),
        values=tuple(case.values[t] for t in rest),
    )
    output, lse = result(subject, case)
    expected_output, expected_lse = result(subject, smaller)
    positions = np.arange(31)
    copies = np.minimum(positions + 1, case.keys[mode].shape[2]) if mask.kind == "causal" else case.keys[mode].shape[2]
    assert_agree(output, expected_output, dtype="float64")
    assert_agree(lse, expected_lse + np.log(copies), dtype="float64")


@subjects
@pytest.mark.parametrize("mode", [0, 1, 2])
def test_a_masked_key_is_a_removed_key(subject: Subject, mode: int) -> None:
    case = case_of(3)
    kept = np.random.default_rng(2).random(case.keys[mode].shape[2]) < 0.6
    masks: list[Any] = [None] * 3
    masks[mode] = np.broadcast_to(kept, (2, kept.size))
    keys, values = list(case.keys), list(case.values)
    keys[mode], values[mode] = keys[mode][:, :, kept], values[mode][:, :, kept]
    same(subject, replace(case, key_masks=tuple(masks)), replace(case, keys=tuple(keys), values=tuple(values)))


@subjects
@pytest.mark.parametrize("mask", [Causal(), Window(sizes=(7, 19)), Ordered()], ids=lambda m: m.kind)
def test_a_shard_with_offsets_is_the_rows_of_the_whole(subject: Subject, mask: Any) -> None:
    case = case_of(2, mask=mask, query_offset=4, key_offsets=(1, -2))
    shard = replace(case, query=case.query[:, :, 13:24], query_offset=17)
    for found, whole in zip(result(subject, shard), result(subject, case), strict=True):
        assert_agree(found, whole[:, :, 13:24], dtype="float64")


@subjects
@pytest.mark.parametrize("mask", [Full(), Causal(), Ordered()], ids=lambda m: m.kind)
def test_parts_over_disjoint_keys_merge_by_lse(subject: Subject, mask: Any) -> None:
    case = case_of(2, mask=mask)
    parts = []
    for start, stop in ((0, 11), (11, 37)):
        keys, values = ((group[0], group[1][:, :, start:stop]) for group in (case.keys, case.values))
        parts.append(result(subject, replace(case, keys=keys, values=values, key_offsets=(0, start))))
    output, lse = result(subject, case)
    merged = np.logaddexp(parts[0][1], parts[1][1])
    assert_agree(merged, lse, dtype="float64")
    safe = np.where(np.isfinite(merged), merged, 0.0)
    total = sum(part * np.exp(part_lse - safe)[..., None] for part, part_lse in parts)
    assert_agree(total, output, dtype="float64")


@subjects
def test_an_identity_weight_changes_nothing(subject: Subject) -> None:
    case = case_of(2)
    width = case.query.shape[-1]
    full = np.zeros((width,) * 3)
    full[(np.arange(width),) * 3] = 1.0
    for weight in (full, (np.eye(width),) * 3):
        same(subject, replace(case.with_spec(score="kronecker"), weight=weight), case)


@subjects
def test_cp_factors_are_the_full_weight_they_make(subject: Subject) -> None:
    case = case_of(2, weight="cp")
    assert isinstance(case.weight, tuple)
    same(subject, case, replace(case, weight=np.einsum("ar,br,cr->abc", *case.weight)))


@subjects
def test_grouped_heads_are_repeated_keys(subject: Subject) -> None:
    case = case_of(2, heads=6, groups=3, mask=Causal())
    keys, values = (tuple(np.repeat(x, 2, axis=1) for x in group) for group in (case.keys, case.values))
    same(subject, case, replace(case, keys=keys, values=values))
