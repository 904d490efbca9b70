"""The exact kernels against the oracle: orders, masks, biases, weights, grouped heads, blocks, dtypes and edges."""

from __future__ import annotations

import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from korder.planning.exact import exact_plan
from korder.spec import Causal, Ordered, Policy, Window
from tests.kernels import GENERIC, NUMPY, STRICT, SUBJECTS, Subject, plan_with
from tests.limits import assert_agree, assert_within_ratio
from tests.problems import Case, random_case

PROBLEMS: dict[str, dict[str, Any]] = {
    "order-1": {"order": 1},
    "order-2": {"order": 2},
    "order-3": {"order": 3},
    "order-4": {"order": 4, "queries": 3},
    "order-5": {"order": 5, "queries": 3, "lengths": (2, 3, 2, 5, 2)},
    "order-6": {"order": 6, "queries": 3, "lengths": (2, 3, 1, 2, 2, 2), "batch": 1},
    "contract-first": {"order": 3, "lengths": (7, 3, 2)},
    "contract-middle": {"order": 3, "lengths": (3, 7, 2), "mask": Causal()},
    "ungrouped": {"order": 2, "groups": 4},
    "one-key-head": {"order": 2, "groups": 1, "batch": 3},
    "many-heads": {"order": 2, "heads": 6, "groups": 3, "batch": 3, "queries": 5},
    "scale": {"order": 2, "scale": 0.37},
    "causal": {"order": 2, "mask": Causal()},
    "causal-offsets": {"order": 2, "mask": Causal(), "query_offset": -2, "key_offsets": (1, -3)},
    "window": {"order": 2, "mask": Window(sizes=(3, 4)), "lengths": (13, 7)},
    "window-offsets": {"order": 3, "mask": Window(sizes=(2, 5, 3)), "query_offset": 3, "key_offsets": (2, 0, 5)},
    "ordered": {"order": 2, "mask": Ordered(), "lengths": (13, 7)},
    "ordered-3": {"order": 3, "mask": Ordered(), "lengths": (5, 7, 13), "key_offsets": (1, 0, -2)},
    "ordered-middle": {"order": 3, "mask": Ordered(), "lengths": (5, 13, 7)},
    "key-masks": {"order": 2, "key_masks": (True, True)},
    "key-masks-ordered": {"order": 3, "key_masks": (False, True, True), "mask": Ordered(), "lengths": (5, 7, 13)},
    "key-biases": {"order": 2, "biases": ("key", "key")},
    "full-biases": {"order": 2, "biases": ("full", "full")},
    "shared-biases": {"order": 3, "biases": ("shared", None, "full"), "key_masks": (True, False, True)},
    "biases-groups": {"order": 2, "biases": ("full", "key"), "groups": 1, "mask": Causal()},
    "cp": {"order": 2, "weight": "cp"},
    "cp-order-1": {"order": 1, "weight": "cp", "mask": Causal()},
    "cp-masked": {"order": 3, "weight": "cp", "key_masks": (True, False, True), "biases": (None, "key", "full")},
    "full-weight": {"order": 2, "weight": "full"},
    "full-weight-1": {"order": 1, "weight": "full"},
    "full-weight-3": {"order": 3, "weight": "full", "lengths": (3, 7, 2), "mask": Causal()},
}
BLOCKS: dict[str, dict[str, Any]] = {
    "planned": {},
    "small": {"queries": 3, "folded": 2, "keys": 2, "heads": 1},
    "uneven": {"queries": 4, "folded": 1, "keys": 3, "heads": 2},
    "one-batch": {"queries": 5, "folded": 3, "keys": 4, "heads": 4},
}


