"""The kit's oracle against the oracle of this suite, and its closed-form gradients against finite differences."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from korder.conformance.cases import Case
from korder.conformance.claims import Claims, everything, variants
from korder.conformance.limits import as_dtype, error, unit, within_ratio
from korder.conformance.oracle import Transform, answer, gradients, scores_of
from korder.errors import ConformanceFailure
from korder.spi import NamespaceBackend
from tests.oracle import oracle_attention, oracle_scores

CLAIMS = Claims(NamespaceBackend().capabilities(), "cpu")
TINY: dict[str, Any] = {
    "batch": 1, "heads": 2, "groups": 1, "queries": 3, "lengths": (4, 3, 2), "query_width": 2, "value_width": 2,
    "rank": 3,
}  # fmt: skip


def arguments(case: Case) -> dict[str, Any]:
    return {
        "scale": case.scale, "mask": case.spec.mask, "weight": case.weight, "biases": case.biases,
        "key_masks": case.key_masks, "query_offset": case.query_offset, "key_offsets": case.key_offsets,
    }  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("mask", ["full", "causal", "window", "ordered"])
def test_masks_and_everything_else(order: int, mask: str) -> None:
    offsets = {"query_offset": 3, "key_offsets": (2, 0, 1)}
    case = CLAIMS.case("oracle", order, mask=mask, **{**everything(CLAIMS, "exact"), **TINY, **offsets})
    output, lse = oracle_attention(case.query, case.keys, case.values, **arguments(case))
    found = answer(case)
    assert error("output", found.output, output) < 1e-13
    assert error("lse", found.lse, lse) < 1e-13


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("label", variants(CLAIMS, "exact"))
def test_variants(order: int, label: str) -> None:
    case = CLAIMS.case(label, order, **{**TINY, **variants(CLAIMS, "exact")[label]})
    output, lse = oracle_attention(case.query, case.keys, case.values, **arguments(case))
    found = answer(case)
    assert error("output", found.output, output) < 1e-13
    assert error("lse", found.lse, lse) < 1e-13


def test_absolute_scores_bound_scores() -> None:
    case = CLAIMS.case("absolute", 2, **TINY)
    positive = replace(case, query=np.abs(case.query), keys=tuple(np.abs(key) for key in case.keys))
    sums = oracle_scores(positive.query, positive.keys, scale=case.scale)
    assert error("absolute", scores_of(case, absolute=True), sums) < 1e-14


def perturbed(case: Case, name: str, place: tuple[int, ...], step: float) -> Case:
    group, _, rest = name.partition("[")
    arrays = getattr(case, group)
    moved = (arrays if not rest else arrays[int(rest[:-1])]).copy()
    moved[place] += step
    if not rest:
        changed: Any = moved
    else:
        index = int(rest[:-1])
        changed = (*arrays[:index], moved, *arrays[index + 1 :])
    fields: dict[str, Any] = {group: changed}
    return replace(case, **fields)


@pytest.mark.parametrize("method", ["exact", "polynomial"])
@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("options", [{"weight": "cp"}, {"weight": "full"}, {"biases": ("key", "shared")}])
def test_gradients_are_those_of_finite_differences(method: str, mask: str, options: dict[str, Any]) -> None:
    case = CLAIMS.case("differences", 2, mask=mask, **{**TINY, **options, "key_masks": True})
    rng = np.random.default_rng(0)
    up, up_lse = rng.standard_normal((1, 2, 3, 2)), rng.standard_normal((1, 2, 3))
    transform = (
        None if method == "exact" else Transform((1.0, 1.0, 0.5, 0.2, 0.1), rng.standard_normal((1, 2, 3)) * 0.3)
    )

    def loss(moved: Case) -> float:
        found = answer(moved, transform=transform)
        lse = np.where(found.lse == -np.inf, 0.0, found.lse)
        return float((found.output * up).sum() + (lse * up_lse).sum())

    for name, gradient in gradients(case, up, up_lse, transform=transform).items():
        assert gradient.shape == case.arrays()[name].shape
        for place in list(np.ndindex(gradient.shape))[::3]:
            sides = [loss(perturbed(case, name, place, step)) for step in (1e-5, -1e-5)]
            assert abs((sides[0] - sides[1]) / 2e-5 - float(gradient[place])) < 1e-7, (name, place)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_rounding_to_a_dtype_is_that_of_torch(dtype: str) -> None:
    rng = np.random.default_rng(1)
    numbers = np.concatenate([rng.standard_normal(500) * 10.0 ** rng.integers(-3, 4, 500), [0.0, -0.0, np.inf, np.nan]])
    wide = numbers if dtype == "float16" else numbers.astype(np.float32).astype(np.float64)
    wanted = torch.from_numpy(wide).to(getattr(torch, dtype)).to(torch.float64).numpy()
    np.testing.assert_array_equal(as_dtype(wide, dtype), wanted)
    three, nine = (torch.tensor(x, dtype=getattr(torch, dtype)) for x in (3.0, 9.0))
    assert unit(dtype, -3.0) == float(torch.nextafter(three, nine)) - 3.0


def test_ratio_rule_fails_what_is_worse_than_plain() -> None:
    exact, plain = np.asarray([1.0, 2.0]), np.asarray([1.0 + 1e-7, 2.0])
    within_ratio("x", exact + 5e-7, [plain], exact, dtype="float32")
    with pytest.raises(ConformanceFailure, match="farther from the oracle"):
        within_ratio("x", exact + 8e-7, [plain], exact, dtype="float32")
    for odd in (np.nan, np.inf):
        with pytest.raises(ConformanceFailure, match=r"wrong at \(1,\)"):
            within_ratio("x", np.asarray([1.0, odd]), [plain], exact, dtype="float32")
    with pytest.raises(ConformanceFailure, match="wrong shape"):
        within_ratio("x", exact[:1], [plain], exact, dtype="float32")
