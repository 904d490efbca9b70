"""Split and Auto: outlying keys and missed rows exactly, the rest by polynomial, merged, certified, differentiable."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import korder
from korder.dispatch import choosing
from korder.dispatch.arrays import namespace_of_kind
from korder.methods import outliers
from korder.methods.exact_certificates import certify_exact
from korder.spi import KernelOutput, Operands

MASKS = (korder.Full(), korder.Causal())


def operands(order, *, heads=4, groups=2, n=41, width=4, heavy=2, rms=0.25, dtype="float64", seed=0):
    """Return query, keys and values whose bulk has scores of an rms; a few tokens stand 5 to 20 times above it."""
    rng = np.random.default_rng(seed)
    size = rms ** (1.0 / (order + 1))
    query = rng.normal(size=(2, heads, n, width)) * size
    keys = [rng.normal(size=(2, groups, n + 2 + 3 * t, width)) * size for t in range(order)]
    values = [rng.normal(size=(2, groups, n + 2 + 3 * t, 3)) for t in range(order)]
    for t, key in enumerate(keys):
        for b in range(2):
            for g in range(groups):
                key[b, g, rng.choice(n, heavy + (b + g) % 2, replace=False)] *= 20.0 if t == 0 else 5.0
    query[1, -1, n // 2] *= 8.0
    return tuple(np.asarray(x, dtype) for x in (query, *keys)), tuple(np.asarray(x, dtype) for x in values)


def split_keys(plan):
    return plan.split.keys if plan.split else ()


@pytest.fixture
def split_first(monkeypatch):
    """Rank splits with outlying keys before everything else, by flop: exact is faster for so few tokens."""
    ranked = choosing.ranked

    def first(*arguments):
        candidates, rejected = ranked(*arguments)
        return sorted(candidates, key=lambda x: (not any(split_keys(x.plan)), x.plan.cost.flops)), rejected

    monkeypatch.setattr(choosing, "ranked", first)


def truth(arrays, values, order, **options):
    """Return the exact output and lse, in float64."""
    mask = options.pop("mask", korder.Full())
    score = "kronecker" if "weight" in options else "khatri_rao"
    spec = korder.AttentionSpec(order=order, mask=mask, score=score)
    wide = [x.astype(np.float64) for x in arrays]
    found = korder.attend_result(wide[0], wide[1:], [v.astype(np.float64) for v in values], spec=spec, **options)
    return found.output, found.lse


def within(result, known):
    """Assert that no row is farther from the truth than its certificate says."""
    output, lse = known
    error = np.abs(result.output.astype(np.float64) - output).max(axis=-1)
    assert (error <= result.certificate.bound).all()
    finite = np.isfinite(lse)
    assert (np.isneginf(result.lse) == ~finite).all()
    assert (np.abs(result.lse[finite] - lse[finite]) <= result.certificate.lse_bound[finite]).all()
    return error


def split_spec(order, mask=korder.Full(), tolerance=3e-2, **method):  # noqa: B008 - specs are frozen
    return korder.AttentionSpec(order=order, mask=mask, method=korder.Split(tolerance=tolerance, **method))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.kind)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_split_is_within_its_certificate_and_tolerance(split_first, order, dtype, mask):
    n = 17 if order == 3 else 41
    arrays, values = operands(order, n=n, heavy=1, dtype=dtype)
    offsets = {} if mask.kind == "full" else {"query_offset": 3, "key_offsets": (0, 2, 1)[:order]}
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=split_spec(order, mask), **offsets)
    assert result.provenance.plan.method == "split"
    assert any(split_keys(result.provenance.plan))
    assert result.output.dtype == arrays[0].dtype
    error = within(result, truth(arrays, values, order, mask=mask, **offsets))
    reach = max(np.ptp(values[0], axis=2).max(), 1.0) ** order
    assert error.max() <= 3e-2 * reach
    assert (result.certificate.approximation > 0).any()


def test_outliers_are_what_stands_out():
    arrays, values = operands(2)
    spec = split_spec(2)
    statistics = korder.measure(arrays[0], arrays[1:], values, spec=spec)
    assert statistics.levels[0].keys == (0, 0)
    assert (4, 4) in [level.keys for level in statistics.levels]  # 2 or 3 of a head, a power of two
    assert all(level.missing for level in statistics.levels)


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.kind)
def test_split_with_key_masks_biases_and_a_weight(split_first, mask):
    rng = np.random.default_rng(3)
    arrays, values = operands(2)
    masks = (rng.random((2, arrays[1].shape[2])) < 0.8, rng.random((2, 2, arrays[2].shape[2])) < 0.8)
    biases = (rng.normal(size=(2, 4, 1, arrays[1].shape[2])), rng.normal(size=(1, 1, 1, arrays[2].shape[2])))
    biases[0][0, 1, 0, 4] = -np.inf
    weight = tuple(rng.normal(size=(4, 3)) * 0.6 for _ in range(3))
    options = {"key_masks": masks, "biases": biases, "weight": weight, "query_offset": 2, "key_offsets": (0, 1)}
    spec = korder.AttentionSpec(order=2, score="kronecker", mask=mask, method=korder.Split(tolerance=0.2))
    arrays[1][0, 0, ~masks[0][0]] = np.nan  # under a mask
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=spec, **options)
    assert any(split_keys(result.provenance.plan))
    within(result, truth(arrays, values, 2, mask=mask, **options))


@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: mask.kind)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_split_gradients_are_those_of_exact_attention_to_the_tolerance(split_first, order, mask):
    arrays, values = operands(order, heads=2, groups=1, n=11 if order == 3 else 19, width=3, heavy=1, rms=0.05)
    leaves = [torch.tensor(x, requires_grad=True) for x in (*arrays, *values)]
    call = (leaves[0], tuple(leaves[1 : order + 1]), tuple(leaves[order + 1 :]))
    offsets = {} if mask.kind == "full" else {"query_offset": 2, "key_offsets": (1, 0, 0)[:order]}
    split = korder.attend_result(*call, spec=split_spec(order, mask, 1e-5), **offsets)
    exact = korder.attend_result(*call, spec=korder.AttentionSpec(order=order, mask=mask), **offsets)
    assert any(split_keys(split.provenance.plan))
    assert not split.certificate.bound.requires_grad
    torch.manual_seed(0)
    weights, shares = torch.randn_like(exact.output), torch.randn_like(exact.lse)
    found, wanted = (
        torch.autograd.grad(
            (x.output * weights).sum() + (torch.where(x.lse.isinf(), 0.0, x.lse) * shares).sum(), leaves
        )
        for x in (split, exact)
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() <= 1e-3 * b.abs().max()
    assert any((a != b).any() for a, b in zip(found, wanted, strict=True))


def test_rows_that_miss_are_computed_exactly(split_first):
    arrays, values = operands(2)
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=split_spec(2))
    plain, _ = truth(arrays, values, 2)
    assert any("computed exactly" in note for note in result.provenance.replanned)
    # the query that is 8 times the others is one of them
    assert result.certificate.approximation[1, 3, 20] == 0.0
    np.testing.assert_allclose(result.output[1, 3, 20], plain[1, 3, 20], rtol=1e-12)


def test_a_higher_degree_is_tried_where_rows_would_cost_more(split_first, monkeypatch):
    arrays, values = operands(2)
    monkeypatch.setattr(outliers, "HOPELESS", 1e9)
    slow_rows = lambda part, backend: float(part.cost.flops) if part.polynomial is None else 0.0  # noqa: E731
    monkeypatch.setattr(choosing, "part_seconds", slow_rows)
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=split_spec(2, tolerance=1e-4))
    first, last = result.provenance.candidates[0], result.provenance.plan
    assert "next degree" in result.provenance.replanned[0]
    assert f"degree {last.split.degree}" in result.provenance.replanned[-1]
    assert f"degree {last.split.degree}" not in first
    within(result, truth(arrays, values, 2))


def no_rows_expected(arrays, values, spec):
    """Return statistics that are wrong: no row is expected to miss, whatever is left to the polynomial."""
    known = korder.measure(arrays[0], arrays[1:], values, spec=spec)
    levels = tuple(replace(level, missing=(0,) * len(level.missing)) for level in known.levels)
    return replace(known, levels=levels)


@pytest.fixture
def polynomial_first(monkeypatch):
    """Rank the split with the lowest degree and no keys aside first, exact last."""
    ranked = choosing.ranked

    def first(*arguments):
        candidates, rejected = ranked(*arguments)
        order = lambda x: (x.plan.method == "exact", split_keys(x.plan), x.plan.split and x.plan.split.degree)  # noqa: E731
        return sorted(candidates, key=order), rejected

    monkeypatch.setattr(choosing, "ranked", first)


@pytest.mark.parametrize("mask", [korder.Full(), korder.Causal(align="end")], ids=lambda mask: mask.kind)
@pytest.mark.parametrize("order", [1, 2])
def test_more_keys_are_set_aside_where_too_few_were(polynomial_first, monkeypatch, order, mask):
    """A choice that was wrong is mended after running: the keys that widen the scores follow."""
    arrays, values = operands(order)
    spec = split_spec(order, mask, 1e-2)
    whole = tuple(values[t].shape[2] for t in range(order))

    def seconds(part, backend):
        if part.polynomial is None and part.problem.lengths == whole:
            return 1.0
        return 0.01 if any(part.problem.key_masks) else 0.1  # a higher degree on all keys comes later

    monkeypatch.setattr(choosing, "part_seconds", seconds)
    given = {"statistics": no_rows_expected(arrays, values, spec)}
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=spec, **given)
    assert "leaves" in result.provenance.replanned[0]
    assert "next degree" in result.provenance.replanned[0]
    assert any(result.provenance.plan.split.keys)
    error = within(result, truth(arrays, values, order, mask=mask))
    assert error.max() <= 1e-2 * max(np.ptp(values[0], axis=2).max(), 1.0) ** order


def test_tries_end_before_they_cost_what_the_rows_would(polynomial_first, monkeypatch):
    """However often a split misses: the tries after the first are worth the rows that it left, together."""
    arrays, values = operands(2, n=23)
    spec = split_spec(2, tolerance=0.3)
    every_row = lambda host, certificate, *_: host.ones_like(certificate.bound, dtype=bool)  # noqa: E731
    monkeypatch.setattr(choosing, "missing_rows", every_row)
    exactly = lambda part: part.polynomial is None and part.problem.queries == 23  # noqa: E731
    monkeypatch.setattr(choosing, "part_seconds", lambda part, backend: 1.0 if exactly(part) else 0.3)
    given = {"statistics": no_rows_expected(arrays, values, spec)}
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=spec, **given)
    assert [("next" in note, "exactly" in note) for note in result.provenance.replanned] == [
        (True, False),
        (True, False),
        (True, False),
        (False, True),
    ]
    np.testing.assert_allclose(result.output, truth(arrays, values, 2)[0], rtol=1e-10, atol=1e-12)


def test_auto_takes_the_cheapest_and_says_what_there_was():
    arrays, values = operands(2, n=23)
    spec = korder.AttentionSpec(order=2, method=korder.Auto(tolerance=1e-2))
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=spec)
    assert result.provenance.plan.method == "exact"  # nothing beats 23 tokens
    assert result.certificate is None
    assert result.provenance.candidates[0].startswith("exact")
    assert any(text.startswith("split") for text in result.provenance.candidates)
    assert "predicted exact" in result.provenance.plan.explain()
    np.testing.assert_allclose(result.output, truth(arrays, values, 2)[0], rtol=1e-10, atol=1e-12)


def test_auto_without_a_tolerance_is_exact():
    arrays, values = operands(2, n=11)
    spec = korder.AttentionSpec(order=2, method=korder.Auto())
    output = korder.attend(arrays[0], arrays[1:], values, spec=spec)
    np.testing.assert_array_equal(output, korder.attend(arrays[0], arrays[1:], values))
    gradient = torch.tensor(arrays[0], requires_grad=True)
    rest = tuple(torch.tensor(x) for x in arrays[1:])
    korder.attend(gradient, rest, tuple(map(torch.tensor, values)), spec=spec).sum().backward()
    assert gradient.grad is not None


def test_auto_takes_the_polynomial_for_many_tokens():
    rng = np.random.default_rng(5)
    query, *keys = (rng.normal(size=(1500, 4)).astype("float32") * 0.4 for _ in range(3))
    values = [rng.normal(size=(1500, 3)).astype("float32") for _ in range(2)]
    spec = korder.AttentionSpec(order=2, method=korder.Auto(tolerance=1e-2))
    result = korder.attend_result(query, keys, values, spec=spec)
    assert result.provenance.plan.split.keys == (0, 0)
    rows = korder.attend(query[:16], keys, values)
    assert (np.abs(result.output[:16] - rows).max(axis=-1) <= result.certificate.bound[:16]).all()


def test_rounding_that_misses_raises_warns_or_runs_exactly(split_first):
    arrays, values = operands(2, n=23, dtype="float32")
    call = (arrays[0], arrays[1:], values)
    with pytest.raises(korder.AccuracyError, match="rounding"):
        korder.attend(*call, spec=split_spec(2, tolerance=1e-9))
    with pytest.warns(korder.AccuracyWarning, match="miss tolerance"):
        korder.attend(*call, spec=split_spec(2, tolerance=1e-9, on_exceed="warn"))
    result = korder.attend_result(*call, spec=split_spec(2, tolerance=1e-9, on_exceed="exact"))
    assert result.provenance.plan.method == "exact"
    assert "next exact" in result.provenance.replanned[0]


def test_what_cannot_choose_says_so():
    arrays, values = operands(1, n=7)
    spec = split_spec(1)
    with pytest.raises(korder.UnsupportedProblemError, match="measured"):
        korder.plan(spec, query=(7, 4), keys=[(7, 4)], values=[(7, 3)])
    tensors = [torch.tensor(x) for x in (*arrays, *values)]
    with pytest.raises(korder.UnsupportedProblemError, match="chooses by the numbers"):
        torch.func.vmap(lambda q, k, v: korder.attend(q, (k,), (v,), spec=spec))(*tensors)
    with pytest.raises(korder.SpecError):
        korder.Split()
    statistics = korder.measure(arrays[0], arrays[1:], values, spec=spec)
    plans = korder.plan(
        spec, query=arrays[0].shape, keys=[arrays[1].shape], values=[values[0].shape], statistics=statistics
    )
    assert {plan.method for plan in plans} == {"exact", "split"}
    given = korder.attend(*(tensors[0], (tensors[1],), (tensors[2],)), spec=spec, statistics=statistics)
    np.testing.assert_allclose(
        given.numpy(), korder.attend(arrays[0], arrays[1:], values, spec=spec, statistics=statistics)
    )


@pytest.mark.parametrize("mask", [korder.Window(sizes=(3, 4)), korder.Ordered()], ids=lambda mask: mask.kind)
def test_other_masks_run_exactly(mask):
    arrays, values = operands(2, n=9)
    spec = split_spec(2, mask.model_copy(update={"align": "end"}))
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=spec)
    assert result.provenance.plan.method == "exact"


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (1, 1)])
def test_edges(sizes):
    n, m = sizes
    rng = np.random.default_rng(1)
    query, keys = rng.normal(size=(n, 3)), [rng.normal(size=(m, 3)), rng.normal(size=(2, 3))]
    values = [rng.normal(size=(len(key), 2)) for key in keys]
    result = korder.attend_result(query, keys, values, spec=split_spec(2))
    np.testing.assert_allclose(result.output, korder.attend(query, keys, values))


@pytest.mark.parametrize("seed", range(12))
def test_certificates_hold_for_hard_inputs(split_first, seed):
    rng = np.random.default_rng(100 + seed)
    order, dtype = 1 + seed % 2, ("float32", "float64")[seed // 2 % 2]
    mask = MASKS[seed // 4 % 2]
    n, width = int(rng.integers(5, 40)), int(rng.integers(1, 6))
    arrays, values = operands(order, n=n, width=width, rms=rng.uniform(0.05, 0.6), dtype=dtype, seed=seed, heavy=1)
    for array in arrays:
        array[...] *= np.sign(array) * np.abs(array) ** rng.uniform(0.0, 0.4)  # heavier tails
    offsets = {"query_offset": int(rng.integers(-3, 4)), "key_offsets": tuple(map(int, rng.integers(-3, 4, order)))}
    spec = split_spec(order, mask, 0.3, on_exceed="exact")
    result = korder.attend_result(arrays[0], arrays[1:], values, spec=spec, **offsets)
    known = truth(arrays, values, order, mask=mask, **offsets)
    if result.certificate is None:
        np.testing.assert_allclose(result.output, known[0], rtol=1e-4, atol=1e-4)
    else:
        within(result, known)


def test_a_bias_that_hides_keys_leaves_the_bounds_of_the_rest():
    """Under the causal mask the keys set aside are hidden row by row: no row's bias speaks for another's."""
    rng = np.random.default_rng(4)
    arrays, values = operands(2, n=9, dtype="float32")
    biases = (np.where(rng.random((2, 4, 9, 11)) < 0.4, -np.inf, 0.0).astype("float32"), None)
    biases[0][:, :, 0] = -np.inf  # the first row sees nothing
    spec = korder.AttentionSpec(order=2, mask=korder.Full())
    given = {"biases": biases, "key_masks": None}
    found = korder.attend_result(arrays[0], arrays[1:], values, spec=spec, **given)
    call = Operands(arrays[0], arrays[1:], values, (None, None), biases)
    problem = found.provenance.plan.problem
    certificate = certify_exact(namespace_of_kind("numpy"), problem, call, KernelOutput(found.output, found.lse))
    known = truth(arrays, values, 2, biases=(biases[0].astype("float64"), None))
    within(korder.Result(found.output, found.lse, certificate), known)
    assert (certificate.bound[:, :, 1:] > 0.0).all()
    assert (certificate.bound[:, :, 0] == 0.0).all()
