"""The polynomial method by its definition: explicit scores of all tuples, P of the centred ones, plain sums.

Shares nothing with the kernels: no monomials, no scales, no blocks. Runs on NumPy arrays of any dtype and, for
gradients, on PyTorch tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

import korder
from korder.spi import Kernel, KernelOutput, Operands, Plan
from korder_native.backend import NativeBackend

Array = Any
RATIO = 4.0
"""Error of a kernel over that of a plain evaluation in the same dtype, times the condition of the monomial sum."""


@dataclass(frozen=True)
class PolynomialCase:
    """A problem of the polynomial method with its operands, NumPy arrays in the kernel layout."""

    spec: korder.AttentionSpec
    operands: Operands

    def mapped(self, change: Callable[[Array], Array]) -> Operands:
        """The operands with every array changed, masks left as they are."""
        return mapped(self.operands, change)

    def cast(self, dtype: str) -> PolynomialCase:
        """The same problem in another dtype."""
        return replace(self, operands=self.mapped(lambda x: x.astype(dtype)))

    def changed(self, **changes: Any) -> PolynomialCase:
        """The same problem with other operands."""
        return replace(self, operands=replace(self.operands, **changes))

    @property
    def arguments(self) -> dict[str, Any]:
        """What `korder.attend` takes beside query, keys and values."""
        x = self.operands
        masks = tuple(mask[:, 0] if mask is not None and mask.shape[1] == 1 else mask for mask in x.key_masks)
        return {"spec": self.spec, "weight": x.weight, "biases": x.biases, "key_masks": masks}

    @cached_property
    def plan(self) -> Plan:
        """The plan for these operands, by their statistics where the method wants them."""
        return self.plan_in(str(self.operands.query.dtype))

    def plan_in(self, dtype: str) -> Plan:
        """The plan in a dtype that NumPy may not have."""
        x, arguments = self.operands, self.arguments
        given = {"query": x.query, "keys": x.keys, "values": x.values, **arguments}
        shape = lambda y: y if y is None else tuple(map(shape, y)) if isinstance(y, tuple) else y.shape  # noqa: E731
        shapes = {name: shape(y) for name, y in given.items() if name != "spec"}
        measured = None
        if self.spec.method.prune is not None:
            measured = korder.measure(x.query, x.keys, x.values, **arguments)
        made = korder.plan(self.spec, dtype=dtype, statistics=measured, **shapes)
        assert made[0].polynomial is not None
        return made[0]

    def kernel(self) -> Kernel:
        """The kernel of the plan, on the instruction set of the environment."""
        return NativeBackend().compile(self.plan)

    def dense(self, centre: Array, dtype: Any = np.longdouble) -> dict[str, Array]:
        """What the polynomial of the plan comes to by its definition, in a dtype."""
        polynomial = self.plan.polynomial
        assert polynomial is not None
        return dense(self.mapped(lambda x: x.astype(dtype)), self.plan.problem.scale, polynomial.values, centre, np)


def mapped(operands: Operands, change: Callable[[Array], Array]) -> Operands:
    """Operands with every array of numbers changed."""
    each = lambda xs: tuple(None if x is None else change(x) for x in xs)  # noqa: E731
    weight = operands.weight
    return replace(
        operands,
        query=change(operands.query),
        **{name: each(getattr(operands, name)) for name in ("keys", "values", "biases")},
        weight=None if weight is None else each(weight) if isinstance(weight, tuple) else change(weight),
    )


def dense(operands: Operands, scale: float, coefficients: Sequence[float], centre: Array, xp: Any) -> dict[str, Array]:
    """Output, the same of absolute terms, lse, moments, and the condition: the absolute terms over the sum.

    Shapes:  (b, h, n, e) twice, (b, h, n), (b, h, n, degree + 1), (b, h, n).
    """
    query, modes = operands.query, "pqrs"[: len(operands.keys)]
    batch, heads, rows, _ = query.shape
    share = heads // operands.keys[0].shape[1]
    head = [i // share for i in range(heads)]
    live = [_live(operands, t, head, xp) for t in range(len(modes))]
    closed = lambda x, open_: xp.where(open_[..., None], x[:, head], xp.zeros_like(x[:, head]))  # noqa: E731
    keys, values = ([closed(x, y) for x, y in zip(xs, live, strict=True)] for xs in (operands.keys, operands.values))
    factors = _factors(operands.weight, query, keys)
    rule = ",".join(["bhiz", *(f"bh{t}z" for t in modes)]) + f"->bhi{modes}"
    tuples = prod(key.shape[2] for key in keys)
    flat = lambda x: x.reshape(batch, heads, rows, tuples)  # noqa: E731
    scores = flat(xp.einsum(rule, *factors)) * scale
    absolute = flat(xp.einsum(rule, *map(abs, factors))) * abs(scale)
    of_keys = [_weights(operands, t, live[t], xp) for t in range(len(modes))]
    weights = xp.einsum(",".join(f"bh{t}" for t in modes) + f"->bh{modes}", *of_keys).reshape(batch, heads, 1, tuples)
    products = xp.einsum(",".join(f"bh{t}z" for t in modes) + f"->bh{modes}z", *values)
    products = products.reshape(batch, heads, tuples, products.shape[-1])
    centre = centre[..., None]
    polynomial = weights * _horner(coefficients, scores - centre)
    total = polynomial.sum(-1)
    count = weights.sum(-1) + xp.zeros_like(total)
    empty = count == 0
    safe, divisor = (xp.where(empty, xp.ones_like(x), x) for x in (count, total))
    lse = xp.where(empty, xp.full_like(count, -np.inf), centre[..., 0] + xp.log(divisor))
    sizes = (weights * _horner([abs(c) for c in coefficients], absolute + abs(centre))).sum(-1)
    moments = [(weights * (scores - centre) ** m).sum(-1) / safe for m in range(len(coefficients))]
    return {
        "output": (polynomial @ products) / divisor[..., None],
        "absolute": (abs(polynomial) @ abs(products)) / divisor[..., None],
        "lse": lse,
        "moments": xp.stack(moments, -1),
        "magnitude": xp.where(empty, xp.zeros_like(sizes), sizes / divisor),
    }


def _live(operands: Operands, t: int, head: list[int], xp: Any) -> Array:
    """Which keys are open: (b, h, m)."""
    key, mask, bias = operands.keys[t], operands.key_masks[t], operands.biases[t]
    live = xp.ones_like(key[:, head][..., 0]) > 0
    if mask is not None:
        live = live & (mask[:, head] if mask.shape[1] > 1 else mask)
    return live if bias is None else live & (bias[:, :, 0] != -np.inf)


def _weights(operands: Operands, t: int, live: Array, xp: Any) -> Array:
    """exp of the bias of open keys, 0 of others: (b, h, m)."""
    ones = xp.ones_like(operands.query[:, :, :1, 0]) * xp.ones_like(operands.keys[t][:, :1, :, 0])
    bias = operands.biases[t]
    if bias is not None:
        ones = ones * xp.exp(xp.where(live, bias[:, :, 0] * ones, xp.zeros_like(ones)))
    return xp.where(live, ones, xp.zeros_like(ones))


def _factors(weight: Array, query: Array, keys: list[Array]) -> list[Array]:
    """The matrices whose rows' elementwise products sum to scores."""
    if weight is None:
        return [query, *keys]
    if isinstance(weight, tuple):
        return [x @ matrix for x, matrix in zip((query, *keys), weight, strict=True)]
    columns = np.indices(weight.shape[1:]).reshape(len(keys), -1)
    return [
        query @ weight.reshape(len(weight), -1),
        *(key[..., index] for key, index in zip(keys, columns, strict=True)),
    ]


