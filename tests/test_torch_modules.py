"""The modules are their definition, train, copy and refuse: judged against the oracle and torch's own attention."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
from korder import AttentionSpec, Causal, Polynomial, Window  # noqa: E402
from korder.spec.layers import AttentionLayerSpec, TransformerBlockSpec  # noqa: E402
from korder.torch import OrderKAttention, OrderKTransformerBlock, alibi  # noqa: E402
from korder.torch.rotary import rotary_factor  # noqa: E402
from tests.oracle import oracle_attention  # noqa: E402

FLOAT64 = torch.float64
BATCH, QUERIES, LENGTHS, WIDTH, MEMORY = 2, 5, (7, 3, 2), 8, 6


def draw(*shape: int, seed: int = 0, dtype: Any = FLOAT64) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=FLOAT64).to(dtype)


def layer(width: int = WIDTH, *, seed: int = 0, **arguments: Any) -> Any:
    torch.manual_seed(seed)
    built = OrderKAttention(width, **{"dtype": FLOAT64, **arguments})
    with torch.no_grad():  # nothing at a special value, biases included
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built


def memories(order: int) -> tuple[Any, ...]:
    return tuple(draw(BATCH, m, MEMORY, seed=10 + m) for m in LENGTHS[:order])


def by_definition(module: Any, x: Any, rows: Any, *, mask: Any = None, **extra: Any) -> Any:
    """The layer from its parameters and the oracle, without rotary positions or normalisation."""
    weights = {name: value.numpy() for name, value in module.state_dict().items()}

    def project(name: str, rows: Any, heads: int) -> Any:
        projected = rows.numpy() @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)
        return projected.reshape(*projected.shape[:2], heads, -1).transpose(0, 2, 1, 3)

    groups = module.key_value_heads
    keys = [project(f"key_projections.{t}", row, groups) for t, row in enumerate(rows)]
    values = [project(f"value_projections.{t}", row, groups) for t, row in enumerate(rows)]
    query = project("query_projection", x, module.heads)
    output, _ = oracle_attention(query, keys, values, scale=module.head_width**-0.5, mask=mask, **extra)
    joined = output.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    return joined @ weights["output_projection.weight"].T + weights.get("output_projection.bias", 0.0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_cross_attention_is_its_definition(order: int, bias: bool) -> None:
    module = layer(order=order, heads=4, key_value_heads=2, head_width=3, value_width=5, memory_width=MEMORY, bias=bias)
    x, rows = draw(BATCH, QUERIES, WIDTH), memories(order)
    np.testing.assert_allclose(module(x, rows).detach(), by_definition(module, x, rows), rtol=1e-12, atol=1e-13)
    one = rows[0]
    np.testing.assert_allclose(module(x, one).detach(), module(x, (one,) * order).detach(), rtol=0, atol=0)


def test_key_masks_biases_and_offsets_reach_the_attention() -> None:
    module = layer(order=2, heads=2, memory_width=MEMORY, mask=Causal())
    x, rows = draw(BATCH, QUERIES, WIDTH), memories(2)
    key_masks = (draw(BATCH, 7, seed=1) > -1, None)
    biases = (draw(1, 2, 1, 7, seed=2), draw(BATCH, 2, QUERIES, 3, seed=3))
    found = module(x, rows, biases=biases, key_masks=key_masks, query_offset=3, key_offsets=(0, 1))
    expected = by_definition(
        module, x, rows, mask=Causal(), query_offset=3, key_offsets=(0, 1),
        biases=[bias.numpy() for bias in biases], key_masks=(key_masks[0].numpy(), None),
    )  # fmt: skip
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mask", [korder.Full(), Causal()], ids=lambda mask: mask.kind)
def test_order_1_is_torchs_own_attention_with_the_same_weights(mask: Any) -> None:
    module = layer(order=1, heads=4, key_value_heads=2, mask=mask)
    x = draw(BATCH, QUERIES, WIDTH)

    def heads(project: Any, count: int) -> Any:
        return project(x).unflatten(-1, (count, -1)).transpose(1, 2)

    theirs = torch.nn.functional.scaled_dot_product_attention(
        heads(module.query_projection, 4), heads(module.key_projections[0], 2), heads(module.value_projections[0], 2),
        is_causal=mask.kind == "causal", enable_gqa=True,
    )  # fmt: skip
    expected = module.output_projection(theirs.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-13)


def test_rows_without_a_batch() -> None:
    module = layer(order=2, heads=2, rotary=True, alibi=True)
    x = draw(1, QUERIES, WIDTH)
    torch.testing.assert_close(module(x[0]), module(x)[0], rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_rotary_layer_knows_differences_of_positions_only(order: int) -> None:
    module = layer(order=order, heads=2, rotary=True)
    x, rows = draw(BATCH, QUERIES, WIDTH), [draw(BATCH, m, WIDTH, seed=m) for m in LENGTHS[:order]]
    at = [module(x, rows, query_offset=s, key_offsets=(s, s + 2, s + 1)[:order]) for s in (0, 500)]
    torch.testing.assert_close(at[0], at[1], rtol=0, atol=1e-11)
    assert (module(x, rows, query_offset=4) - module(x, rows)).abs().max() > 1e-3


def test_positions_count_as_the_mask_aligns_them() -> None:
    for options in ({"rotary": True}, {"alibi": True}):
        aligned = layer(order=2, heads=2, mask=Causal(align="end"), **options)
        plain = layer(order=2, heads=2, mask=Causal(), **options)
        x, row = draw(BATCH, 3, WIDTH), draw(BATCH, 7, WIDTH, seed=1)
        torch.testing.assert_close(aligned(x, row), plain(x, row, query_offset=4), rtol=1e-12, atol=1e-13)


def test_a_chunk_is_the_rows_of_the_whole() -> None:
    module = layer(order=2, heads=2, mask=Window(sizes=(3, 4)), rotary=True, alibi=True)
    x = draw(BATCH, 7, WIDTH)
    torch.testing.assert_close(module(x[:, 4:], x, query_offset=4), module(x)[:, 4:], rtol=1e-12, atol=1e-13)


def test_alibi_is_a_bias_of_distances_and_adds_to_the_users() -> None:
    with_slopes, without = (layer(order=2, heads=2, alibi=on) for on in (True, False))
    x, own = draw(BATCH, QUERIES, WIDTH), draw(1, 2, 1, QUERIES, seed=1)
    slopes = np.array([2.0**-4, 2.0**-8])
    distances = np.abs(np.arange(QUERIES)[:, None] - np.arange(QUERIES))
    linear = torch.from_numpy(-slopes[:, None, None] * distances)
    torch.testing.assert_close(alibi(2, QUERIES, QUERIES, dtype=FLOAT64), linear, rtol=0, atol=0)
    expected = without(x, biases=(linear[None] + own, linear[None]))
    torch.testing.assert_close(with_slopes(x, biases=(own, None)), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_scores_keep_to_the_bound_and_come_near_it(order: int, rotary: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = layer(order=order, heads=2, rotary=rotary, score_bound=3.0, learn_sharpness=True)
    seen: dict[str, Any] = {}

    def attend(query: Any, keys: Any, values: Any, *, spec: Any, **_: Any) -> Any:
        scores = query.unsqueeze(-2)
        for t, key in enumerate(keys):
            scores = (
                scores.unsqueeze(2) * key[(slice(None),) * 2 + (None,) * (t + 1)] if t else scores * key[:, :, None]
            )
        seen["scores"] = spec.scale * scores.sum(-1)
        return query.new_zeros(*query.shape[:-1], values[0].shape[-1])

    monkeypatch.setattr("korder.torch.attention.attend", attend)
    x = 100 * draw(BATCH, QUERIES, WIDTH)
    module(x)
    largest = seen["scores"].abs().amax(dim=tuple(axis for axis in range(seen["scores"].ndim) if axis != 1))
    bounds = module.score_bounds()
    assert module.score_bound == 3.0
    assert (bounds < 3.0).all()
    assert (largest <= bounds * (1 + 1e-12)).all()
    assert (largest > 0.1 * bounds).all()
    with torch.no_grad():  # every projection the constant 1: the bound is reached
        for linear in (module.query_projection, *module.key_projections):
            linear.weight.zero_()
            linear.bias.copy_(torch.tensor([1.0, 0.0] * 4) if rotary else torch.ones(8))
    module(x[:, :1])
    reached = seen["scores"].abs().amax(dim=tuple(axis for axis in range(seen["scores"].ndim) if axis != 1))
    torch.testing.assert_close(reached, bounds, rtol=1e-12, atol=0)


def test_bounds_of_heads() -> None:
    assert layer(heads=2).score_bounds().tolist() == [np.inf, np.inf]
    fixed = layer(heads=2, score_bound=4.0)
    assert fixed.score_bounds().tolist() == [4.0, 4.0]
    assert fixed.sharpness is None
    torch.manual_seed(0)
    fresh = OrderKAttention(8, heads=2, score_bound=4.0, learn_sharpness=True)
    assert fresh.score_bounds().tolist() == [2.0, 2.0]


def test_a_bounded_layer_may_run_the_polynomial_method() -> None:
    options = {"order": 2, "heads": 2, "score_bound": 1.0, "mask": Causal(), "rotary": True}
    exact, near = layer(**options), layer(**options, method=Polynomial(degree=6))
    x = draw(BATCH, QUERIES, WIDTH)
    torch.testing.assert_close(near(x), exact(x), rtol=0, atol=1e-3)
    assert not torch.equal(near(x), exact(x))
    assert "method=polynomial" in repr(near)


SMALL = {
    "plain": {"order": 2, "heads": 2, "key_value_heads": 1},
    "order 1": {"order": 1},
    "order 3": {"order": 3, "mask": Causal()},
    "everything": {"order": 2, "rotary": True, "alibi": True, "score_bound": 3.0, "learn_sharpness": True},
}


@pytest.mark.parametrize("options", SMALL.values(), ids=SMALL)
def test_gradients_reach_every_parameter(options: dict[str, Any]) -> None:
    module, x = layer(4, **options), draw(1, 3, 4).requires_grad_()
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x: Any, *values: Any) -> Any:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters), atol=1e-7, rtol=1e-5)
    function(x, *parameters).square().sum().backward()
    for name, parameter in module.named_parameters():
        # A key bias of order 1 adds one number to all scores of a query, which the softmax does not see.
        vanishes = module.order == 1 and name == "key_projections.0.bias"
        assert (parameter.grad.abs().max() > 1e-6) != vanishes, name


KEYS = [
    "sharpness", "query_projection.weight", "query_projection.bias", "key_projections.0.weight",
    "key_projections.0.bias", "key_projections.1.weight", "key_projections.1.bias", "value_projections.0.weight",
    "value_projections.0.bias", "value_projections.1.weight", "value_projections.1.bias", "output_projection.weight",
    "output_projection.bias",
]  # fmt: skip
BLOCK_KEYS = [
    "attention_norm.weight", "attention_norm.bias", *(f"attention.{key}" for key in KEYS[1:]), "hidden_norm.weight",
    "hidden_norm.bias", "expand.weight", "expand.bias", "contract.weight", "contract.bias",
]  # fmt: skip


def stored_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a release wrote: sines of consecutive numbers, in the order of the names."""
    found, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        found[name] = torch.from_numpy(np.sin(np.arange(start, start + size)).reshape(shape))
        start += size
    return found