def check(subject: Subject, case: Case, **blocks: Any) -> None:
    exact_output, exact_lse = case.oracle()
    if case.dtype == "float64":  # the oracle rounds as much as the kernel
        found = subject.forward(case, plan_with(case, **blocks))
        assert_agree(found.output, exact_output, dtype="float64")
        assert_agree(found.lse, exact_lse, dtype="float64")
        return
    plain_output, plain_lse = case.plain()
    found = subject.forward(case, plan_with(case, **blocks))
    assert_within_ratio(found.output, plain_output, exact_output, dtype=case.dtype)
    assert_within_ratio(found.lse, plain_lse, exact_lse, dtype=str(np.asarray(found.lse).dtype))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_numpy_matches_the_oracle(problem: str, blocks: str) -> None:
    case = random_case(**PROBLEMS[problem], dtype="float32")
    check(NUMPY, case, **BLOCKS[blocks])


@pytest.mark.parametrize("problem", PROBLEMS)
def test_generic_matches_the_oracle(problem: str) -> None:
    check(GENERIC, random_case(**PROBLEMS[problem], seed=1))
    check(GENERIC, random_case(**PROBLEMS[problem], seed=1, dtype="float32"), **BLOCKS["small"])


@pytest.mark.parametrize(
    "problem",
    ["order-1", "order-3", "ordered-3", "window", "key-masks-ordered", "shared-biases", "cp-masked", "full-weight-3"],
)
def test_strict_namespace_matches_the_oracle(problem: str) -> None:
    case = random_case(**PROBLEMS[problem], seed=2)
    check(STRICT, case)
    check(STRICT, case, **BLOCKS["uneven"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("problem", ["order-1", "order-2", "causal", "ordered-3", "full-biases", "cp", "full-weight"])
def test_narrow_dtypes_keep_the_ratio(problem: str, dtype: str) -> None:
    case = random_case(**PROBLEMS[problem], dtype=dtype, seed=3)
    for subject in (NUMPY, GENERIC):
        check(subject, case)
        found = subject.forward(case)
        assert found.output.dtype == dtype
        assert found.lse.dtype == "float32"


def test_policy_widens_the_sums() -> None:
    case = random_case(2, dtype="float32", policy=Policy(precision="float64"))
    for subject in SUBJECTS:
        found = subject.forward(case)
        assert str(np.asarray(found.lse).dtype) == "float64"
        assert np.asarray(found.output).dtype == "float32"
        exact_output, exact_lse = case.oracle()
        assert np.max(np.abs(np.asarray(found.lse) - exact_lse)) < 1e-13
        assert np.max(np.abs(np.asarray(found.output) - exact_output)) <= np.spacing(
            np.float32(np.abs(exact_output).max())
        )


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
class TestEdges:
    def test_length_one(self, subject: Subject) -> None:
        check(subject, random_case(3, queries=1, lengths=(1, 1, 1), query_width=1, value_width=1))

    def test_one_query_of_many_keys(self, subject: Subject) -> None:
        check(subject, random_case(2, queries=1, lengths=(13, 7), mask=Causal(), query_offset=9))

    @pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
    def test_no_keys_in_a_mode(self, subject: Subject, lengths: tuple[int, ...]) -> None:
        case = random_case(2, lengths=lengths)
        found = subject.forward(case)
        assert not np.asarray(found.output).any()
        assert np.all(np.asarray(found.lse) == -np.inf)

    @pytest.mark.parametrize("axes", [{"queries": 0}, {"batch": 0}])
    def test_nothing_asked(self, subject: Subject, axes: dict[str, int]) -> None:
        case = random_case(2, **axes)
        found = subject.forward(case)
        assert found.output.shape == (*case.query.shape[:3], 4)
        assert found.lse.shape == case.query.shape[:3]

    def test_rows_that_see_nothing(self, subject: Subject) -> None:
        case = random_case(2, mask=Ordered(), lengths=(13, 7), query_offset=-2)
        check(subject, case, queries=2, folded=3, keys=4)
        found = subject.forward(case)
        output, lse = np.asarray(found.output), np.asarray(found.lse)
        empty = lse == -np.inf
        assert empty[:, :, :3].all()
        assert not empty[:, :, 3:].any()
        assert not output[empty].any()

    def test_every_key_of_one_head_masked(self, subject: Subject) -> None:
        case = random_case(2, key_masks=(True, True))
        case.key_masks[1][0, 1, :] = False
        check(subject, case)
        assert np.all(np.asarray(subject.forward(case).lse)[0, 2:] == -np.inf)

    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_scores_of_ten_thousand(self, subject: Subject, sign: float) -> None:
        case = random_case(2, dtype="float32", mask=Causal())
        case.query[...] *= sign * 1e4
        check(subject, case)
        check(subject, case, queries=2, folded=2, keys=3)

    def test_all_scores_far_below_zero(self, subject: Subject) -> None:
        case = random_case(2, biases=("key", "full"), mask=Causal(), dtype="float32")
        case.biases[0][...] -= 1e4
        check(subject, case, queries=3, folded=2, keys=2)

    def test_scores_that_grow_from_tile_to_tile(self, subject: Subject) -> None:
        case = random_case(2, biases=("key", None), lengths=(7, 5), dtype="float32")
        case.biases[0][..., :] = np.array([-900.0, -40.0, 0.0, 19.0, 60.0, 900.0, 20.0])
        for folded, keys in ((1, 1), (2, 1), (1, 2)):
            check(subject, case, queries=4, folded=folded, keys=keys)

    def test_biases_of_minus_infinity_mask(self, subject: Subject) -> None:
        case = random_case(2, biases=("full", "key"))
        case.biases[0][0, 1, 3, :] = -np.inf
        case.biases[0][1, :, 5, 2] = -np.inf
        case.biases[1][:, :, 0, 4] = -np.inf
        check(subject, case)
        check(subject, case, queries=3, folded=2, keys=2)

    def test_strided_operands(self, subject: Subject) -> None:
        case = random_case(2, queries=11)

        def strided(x: np.ndarray) -> np.ndarray:
            return np.flip(np.repeat(x.swapaxes(-1, -2), 2, axis=-1)[..., ::2].swapaxes(-1, -2), axis=-2)[..., ::-1, :]

        views = Case(case.spec, strided(case.query), tuple(map(strided, case.keys)), tuple(map(strided, case.values)))
        assert not views.query.flags.c_contiguous
        assert np.array_equal(np.asarray(subject.forward(views).output), np.asarray(subject.forward(case).output))

    def test_wide_heads(self, subject: Subject) -> None:
        check(subject, random_case(2, query_width=301, value_width=211, queries=3, batch=1))


POISONED: dict[str, dict[str, Any]] = {
    "causal": {"order": 2, "mask": Causal(), "lengths": (13, 7)},
    "causal-1": {"order": 1, "mask": Causal(), "lengths": (13,)},
    "ordered": {"order": 3, "mask": Ordered(), "lengths": (7, 13, 5)},
    "window": {"order": 2, "mask": Window(sizes=(3, 4)), "lengths": (13, 7)},
    "cp": {"order": 2, "weight": "cp", "mask": Causal(), "lengths": (5, 13)},
    "full-weight": {"order": 2, "weight": "full", "mask": Causal(), "lengths": (5, 13)},
    "unmasked": {"order": 2},
}


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
@pytest.mark.parametrize("problem", POISONED)
def test_nan_reaches_exactly_the_rows_that_see_it(subject: Subject, problem: str) -> None:
    case = random_case(**POISONED[problem])
    for t, (key, value) in enumerate(zip(case.keys, case.values, strict=True)):
        key[:, 0, -1 - (t == 0), 1] = np.nan
        value[0, :, -1, 2] = np.nan
    exact_output, exact_lse = case.oracle()
    found = subject.forward(case, plan_with(case, queries=4, folded=2, keys=3))
    output, lse = np.asarray(found.output), np.asarray(found.lse)
    assert np.array_equal(np.isnan(output), np.isnan(exact_output))
    assert np.array_equal(np.isnan(lse), np.isnan(exact_lse))
    clean = ~np.isnan(exact_output)
    assert np.max(np.abs(output[clean] - exact_output[clean]), initial=0) < 1e-13


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e300])
def test_masked_keys_may_hold_anything(subject: Subject, poison: float) -> None:
    case = random_case(2, key_masks=(True, True), biases=(None, "key"), groups=1)
    case.key_masks[0][:, 3] = False
    case.key_masks[1][:, :, 1] = False
    case.biases[1][..., 2] = -np.inf
    clean = subject.forward(case)
    case.keys[0][:, :, 3] = case.values[0][:, :, 3] = poison
    case.keys[1][:, :, 1:3] = case.values[1][:, :, 1:3] = poison
    found = subject.forward(case)
    assert_agree(found.output, np.asarray(clean.output), dtype="float64")
    assert_agree(found.lse, np.asarray(clean.lse), dtype="float64")


