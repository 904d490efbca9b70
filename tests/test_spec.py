"""Specs are frozen, refuse what they do not know, and name the key path, the value and the nearest known key."""

from __future__ import annotations

import numpy as np
import pytest

from korder import AttentionSpec, Causal, Exact, Full, Policy, Polynomial, SpecError, Window
from korder.spec.runs import parse_run

WRONG = [
    ({"order": 0}, "order", "an integer from 1 to 6", "0"),
    ({"order": 7}, "order", "an integer from 1 to 6", "7"),
    ({"order": True}, "order", "", "True"),
    ({"order": 2.5}, "order", "", "2.5"),
    ({}, "order", "", "nothing"),
    ({"order": 2, "scale": "wide"}, "scale", "inverse_dim", "'wide'"),
    ({"order": 2, "scale": float("nan")}, "scale", "", "nan"),
    ({"order": 2, "scale": float("inf")}, "scale", "", "inf"),
    ({"order": 2, "score": "trilinear"}, "score", "khatri_rao", "'trilinear'"),
    ({"order": 2, "mask": {"kind": "causl"}}, "mask", "causal", "causl"),
    ({"order": 2, "mask": {"kind": "window", "sizes": [3]}}, "sizes", "", "[3]"),
    ({"order": 1, "mask": {"kind": "window", "sizes": [0]}}, "mask.sizes[0]", "a positive integer", "0"),
    ({"order": 2, "method": {"kind": "polynomial"}}, "method", "degree", "neither"),
    (
        {"order": 2, "method": {"kind": "polynomial", "tolerance": 0.0}},
        "method.tolerance",
        "above 0 and below 1",
        "0.0",
    ),
    ({"order": 2, "method": {"kind": "polynomial", "degree": 2, "interval": 1.0}}, "method", "", "interval"),
    ({"order": 2, "method": {"kind": "magic"}}, "method", "polynomial", "magic"),
    ({"order": 2, "policy": {"memory_limit": -1}}, "policy.memory_limit", "'256MiB'", "-1"),
    ({"order": 2, "policy": {"backends": []}}, "policy.backends", "", "[]"),
    ({"order": 2, "policy": {"memory_limit": "12 parsecs"}}, "policy.memory_limit", "", "12 parsecs"),
]


