"""The closed-form gradient through the PyTorch door: first and second derivatives, transforms, what is refused."""

from __future__ import annotations

from math import factorial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
from korder import AttentionSpec, Polynomial  # noqa: E402
from korder.errors import UnsupportedProblemError  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DEGREE, SCALE = 2, 0.3
NAMES = ("query", "keys[0]", "keys[1]", "values[0]", "values[1]", "weight[0]", "weight[1]", "weight[2]")
SHAPES = ((5, 3), (4, 2), (7, 3), (4, 2), (7, 2), (3, 4), (2, 4), (3, 4))


def spec(gradient: str = "closed_form") -> AttentionSpec:
    method = Polynomial(degree=DEGREE, gradient=gradient)  # type: ignore[arg-type]
    return AttentionSpec(order=2, scale=SCALE, score="kronecker", method=method)


def operands(*lead: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(5)
    return tuple(
        torch.randn(*(lead if place < 5 else ()), *shape, dtype=torch.float64, generator=generator, requires_grad=True)
        for place, shape in enumerate(SHAPES)
    )


MASK = torch.tensor([True, False, True, True])


def attention(*given: Any, gradient: str = "closed_form") -> tuple[Any, Any]:
    query, k1, k2, v1, v2, *weight = given
    result = korder.attend_result(
        query, (k1, k2), (v1, v2), spec=spec(gradient), weight=tuple(weight), key_masks=(MASK, None)
    )
    return result.output, result.lse


def explicit(of_output: Any, of_lse: Any, *given: Any, closed: bool = True) -> tuple[Any, ...]:
    """The gradients by their formula over explicit tuples; differentiable in everything but the rows' centres."""
    query, k1, k2, v1, v2, w0, w1, w2 = given
    factors = (query @ w0, k1 @ w1, k2 @ w2)
    scores = SCALE * torch.einsum("il,jl,kl->ijk", *factors)
    centred = scores - scores.detach()[:, MASK].mean(dim=(1, 2), keepdim=True)
    live = MASK.double()[None, :, None]
    weights = live * sum(centred**m / factorial(m) for m in range(DEGREE + 1))
    total = weights.sum(dim=(1, 2), keepdim=True)
    shares = weights / total
    slopes = shares if closed else live * sum(centred**m / factorial(m) for m in range(DEGREE)) / total
    products = torch.einsum("je,ke->jke", v1, v2)
    output = torch.einsum("ijk,jke->ie", shares, products)
    inner = torch.einsum("ie,jke->ijk", of_output, products) - (of_output * output).sum(-1)[:, None, None]
    of_scores = SCALE * slopes * (inner + of_lse[:, None, None])
    query_side = torch.einsum("ijk,jl,kl->il", of_scores, factors[1], factors[2])
    first_side = torch.einsum("ijk,il,kl->jl", of_scores, factors[0], factors[2])
    second_side = torch.einsum("ijk,il,jl->kl", of_scores, factors[0], factors[1])
    return (
        query_side @ w0.T,
        first_side @ w1.T,
        second_side @ w2.T,
        torch.einsum("ijk,ie,ke->je", shares, of_output, v2),
        torch.einsum("ijk,ie,je->ke", shares, of_output, v1),
        query.T @ query_side,
        k1.T @ first_side,
        k2.T @ second_side,
    )


def upstream() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(6)
    return tuple(torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((5, 2), (5,)))


def agree(found: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    for name, a, b in zip((*NAMES, "output's gradient", "lse's gradient"), found, wanted, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gradient", ["closed_form", "consistent"])
def test_first_derivatives(gradient: str) -> None:
    given = operands()
    found = torch.autograd.grad(attention(*given, gradient=gradient), given, upstream())
    agree(found, explicit(*upstream(), *given, closed=gradient == "closed_form"))
    other = explicit(*upstream(), *given, closed=gradient != "closed_form")
    assert all((found[place] - other[place]).abs().max() > 1e-3 for place in (0, 1, 2, 5, 6, 7))


def test_second_derivatives_are_those_of_the_first() -> None:
    given, of_rows = operands(), [x.requires_grad_() for x in upstream()]
    generator = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in SHAPES]
    wanted = torch.autograd.grad(explicit(*of_rows, *given), (*given, *of_rows), cotangents)
    first = torch.autograd.grad(attention(*given), given, of_rows, create_graph=True)
    agree(torch.autograd.grad(first, (*given, *of_rows), cotangents), wanted)


def test_second_derivatives_of_some_operands_through_the_output_alone() -> None:
    given, (of_output, of_lse) = operands(), upstream()
    first = torch.autograd.grad(attention(*given)[0], given[1:4:2], of_output, create_graph=True)
    wanted = explicit(of_output, 0 * of_lse, *given)[1:4:2]
    agree(first, wanted)
    parts = [torch.autograd.grad(sum((x**2).sum() for x in each), given) for each in (first, wanted)]
    agree(*parts)


@pytest.mark.parametrize("gradient", ["closed_form", "consistent"])
def test_transforms(gradient: str) -> None:
    of_output, _ = upstream()

    def gradients(*given: Any) -> tuple[Any, ...]:
        pull = torch.func.vjp(lambda *x: attention(*x, gradient=gradient)[0], *given)[1]
        return pull(of_output)  # type: ignore[no-any-return]

    many, shared = operands(3)[:5], operands(3)[5:]
    found = torch.func.vmap(gradients, in_dims=(0,) * 5 + (None,) * 3)(*many, *shared)
    for place in range(3):
        given = (*(x[place] for x in many), *shared)
        wanted = explicit(of_output, torch.zeros(5).double(), *given, closed=gradient == "closed_form")
        agree(tuple(x[place] for x in found), wanted)


def test_forward_mode_is_refused() -> None:
    given = operands()
    with pytest.raises(UnsupportedProblemError, match="no forward-mode derivative"):
        torch.func.jvp(attention, given, given)
    _, tangents = torch.func.jvp(lambda *x: attention(*x, gradient="consistent"), given, given)
    assert tangents[0].abs().max() > 0.01