@pytest.mark.parametrize(
    "problem",
    [
        {"order": 1, "lengths": (701,), "queries": 499},
        {"order": 2, "lengths": (131, 137), "queries": 139},
        {"order": 2, "lengths": (131, 137), "queries": 139, "mask": Causal()},
        {"order": 2, "lengths": (331, 337), "queries": 339, "mask": Window(sizes=(23, 41))},
        {"order": 2, "lengths": (131, 137), "queries": 139, "mask": Ordered()},
        {"order": 2, "lengths": (131, 137), "queries": 139, "biases": ("full", "full")},
        {"order": 3, "lengths": (31, 41, 43), "queries": 37},
        {"order": 2, "lengths": (31, 41), "queries": 37, "heads": 6, "groups": 3, "batch": 3},
        {"order": 2, "lengths": (131, 137), "queries": 139, "policy": Policy(memory_limit=1_500_000)},
    ],
    ids=str,
)
def test_planned_memory_is_what_a_forward_takes(problem: dict[str, Any]) -> None:
    axes = {"batch": 1, "heads": 1, "groups": 1} | problem
    case = random_case(**axes, query_width=37, value_width=29, dtype="float32")
    plan = exact_plan(case.problem())
    operands = case.operands()
    peaks = {}
    for subject in (NUMPY, GENERIC):
        kernel = subject.kernel(subject.xp, plan)
        with np.errstate(all="ignore"):
            kernel.forward(operands, save=False)
            tracemalloc.start()
            found = kernel.forward(operands, save=False)
        peaks[subject] = tracemalloc.get_traced_memory()[1] - found.output.nbytes - found.lse.nbytes
        tracemalloc.stop()
    own = NUMPY.kernel(NUMPY.xp, plan).workspace_bytes
    assert abs(peaks[NUMPY] - own) <= 0.2 * own
    assert GENERIC.kernel(GENERIC.xp, plan).workspace_bytes == plan.cost.peak_memory
    assert max(own, *peaks.values()) <= plan.cost.peak_memory


def test_one_kernel_serves_many_threads() -> None:
    case = random_case(2, lengths=(61, 67), queries=71, mask=Causal(), batch=1)
    kernel = NUMPY.kernel(NUMPY.xp, plan_with(case, queries=16, folded=13, keys=67))
    others = [random_case(2, lengths=(61, 67), queries=71, mask=Causal(), batch=1, seed=seed) for seed in range(8)]
    alone = [kernel.forward(other.operands(), save=False).output for other in others]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda other: kernel.forward(other.operands(), save=False).output, others * 3))
    for index, output in enumerate(together):
        assert np.array_equal(output, alone[index % 8])


def test_save_keeps_what_a_narrow_backward_wants() -> None:
    case = random_case(2, dtype="float16")
    kept = NUMPY.forward(case, save=True).residuals
    assert kept is not None
    assert kept["output"].dtype == "float32"
    assert NUMPY.forward(case, save=False).residuals is None
