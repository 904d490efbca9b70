"""The PyTorch kernels' own ways: tiles that are skipped, references that are raised, products that fall back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
from korder import AttentionSpec, Causal, Polynomial, Window  # noqa: E402
from korder.conformance.limits import GRADIENT  # noqa: E402
from korder.dispatch.registry import default_registry  # noqa: E402
from korder.spi import Backend, Capabilities  # noqa: E402
from korder_torch import exact, fused, products  # noqa: E402
from tests.limits import RATIO, assert_within_ratio  # noqa: E402


def on_processor(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let PyTorch say that it runs on another processor, and forget the kernels that were compiled before."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: name)
    monkeypatch.setattr(default_registry(), "prepared", type(default_registry().prepared)(8))


def tensors(n: int, *, width: int = 8, seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator) for _ in range(5)]


def scores_computed(monkeypatch: pytest.MonkeyPatch, n: int, mask: Any) -> tuple[int, int]:
    """Scores that the tiles of one call held, and how many tiles there were."""
    found: list[int] = []
    plain = exact.TorchTileArithmetic.absorb

    def counted(self: Any, state: Any, folded: Any, contracted: Any, mask: Any) -> Any:
        found.append(folded.query.shape[:-1].numel() * contracted.keys.shape[-2])
        return plain(self, state, folded, contracted, mask)

    def counted_fused(query: Any, keys: Any, values: Any, **options: Any) -> Any:
        found.append(query.shape[:-1].numel() * keys.shape[-2])
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, keys, values, **options)

    q, *rest = tensors(n)
    with monkeypatch.context() as patched:
        patched.setattr(exact.TorchTileArithmetic, "absorb", counted)
        patched.setattr(fused, "_ops", lambda: fused.FusedOps(counted_fused, None))
        korder.attend(q, rest[:2], rest[2:], spec=AttentionSpec(order=2, mask=mask))
    return sum(found), len(found)


@pytest.mark.parametrize(("processor", "n", "most"), [("AVX2", 384, 1.4), ("AVX512", 192, 1.2)])
def test_a_causal_mask_skips_the_tiles_above_the_diagonal(
    processor: str, n: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_processor(monkeypatch, processor)
    computed, count = scores_computed(monkeypatch, n, Causal())
    live = sum(i * i for i in range(1, n + 1))
    assert count > 1
    assert live <= computed <= most * live  # a tile is computed whole for the queries that it is cut for
    assert scores_computed(monkeypatch, n, korder.Full())[0] == n**3


def test_a_window_computes_tiles_in_proportion_to_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Window(sizes=(16, 16))
    sizes = (256, 512, 1024)
    computed = [scores_computed(monkeypatch, n, mask)[0] for n in sizes]
    assert computed[1] / computed[0] == pytest.approx(2.0, rel=0.05)
    assert computed[2] / computed[1] == pytest.approx(2.0, rel=0.05)
    assert computed[2] <= 6 * sizes[2] * 16 * 16  # blocks of queries see a little more than their windows


@pytest.mark.parametrize("shift", [-60.0, -30.0, 0.0, 30.0, 60.0, 300.0])
@pytest.mark.parametrize("tile", [2**7, 2**21])
def test_scores_of_any_size(shift: float, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant that every score is moved by changes lse by itself, and nothing else."""
    monkeypatch.setattr(exact, "TILE_SCORES", tile)
    monkeypatch.setattr(default_registry(), "prepared", type(default_registry().prepared)(8))
    q, k1, k2, v1, v2 = tensors(19)
    bias = torch.full((1, 1, 1, 19), shift)
    given = [x[None, None] for x in (q, k1, k2, v1, v2)]
    arguments = (given[0], tuple(given[1:3]), tuple(given[3:]))
    moved = korder.attend_result(*arguments, biases=(bias, None))
    plain = korder.attend_result(*_double(arguments))
    rounded = 2.0**-23 * abs(shift)  # what adding the bias to a score costs in float32
    torch.testing.assert_close(moved.output, plain.output.float(), rtol=2e-5, atol=2e-6 + rounded)
    torch.testing.assert_close(moved.lse, (plain.lse + shift).float(), rtol=1e-6, atol=1e-5)


def _double(arguments: Any) -> Any:
    return tuple(x.double() if torch.is_tensor(x) else _double(x) for x in arguments)


def test_values_that_overflow_only_without_a_reference() -> None:
    q, k1, k2, v1, v2 = tensors(23)
    bias = torch.full((1, 1, 1, 23), 25.0)
    large = [x[None, None] for x in (q, k1, k2, v1 * 1e18, v2 * 1e18)]
    found = korder.attend(large[0], large[1:3], large[3:], biases=(bias, None))
    expected = korder.attend(q.double(), (k1.double(), k2.double()), (v1.double() * 1e18, v2.double() * 1e18))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0, 0].double(), expected, rtol=1e-4, atol=1e30)