def _horner(coefficients: Sequence[float], x: Array) -> Array:
    total = x * 0
    for coefficient in reversed(coefficients):
        total = total * x + coefficient
    return total


def random_polynomial(
    order: int,
    *,
    degree: int = 4,
    seed: int = 0,
    rows: int = 11,
    lengths: tuple[int, ...] | None = None,
    width: int = 4,
    value_width: int = 3,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    key_masks: str | None = None,
    biases: tuple[str | None, ...] = (),
    weight: str | None = None,
    scale: float = 0.2,
    **method: Any,
) -> PolynomialCase:
    """A problem with a different tensor in every place; masks: group, shared; biases: key, shared, closed."""
    rng = np.random.default_rng(seed)
    (h, g), lengths = heads, lengths or (13, 7, 5, 3)[:order]
    kinds = (biases or (None,) * order)[:order]
    widths = (width,) * order if weight is None else (2, 3, 2, 2)[:order]
    factors: Any = None
    if weight == "cp":
        factors = tuple(rng.standard_normal((d, 5)) / np.sqrt(d) for d in (width, *widths))
    elif weight == "full":
        factors = rng.standard_normal((width, *widths)) / width

    def bias(kind: str | None, m: int) -> Array | None:
        if kind is None:
            return None
        found = rng.standard_normal((1, 1, 1, m) if kind == "shared" else (batch, h, 1, m))
        return np.where(rng.random(found.shape) < 0.3, -np.inf, found) if kind == "closed" else found

    mask = lambda m: rng.random((batch, g if key_masks == "group" else 1, m)) > 0.25  # noqa: E731
    operands = Operands(
        rng.standard_normal((batch, h, rows, width)),
        tuple(rng.standard_normal((batch, g, m, d)) for m, d in zip(lengths, widths, strict=True)),
        tuple(rng.standard_normal((batch, g, m, value_width)) for m in lengths),
        tuple(mask(m) if key_masks else None for m in lengths),
        tuple(bias(kind, m) for kind, m in zip(kinds, lengths, strict=True)),
        factors,
        0,
        (0,) * order,
    )
    spec = korder.AttentionSpec(
        order=order,
        scale=scale,
        score="khatri_rao" if weight is None else "kronecker",
        method=korder.Polynomial(degree=degree, **method),
    )
    return PolynomialCase(spec, operands)


