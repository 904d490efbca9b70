"""Gradients of the exact kernels: central differences in float64, agreement between kernels and blocks, edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from korder.planning.exact import exact_plan
from korder.spec import Causal, Ordered, Window
from korder.spi import NEEDS, OutputGradients
from tests.kernels import GENERIC, NUMPY, STRICT, SUBJECTS, Subject, flat, plan_with
from tests.limits import GRADIENT_LIMIT, GRADIENT_STEP, assert_agree
from tests.problems import Case, random_case

PROBLEMS: dict[str, dict[str, Any]] = {
    "order-1": {"order": 1},
    "order-2": {"order": 2},
    "order-3": {"order": 3, "queries": 5},
    "order-4": {"order": 4, "queries": 3, "lengths": (3, 2, 5, 2)},
    "contract-first": {"order": 3, "lengths": (7, 3, 2), "queries": 5, "groups": 1},
    "causal-offsets": {"order": 2, "mask": Causal(), "query_offset": -2, "key_offsets": (1, -3)},
    "window": {"order": 2, "mask": Window(sizes=(3, 4)), "lengths": (13, 7)},
    "ordered": {"order": 3, "mask": Ordered(), "lengths": (5, 13, 7)},
    "key-masks": {"order": 2, "key_masks": (True, True)},
    "biases": {"order": 2, "biases": ("key", "full"), "groups": 1},
    "shared-biases": {"order": 3, "queries": 5, "biases": ("shared", "full", "key"), "mask": Causal()},
    "cp": {"order": 2, "weight": "cp", "key_masks": (True, False)},
    "full-weight": {"order": 2, "weight": "full", "queries": 5, "mask": Causal()},
    "full-weight-1": {"order": 1, "weight": "full"},
}


def gradients_of_outputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(99)
    shape = case.query.shape[:3]
    output, lse = rng.standard_normal((*shape, case.values[0].shape[-1])), rng.standard_normal(shape)
    return output.astype(case.dtype), lse.astype("float32" if case.dtype == "float16" else case.dtype)


def loss(subject: Subject, case: Case) -> float:
    """A loss that weighs every output differently; an lse of -inf is left out."""
    found = subject.forward(case)
    output, lse = gradients_of_outputs(case)
    found_lse = np.asarray(found.lse)
    seen = np.isfinite(found_lse)
    return float(np.sum(np.asarray(found.output) * output) + np.sum(found_lse[seen] * lse[seen]))


@pytest.mark.parametrize("subject", [NUMPY, GENERIC], ids=lambda s: s.name)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_gradient_matches_central_differences(problem: str, subject: Subject) -> None:
    case = random_case(**PROBLEMS[problem], value_width=3, query_width=5)
    gradients = flat(subject.backward(case, *gradients_of_outputs(case)))
    operands = flat(case.operands())
    assert gradients.keys() == operands.keys()
    rng = np.random.default_rng(7)
    for name, operand in operands.items():
        assert gradients[name].shape == operand.shape
        kept = operand.copy()
        for _ in range(2):
            direction = rng.standard_normal(operand.shape)
            operand[...] = kept + GRADIENT_STEP * direction
            above = loss(subject, case)
            operand[...] = kept - GRADIENT_STEP * direction
            below = loss(subject, case)
            operand[...] = kept
            expected = (above - below) / (2 * GRADIENT_STEP)
            found = float(np.sum(gradients[name] * direction))
            scale = float(np.sum(np.abs(gradients[name] * direction))) + 1e-12
            assert abs(found - expected) <= GRADIENT_LIMIT * max(scale, abs(expected)), name


@pytest.mark.parametrize(
    "blocks", [{"queries": 3, "folded": 2, "keys": 2, "heads": 1}, {"queries": 4, "folded": 1, "keys": 3, "heads": 2}]
)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_blocks_do_not_matter(problem: str, blocks: dict[str, Any]) -> None:
    case = random_case(**PROBLEMS[problem], seed=4)
    whole = flat(GENERIC.backward(case, *gradients_of_outputs(case)))
    for subject in (NUMPY, GENERIC):
        cut = flat(subject.backward(case, *gradients_of_outputs(case), plan=plan_with(case, **blocks)))
        for name, gradient in whole.items():
            assert_agree(cut[name], gradient, dtype="float64")


@pytest.mark.parametrize("problem", ["order-1", "ordered", "shared-biases", "cp", "full-weight", "window"])
def test_strict_namespace(problem: str) -> None:
    case = random_case(**PROBLEMS[problem], seed=5)
    strict = flat(STRICT.backward(case, *gradients_of_outputs(case)))
    for name, gradient in flat(GENERIC.backward(case, *gradients_of_outputs(case))).items():
        assert_agree(strict[name], gradient, dtype="float64")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("problem", ["order-2", "ordered", "biases", "cp", "full-weight"])
def test_narrow_dtypes(problem: str, dtype: str) -> None:
    case = random_case(**PROBLEMS[problem], dtype=dtype)
    exact = flat(GENERIC.backward(case.astype("float64"), *(x.astype("float64") for x in gradients_of_outputs(case))))
    limit = 3e-6 if dtype == "float32" else 2e-3
    for name, gradient in flat(NUMPY.backward(case, *gradients_of_outputs(case))).items():
        assert gradient.dtype == dtype
        assert np.max(np.abs(gradient - exact[name])) <= limit * np.max(np.abs(exact[name])), name


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
class TestEdges:
    def test_only_what_is_needed(self, subject: Subject) -> None:
        case = random_case(2, weight="cp", biases=("key", "full"))
        everything = flat(subject.backward(case, *gradients_of_outputs(case)))
        for need in NEEDS:
            found = flat(subject.backward(case, *gradients_of_outputs(case), needs=frozenset({need})))
            assert set(found) == {name for name in everything if name.split("[")[0] == need}
            for name, gradient in found.items():
                assert_agree(gradient, everything[name], dtype="float64")

    def test_without_a_gradient_of_lse(self, subject: Subject) -> None:
        case = random_case(2)
        output, lse = gradients_of_outputs(case)
        alone = flat(subject.backward(case, output))
        for name, gradient in flat(subject.backward(case, output, np.zeros_like(lse))).items():
            assert_agree(alone[name], gradient, dtype="float64")

    def test_no_keys(self, subject: Subject) -> None:
        case = random_case(2, lengths=(0, 5))
        for gradient in flat(subject.backward(case, *gradients_of_outputs(case))).values():
            assert not gradient.any()

    def test_rows_that_see_nothing_give_nothing(self, subject: Subject) -> None:
        case = random_case(2, mask=Ordered(), lengths=(13, 7), query_offset=-2)
        output, lse = gradients_of_outputs(case)
        lse[:, :, :3] = np.nan  # whatever log(0) may have left there
        found = flat(subject.backward(case, output, lse))
        assert not found["query"][:, :, :3].any()
        lse[:, :, :3] = 0.0
        for name, gradient in flat(subject.backward(case, output, lse)).items():
            assert np.array_equal(found[name], gradient), name

    @pytest.mark.parametrize("poison", [np.nan, np.inf, 1e300])
    def test_masked_keys_may_hold_anything(self, subject: Subject, poison: float) -> None:
        case = random_case(2, key_masks=(True, False), mask=Causal(), lengths=(7, 13), weight="cp")
        case.key_masks[0][:, 3] = False
        clean = flat(subject.backward(case, *gradients_of_outputs(case)))
        case.keys[0][:, :, 3] = case.values[0][:, :, 3] = poison
        case.keys[1][:, :, 11:] = case.values[1][:, :, 11:] = poison  # no query stands so late
        found = flat(subject.backward(case, *gradients_of_outputs(case)))
        for name, gradient in clean.items():
            assert_agree(found[name], gradient, dtype="float64")
        assert not found["keys[0]"][:, :, 3].any()
        assert not found["keys[1]"][:, :, 11:].any()

    def test_nan_stays_with_the_rows_that_see_it(self, subject: Subject) -> None:
        case = random_case(2, mask=Causal(), lengths=(11, 7), groups=4)
        clean = flat(subject.backward(case, *gradients_of_outputs(case)))
        case.keys[0][0, 1, 9] = np.nan
        case.values[1][1, 2, 6, 0] = np.nan
        found = flat(subject.backward(case, *gradients_of_outputs(case)))
        seen = np.isnan(found["query"]).any(axis=-1)
        assert seen[0, 1, 9:].all()
        assert seen[1, 2, 6:].all()
        assert seen.sum() == 2 + 5
        for name, gradient in found.items():
            touched = np.isnan(gradient).any(axis=(2, 3))
            assert not touched[[0, 0, 0, 1, 1, 1], [0, 2, 3, 0, 1, 3]].any()
            rest = ~np.isnan(gradient)
            if name == "query":
                assert_agree(gradient[rest], clean[name][rest], dtype="float64")


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_a_nan_value_spares_the_values_it_never_meets(subject: Subject) -> None:
    case = random_case(2, mask=Ordered(), lengths=(7, 11), groups=4)
    clean = flat(subject.backward(case, *gradients_of_outputs(case)))
    case.values[0][0, 1, 4] = np.nan
    found = flat(subject.backward(case, *gradients_of_outputs(case)))
    # Key 4 of the first mode stands with later keys of the second only.
    assert np.isnan(found["values[1]"][0, 1, 5:]).all()
    assert_agree(found["values[1]"][0, 1, :5], clean["values[1]"][0, 1, :5], dtype="float64")


def test_memory_of_a_backward_stays_bounded() -> None:
    import tracemalloc

    from korder.planning.explain import size
    from korder.planning.memory import backward_workspace

    axes = {"batch": 1, "heads": 2, "groups": 1, "query_width": 37, "value_width": 29}
    case = random_case(2, queries=139, lengths=(131, 137), dtype="float32", mask=Causal(), **axes)
    plan = exact_plan(case.problem())
    assert plan.tiling is not None
    kernel = NUMPY.kernel(NUMPY.xp, plan)
    operands = case.operands()
    saved = kernel.forward(operands, save=True)
    grads = OutputGradients(*gradients_of_outputs(case))
    tracemalloc.start()
    found = kernel.backward(operands, saved, grads, needs=NEEDS)
    peak = tracemalloc.get_traced_memory()[1] - sum(gradient.nbytes for gradient in flat(found).values())
    tracemalloc.stop()
    assert abs(peak / backward_workspace(case.problem(), plan.tiling, in_place=True) - 1) <= 0.2
    planned = backward_workspace(case.problem(), plan.tiling, in_place=False)
    assert peak <= planned
    assert f"backward works in {size(planned)}" in plan.explain()
