"""Rotary positions of order k: the complex definition by loops, shift invariance, and the bounds that theory gives."""

from __future__ import annotations

import cmath
from itertools import product
from math import sqrt
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from korder import ShapeError  # noqa: E402
from korder.torch import embed_rotary  # noqa: E402
from korder.torch.scores import unit_rows  # noqa: E402

LENGTHS = (5, 3, 2, 4)  # queries, then the keys of each mode
ORDERS = [1, 2, 3]


def rows(order: int, width: int = 6, seed: int = 0) -> tuple[Any, list[Any]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(m, width, generator=generator, dtype=torch.float64) for m in LENGTHS[: order + 1]]
    return drawn[0], drawn[1:]


def complex_scores(query: Any, keys: list[Any], *, first: int, offsets: tuple[int, ...], base: float) -> Any:
    """Re sum_l q[l] conj(k1[l]) .. conj(kk[l]) exp(i w_l (k p_i - p_j1 - .. - p_jk)), one number at a time."""
    pairs = query.shape[1] // 2
    scores = np.zeros((query.shape[0], *(key.shape[0] for key in keys)))
    for i, *js in product(*(range(size) for size in scores.shape)):
        total = 0.0
        for pair in range(pairs):
            speed = base ** (-2 * pair / query.shape[1])
            term = complex(query[i, 2 * pair], query[i, 2 * pair + 1])
            turn = len(keys) * (i + first)
            for key, j, offset in zip(keys, js, offsets, strict=True):
                term *= complex(key[j, 2 * pair], key[j, 2 * pair + 1]).conjugate()
                turn -= j + offset
            total += (term * cmath.exp(1j * speed * turn)).real
        scores[(i, *js)] = total
    return scores


def plain_scores(query: Any, keys: Any) -> Any:
    """The real multilinear score of every tuple."""
    scores = query
    for key in keys:
        scores = scores.unsqueeze(-2) * key
    return scores.sum(-1)


