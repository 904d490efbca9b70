"""The problems that the benchmark measures, and the checks without which it prints no speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import to_device

from korder.dispatch.arrays import array_kind, dtype_name, namespace_of_kind
from korder.dispatch.prepare import Prepared, prepare
from korder.dispatch.registry import default_registry
from korder.experiments.inputs import FloatArray, rescaled, score_rms
from korder.planning.plan import Plan
from korder.problem import Shapes, make_problem
from korder.spec import AttentionSpec, Causal, Full, Window
from korder.spi.operands import NEEDS, KernelOutput, OperandGradients, Operands, OutputGradients

_CHUNK = 256  # keys of the first mode in a block of the reference
_SLACK = 4.0  # times the error of a plain evaluation in the same dtype
_IDENTITY = 1e-4  # of the absolute terms: float32 sums of a few million products, with room


class Disagreement(Exception):  # noqa: N818 - not an error of the user's, but a finding of the benchmark
    """The outputs of a case are not what they should be, so its speed means nothing."""


@dataclass(frozen=True, slots=True)
class Case:
    """Operands in the kernel layout, the kernel that is measured, and the gradient of a made-up loss."""

    operands: Operands
    prepared: Prepared
    cotangent: Any

    @property
    def plan(self) -> Plan:
        """The plan that the kernel runs."""
        return self.prepared.selection.plan

    @property
    def flops(self) -> float:
        """Flop of the forward, by the counting convention: products only, exponentials free, masks not looked at."""
        problem = self.plan.problem
        if self.plan.polynomial is not None:
            features, columns = self.plan.polynomial.features, problem.value_width + 1
            return 2.0 * (problem.order + 1) * problem.queries * features * columns
        return 2.0 * problem.queries * problem.tuples * (problem.query_width + problem.value_width)

    def forward(self, save: bool = False) -> KernelOutput:
        """Run the forward once."""
        return self.prepared.kernel.forward(self.operands, save=save)

    def backward(self, saved: KernelOutput) -> OperandGradients:
        """Run the backward once."""
        needs = frozenset(NEEDS - {"biases", "weight"})
        return self.prepared.kernel.backward(self.operands, saved, OutputGradients(self.cotangent), needs=needs)


def make_case(
    spec: AttentionSpec, n: int, width: int, backend: str, score_size: float | None = None, dtype: str = "float32"
) -> Case:
    """Return self-attention over n seeded standard normal tokens, a different tensor in every place.

    The arrays are NumPy's where the backend takes them, else of the kind that it takes.
    """
    generator = np.random.default_rng(n)
    draw: Callable[[], FloatArray] = lambda: generator.standard_normal((1, 1, n, width)).astype(dtype)  # noqa: E731
    query, keys = draw(), tuple(draw() for _ in range(spec.order))
    if score_size is not None:
        query = rescaled(query, score_rms(query, keys, spec.score_factor(width)), score_size, "the size of scores")
    values = tuple(draw() for _ in range(spec.order))
    none = (None,) * spec.order
    operands = Operands(query, keys, values, none, none, key_offsets=(0,) * spec.order)
    shapes = Shapes(query.shape, tuple(key.shape for key in keys), tuple(value.shape for value in values))
    kind, device = place_of(backend)
    problem = make_problem(spec, shapes, dtype, device)
    prepared = prepare(default_registry(), problem, kind, backend)  # before a framework is imported that is not there
    place: Callable[[FloatArray], Any] = lambda array: placed(array, kind, device)  # noqa: E731
    return Case(with_arrays(operands, place), prepared, place(draw()))


def place_of(backend: str) -> tuple[str, str]:
    """Return the array kind and the device of a backend's cases: NumPy's and the CPU where it takes them."""
    if backend == "auto":
        return "numpy", "cpu"
    found = default_registry().get(backend)
    kinds, devices = found.array_kinds, found.capabilities().devices
    return "numpy" if "numpy" in kinds else min(kinds), "cpu" if "cpu" in devices else min(devices)


def with_arrays(operands: Operands, change: Callable[[Any], Any]) -> Operands:
    """Return the operands with query, keys and values changed."""
    keys, values = (tuple(map(change, arrays)) for arrays in (operands.keys, operands.values))
    return replace(operands, query=change(operands.query), keys=keys, values=values)


def placed(array: FloatArray, kind: str, device: str) -> Any:
    """Return an array of a kind, on a device."""
    if kind == "numpy":
        return array
    made = namespace_of_kind(kind).asarray(array)
    return made if device == "cpu" else to_device(made, device)


def as_numpy(array: Any) -> FloatArray:
    """Return an array of any kind as NumPy's, without its graph, bfloat16 as float32."""
    if array_kind(array) == "torch":
        array = array.detach().cpu()
        array = array.float() if dtype_name(array) == "bfloat16" else array
    return np.asarray(array)


