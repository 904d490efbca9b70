"""Shapes are checked once, before any work, and every error names the operand and both shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from korder import AttentionSpec, Causal, Full, OperandError, ShapeError, SpecError
from korder.problem import Shapes, make_problem

GOOD = Shapes(
    query=(2, 6, 5, 4),
    keys=((2, 3, 7, 4), (2, 3, 11, 4)),
    values=((2, 3, 7, 9), (2, 3, 11, 9)),
)
SPEC = AttentionSpec(order=2)


def test_a_good_problem() -> None:
    problem = make_problem(SPEC, GOOD, "float32")
    assert (problem.batch, problem.heads, problem.groups, problem.queries) == (2, 6, 3, 5)
    assert (problem.lengths, problem.query_width, problem.value_width) == ((7, 11), 4, 9)
    assert (problem.order, problem.tuples, problem.scale, problem.accumulation) == (2, 77, 0.5, "float32")
    assert "n=5, m=7 x 11" in problem.describe()


def test_two_axes_are_one_head_and_extra_axes_are_batch() -> None:
    flat = make_problem(AttentionSpec(order=1), Shapes((5, 4), ((7, 4),), ((7, 9),)), "float32")
    assert (flat.batch, flat.heads, flat.groups) == (1, 1, 1)
    deep = Shapes((2, 3, 6, 5, 4), ((2, 3, 2, 7, 4),), ((2, 3, 2, 7, 9),))
    assert make_problem(AttentionSpec(order=1), deep, "float32").batch == 6


WRONG = {
    "no key": (replace(GOOD, keys=(), values=()), "keys-missing", "at least one key", "an empty tuple"),
    "missing value": (replace(GOOD, values=GOOD.values[:1]), "modes-mismatch", "same length", "1 values"),
    "length": (replace(GOOD, values=((2, 3, 7, 9), (2, 3, 10, 9))), "shape-mismatch", "keys[1] and values[1]",
               "(2, 3, 10, 9)"),
    "key width": (replace(GOOD, keys=((2, 3, 7, 4), (2, 3, 11, 5))), "shape-mismatch", "query and keys[1]", "d = 5"),
    "value width": (replace(GOOD, values=((2, 3, 7, 9), (2, 3, 11, 8))), "shape-mismatch", "all values", "e = 8"),
    "axes": (replace(GOOD, keys=((2, 3, 7, 4), (11, 4))), "shape-mismatch", "number of axes", "(11, 4)"),
    "batch": (replace(GOOD, keys=((2, 3, 7, 4), (1, 3, 11, 4))), "shape-mismatch", "batch axes", "(1, 3, 11, 4)"),
    "heads": (replace(GOOD, keys=((2, 3, 7, 4), (2, 2, 11, 4))), "heads-mismatch", "same number of heads", "2 heads"),
    "groups": (replace(GOOD, query=(2, 4, 5, 4)), "heads-mismatch", "must divide", "g = 3"),
    "bias": (replace(GOOD, biases=(None, (2, 6, 5, 7))), "shape-mismatch", "biases[1]", "(2, 6, 5, 7)"),
    "biases": (replace(GOOD, biases=(None,)), "modes-mismatch", "one entry per mode", "1 entries"),
    "key mask": (replace(GOOD, key_masks=((2, 6, 7), None)), "shape-mismatch", "key_masks[0]", "(2, 6, 7)"),
    "scalar": (Shapes((5,), ((7,),), ((7,),)), "shape-mismatch", "two axes", "(5,)"),
    "no columns": (Shapes((5, 0), ((7, 0),), ((7, 2),)), "shape-mismatch", "one column", "(5, 0)"),
}  # fmt: skip


@pytest.mark.parametrize(("shapes", "code", "message", "got"), WRONG.values(), ids=WRONG)
def test_shapes_that_do_not_fit(shapes: Shapes, code: str, message: str, got: str) -> None:
    with pytest.raises(ShapeError) as caught:
        make_problem(AttentionSpec(order=max(len(shapes.keys), 1)), shapes, "float32")
    assert caught.value.code == code
    assert message in caught.value.message
    assert got in (caught.value.got or "")
    assert caught.value.expected


def test_order_must_be_the_number_of_keys() -> None:
    with pytest.raises(SpecError, match="order must equal") as caught:
        make_problem(AttentionSpec(order=3), GOOD, "float32")
    assert (caught.value.expected, caught.value.got) == (
        "3 key matrices, because the spec says order=3",
        "2 key matrices",
    )


@pytest.mark.parametrize("dtype", ["int64", "bool", "object", "complex64"])
def test_dtype_must_be_a_float(dtype: str) -> None:
    with pytest.raises(OperandError, match="floating-point"):
        make_problem(SPEC, GOOD, dtype)


def test_unequal_lengths_under_a_mask_need_positions() -> None:
    with pytest.raises(ShapeError, match="positions line up"):
        make_problem(AttentionSpec(order=2, mask=Causal()), GOOD, "float32")
    for spec, shapes in (
        (AttentionSpec(order=2, mask=Causal(align="end")), GOOD),
        (AttentionSpec(order=2, mask=Causal()), replace(GOOD, offsets_given=True)),
        (AttentionSpec(order=2, mask=Full()), GOOD),
    ):
        assert make_problem(spec, shapes, "float32").queries == 5
    with pytest.raises(SpecError, match="both say"):
        make_problem(AttentionSpec(order=2, mask=Causal(align="end")), replace(GOOD, offsets_given=True), "float32")


KRONECKER = AttentionSpec(order=2, score="kronecker")
WIDE = replace(GOOD, keys=((2, 3, 7, 2), (2, 3, 11, 3)))


def test_weights() -> None:
    full = make_problem(KRONECKER, replace(WIDE, weight=(4, 2, 3)), "float32")
    assert (full.weight, full.score_width, full.key_widths) == ("full", 6, (2, 3))
    factors = make_problem(KRONECKER, replace(WIDE, weight=((4, 8), (2, 8), (3, 8))), "float32")
    assert (factors.weight, factors.score_width, factors.weight_rank) == ("cp", 8, 8)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ((4, 3, 2), "one axis per operand"),
        (((4, 8), (2, 8)), "CP factors"),
        (((4, 8), (2, 8), (3, 7)), "CP factors"),
        (((4, 8), (3, 8), (2, 8)), "CP factors"),
        ((), "one axis per operand"),
    ],
)
def test_weights_that_do_not_fit(weight: object, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        make_problem(KRONECKER, replace(WIDE, weight=weight), "float32")


def test_weight_and_score_form_go_together() -> None:
    with pytest.raises(OperandError, match="score form"):
        make_problem(KRONECKER, GOOD, "float32")
    with pytest.raises(OperandError, match="score form"):
        make_problem(SPEC, replace(GOOD, weight=(4, 4, 4)), "float32")


def test_kinds_of_bias() -> None:
    biases = ((2, 6, 1, 7), (1, 1, 5, 11))
    assert make_problem(SPEC, replace(GOOD, biases=biases), "float32").biases == ("key", "full")
    assert make_problem(SPEC, replace(GOOD, biases=(None, biases[1])), "float32").biases == (None, "full")


@pytest.mark.parametrize(
    ("dtype", "precision", "sums"),
    [("float16", "input", "float32"), ("float32", "float64", "float64"), ("float64", "float32", "float64")],
)
def test_sums_are_never_narrower_than_the_operands(dtype: str, precision: str, sums: str) -> None:
    spec = AttentionSpec(order=2, policy={"precision": precision})
    assert make_problem(spec, GOOD, dtype).accumulation == sums
