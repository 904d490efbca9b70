"""Specs are frozen, refuse what they do not know, and name the key path, the value and the nearest known key."""

from __future__ import annotations

import pytest

from korder import AttentionSpec, Causal, Exact, Full, Policy, Polynomial, SpecError, Window

WRONG = [
    ({"order": 0}, "order", ">= 1", "0"),
    ({"order": 7}, "order", "<= 6", "7"),
    ({"order": True}, "order", "", "True"),
    ({"order": 2.5}, "order", "", "2.5"),
    ({}, "order", "", "nothing"),
    ({"order": 2, "scale": "wide"}, "scale", "inverse_dim", "'wide'"),
    ({"order": 2, "scale": float("nan")}, "scale", "", "nan"),
    ({"order": 2, "scale": float("inf")}, "scale", "", "inf"),
    ({"order": 2, "score": "trilinear"}, "score", "khatri_rao", "'trilinear'"),
    ({"order": 2, "mask": {"kind": "causl"}}, "mask", "causal", "causl"),
    ({"order": 2, "mask": {"kind": "window", "sizes": [3]}}, "sizes", "", "[3]"),
    ({"order": 1, "mask": {"kind": "window", "sizes": [0]}}, "mask.sizes[0]", "> 0", "0"),
    ({"order": 2, "method": {"kind": "polynomial"}}, "method", "", "polynomial"),
    ({"order": 2, "method": {"kind": "polynomial", "tolerance": 0.0}}, "method.tolerance", "> 0", "0.0"),
    ({"order": 2, "method": {"kind": "polynomial", "degree": 2, "interval": 1.0}}, "method", "", "interval"),
    ({"order": 2, "method": {"kind": "magic"}}, "method", "polynomial", "magic"),
    ({"order": 2, "policy": {"memory_limit": -1}}, "policy.memory_limit", "", "-1"),
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
    with pytest.raises(Exception, match="frozen"):
        spec.order = 3  # type: ignore[misc]
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
