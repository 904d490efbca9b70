"""Whoever builds or calls a module wrongly reads what is wrong, expected, came, before any work is done."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
from korder import AttentionSpec, Causal, Polynomial, ShapeError, SpecError, Window  # noqa: E402
from korder.torch import OrderKAttention, OrderKTransformerBlock  # noqa: E402
from tests.test_torch_modules import BATCH, FLOAT64, MEMORY, QUERIES, WIDTH, draw, layer  # noqa: E402

WRONG = [
    ({"order": 0}, "order is out of range", "0"),
    ({"heads": 3}, "heads = 3 does not divide width = 8", "heads = 3"),
    ({"heads": 4, "key_value_heads": 3}, "does not divide heads = 4", "key_value_heads = 3"),
    ({"heads": 8, "rotary": True}, "rotary turns pairs", "head_width = 1"),
    ({"head_width": 3, "rotary": True}, "rotary turns pairs", "head_width = 3"),
    ({"dropout": 1.0}, "dropout is out of range", "1.0"),
    ({"dropout": -0.1}, "dropout is out of range", "-0.1"),
    ({"width": 0}, "width is out of range", "0"),
    ({"score_bound": 0.0}, "score_bound is out of range", "0.0"),
    ({"score_bound": 1.0, "scale": "inverse_dim"}, "both say how large", "inverse_dim"),
    ({"learn_sharpness": True}, "belongs to a score_bound", "learn_sharpness = True"),
    ({"alibi": True, "method": Polynomial(degree=2)}, "polynomial cannot take", "polynomial"),
    ({"spec": AttentionSpec(order=2, score="kronecker")}, "CP factors", "kronecker"),
    ({"spec": AttentionSpec(order=2), "mask": Causal()}, "given together", "spec and mask"),
    ({"spec": "causal"}, "where a spec belongs", "causal"),
    ({"order": 2, "mask": Window(sizes=(3,))}, "order = 2 needs one per mode", "(3,)"),
    ({"rotary_base": 1.0}, "rotary_base is out of range", "1.0"),
]


@pytest.mark.parametrize(("arguments", "message", "got"), WRONG, ids=lambda value: str(value)[:40])
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str, got: str) -> None:
    arguments = {"width": 8, **arguments}
    for kind in (OrderKAttention, OrderKTransformerBlock):
        with pytest.raises(SpecError) as caught:
            kind(**arguments)
        assert message in caught.value.message
        assert got in (caught.value.got or "")


def test_unknown_keys_name_the_nearest() -> None:
    for build in (
        lambda: OrderKTransformerBlock(8, hedas=2),
        lambda: OrderKAttention.from_config({"width": 8, "attention": {"order": 2}, "hedas": 2}),
    ):
        with pytest.raises(SpecError) as caught:
            build()
        assert "'heads'" in (caught.value.hint or "")


def wrong_calls() -> dict[str, tuple[Any, type[Exception], str]]:
    x, row = draw(BATCH, QUERIES, WIDTH), draw(BATCH, 7, WIDTH)
    return {
        "width": (lambda m: m(draw(BATCH, QUERIES, 9)), ShapeError, "(2, 5, 9)"),
        "axes": (lambda m: m(draw(8)), ShapeError, "(8,)"),
        "count": (lambda m: m(x, (x,)), ShapeError, "1 tensors"),
        "memory width": (lambda m: m(x, (x, draw(BATCH, QUERIES, 9))), ShapeError, "(2, 5, 9)"),
        "batch": (lambda m: m(x, draw(3, QUERIES, WIDTH)), ShapeError, "(3, 5, 8)"),
        "lengths": (lambda m: m(x, row), ShapeError, "(7, 7)"),
        "ambiguous": (lambda m: m(x, query_offset=1, key_offsets=(0,)), ShapeError, "1 offsets"),
        "key masks": (lambda m: m(x, key_masks=(None, x[:, :3, 0] > 0)), ShapeError, "(2, 3)"),
        "biases": (lambda m: m(x, biases=(None, x)), ShapeError, "(2, 5, 8)"),
        "dtype": (lambda m: m(x.float()), korder.OperandError, "torch.float32"),
        "no tensor": (lambda m: m([1.0]), korder.OperandError, "list"),
    }


@pytest.mark.parametrize("name", wrong_calls())
@pytest.mark.parametrize("kind", [OrderKAttention, OrderKTransformerBlock])
def test_wrong_inputs_are_refused_before_any_work(name: str, kind: Any) -> None:
    call, error, got = wrong_calls()[name]
    module = kind(8, order=2, heads=2, mask=Causal(), dtype=FLOAT64)
    worked: list[str] = []
    for part in module.modules():
        if isinstance(part, torch.nn.Linear):
            part.register_forward_hook(lambda *_: worked.append("projection"))
    with pytest.raises(error) as caught:
        call(module)
    assert got in str(caught.value.got)
    assert not worked


def test_a_memory_of_another_width_must_be_given() -> None:
    with pytest.raises(ShapeError, match="x as its own memory"):
        layer(memory_width=MEMORY)(draw(BATCH, QUERIES, WIDTH))
