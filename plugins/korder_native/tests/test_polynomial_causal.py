"""The polynomial method under a causal mask: rows against the definition on the keys that they see, and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from korder_numpy.backend import NumpyBackend
from polynomial_reference import RATIO, PolynomialCase, assert_alike, dense, error, every_array, random_polynomial
from reference import ISAS
from test_polynomial_forward import isa

import korder
from korder.spi import NEEDS, KernelOutput, OperandGradients, Operands, OutputGradients
from korder_native import polynomial
from korder_native.backend import NativeBackend

__all__ = ["isa"]
Array = Any
OFFSETS = ((0, 0, 0, 0), (3, 1, 0, 2), (-2, 0, 1, -1), (40, 40, 40, 40))
"""Of the keys, from the query's own position: later ones, earlier ones, and some that every row sees."""


def causal_case(order: int, offsets: tuple[int, ...] = OFFSETS[0], **options: Any) -> PolynomialCase:
    """A causal problem; key j of mode t is seen from row j - offsets[t] on."""
    case = random_polynomial(order, **options)
    spec = case.spec.model_copy(update={"mask": korder.Causal(align="start")})
    operands = replace(case.operands, query_offset=5, key_offsets=tuple(5 - offset for offset in offsets[:order]))
    return PolynomialCase(spec, operands)


def seen_by(operands: Operands, row: int) -> Operands:
    """The operands of one row and the keys that it sees."""
    ends = [max(row + operands.query_offset - offset + 1, 0) for offset in operands.key_offsets]
    cut = lambda xs, axis: tuple(  # noqa: E731
        None if x is None else np.take(x, np.arange(min(end, x.shape[axis])), axis=axis)
        for x, end in zip(xs, ends, strict=True)
    )
    return replace(
        operands,
        query=operands.query[:, :, row : row + 1],
        keys=cut(operands.keys, 2),
        values=cut(operands.values, 2),
        key_masks=cut(operands.key_masks, 2),
        biases=cut(operands.biases, 3),
    )


def by_definition(case: PolynomialCase, centre: Array, dtype: Any = np.longdouble) -> dict[str, Array]:
    """What every row comes to in a dtype."""
    method, wide = case.plan.polynomial, case.mapped(lambda x: x.astype(dtype))
    assert method is not None
    rows = [
        dense(seen_by(wide, row), case.plan.problem.scale, method.values, centre[:, :, row : row + 1], np)
        for row in range(wide.query.shape[2])
    ]
    return {name: np.concatenate([row[name] for row in rows], axis=2) for name in rows[0]}


def assert_right(case: PolynomialCase) -> None:
    found = case.kernel().forward(case.operands, save=True)
    assert found.residuals is not None
    centre = np.asarray(found.residuals["centre"])
    truth, plain = by_definition(case, centre), by_definition(case, centre, case.operands.query.dtype)
    sizes = np.asarray(truth["magnitude"], float)
    condition = max(1.0, float(np.max(sizes)))
    assert np.allclose(np.asarray(found.magnitude), sizes, rtol=1e-4, atol=0)
    for name in ("output", "lse"):
        largest = float(np.max(np.abs(truth[name][np.isfinite(truth[name])]), initial=0.0))
        step = float(np.spacing(np.asarray(largest, case.operands.query.dtype)))
        allowed = RATIO * condition * (error(plain[name], truth[name]) + step)
        wrong = error(getattr(found, name), truth[name])
        assert wrong <= allowed, f"{name}: error {wrong:.3e}, allowed {allowed:.3e}"


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_every_row_sees_the_keys_up_to_its_own(order: int, offsets: tuple[int, ...], isa: str) -> None:
    for dtype in ("float32", "float64"):
        assert_right(causal_case(order, offsets, key_masks="group").cast(dtype))


@pytest.mark.parametrize("options", [
    {"biases": ("key", "shared")}, {"biases": ("closed", None)}, {"weight": "cp"}, {"weight": "full"}, {"scale": -0.3},
    {"degree": 0}, {"degree": 1}, {"degree": 7}, {"value_width": 18, "width": 9}, {"heads": (6, 1)}, {"prune": 1e-3},
    {"coefficients": "minimax", "interval": 6.0},
], ids=str)  # fmt: skip
def test_every_variant(options: dict[str, Any], isa: str) -> None:
    assert_right(causal_case(2, OFFSETS[1], **{"key_masks": "shared", **options}).cast("float64"))


def both(case: PolynomialCase, *, lse: bool = True) -> tuple[Any, Any]:
    """What the C++ kernel and korder's own kernel on NumPy arrays return."""
    return both_ways(case, NativeBackend(), lse=lse), both_ways(case, NumpyBackend(), lse=lse)


