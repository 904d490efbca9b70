"""Blocks of the polynomial method side by side in PyTorch: the same numbers, the caller's threads as they were."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
from korder_torch import polynomial  # noqa: E402
from korder_torch.lanes import Lanes  # noqa: E402


@pytest.fixture(autouse=True)
def _two_threads() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let every call use lanes; return how many each of them began."""
    counts: list[int] = []
    start = Lanes.__init__

    def counted(self: Lanes, count: int) -> None:
        counts.append(count)
        start(self, count)

    monkeypatch.setattr(polynomial, "WORTH_LANES", 0)
    monkeypatch.setattr(Lanes, "__init__", counted)
    return counts


def attended(n: int, order: int, limit: str, **spec: Any) -> tuple[Any, list[Any]]:
    """Return a result and its gradients; `limit` tells this test's plans from those that others compiled."""
    torch.manual_seed(1)
    query = 0.5 * torch.randn(1, 2, n, 6, dtype=torch.float64)
    keys = [0.5 * torch.randn(1, 1, n + 7 * t, 6, dtype=torch.float64) for t in range(order)]
    values = [torch.randn(1, 1, n + 7 * t, 5, dtype=torch.float64) for t in range(order)]
    leaves = [x.requires_grad_() for x in (query, *keys, *values)]
    made = korder.AttentionSpec(
        order=order, method=korder.Polynomial(degree=4), policy=korder.Policy(memory_limit=limit), **spec
    )
    result = korder.attend_result(query, keys, values, spec=made)
    return result, list(torch.autograd.grad(result.output.square().sum(), leaves))


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("n", [0, 1, 1500, 2100])
def test_lanes_change_no_more_than_the_order_of_sums(
    begun: list[int], monkeypatch: pytest.MonkeyPatch, n: int, order: int
) -> None:
    result, gradients = attended(n, order, "201MiB")
    assert begun == [2]
    monkeypatch.setattr(polynomial, "WORTH_LANES", 2**70)
    expected, known = attended(n, order, "202MiB")
    assert begun == [2]
    for one, other in zip(gradients, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result.output, expected.output, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result.lse, expected.lse, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(result.certificate.bound, expected.certificate.bound, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("limit", ["800KiB", "1300KiB", "3MiB", "20MiB"])
def test_lanes_keep_to_the_memory_limit(begun: list[int], limit: str) -> None:
    policy = korder.Policy(memory_limit=limit)
    spec = korder.AttentionSpec(order=2, method=korder.Polynomial(degree=4), policy=policy)
    x = torch.zeros(1, 1, 1500, 6)
    (plan, *_) = korder.plan(spec, query=x, keys=(x, x), values=(x, x))
    kernel = polynomial.TorchPolynomialKernel(polynomial.torch, plan)
    assert kernel.workspace_bytes <= policy.memory_limit


def test_lanes_are_for_much_work_under_the_full_mask(begun: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    attended(40, 2, "203MiB", mask=korder.Causal(align="end"))
    monkeypatch.setattr(polynomial, "WORTH_LANES", 2**28)
    attended(40, 2, "204MiB")
    assert begun == []


def test_threads_and_settings_are_left_as_they_were(begun: list[int]) -> None:
    before = threading.active_count()
    attended(1500, 2, "205MiB")
    assert begun == [2]
    assert threading.active_count() == before
    assert torch.get_num_threads() == 2
    assert torch.is_grad_enabled()
    seen: list[int] = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [2]


def test_lanes_work_alone_without_autograd_and_in_order() -> None:
    def look(number: int) -> tuple[int, int, bool]:
        return number, torch.get_num_threads(), torch.is_grad_enabled()

    with Lanes(2) as lanes:
        found = list(lanes.each(partial(look, i) for i in range(9)))
    assert found == [(i, 1, False) for i in range(9)]


def test_an_error_in_a_lane_reaches_the_caller() -> None:
    def fail() -> int:
        raise ValueError("in a lane")

    with Lanes(2) as lanes, pytest.raises(ValueError, match="in a lane"):
        list(lanes.each([lambda: 1, fail, lambda: 3, lambda: 4]))
