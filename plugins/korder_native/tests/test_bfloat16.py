"""The exact method on bfloat16: lse as right as in float32, the output to its own rounding and that of weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ALL_ISAS, EXACT, RATIO, Case, assert_near, every_gradient, random_case, upstream
from test_forward import MASKS, case_by_chance, mask_of

import korder
from korder.conformance.limits import as_dtype
from korder.spi import NEEDS, KernelOutput, Operands, OutputGradients
from korder_native import exact
from korder_native.exact import NativeExactKernel

torch = pytest.importorskip("torch")

HALF_UNIT = 2.0**-9
"""Relative rounding of a number to bfloat16."""


def halved(case: Case) -> Case:
    """The same problem with numbers that bfloat16 has; plain evaluations are in float32."""
    rounded = lambda x: None if x is None else as_dtype(x, "bfloat16")  # noqa: E731
    keys, values, biases = (tuple(map(rounded, xs)) for xs in (case.keys, case.values, case.biases))
    return replace(case, query=rounded(case.query), keys=keys, values=values, biases=biases, dtype="float32")


def kernel_of(case: Case, isa: str, **policy: Any) -> NativeExactKernel:
    spec = case.spec.model_copy(update={"policy": case.spec.policy.model_copy(update=policy)})
    return NativeExactKernel(replace(case, spec=spec).plan_in("bfloat16"), isa)


def tensors(case: Case) -> Operands:
    def made(x: Any) -> Any:
        if x is None:
            return None
        return torch.from_numpy(x) if x.dtype == bool else torch.from_numpy(x).to(torch.bfloat16)

    several = (tuple(map(made, xs)) for xs in (case.keys, case.values, case.key_masks, case.biases))
    return Operands(made(case.query), *several, None, case.query_offset, case.key_offsets)


def assert_outputs(case: Case, found: KernelOutput) -> None:
    assert found.output.dtype == torch.bfloat16
    assert found.lse.dtype == torch.float32
    (output, lse), (plain, plain_lse) = case.evaluate(), case.evaluate("float32")
    assert_near(found.lse.numpy(), lse, plain_lse, "float32")
    sizes, _ = replace(case, values=tuple(map(np.abs, case.values))).evaluate()
    largest = float(np.max(np.abs(output), initial=0.0))
    allowed = HALF_UNIT * (largest + float(np.max(sizes, initial=0.0)))  # of the output, and of weights
    allowed += RATIO * float(np.max(np.abs(plain.astype(EXACT) - output), initial=0.0))
    allowed += float(np.spacing(np.float32(largest)))
    wrong = float(np.max(np.abs(found.output.double().numpy() - output), initial=0.0))
    assert wrong <= allowed, f"error {wrong:.3e}, allowed {allowed:.3e}, largest {largest:.3e}"


def assert_right(case: Case, isa: str) -> None:
    case = halved(case)
    assert_outputs(case, kernel_of(case, isa).forward(tensors(case), save=False))


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_every_number_of_rows_and_keys(isa: str) -> None:
    for rows in range(1, 34):
        assert_right(random_case(rows, (3, 11), batch=1, heads=(1, 1)), isa)
    for keys in [*range(1, 67), 95, 96, 97, 129]:
        assert_right(random_case(5, (2, keys), batch=1, heads=(1, 1)), isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("order", [1, 2])
def test_every_width(order: int, isa: str) -> None:
    for width in [*range(1, 36), 63, 64, 65, 80]:
        lengths = (2, 37)[-order:]
        assert_right(random_case(7, lengths, width=width, value_width=81 - width, batch=1, heads=(1, 1)), isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_with_everything(mask: str, order: int, isa: str) -> None:
    lengths = ((67,), (11, 43), (5, 13, 7), (5, 3, 7, 4))[order - 1]
    kinds = ("full", "key", "shared", None)[:order]
    options: dict[str, Any] = {"mask": mask_of(mask, order), "key_masks": True, "biases": kinds}
    assert_right(random_case(19, lengths, query_offset=3, key_offsets=(1, 0, 2, -1)[:order], **options), isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("size", [1e4, 1e-4, 1e-38])
def test_scores_of_any_size(size: float, isa: str) -> None:
    for order in (1, 2):
        assert_right(random_case(9, (4, 41)[-order:], size=size), isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_several_blocks_and_chunks_of_keys(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = random_case(7, (1, 1803), width=900, value_width=850, batch=1, heads=(1, 1), mask=korder.Causal())
    for threads in (1, 2):
        monkeypatch.setattr(exact, "thread_count", lambda threads=threads: threads)
        assert_right(replace(wide, query_offset=1795), isa)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_shapes_by_chance(data: st.DataObject) -> None:
    assert_right(case_by_chance(data, 40, 3), data.draw(st.sampled_from(ALL_ISAS)))


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_precision_float32_multiplies_nothing_narrow(isa: str) -> None:
    """Who asks for float32 gets weights in it; who does not gets others where the instruction set narrows them."""
    case = halved(random_case(9, (7, 23), width=16, value_width=8))
    found = kernel_of(case, isa, precision="float32").forward(tensors(case), save=True)
    kernel = kernel_of(case, isa)
    other = kernel.forward(tensors(case), save=True)
    assert torch.equal(other.residuals["output"], found.residuals["output"]) == (not kernel.kernels.narrows)
    output, lse = case.evaluate()
    plain, plain_lse = case.evaluate("float32")
    assert_near(found.residuals["output"].numpy(), output, plain, "float32")
    assert_near(found.lse.numpy(), lse, plain_lse, "float32")


def assert_gradients(case: Case, isa: str) -> None:
    """The way back multiplies in float32: gradients are as right as the output that it is given."""
    case = halved(case)
    kernel, operands = kernel_of(case, isa), tensors(case)
    given = tuple(as_dtype(x, "bfloat16") for x in upstream(case))
    of_output, of_lse = torch.from_numpy(given[0]).to(torch.bfloat16), torch.from_numpy(given[1]).float()
    saved = kernel.forward(operands, save=True)
    found = every_gradient(kernel.backward(operands, saved, OutputGradients(of_output, of_lse), needs=NEEDS))
    wanted = every_gradient(case.differentiate(*given, dtype=EXACT))
    for got, truth in zip(found, wanted, strict=True):
        wrong = float(np.max(np.abs(got.double().numpy() - truth)))
        assert wrong <= 3 * HALF_UNIT * float(np.max(np.abs(truth)))


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_gradients(order: int, isa: str) -> None:
    assert_gradients(random_case(19, ((37,), (7, 19), (3, 5, 11))[order - 1], width=9, key_masks=True), isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize("size", [1e3, 1e5, 1e7, 1e9])
def test_gradients_of_steep_scores(size: float, isa: str) -> None:
    """The way back sums scores in another order: where that matters forward takes the same."""
    for order in (1, 2):
        assert_gradients(random_case(9, (3, 41)[-order:], size=size, width=24, value_width=4), isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_values_may_have_anything_in_common(isa: str) -> None:
    """Weights sum to 1 as they are multiplied: what values share comes out as it is, and leaves gradients alone."""
    case = random_case(9, (41,), width=8, value_width=4)
    assert_gradients(replace(case, values=tuple(x + 10 for x in case.values)), isa)


@pytest.mark.parametrize("isa", ALL_ISAS)
@pytest.mark.parametrize(("scale", "size"), [(1e39, 1e-37), (2.0**130, 1e-37), (3e-42, 1e37), (-0.7, 1.0)])
def test_scales_that_float32_does_not_have(scale: float, size: float, isa: str) -> None:
    case = random_case(9, (41,), size=size)
    case = halved(replace(case, spec=case.spec.model_copy(update={"scale": scale})))
    found = kernel_of(case, isa).forward(tensors(case), save=False)
    output, lse = case.evaluate()
    assert np.allclose(found.lse.numpy(), lse.astype("f8"), rtol=1e-5, atol=1e-4)
    assert np.allclose(found.output.double().numpy(), output.astype("f8"), rtol=0, atol=2 * HALF_UNIT * 3)


@pytest.mark.parametrize("isa", ALL_ISAS)
def test_the_same_threads_give_the_same_bits(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "thread_count", lambda: 3)
    case = halved(random_case(50, (13, 70), width=16))
    first, second = (kernel_of(case, isa).forward(tensors(case), save=False) for _ in range(2))
    assert torch.equal(first.output, second.output)
    assert torch.equal(first.lse, second.lse)