def test_names_of_the_state_are_pinned_and_an_older_state_gives_what_it_gave() -> None:
    module = layer(4, order=2, heads=2, key_value_heads=1, rotary=True, score_bound=2.0, learn_sharpness=True)
    assert list(module.state_dict()) == KEYS
    assert list(OrderKTransformerBlock(4, order=2).state_dict()) == BLOCK_KEYS
    square, half = (4, 4), (2, 4)
    shapes = dict(zip(KEYS, [(2,), square, (4,), *[half, (2,)] * 4, square, (4,)], strict=True))
    module.load_state_dict(stored_weights(shapes))
    found = module(torch.arange(8, dtype=FLOAT64).reshape(1, 2, 4) / 8)
    torch.testing.assert_close(found, torch.tensor(PINNED, dtype=FLOAT64), rtol=1e-9, atol=1e-9)


PINNED = [
    [
        [0.6274356087410844, -0.6857247985325241, -0.7914893519101397, -0.6528698897058361],
        [0.5194359356965551, -0.6107077888909378, -0.7815584584825843, -0.7408694296242184],
    ]
]


def test_all_ways_to_build_are_one() -> None:
    spec = AttentionSpec(order=3, mask=Causal(), method=Polynomial(degree=2))
    fields = {"heads": 2, "key_value_heads": 1, "rotary": True, "dropout": 0.25}
    mapping = {"width": 8, "attention": spec.model_dump(), **fields}
    built = [
        OrderKAttention(8, order=3, mask={"kind": "causal"}, method=Polynomial(degree=2), **fields),
        OrderKAttention(8, spec=spec, **fields),
        OrderKAttention.from_config(mapping),
        OrderKAttention.from_config(AttentionLayerSpec(**mapping)),
    ]
    built.append(OrderKAttention.from_config(AttentionLayerSpec.model_validate_json(built[0].config.model_dump_json())))
    assert len({module.config for module in built}) == 1
    assert built[0].config == korder.AttentionLayerSpec(**mapping)
    blocks = [
        OrderKTransformerBlock(8, hidden_width=12, activation="silu", spec=spec, **fields),
        OrderKTransformerBlock.from_config(
            {"attention": mapping, "hidden_width": 12, "activation": "silu", "dropout": 0.25}
        ),
    ]
    assert len({block.config for block in blocks}) == 1
    assert isinstance(blocks[0].config, TransformerBlockSpec)
    assert OrderKAttention(8).order == 2