def require_forward(case: Case, rows: int = 2) -> float:
    """Run the kernel, compare as `require_output`, and return the largest error."""
    return require_output(case, case.forward().output, rows)


def require_output(case: Case, output: Any, rows: int = 2) -> float:
    """Compare sampled rows with a plain evaluation in float64, and return the largest error.

    Raises:
        Disagreement: An error above 4 times that of a plain evaluation in the same dtype, for the polynomial method
            times the condition number of its sum, plus one unit in the last place of the largest output.
    """
    got = as_numpy(output)[0, 0]
    worst = 0.0
    for row in _rows(case, rows):
        truth = _reference_row(case, row, np.float64)[0]
        plain = _reference_row(case, row, got.dtype)[0]
        error, allowed = _errors(got[row], truth, plain, _condition(case, row))
        worst = max(worst, error)
        if not error <= allowed:
            raise Disagreement(f"row {row} of the output is off by {error:.2e}, allowed {allowed:.2e}")
    return worst


def require_backward(case: Case, saved: KernelOutput, rows: int = 1) -> None:
    """Run the kernel's backward and compare as `require_gradients`."""
    require_gradients(case, saved.output, case.backward(saved), rows)


def require_gradients(case: Case, output: Any, gradients: OperandGradients, rows: int = 1) -> None:
    """Compare sampled rows of the query's gradient with the closed form, and all gradients with each other.

    A score is linear in the query and in every key, so sum(x grad x) is one number for all of them; an output is
    linear in every value, so sum(v grad v) is sum(out grad out) for each.

    Raises:
        Disagreement: A gradient that is not what it should be.
    """
    got = as_numpy(gradients.query)[0, 0]
    for row in _rows(case, rows):
        truth = _reference_row(case, row, np.float64)[1]
        plain = _reference_row(case, row, got.dtype)[1]
        error, allowed = _errors(got[row], truth, plain)
        if not error <= allowed:
            raise Disagreement(f"row {row} of the query's gradient is off by {error:.2e}, allowed {allowed:.2e}")
    query = _pairing(case.operands.query, gradients.query)
    of_output = _pairing(output, case.cotangent)
    for t in range(case.plan.problem.order):
        _require_equal(f"keys[{t}]", _pairing(case.operands.keys[t], gradients.keys[t]), query)
        _require_equal(f"values[{t}]", _pairing(case.operands.values[t], gradients.values[t]), of_output)


def require_same(what: str, got: Any, expected: Any, allowed: float = 1e-4) -> float:
    """Compare two arrays of any kind, and return the largest difference relative to the largest entry.

    Raises:
        Disagreement: A larger difference than is allowed.
    """
    wide = as_numpy(expected).astype(np.float64)
    gap = float(np.max(np.abs(as_numpy(got) - wide)) / np.max(np.abs(wide)))
    if not gap <= allowed:
        raise Disagreement(f"{what} differs by {gap:.1e} of the largest entry, allowed {allowed:.0e}")
    return gap


def _rows(case: Case, count: int) -> list[int]:
    return [int(row) for row in np.linspace(0, case.plan.problem.queries - 1, count + 2)[1:-1]]


def _errors(got: FloatArray, truth: FloatArray, plain: FloatArray, condition: float = 1.0) -> tuple[float, float]:
    """The error, and what the ratio rule allows."""
    largest = np.max(np.abs(truth))
    unit = float(np.spacing(largest.astype(plain.dtype)))
    return float(np.max(np.abs(got - truth))), _SLACK * condition * float(np.max(np.abs(plain - truth))) + unit


