"""Times of decision 014: `python docs/decisions/causal_forms.py`, a minute or two.

The kernels' causal forward, and a sketch of the one by matrix products, over the forward of the full mask.
"""

from __future__ import annotations

from functools import partial
from math import factorial
from typing import Any

import array_api_compat.numpy
import array_api_compat.torch
import numpy as np
import torch

from korder import AttentionSpec, Causal, Polynomial
from korder.experiments.benchmark_cases import Case, make_case
from korder.experiments.benchmark_figures import median_seconds
from korder.methods.features import feature_table, multinomials, polynomial_features

PROBLEMS = ((64, 2, 1024), (16, 4, 512), (8, 4, 2048))
CHUNKS = (8, 16, 32)


def by_products(xp: Any, case: Case, degree: int, chunk: int) -> Any:
    """Order 2 in plain float32: past keys of both modes, of one mode, and of none, each as products.

    No absolute sums, no float64 totals, no powers apart: less than a certificate needs.
    """
    query, keys, values = (
        case.operands.query[0, 0],
        *([x[0, 0] for x in arrays] for arrays in (case.operands.keys, case.operands.values)),
    )
    n, width = query.shape
    table = feature_table(width, degree)
    powers = [np.full(table.rows(s).stop - table.rows(s).start, 1.0 / factorial(s)) for s in range(degree + 1)]
    weights = xp.asarray((np.concatenate(powers) * multinomials(table)).astype("float32"))[:, None]
    ones = xp.ones((n, 1), dtype=xp.float32)
    weighted = [xp.concat([value, ones], axis=1) for value in values]
    states = [xp.zeros((table.features, weighted[0].shape[1]), dtype=xp.float32) for _ in keys]
    seen = xp.tril(xp.ones((chunk, chunk), dtype=xp.float32))
    einsum: Any = torch.einsum if isinstance(query, torch.Tensor) else np.einsum
    rows = []
    for start in range(0, n, chunk):
        at = slice(start, start + chunk)
        features = [polynomial_features(xp, table, xp.permute_dims(x[at, :], (1, 0))) for x in keys]
        left = polynomial_features(xp, table, xp.permute_dims(query[at, :], (1, 0)) * case.plan.problem.scale) * weights
        total = xp.permute_dims(left, (1, 0)) @ (states[0] * states[1])
        for t in (0, 1):
            folded = left[None, :, :] * xp.permute_dims(states[1 - t], (1, 0))[:, :, None]
            pairs = (xp.permute_dims(folded, (0, 2, 1)) @ features[t]) * seen
            total = total + einsum("cij,jc->ic", pairs, weighted[t][at, :])
        scores = einsum("id,jd,kd->ijk", query[at, :], keys[0][at, :], keys[1][at, :]) * case.plan.problem.scale
        polynomial = sum(scores**s / factorial(s) for s in range(degree + 1)) * seen[:, :, None] * seen[:, None, :]
        total = total + einsum("ijk,jc,kc->ic", polynomial, weighted[0][at, :], weighted[1][at, :])
        states = [state + u @ w[at, :] for state, u, w in zip(states, features, weighted, strict=True)]
        rows.append(total[:, :-1] / total[:, -1:])
    return xp.concat(rows, axis=0)


def main() -> None:
    """Print a line for each problem and backend."""
    for width, degree, n in PROBLEMS:
        for backend, xp in (("numpy", array_api_compat.numpy), ("torch", array_api_compat.torch)):
            spec = AttentionSpec(order=2, method=Polynomial(degree=degree))
            whole = make_case(spec, n, width, backend, 0.3)
            causal = make_case(spec.model_copy(update={"mask": Causal()}), n, width, backend, 0.3)
            expected = np.asarray(causal.forward().output)[0, 0]
            gap = np.abs(np.asarray(by_products(xp, causal, degree, 16)) - expected).max()
            assert gap < 2e-2, gap  # the sketch does not centre rows, which the degree feels
            sketches = [partial(by_products, xp, causal, degree, chunk) for chunk in CHUNKS]
            full, running, *products = median_seconds(3, whole.forward, causal.forward, *sketches)
            shown = ", ".join(f"{x / full:.1f} in chunks of {c}" for x, c in zip(products, CHUNKS, strict=True))
            print(
                f"{backend}, d = {width}, degree {degree}, n = {n}: running sums {running / full:.1f}; products {shown}"
            )


if __name__ == "__main__":
    main()