def error(got: Array, truth: Array) -> float:
    """The largest difference; what is not finite has to be the same."""
    got = np.asarray(got, dtype=np.longdouble)
    assert got.shape == truth.shape, (got.shape, truth.shape)
    finite = np.isfinite(truth)
    assert np.array_equal(got[~finite], truth[~finite], equal_nan=True)
    return float(np.max(np.abs(got[finite] - truth[finite]), initial=0.0))


def assert_forward(case: PolynomialCase, found: KernelOutput, unit: float | None = None) -> None:
    """Assert that everything that forward returned is right to rounding; `unit` is that of a narrower output."""
    assert found.residuals is not None
    centre = np.asarray(found.residuals["centre"])
    truth, plain = case.dense(centre), case.dense(centre, case.operands.query.dtype)
    sizes = np.asarray(truth["magnitude"], float)
    condition = max(1.0, float(np.max(sizes[np.isfinite(sizes)], initial=0.0)))
    assert case.plan.polynomial is not None
    terms = {"output": 1.0, "lse": 1.0, "moments": np.abs(case.plan.polynomial.values)}
    for name, term in terms.items():
        exact = truth[name] * term
        largest = float(np.max(np.abs(exact[np.isfinite(exact)]), initial=0.0))
        if name == "output":  # values that cancel leave the rounding of their sizes
            largest = float(np.max(np.asarray(truth["absolute"]), initial=0.0))
        step = float(np.spacing(np.asarray(largest, case.operands.query.dtype)))
        allowed = RATIO * condition * (error(plain[name] * term, exact) + step)
        if name == "output" and unit is not None:
            allowed += unit * largest
        wrong = error(np.asarray(getattr(found, name)) * term, exact)
        assert wrong <= allowed, f"{name}: error {wrong:.3e}, allowed {allowed:.3e}, condition {condition:.1f}"
    finite = np.isfinite(sizes)
    assert np.allclose(np.asarray(found.magnitude)[finite], sizes[finite], rtol=1e-4, atol=0)


def every_array(found: Any) -> dict[str, Array]:
    """All arrays of a kernel's output or of gradients by name, float64."""
    named: dict[str, Array] = {}
    for field in fields(found):
        value = getattr(found, field.name)
        for place, array in enumerate(value if isinstance(value, tuple) else (value,)):
            if array is not None and not isinstance(array, dict):
                named[f"{field.name}[{place}]"] = np.asarray(array, float)
    return named


def assert_alike(found: Any, other: Any, limit: float, least: float = 0.0) -> None:
    """Assert that outputs, or gradients, agree to a limit relative to each array's largest entry, or to `least`."""
    one, two = every_array(found), every_array(other)
    assert one.keys() == two.keys()
    for name, wanted in two.items():
        largest = float(np.max(np.abs(wanted[np.isfinite(wanted)]), initial=least))
        wrong = error(one[name], wanted)
        assert wrong <= limit * largest, f"{name}: difference {wrong:.3e}, largest entry {largest:.3e}"