def _condition(case: Case, row: int) -> float:
    """Return the sum of absolute monomial terms over the sum of a row of order 2; 1 for the exact method."""
    if case.plan.polynomial is None:
        return 1.0
    operands, seen = case.operands, _seen(case, row)
    query = as_numpy(operands.query)[0, 0, row] * case.plan.problem.scale
    keys = [as_numpy(key)[0, 0, part] for key, part in zip(operands.keys, seen, strict=True)]
    centre = float(query @ (keys[0].mean(axis=0) * keys[1].mean(axis=0)))
    polynomial = np.polynomial.Polynomial(case.plan.polynomial.values)(np.polynomial.Polynomial([-centre, 1.0]))
    absolute = np.polynomial.Polynomial(np.abs(polynomial.coef))
    total = terms = 0.0
    for block in _blocks(keys[0]):
        folded = query * keys[0][block]
        total += float(polynomial(folded @ keys[1].T).sum(dtype=np.float64))
        terms += float(absolute(np.abs(folded) @ np.abs(keys[1]).T).sum(dtype=np.float64))
    return terms / total


def _pairing(array: Any, gradient: Any) -> tuple[float, float]:
    """The sum of products, and of their absolute values."""
    terms = as_numpy(array).astype(np.float64) * as_numpy(gradient)
    return float(terms.sum()), float(np.abs(terms).sum())


def _require_equal(name: str, left: tuple[float, float], right: tuple[float, float]) -> None:
    gap, terms = abs(left[0] - right[0]), max(left[1], right[1])
    if not gap <= _IDENTITY * terms:
        raise Disagreement(f"the gradient of {name} breaks an identity by {gap:.2e} of terms that sum to {terms:.2e}")


def _reference_row(case: Case, row: int, dtype: Any) -> tuple[FloatArray, FloatArray]:
    """Return output and query gradient of one row of an order-2 case, by explicit scores, a block of keys at a time."""
    operands, seen = case.operands, _seen(case, row)
    query, cotangent = (as_numpy(array)[0, 0, row].astype(dtype) for array in (operands.query, case.cotangent))
    keys = [as_numpy(key)[0, 0, part].astype(dtype) for key, part in zip(operands.keys, seen, strict=True)]
    values = [as_numpy(value)[0, 0, part].astype(dtype) for value, part in zip(operands.values, seen, strict=True)]
    scale = _number(case.plan.problem.scale, dtype)
    weigh, slope = _weights(case.plan, scale * (query @ (keys[0].mean(axis=0) * keys[1].mean(axis=0))))
    total, weighted = _number(0.0, dtype), np.zeros_like(values[0][0])
    for block in _blocks(keys[0]):
        weight = weigh(scale * ((query * keys[0][block]) @ keys[1].T))
        total += weight.sum()
        weighted += (values[0][block] * (weight @ values[1])).sum(axis=0)
    output = weighted / total
    gradient = np.zeros_like(query)
    for block in _blocks(keys[0]):
        score = scale * ((query * keys[0][block]) @ keys[1].T)
        of_values = (cotangent * values[0][block]) @ values[1].T
        of_scores = slope(score) / total * (of_values - cotangent @ output)
        gradient += scale * (keys[0][block] * (of_scores @ keys[1])).sum(axis=0)
    return output, gradient


def _seen(case: Case, row: int) -> list[slice]:
    """The keys of each mode that a row may attend to; they are the same for every key of the other modes."""
    mask = case.plan.problem.spec.mask
    if isinstance(mask, Window):
        return [slice(max(row + 1 - size, 0), row + 1) for size in mask.sizes]
    assert isinstance(mask, Full | Causal), f"no reference for {mask}"
    return [slice(row + 1 if isinstance(mask, Causal) else None)] * case.plan.problem.order


def _number(value: float, dtype: Any) -> Any:
    """Return a number of the dtype, so that it does not widen what it multiplies."""
    return np.dtype(dtype).type(value)


def _blocks(keys: FloatArray) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, len(keys), _CHUNK)]


def _weights(plan: Plan, centre: Any) -> tuple[Callable[[FloatArray], FloatArray], Callable[[FloatArray], FloatArray]]:
    """The unnormalised weight of a score, and its derivative."""
    if plan.polynomial is None:
        # Standard normal scores reach about 10, far from overflow.
        return np.exp, np.exp
    polynomial = np.polynomial.Polynomial(np.asarray(plan.polynomial.values, dtype=np.asarray(centre).dtype))
    derivative = polynomial.deriv()
    return lambda score: polynomial(score - centre), lambda score: derivative(score - centre)