@pytest.mark.parametrize("kind", [OrderKAttention, OrderKTransformerBlock])
def test_copies_dtypes_and_pickles(kind: Any) -> None:
    torch.manual_seed(1)
    module = kind(8, order=2, heads=2, rotary=True, score_bound=2.0, learn_sharpness=True, mask=Causal())
    x = draw(BATCH, QUERIES, WIDTH, dtype=torch.float32)
    expected = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
        assert twin.config == module.config
        with torch.no_grad():
            next(twin.parameters()).add_(1.0)
    assert torch.equal(module(x), expected)
    torch.testing.assert_close(copy.deepcopy(module).double()(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    narrow = copy.deepcopy(module).to(torch.bfloat16)(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), expected, rtol=0.1, atol=0.1)
    assert all(p.dtype == FLOAT64 for p in kind(8, dtype=FLOAT64).parameters())
    assert all(p.device.type == "meta" for p in kind(8, device="meta", rotary=True).parameters())


def test_dropout_drops_outputs_in_training_only() -> None:
    torch.manual_seed(2)
    module, plain = layer(heads=2, dropout=0.5), layer(heads=2)
    x = draw(16, QUERIES, WIDTH)
    trained, whole = module(x), plain(x)
    dropped = trained == 0
    assert 0.35 < dropped.double().mean() < 0.65
    torch.testing.assert_close(trained[~dropped], 2 * whole[~dropped], rtol=1e-12, atol=0)
    assert torch.equal(module.eval()(x), whole)
    config = OrderKTransformerBlock(8, dropout=0.5).config
    assert config.dropout == config.attention.dropout == 0.5
    branches = ({"dropout": 0.0}, {"attention": config.attention.model_copy(update={"dropout": 0.0})})
    for one_branch in branches:  # each branch drops on its own
        block = OrderKTransformerBlock.from_config(config.model_copy(update=one_branch), dtype=FLOAT64)
        assert not torch.equal(block(x), block(x))
        assert torch.equal(block.eval()(x), block(x))


def test_the_block_is_two_residual_branches() -> None:
    block = OrderKTransformerBlock(8, order=2, heads=2, hidden_width=12, dtype=FLOAT64, mask=Causal())
    x = draw(BATCH, QUERIES, WIDTH)
    middle = x + block.attention(torch.nn.functional.layer_norm(x, (8,)))
    hidden = torch.nn.functional.gelu(
        torch.nn.functional.layer_norm(middle, (8,)) @ block.expand.weight.T + block.expand.bias
    )
    torch.testing.assert_close(block(x), middle + hidden @ block.contract.weight.T + block.contract.bias)
    row = draw(BATCH, 7, WIDTH, seed=1)
    attended = x + block.attention(block.attention_norm(x), row, query_offset=2)
    again = attended + block.contract(block.activation(block.expand(block.hidden_norm(attended))))
    torch.testing.assert_close(block(x, row, query_offset=2), again)


@torch.no_grad()
def start(order: int, *, rotary: bool, bias: bool = True, many: int = 16) -> dict[str, float]:
    """Mean squares over draws: of scores, of the output for one key, and for many equal scores times their number."""
    found: dict[str, list[Any]] = {"scores": [], "alone": [], "averaged": []}
    for seed in range(6):
        torch.manual_seed(seed)
        module = OrderKAttention(32, order=order, heads=2, rotary=rotary, bias=bias)
        uniform = OrderKAttention(32, order=order, heads=2, bias=bias, scale=0.0)
        x = torch.randn(8, many, 32)
        query, *keys = (
            project(x).unflatten(-1, (2, -1)).transpose(1, 2)
            for project in (module.query_projection, *module.key_projections)
        )
        query, keys = module._score_operands(query, tuple(keys), 0, (0,) * order)
        product = query.roll(1, 2)
        for t, key in enumerate(keys):
            product = product * key.roll(3 * t, 2)
        found["scores"].append((module._spec.scale * product.sum(-1)).square().mean())
        found["alone"].append(module(x[:, :1]).square().mean())
        found["averaged"].append(uniform(x).square().mean() * many)
    return {name: float(torch.stack(values).mean()) for name, values in found.items()}


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_start_has_a_sensible_scale(order: int, rotary: bool) -> None:
    mean = start(order, rotary=rotary)
    assert 0.6 < mean["scores"] < 1.7, mean
    assert 0.6 < mean["alone"] < 1.7, mean
    # Each further mode keeps half, and the n-th part of the other half.
    assert mean["averaged"] == pytest.approx((0.5 + 0.5 / 16) ** (order - 1), rel=0.4), mean
    without = start(order, rotary=rotary, bias=False)
    assert 0.6 < without["alone"] < 1.7, without
    assert without["averaged"] == pytest.approx(16.0 ** (1 - order), rel=0.6), without


def test_reset_parameters_draws_again() -> None:
    module = OrderKTransformerBlock(8, score_bound=2.0, learn_sharpness=True)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(5.0)
    module.reset_parameters()
    for name, value in module.state_dict().items():
        assert value.abs().max() <= 1.0, name
        assert torch.equal(value, before[name]) != (name.endswith("weight") and "norm" not in name)


def test_representation_says_what_the_layer_is() -> None:
    text = repr(layer(order=3, heads=4, key_value_heads=2, head_width=6, value_width=5, rotary=True, memory_width=6,
                      mask=Causal(), score_bound=2.5, alibi=True))  # fmt: skip
    for part in ("width=8", "order=3", "heads=4", "key_value_heads=2", "head_width=6", "value_width=5", "rotary=True",
                 "method=exact", "mask=causal", "memory_width=6", "score_bound=2.5", "alibi=True"):  # fmt: skip
        assert part in text
    assert "activation='relu'" in repr(OrderKTransformerBlock(8, activation="relu"))


def test_the_scale_of_a_rotary_layer_counts_the_head_width() -> None:
    module = OrderKAttention(16, order=2, heads=2, rotary=True, scale="inverse_dim")
    assert module._spec.scale == pytest.approx(rotary_factor(2) / 8)