@pytest.mark.parametrize(("fields", "path", "expected", "got"), WRONG, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_said(fields: dict[str, object], path: str, expected: str, got: str) -> None:
    for build in (lambda: AttentionSpec(**fields), lambda: AttentionSpec.model_validate(fields)):
        with pytest.raises(SpecError) as caught:
            build()
        assert path in caught.value.message
        assert expected in (caught.value.expected or "")
        assert got in (caught.value.got or "")


@pytest.mark.parametrize(
    ("fields", "path", "near"),
    [
        ({"order": 2, "maks": {"kind": "full"}}, "'maks'", "'mask'"),
        ({"order": 2, "method": {"kind": "polynomial", "degre": 3}}, "'method.degre'", "'degree'"),
        ({"order": 2, "policy": {"memory_limt": 3}}, "'policy.memory_limt'", "'memory_limit'"),
    ],
)
def test_unknown_key_names_path_and_nearest(fields: dict[str, object], path: str, near: str) -> None:
    with pytest.raises(SpecError) as caught:
        AttentionSpec.model_validate(fields)
    assert caught.value.code == "spec-unknown-key"
    assert path in caught.value.message
    assert near in (caught.value.hint or "")


def test_every_problem_is_named() -> None:
    with pytest.raises(SpecError, match="also wrong: scale"):
        AttentionSpec(order=9, scale="x")


@pytest.mark.parametrize(
    ("field", "value", "message", "hint"),
    [
        ("mask", "causal", "mask is a text where a spec belongs.", "write {'kind': 'causal'}, or korder.Causal()."),
        ("mask", Causal, "mask is the class Causal, not an instance.", "korder.Causal()"),
        ("mask", {"kind": "causl"}, "mask is of an unknown kind, 'causl'.", "did you mean 'causal'?"),
        ("mask", {"align": "end"}, "mask is without a kind.", 'add the key, for example kind = "causal".'),
        ("mask", Exact(), "mask is an Exact, which does not belong there.", None),
        ("method", "polynomial", "method is a text where a spec belongs.", "korder.Polynomial(degree=4)"),
        ("method", Polynomial, "method is the class Polynomial, not an instance.", "korder.Polynomial(degree=4)"),
        ("policy", "numpy", "policy is a text where a spec belongs.", None),
    ],
)
def test_what_is_no_spec_is_named_in_plain_words(field: str, value: object, message: str, hint: str | None) -> None:
    with pytest.raises(SpecError) as caught:
        AttentionSpec(**{"order": 2, field: value})
    assert caught.value.message == message
    assert (hint in (caught.value.hint or "")) if hint else caught.value.hint is None
    assert {"mask": "'causal'", "method": "'polynomial'", "policy": "Policy"}[field] in (caught.value.expected or "")


def test_a_run_file_is_answered_in_its_own_terms() -> None:
    run = {"schema_version": 1, "kind": "attend", "data": {"kind": "random", "n": 7, "width": 4}}
    with pytest.raises(SpecError) as caught:
        parse_run({**run, "attention": {"order": 2, "mask": "causal"}})
    assert caught.value.message == "attention.mask is a text where a table belongs."
    assert caught.value.hint == 'write {kind = "causal"}.'
    with pytest.raises(SpecError) as caught:
        parse_run({**run, "data": {**run["data"], "lengths": [3]}, "attention": {"order": 2}})
    assert caught.value.message.startswith("data.lengths has 1")
    assert caught.value.got == "data.lengths = [3], attention.order = 2"


@pytest.mark.parametrize(
    ("data", "output", "expected"),
    [
        ({"n": 1e3}, {}, "a positive integer"),
        ({"lengths": 5}, {}, "a list of integers of at least 0"),
        ({"lengths": [3, -1]}, {}, "an integer of at least 0"),
        ({"score_rms": "x"}, {}, "a positive number"),
        ({}, {"plot": "maybe"}, "true or false"),
        ({}, {"directory": ""}, "a non-empty text"),
        ({}, "out", "a table of directory, overwrite, arrays, plot"),
    ],
)
def test_expected_says_type_and_bounds(data: dict[str, object], output: object, expected: str) -> None:
    content = {"schema_version": 1, "kind": "attend", "attention": {"order": 2}, "output": output}
    with pytest.raises(SpecError) as caught:
        parse_run({**content, "data": {"kind": "random", "n": 7, "width": 4, **data}})
    assert caught.value.expected == expected


@pytest.mark.parametrize(
    ("fields", "message", "got"),
    [
        ({}, "a polynomial needs a degree, a tolerance, or both.", "neither"),
        ({"degree": 2, "on_exceed": "exact"}, "on_exceed belongs to a tolerance.", "on_exceed = 'exact'"),
        ({"degree": 2, "interval": 1.0}, "an interval belongs to coefficients = 'minimax'.", "interval = 1.0"),
    ],
)
def test_keys_that_do_not_fit_each_other(fields: dict[str, object], message: str, got: str) -> None:
    with pytest.raises(SpecError) as caught:
        Polynomial(**fields)
    assert (caught.value.message, caught.value.got) == (message, got)


@pytest.mark.parametrize(
    ("model", "argument", "example"),
    [(AttentionSpec, 2, "AttentionSpec(order=2)"), (Polynomial, 4, "Polynomial(degree=4)"),
     (Window, (3, 4), "Window(sizes=(128, 128))")],
)  # fmt: skip
def test_arguments_are_named(model: type, argument: object, example: str) -> None:
    with pytest.raises(SpecError, match="takes keyword arguments only") as caught:
        model(argument)
    assert example in (caught.value.expected or "")


def test_integers_of_numpy_are_integers_and_booleans_are_not() -> None:
    spec = AttentionSpec(order=np.int64(2), method=Polynomial(degree=np.int64(4)), mask=Window(sizes=np.array([3, 4])))
    assert spec == AttentionSpec(order=2, method=Polynomial(degree=4), mask=Window(sizes=(3, 4)))
    assert type(spec.order) is int
    for build in (lambda: AttentionSpec(order=np.True_), lambda: Window(sizes=(True,)), lambda: Polynomial(degree=True),
                  lambda: Policy(memory_limit=True)):  # fmt: skip
        with pytest.raises(SpecError):
            build()


def test_wrong_json_is_a_spec_error() -> None:
    for text in ('{"order": 9}', "{"):
        with pytest.raises(SpecError):
            AttentionSpec.model_validate_json(text)


def test_defaults() -> None:
    spec = AttentionSpec(order=3)
    assert (spec.mask, spec.method, spec.policy.memory_limit) == (Full(), Exact(), 128 * 2**20)
    assert spec.score_factor(16) == 0.25


@pytest.mark.parametrize(
    ("scale", "factor"), [("inverse_sqrt_dim", 0.2), ("inverse_dim", 0.04), (1.5, 1.5), (0.0, 0.0)]
)
def test_scale(scale: object, factor: float) -> None:
    assert AttentionSpec(order=2, scale=scale).score_factor(25) == pytest.approx(factor, rel=1e-15)


def test_frozen_and_hashable() -> None:
    spec = AttentionSpec(order=2, mask=Causal(align="end"), method=Polynomial(degree=4))
    with pytest.raises(SpecError, match="frozen") as caught:
        spec.order = 3  # type: ignore[misc]
    assert "model_copy(update={'order': 3})" in (caught.value.hint or "")
    with pytest.raises(SpecError, match="frozen"):
        del spec.order
    assert hash(spec) == hash(
        AttentionSpec(order=2, mask={"kind": "causal", "align": "end"}, method=Polynomial(degree=4))
    )


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(order=1),
        AttentionSpec(order=2, scale="inverse_dim", score="kronecker", mask=Window(sizes=(3, 5), align="start")),
        AttentionSpec(
            order=2, method=Polynomial(tolerance=1e-3, coefficients="minimax", interval=2.0, on_exceed="exact")
        ),
        AttentionSpec(order=4, scale=0.5, policy=Policy(backends=("numpy",), precision="float64", memory_limit="1MiB")),
    ],
)
def test_round_trip_through_json(spec: AttentionSpec) -> None:
    assert AttentionSpec.model_validate_json(spec.model_dump_json()) == spec


def test_memory_limit_reads_units() -> None:
    assert Policy(memory_limit="256MiB").memory_limit == 256 * 2**20