def both_ways(case: PolynomialCase, backend: Any, *, lse: bool = False) -> tuple[KernelOutput, OperandGradients]:
    """Forward, and backward for made-up gradients."""
    rng, x = np.random.default_rng(9), case.operands
    shape, dtype = x.query.shape[:3], x.query.dtype
    output = rng.standard_normal((*shape, x.values[0].shape[-1])).astype("float32").astype(dtype)
    grads = OutputGradients(output, rng.standard_normal(shape) if lse else None)
    kernel = backend.compile(case.plan)
    saved = kernel.forward(x, save=True)
    return saved, kernel.backward(x, saved, grads, needs=NEEDS)


def assert_gradients_in_float32(case: PolynomialCase) -> None:
    """Assert that the C++ kernel's gradients are as near those in float64 as the running form's, or nearly.

    How near the running form comes depends on NumPy's products, whose order of summation a processor chooses.
    """
    (_, found), (_, plain) = both(case, lse=False)
    _, (_, wide) = both(case.cast("float64"), lse=False)
    one, other = every_array(found), every_array(plain)
    for name, wanted in every_array(wide).items():
        largest = float(np.max(np.abs(wanted), initial=0.1))
        allowed = RATIO * error(other[name], wanted) + 1e-5 * largest
        wrong = error(one[name], wanted)
        assert wrong <= allowed, f"{name}: error {wrong:.3e}, allowed {allowed:.3e}, largest entry {largest:.3e}"


@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_gradients_are_those_of_the_running_form(order: int, offsets: tuple[int, ...], isa: str) -> None:
    options: dict[str, Any] = {"rows": 70 if order < 3 else 14, "batch": 1, "key_masks": "group"}
    case = causal_case(order, offsets, biases=("key", None, "shared", None), **options)
    blind = np.isinf(case.kernel().forward(case.operands, save=False).lse).any()
    (saved, gradients), (other, expected) = both(case, lse=not blind)
    assert_alike(saved, other, 1e-12)
    assert_alike(gradients, expected, 1e-11, 0.1)
    assert_gradients_in_float32(case.cast("float32"))


@pytest.mark.parametrize("options", [{"weight": "cp"}, {"weight": "full"}, {"heads": (6, 1)}, {"prune": 1e-3}], ids=str)
def test_gradients_of_every_variant(options: dict[str, Any], isa: str) -> None:
    (_, gradients), (_, expected) = both(causal_case(2, rows=70, **options), lse=False)
    assert_alike(gradients, expected, 1e-11, 0.1)


def test_rows_go_through_in_several_blocks(isa: str) -> None:
    case = causal_case(2, rows=1100, lengths=(1090, 1103), width=2, value_width=9, degree=2, batch=1, heads=(2, 1))
    (saved, gradients), (other, expected) = both(case, lse=False)
    assert_alike(saved, other, 1e-12)
    assert_alike(gradients, expected, 1e-11, 0.1)


def test_a_key_that_is_not_a_number_is_seen_from_its_row_on(isa: str) -> None:
    case = causal_case(2, rows=150, lengths=(150, 150), key_masks=None)
    clean = case.kernel().forward(case.operands, save=False)
    case.operands.keys[1][0, 1, 77, 2] = np.nan
    found = case.kernel().forward(case.operands, save=False)
    touched = np.zeros(clean.output.shape[:3], bool)
    touched[0, 2:, 77:] = True
    assert np.isnan(found.output[touched]).all()
    assert np.array_equal(found.output[~touched], clean.output[~touched])


def test_calls_repeat_to_the_bit_and_threads_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = causal_case(2, rows=300, lengths=(290, 310), width=5, value_width=17)
    found = []
    for threads in (1, 2, 2, 5):
        monkeypatch.setattr(polynomial, "thread_count", lambda threads=threads: threads)
        found.append(both_ways(case, NativeBackend()))
    for one, two in zip(found[1], found[2], strict=True):
        assert every_array(one).keys() == every_array(two).keys()
        assert all(np.array_equal(x, every_array(two)[name]) for name, x in every_array(one).items())
    for saved, gradients in found[1:]:
        assert_alike(saved, found[0][0], 1e-13)
        assert_alike(gradients, found[0][1], 1e-12, 0.1)


def test_rows_without_keys_and_keys_without_rows(isa: str) -> None:
    assert ISAS
    for rows, lengths in ((0, (5, 4)), (3, (0, 4)), (1, (1, 1)), (4, (9, 9))):
        (saved, gradients), (other, expected) = both(causal_case(2, rows=rows, lengths=lengths), lse=False)
        assert_alike(saved, other, 1e-13)
        assert_alike(gradients, expected, 1e-12, 0.1)
