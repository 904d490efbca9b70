"""The custom op under what PyTorch users expect to work: opcheck, torch.func, torch.compile, export, autocast."""

from __future__ import annotations

import traceback
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import korder  # noqa: E402
import korder.torch as door  # noqa: E402
from korder import AttentionSpec, Causal, Polynomial, Window  # noqa: E402
from korder.torch.calls import pack  # noqa: E402
from korder.torch.ops import attend_op, backward_op  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SPECS = {
    "exact": AttentionSpec(order=2),
    "causal": AttentionSpec(order=2, mask=Causal(align="end")),
    "window": AttentionSpec(order=2, mask=Window(sizes=(2, 3), align="end")),
    "polynomial": AttentionSpec(order=2, method=Polynomial(degree=2)),
    "causal polynomial": AttentionSpec(order=2, mask=Causal(align="end"), method=Polynomial(degree=2)),
}
PLACES = (0, 1, 2, 3, 4)
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def operands(*lead: int, dtype: Any = torch.float64, seed: int = 0) -> tuple[Any, ...]:
    """Query, two keys, two values; every length is another."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((5, 3), (4, 3), (7, 3), (4, 2), (7, 2))
    return tuple(torch.randn(*lead, *shape, dtype=dtype, generator=generator) for shape in shapes)


def function(spec: AttentionSpec) -> Any:
    return lambda q, k1, k2, v1, v2: door.attend(q, (k1, k2), (v1, v2), spec=spec)


def loss(spec: AttentionSpec) -> Any:
    attend = function(spec)
    return lambda *given: attend(*given).sin().sum()


def gradients(spec: AttentionSpec, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """By plain autograd, which test_torch checks against differences."""
    leaves = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(loss(spec)(*leaves), leaves)


@each_spec
def test_opcheck(spec: AttentionSpec) -> None:
    given = [x.requires_grad_() for x in operands()]
    packed = pack(given[0], given[1:3], given[3:], spec, None, None, None, None, None, None, "torch")
    torch.library.opcheck(attend_op, (packed.tensors, packed.text, packed.offsets, True))
    outputs = [x.detach() for x in attend_op(packed.tensors, packed.text, packed.offsets, True)]
    grads = (torch.randn_like(outputs[0]), torch.randn_like(outputs[1]))
    plain = [x.detach() for x in given]
    torch.library.opcheck(backward_op, (plain, outputs, *grads, packed.text, packed.offsets, [True] * 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("order", [1, 3])
def test_opcheck_of_other_orders_and_dtypes(order: int, dtype: str) -> None:
    x = [torch.randn(1, 2, n, 4, dtype=getattr(torch, dtype)) for n in (5, 3, 2, 4)][: order + 1]
    packed = pack(x[0], x[1:], x[1:], None, None, None, None, None, None, None, "torch")
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attend_op, (packed.tensors, packed.text, packed.offsets, True), test_utils=tests)


@each_spec
def test_grad_of_torch_func(spec: AttentionSpec) -> None:
    found = torch.func.grad(loss(spec), argnums=PLACES)(*operands())
    torch.testing.assert_close(found, gradients(spec, operands()), rtol=1e-12, atol=1e-13)


@each_spec
def test_vmap_is_a_loop(spec: AttentionSpec) -> None:
    many, one = operands(6), operands(seed=1)
    mixed = (many[0], one[1], many[2].movedim(0, 1), one[3], many[4])
    found = torch.vmap(function(spec), (0, None, 1, None, 0))(*mixed)
    expected = [function(spec)(many[0][i], one[1], many[2][i], one[3], many[4][i]) for i in range(6)]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-13)


@each_spec
def test_vmap_and_grad_nest_either_way(spec: AttentionSpec) -> None:
    many = operands(3)
    expected = [gradients(spec, tuple(x[i] for x in many)) for i in range(3)]
    per_sample = torch.vmap(torch.func.grad(loss(spec), argnums=PLACES))(*many)
    of_all = torch.func.grad(lambda *x: torch.vmap(function(spec))(*x).sin().sum(), argnums=PLACES)(*many)
    for place in PLACES:
        stacked = torch.stack([sample[place] for sample in expected])
        torch.testing.assert_close(per_sample[place], stacked, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(of_all[place], stacked, rtol=1e-12, atol=1e-13)


def test_vmap_with_heads_masks_and_biases() -> None:
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(5, 2, 4, n, 3, generator=generator, dtype=torch.float64) for n in (6, 7, 7))
    k, v = k[:, :, :2], v[:, :, :2]
    masks, bias = torch.rand(5, 2, 7, generator=generator) > 0.3, torch.randn(5, 1, 4, 1, 7, dtype=torch.float64)

    def attend(q: Any, k: Any, v: Any, mask: Any, bias: Any) -> Any:
        return door.attend(q, (k,), (v,), key_masks=(mask,), biases=(bias,))

    given = (q, k, v, masks, bias)
    expected = torch.stack([attend(*(x[i] for x in given)) for i in range(5)])
    torch.testing.assert_close(torch.vmap(attend)(*given), expected, rtol=1e-12, atol=1e-13)

    def of_bias(q: Any, k: Any, v: Any, mask: Any, bias: Any) -> Any:
        return torch.func.grad(lambda b: attend(q, k, v, mask, b).sin().sum())(bias)

    expected = torch.stack([of_bias(*(x[i] for x in given)) for i in range(5)])
    torch.testing.assert_close(torch.vmap(of_bias)(*given), expected, rtol=1e-12, atol=1e-13)


def test_vmap_over_a_weight() -> None:
    q, k1, k2, v1, v2 = operands()
    weights = torch.randn(3, 3, 3, 3, dtype=torch.float64)
    spec = AttentionSpec(order=2, score="kronecker")
    found = torch.vmap(lambda w: door.attend(q, (k1, k2), (v1, v2), weight=w, spec=spec))(weights)
    expected = [door.attend(q, (k1, k2), (v1, v2), weight=w, spec=spec) for w in weights]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-13)
    grad = torch.func.grad(lambda w: door.attend(q, (k1, k2), (v1, v2), weight=w, spec=spec).sin().sum())
    torch.testing.assert_close(torch.vmap(grad)(weights), torch.stack([grad(w) for w in weights]))


@each_spec
def test_tangents_are_those_of_the_gradient(spec: AttentionSpec) -> None:
    given, tangents = operands(), operands(seed=2)
    _, tangent = torch.func.jvp(loss(spec), given, tangents)
    expected = sum((x * t).sum() for x, t in zip(gradients(spec, given), tangents, strict=True))
    assert abs(tangent) > 1e-3
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["exact", "causal"])
def test_hessians_agree_with_differences(name: str) -> None:
    given = operands()
    of_query = lambda q: loss(SPECS[name])(q, *given[1:])  # noqa: E731
    gradient, step = torch.func.grad(of_query), 1e-5
    differences = torch.zeros(5, 3, 5, 3, dtype=torch.float64)
    for place in torch.cartesian_prod(torch.arange(5), torch.arange(3)):
        move = torch.zeros(5, 3, dtype=torch.float64)
        move[tuple(place)] = step
        differences[tuple(place)] = (gradient(given[0] + move) - gradient(given[0] - move)) / (2 * step)
    for hessian in (torch.func.hessian(of_query), torch.func.jacrev(gradient)):
        torch.testing.assert_close(hessian(given[0]), differences, rtol=1e-6, atol=1e-8)


@each_spec
def test_compiled_without_a_graph_break(spec: AttentionSpec) -> None:
    def attend(q: Any, k1: Any, k2: Any, v1: Any, v2: Any) -> Any:
        result = door.attend_result(q, (k1, k2), (v1, v2), spec=spec)
        return result.output.sin().sum() + result.lse.clamp(-50.0).sum() + korder.attend(q, (k1, k2), (v1, v2)).sum()

    given = [x.requires_grad_() for x in operands()]
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected, found = attend(*given), compiled(*given)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    pairs = zip(torch.autograd.grad(found, given), torch.autograd.grad(expected, given), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_compiled_with_biases_masks_offsets_and_other_shapes() -> None:
    def attend(q: Any, k1: Any, k2: Any, v1: Any, v2: Any) -> Any:
        options = {"biases": (None, q @ k2.mT), "key_masks": (k1[:, 0] > 0, None), "query_offset": 3}
        return door.attend(q * 2, (k1, k2), (v1, v2), spec=SPECS_OFFSETS, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for extra in (0, 1, 4):
        given = list(operands())
        given[0] = torch.randn(5 + extra, 3, dtype=torch.float64)
        torch.testing.assert_close(compiled(*given), attend(*given), rtol=1e-12, atol=1e-13)


SPECS_OFFSETS = AttentionSpec(order=2, mask=Causal())


def test_exported() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Any, k1: Any, k2: Any, v1: Any, v2: Any) -> Any:
            return door.attend(q, (k1, k2), (v1, v2), spec=SPECS["causal"])

    given = operands()
    exported = torch.export.export(Layer(), given)
    assert any("korder.attend" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(*given), Layer()(*given), rtol=1e-12, atol=1e-13)


def test_what_depends_on_numbers_is_refused_while_tracing() -> None:
    spec = AttentionSpec(order=2, method=Polynomial(tolerance=1e-2))
    q, k1, k2, v1, v2 = (0.1 * x for x in operands())
    attend = lambda q: door.attend(q, (k1, k2), (v1, v2), spec=spec)  # noqa: E731
    with pytest.raises(korder.UnsupportedProblemError, match="statistics="):
        torch.vmap(attend)(q[None])
    with pytest.raises(torch._dynamo.exc.Unsupported) as raised:
        torch.compile(attend, fullgraph=True, backend="aot_eager")(q)
    assert "statistics=" in "".join(traceback.format_exception(raised.value))
    broken = torch.compile(attend, backend="aot_eager")(q)  # with a graph break it runs eagerly
    torch.testing.assert_close(broken, attend(q), rtol=1e-12, atol=1e-13)
    statistics = korder.measure(q, (k1, k2), (v1, v2), spec=spec)
    known = lambda q: door.attend(q, (k1, k2), (v1, v2), spec=spec, statistics=statistics)  # noqa: E731
    torch.testing.assert_close(torch.vmap(known)(q[None])[0], attend(q), rtol=1e-12, atol=1e-13)


def test_outside_a_broken_graph_numbers_decide_as_they_do_without_a_compiler() -> None:
    """A tolerance that takes more than the lowest degree, and pruning."""
    q, k1, k2, v1, v2 = operands()
    for method in (Polynomial(tolerance=1e-5), Polynomial(degree=4, prune=1e-2)):
        spec = AttentionSpec(order=2, scale=0.2, method=method)
        attend = lambda q, spec=spec: door.attend(q, (k1, k2), (v1, v2), spec=spec)  # noqa: E731
        torch._dynamo.reset()
        broken = torch.compile(attend, backend="aot_eager")(q)
        torch.testing.assert_close(broken, attend(q), rtol=1e-12, atol=1e-13)


def test_a_compiler_reports_what_is_wrong() -> None:
    compiled = torch.compile(lambda q, k: door.attend(q, (k,), (k,)), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="must have the same width"):
        compiled(torch.ones(4, 3), torch.ones(5, 2))


def test_tangents_never_vanish_in_the_op() -> None:
    q, k1, _, v1, _ = operands()
    packed = pack(q, (k1,), (v1,), None, None, None, None, None, None, None, "auto")
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(korder.UnsupportedProblemError, match="forward-mode"):
            attend_op([dual, k1, v1], packed.text, packed.offsets, False)
    inside = torch.compile(lambda q: torch.func.jvp(function(SPECS["exact"]), (q, *operands()[1:]), operands()))
    tangent = inside(q)[1]  # outside a full graph it falls back to eager, where tangents are kept
    torch.testing.assert_close(tangent, torch.func.jvp(function(SPECS["exact"]), operands(), operands())[1])


def test_autocast_lowers_as_torchs_own_attention_does() -> None:
    q, k, v = (torch.randn(1, 2, n, 4, requires_grad=True) for n in (5, 7, 7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = door.attend(q, (k,), (v,)), torch.nn.functional.scaled_dot_product_attention(q, k, v)
        mixed = door.attend(q.bfloat16(), (k,), (v,))
    assert ours.dtype == theirs.dtype == mixed.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    ours.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


def test_threads_change_rounding_only() -> None:
    q, k1, k2, v1, v2 = (torch.randn(n, 16) for n in (61, 53, 47, 53, 47))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = door.attend(q, (k1, k2), (v1, v2))
        torch.set_num_threads(2)
        two = door.attend(q, (k1, k2), (v1, v2))
        assert torch.equal(two, door.attend(q, (k1, k2), (v1, v2)))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"order": 2, "heads": 2, "rotary": True, "score_bound": 3.0},
        {"order": 2, "heads": 4, "key_value_heads": 2, "alibi": True, "mask": Causal()},
        {"order": 2, "heads": 2, "method": Polynomial(degree=2), "mask": Causal()},
    ],
    ids=["rotary", "alibi", "polynomial"],
)
def test_blocks_compile_export_and_give_gradients_per_sample(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    block = door.OrderKTransformerBlock(8, **options).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    eager = block(x)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager, rtol=1e-12, atol=1e-13)
    parameters = dict(block.named_parameters())
    of_compiled = torch.autograd.grad(compiled.sin().sum(), parameters.values())
    of_eager = torch.autograd.grad(eager.sin().sum(), parameters.values())
    for a, b in zip(of_compiled, of_eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), eager, rtol=1e-12, atol=1e-13)

    def loss_of_one(parameters: Any, one: Any) -> Any:
        return torch.func.functional_call(block, parameters, (one[None],)).sin().sum()

    per_sample = torch.vmap(torch.func.grad(loss_of_one), (None, 0))(parameters, x)
    for name, gradient in zip(parameters, of_eager, strict=True):
        torch.testing.assert_close(per_sample[name].sum(0), gradient, rtol=1e-10, atol=1e-11)