@pytest.mark.parametrize("order", ORDERS)
def test_the_embedding_has_the_complex_scores(order: int) -> None:
    query, keys = rows(order)
    offsets = (11, 3, 5)[:order]
    embedded, turned, factor = embed_rotary(query, keys, query_offset=7, key_offsets=offsets, base=100.0)
    assert {x.shape[-1] for x in (embedded, *turned)} == {(order + 1) * 3}
    expected = complex_scores(query.numpy(), [key.numpy() for key in keys], first=7, offsets=offsets, base=100.0)
    np.testing.assert_allclose(factor * plain_scores(embedded, turned).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("order", ORDERS)
def test_a_shift_of_all_positions_changes_nothing(order: int) -> None:
    query, keys = rows(order, seed=1)

    def scores(shift: int, query_shift: int) -> Any:
        offsets = tuple(t + shift for t in range(order))
        embedded, turned, factor = embed_rotary(query, keys, query_offset=2 + query_shift, key_offsets=offsets)
        return factor * plain_scores(embedded, turned)

    torch.testing.assert_close(scores(1000, 1000), scores(0, 0), rtol=0, atol=1e-10)
    assert (scores(1000, 999) - scores(0, 0)).abs().max() > 0.1  # positions do matter


def test_order_1_is_the_ordinary_rotary_score() -> None:
    query, (key,) = rows(1, seed=2)

    def turned(x: Any) -> Any:
        angles = torch.arange(x.shape[0])[:, None] * 10000.0 ** (-torch.arange(0, 6, 2, dtype=torch.float64) / 6)
        even, odd = x[:, 0::2], x[:, 1::2]
        return torch.stack((even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()), -1)

    embedded, (embedded_key,), factor = embed_rotary(query, (key,))
    expected = turned(query).flatten(-2) @ turned(key).flatten(-2).T
    torch.testing.assert_close(factor * embedded @ embedded_key.T, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("order", ORDERS)
def test_entries_grow_by_at_most_sqrt_2(order: int) -> None:
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64)
    query = signs.repeat(40, 1)  # corners of the box, turned by many angles
    embedded, turned, _ = embed_rotary(query, (query,) * order)
    largest = max(float(x.abs().max()) for x in (embedded, *turned))
    assert 1.3 < largest <= sqrt(2) * (1 + 1e-14)


@pytest.mark.parametrize("order", ORDERS)
def test_gradients_of_the_embedding(order: int) -> None:
    query, keys = rows(order, width=4, seed=3)
    operands = [x.requires_grad_() for x in (query, *keys)]

    def function(query: Any, *keys: Any) -> Any:
        embedded, turned, _ = embed_rotary(query, keys, query_offset=3)
        return embedded, *turned

    assert torch.autograd.gradcheck(function, operands)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_rows_stay_narrow_and_far_positions_stay_exact(dtype: str) -> None:
    query, keys = rows(2, seed=4)
    narrow = getattr(torch, dtype)
    given = [x.to(narrow) for x in (query, *keys)]
    embedded, turned, _ = embed_rotary(given[0], given[1:], query_offset=1_000_003, key_offsets=(1_000_000, 999_999))
    wide = [x.double() for x in given]
    expected, others, _ = embed_rotary(wide[0], wide[1:], query_offset=1_000_003, key_offsets=(1_000_000, 999_999))
    for found, right in zip((embedded, *turned), (expected, *others), strict=True):
        assert found.dtype == narrow
        torch.testing.assert_close(found.double(), right, rtol=0, atol=8 * torch.finfo(narrow).eps)


def test_odd_and_unequal_widths_are_refused() -> None:
    for query, key in (((3, 5), (3, 5)), ((3, 4), (3, 6))):
        with pytest.raises(ShapeError, match="even number of columns") as caught:
            embed_rotary(torch.zeros(query), (torch.zeros(key),))
        assert str(key if query[1] == 4 else query) in (caught.value.got or "")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pairs", [False, True])
def test_unit_rows_bound_every_score_by_1_and_reach_it(order: int, pairs: bool) -> None:
    generator = torch.Generator().manual_seed(5)
    operands = [unit_rows(torch.randn(7, 6, generator=generator, dtype=torch.float64) ** 3, order, pairs=pairs)
                for _ in range(order + 1)]  # fmt: skip
    same = unit_rows(torch.rand(5, 6, generator=generator, dtype=torch.float64), order, pairs=pairs)
    if pairs:
        embedded, turned, factor = embed_rotary(operands[0], operands[1:])
        scores = factor * plain_scores(embedded, turned)
        same = same.unflatten(-1, (-1, 2)).norm(dim=-1)  # the moduli, what all angles 0 would give
    else:
        scores = plain_scores(operands[0], operands[1:])
    assert 0.3 < scores.abs().max() <= 1 + 1e-14
    torch.testing.assert_close(same.pow(order + 1).sum(-1), torch.ones(5, dtype=torch.float64), rtol=1e-14, atol=0)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_unit_rows_at_their_edges(order: int, pairs: bool) -> None:
    x = torch.tensor([[0.0] * 4, [1e-30, 0, 0, 2e-30], [1e30, 3e30, 0, 0], [0, 0, 0, 5.0]], requires_grad=True)
    found = unit_rows(x, order, pairs=pairs)
    assert torch.isfinite(found).all()
    assert not found[0].any()
    moduli = found.unflatten(-1, (-1, 2)).norm(dim=-1) if pairs else found.abs()
    torch.testing.assert_close(moduli.pow(order + 1).sum(-1)[1:], torch.ones(3))
    found.sum().backward()
    assert torch.isfinite(x.grad[[0, 3]]).all()
    rows = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(6), requires_grad=True)
    assert torch.autograd.gradcheck(lambda rows: unit_rows(rows, order, pairs=pairs), (rows,))


def test_a_rotary_bounded_layer_by_complex_numbers() -> None:
    """The whole layer, order 2, one head: rows over their norm of exponent 3, complex scores, sharpness, softmax."""
    from korder.torch import OrderKAttention

    torch.manual_seed(7)
    layer = OrderKAttention(6, order=2, rotary=True, score_bound=4.0, learn_sharpness=True, dtype=torch.float64)
    with torch.no_grad():
        layer.sharpness.fill_(0.3)
        x = torch.randn(1, 4, 6, dtype=torch.float64)
        found = layer(x)[0]
        query, *keys = (project(x)[0].numpy() for project in (layer.query_projection, *layer.key_projections))
        first, second = (project(x)[0].numpy() for project in layer.value_projections)
    unit = [
        row / (np.hypot(row[:, 0::2], row[:, 1::2]) ** 3).sum(1, keepdims=True) ** (1 / 3) for row in (query, *keys)
    ]
    scores = complex_scores(unit[0], unit[1:], first=0, offsets=(0, 0), base=10000.0) * 4.0 / (1 + np.exp(-0.3))
    weights = np.exp(scores)
    weights /= weights.sum(axis=(1, 2), keepdims=True)
    attended = torch.from_numpy(np.einsum("iab,ac,bc->ic", weights, first, second))
    torch.testing.assert_close(found, layer.output_projection(attended).detach(), rtol=1e-12, atol=1e-13)