@pytest.mark.parametrize("shapes", [((7, 5), (5, 3)), ((1, 1), (1, 1)), ((64, 48), (48, 33)), ((0, 4), (4, 2))])
def test_products_of_any_strides(shapes: Any) -> None:
    (p, q), (_, s) = shapes
    left, right = torch.randn(p, q), torch.randn(q, s)
    layouts = (
        lambda x: x,
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],  # gaps between the rows
        lambda x: torch.cat([x.mT, x.mT], dim=1)[:, : x.shape[0]].mT,  # gaps between the columns
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    )
    for of_left in layouts:
        for of_right in layouts:
            found = products.product(of_left(left), of_right(right))
            torch.testing.assert_close(found, left @ right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("processor", ["AVX2", "AVX512"])
@pytest.mark.parametrize("sharpness", [1.0, 60.0])
@pytest.mark.parametrize("mask", [korder.Full(), Causal(), Window(sizes=(11, 23))], ids=lambda mask: mask.kind)
def test_small_tiles_join(mask: Any, sharpness: float, processor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the fused kernel and of our own products, whole ones and ones that are cut by the mask."""
    on_processor(monkeypatch, processor)
    monkeypatch.setattr(exact, "TILE_SCORES", 2**9)
    for name in ("FORWARD_KEYS", "BACKWARD_KEYS", "CAUSAL_KEYS"):
        monkeypatch.setattr(fused, name, 2**7)
    joined: list[int] = []
    backward = fused.FusedAttention.backward
    monkeypatch.setattr(
        fused.FusedAttention, "backward", lambda self, *rest: (joined.append(1), backward(self, *rest))[1]
    )
    generator = torch.Generator().manual_seed(5)
    n, m = (29, 31) if mask.kind == "full" else (31, 31)
    given = [torch.randn(2, h, rows, 6, generator=generator) for h, rows in ((4, n), (2, m), (2, 31), (2, m), (2, 31))]
    given[0] *= sharpness
    spec = AttentionSpec(order=2, mask=mask)
    cotangent = torch.randn(given[0].shape, generator=generator)

    def both(tensors: list[Any]) -> list[Any]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        output = korder.attend(leaves[0], leaves[1:3], leaves[3:], spec=spec)
        gradients = torch.autograd.grad((output * cotangent.to(output.dtype)).sum(), leaves)
        return [x.detach().double().numpy() for x in (output, *gradients)]

    found, expected = both(given), both([x.double() for x in given])
    truth, plain = (dense([x.to(t) for x in given], mask, cotangent) for t in (torch.float64, torch.float32))
    assert bool(joined) == (processor == "AVX2" and mask.kind != "window")
    # weights are computed again from lse, so gradients carry its rounding: the least factor of the conformance kit
    factors = [1.0, *[GRADIENT] * 5]
    for got, wide, narrow, exactly, factor in zip(found, expected, plain, truth, factors, strict=True):
        np.testing.assert_allclose(wide, exactly, rtol=1e-9, atol=1e-11 * sharpness)
        assert_within_ratio(got.astype("float32"), narrow, exactly, dtype="float32", ratio=RATIO * factor)


def dense(tensors: list[Any], mask: Any, cotangent: Any) -> list[Any]:
    """Output and gradients of order 2 by definition in the dtype of the tensors, two query heads to a key head."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    output = dense_output(leaves, mask)
    gradients = torch.autograd.grad((output * cotangent.to(output.dtype)).sum(), leaves)
    return [x.detach().numpy() for x in (output, *gradients)]


def dense_output(tensors: list[Any], mask: Any) -> Any:
    q, k1, k2, v1, v2 = (x if x.shape[1] == 4 else x.repeat_interleave(2, dim=1) for x in tensors)
    scores = torch.einsum("bhid,bhjd,bhkd->bhijk", q * q.shape[-1] ** -0.5, k1, k2)
    i, j, k = (torch.arange(size) for size in scores.shape[2:])
    sizes = getattr(mask, "sizes", (1000, 1000))
    for x, size in ((j[None, :, None], sizes[0]), (k[None, None, :], sizes[1])):
        if mask.kind != "full":
            rows = i[:, None, None]
            scores = scores.masked_fill(~((x <= rows) & (x > rows - size)), -torch.inf)
    weights = torch.softmax(scores.flatten(3), dim=-1).view_as(scores)
    return torch.einsum("bhijk,bhje,bhke->bhie", weights, v1, v2)


@pytest.mark.parametrize("method", [korder.Exact(), Polynomial(degree=2)], ids=lambda method: method.kind)
def test_without_onednn_the_answer_is_the_same(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k1, k2, v1, v2 = (x.requires_grad_() for x in tensors(37))
    spec = AttentionSpec(order=2, method=method)

    def both() -> list[Any]:
        output = korder.attend(q, (k1, k2), (v1, v2), spec=spec)
        return [output, *torch.autograd.grad(output.sin().sum(), (q, k1, k2, v1, v2))]

    fast = both()
    monkeypatch.setattr(products, "_linear", lambda x: None)
    for a, b in zip(fast, both(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_bfloat16_loses_no_more_than_its_own_rounding() -> None:
    given = [x.bfloat16() for x in tensors(67, width=32)]
    found = korder.attend(given[0], given[1:3], given[3:])
    wide = [x.double() for x in given]
    exact_output = korder.attend(wide[0], wide[1:3], wide[3:])
    assert found.dtype == torch.bfloat16
    scores = torch.einsum("id,jd,kd->ijk", *given[:3]) * torch.tensor(32**-0.5, dtype=torch.bfloat16)
    weights = torch.softmax(scores.flatten(1), dim=1).view_as(scores)
    plain = torch.einsum("ijk,je,ke->ie", weights, *given[3:])
    assert (found.double() - exact_output).norm() < 1e-2 * exact_output.norm()
    assert (found.double() - exact_output).abs().max() <= 4 * (plain.double() - exact_output).abs().max()


class TestBadInput:
    """Each error names the tensor."""

    def test_mixed_dtypes(self) -> None:
        q, k1, k2, v1, v2 = tensors(5)
        with pytest.raises(korder.OperandError, match=r"values\[1\] has another dtype"):
            korder.attend(q, (k1, k2), (v1, v2.double()))

    def test_mixed_devices(self) -> None:
        q, k1, k2, v1, v2 = tensors(5)
        with pytest.raises(korder.OperandError, match=r"keys\[1\] has another device"):
            korder.attend(q, (k1, k2.to("meta")), (v1, v2))

    def test_wrong_head_grouping(self) -> None:
        q, k = torch.ones(1, 6, 3, 2), torch.ones(1, 4, 3, 2)
        with pytest.raises(korder.ShapeError, match="head"):
            korder.attend(q, (k,), (k,))

    def test_a_backend_without_a_backward(self, monkeypatch: pytest.MonkeyPatch) -> None:
        backend = default_registry().get("torch")
        claims = backend.capabilities()
        methods = tuple(replace(method, backward=False) for method in claims.methods)
        without: Capabilities = replace(claims, methods=methods)
        monkeypatch.setattr(type(backend), "capabilities", lambda self: without)
        q, k1, k2, v1, v2 = tensors(5, width=3)
        korder.attend(q, (k1, k2), (v1, v2), backend="torch")
        with pytest.raises(korder.UnsupportedProblemError, match="backward"):
            korder.attend(q.requires_grad_(), (k1, k2), (v1, v2), backend="torch")

    def test_a_kernel_that_does_not_say_what_it_saves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Silent:
            def __init__(self, kernel: Any) -> None:
                self.forward, self.backward = kernel.forward, kernel.backward

        backend: Backend = default_registry().get("torch")
        compile_plan = type(backend).compile
        monkeypatch.setattr(type(backend), "compile", lambda self, plan: Silent(compile_plan(self, plan)))
        monkeypatch.setattr(default_registry(), "prepared", type(default_registry().prepared)(8))
        q, k1, k2, v1, v2 = tensors(5, width=3)
        korder.attend(q, (k1, k2), (v1, v2))
        with pytest.raises(korder.KernelError, match="does not say what its kernel saves"):
            korder.attend(q.requires_grad_(), (k1, k2), (v1, v2))

    def test_an_array_among_tensors(self) -> None:
        q, k1, k2, v1, v2 = tensors(5)
        with pytest.raises(korder.OperandError, match=r"values\[0\] has another array kind"):
            korder.attend(q, (k1, k2), (v1.numpy(), v2))

    def test_modes_that_are_no_tuple(self) -> None:
        q, k1, _, v1, _ = tensors(5)
        with pytest.raises(korder.OperandError, match="keys must be a tuple"):
            korder.attend(q, k1, (v1,))

    def test_one_value_too_few(self) -> None:
        q, k1, k2, v1, _ = tensors(5)
        with pytest.raises(korder.KorderError, match="values"):
            korder.attend(q, (k1, k2), (v1,))


def test_float16_rounds_once() -> None:
    given = [x.half() for x in tensors(11)]
    found = korder.attend(given[0], given[1:3], given[3:])
    exact_output = korder.attend(given[0].double(), [x.double() for x in given[1:3]], [x.double() for x in given[3:]])
    assert_within_ratio(
        found.numpy(), exact_output.half().numpy(), np.asarray(exact_output), dtype="float16", ratio=2.0
    )
