"""Problems of the polynomial method for several test files: kernels at hand, and masks, biases and weights to cover."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import array_api_compat.numpy as xp
import numpy as np

from korder.methods.polynomial import PolynomialKernel
from korder.planning.polynomial import polynomial_plan
from korder.spec import Causal, Ordered, Polynomial, Window
from korder.spi import KernelOutput, Plan
from korder_numpy.polynomial import NumpyPolynomialKernel
from tests.limits import RATIO, error, unit
from tests.problems import Case, random_case

KERNELS = {"generic": PolynomialKernel, "numpy": NumpyPolynomialKernel}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "key_masks": {"key_masks": True},
    "biases": {"biases": ("key", "shared", "key")},
    "masks_and_shared_bias": {"key_masks": True, "biases": ("shared", None, "shared")},
    "one_group": {"heads": 3, "groups": 1},
    "cp": {"weight": "cp"},
    "full_weight": {"weight": "full", "key_widths": (2, 3, 2)},
}
MASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"mask": Causal()},
    "causal_offsets": {"mask": Causal(), "query_offset": 4, "key_offsets": (6, 2, 5)},
    "causal_late": {"mask": Causal(), "query_offset": 0, "key_offsets": (2, 3, 0)},
    "window": {"sizes": (3, 5, 4, 2, 6, 3)},
    "window_offsets": {"batch": 1, "sizes": (6, 4, 9), "query_offset": 4, "key_offsets": (6, 2, 5)},
    "window_wide": {"batch": 1, "sizes": (13, 2, 30), "query_offset": 1, "key_offsets": (0, 3, 2)},
    "ordered": {"mask": Ordered()},
    "ordered_offsets": {"batch": 1, "mask": Ordered(), "query_offset": 4, "key_offsets": (3, -2, 5)},
    "ordered_late": {"batch": 1, "mask": Ordered(), "query_offset": 0, "key_offsets": (-1, 3, 1)},
    "window_long": {"sizes": (40, 64, 100)},
}
COMBINATIONS = [
    (order, variant, mask)
    for place, mask in enumerate(MASKS)
    for number, variant in enumerate(VARIANTS)
    for order in (1, 2, 3)
    if mask.startswith(("full", "causal")) or (order == 1 + (number + place) % 3 and (number + place) % 2 == 0)
    if mask != "window_long"
]
"""Orders, variants and masks: all under the full mask and the causal one, under others every second variant in turn."""


def polynomial_case(order: int, variant: str, mask: str, *, degree: int, seed: int = 0, **spec: Any) -> Case:
    """Return a random problem of the polynomial method."""
    options = {**VARIANTS[variant], **MASKS[mask], **spec}
    for name in ("biases", "key_offsets", "key_widths", "sizes"):
        if name in options:
            options[name] = options[name][:order]
    if "sizes" in options:
        options["mask"] = Window(sizes=options.pop("sizes"))
    if options.get("key_masks"):
        options["key_masks"] = (True,) * order
    options.setdefault("scale", 0.15)
    return random_case(order, seed=seed, method=Polynomial(degree=degree), **options)


def run(
    case: Case, *, kernel: str = "numpy", namespace: Any = xp, chunk: int | None = None
) -> tuple[Plan, KernelOutput]:
    """Return the plan and what its kernel makes of a case, saved; `chunk` tokens at a time."""
    plan = plan_of(case, chunk)
    return plan, KERNELS[kernel](namespace, plan).forward(case.operands(), save=True)


def plan_of(case: Case, chunk: int | None = None) -> Plan:
    """Return the plan of a case at its method's degree."""
    from dataclasses import replace

    method = case.spec.polynomial
    assert method is not None
    assert method.degree is not None
    plan = polynomial_plan(case.problem(), method.degree)
    assert plan.polynomial is not None
    return plan if chunk is None else replace(plan, polynomial=replace(plan.polynomial, chunk=chunk))


def centre_of(output: KernelOutput) -> np.ndarray:
    """Return the row centres that a kernel used."""
    assert output.residuals is not None
    return np.asarray(output.residuals["centre"])


def judge_many(judge: Callable[[int, str], str], seeds: range, dtype: str) -> Counter[str]:
    """Return how often each word came of judging a case; the seed is told of one that fails."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        try:
            counts[judge(seed, dtype)] += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, {dtype}: {error}") from error
    return counts


def assert_sums_agree(case: Case, coefficients: Any, output: KernelOutput, exact: Any, plain: Any) -> None:
    """Judge output, lse and moments by the ratio rule, its limit grown by the condition of the monomial sum."""
    condition = max(1.0, float(np.max(exact["condition"])))
    # the condition is that of the sum of all powers, each times its coefficient
    terms = {"output": 1.0, "lse": 1.0, "moments": np.abs(coefficients)}
    for name, term in terms.items():
        got, wanted = np.asarray(getattr(output, name)) * term, np.asarray(exact[name] * term, dtype=float)
        largest = float(np.max(np.abs(wanted[np.isfinite(wanted)]), initial=0.0))
        allowed = error(plain[name] * term, wanted) + unit(case.dtype, largest)
        assert error(got, wanted) <= RATIO * condition * allowed, name
    np.testing.assert_allclose(output.magnitude, np.where(exact["mean"] == 0, 0, exact["condition"]), rtol=1e-4)
