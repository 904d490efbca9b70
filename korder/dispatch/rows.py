"""A few rows computed exactly, to set a measured error beside the certificate. An estimate, never a bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from array_api_compat import device

from korder.dispatch.arrays import namespace_of_kind
from korder.dispatch.prepare import prepare
from korder.dispatch.registry import Registry
from korder.dispatch.run import Request
from korder.problem import Problem
from korder.spec import Exact
from korder.spi.operands import KernelOutput, Operands


def estimate(registry: Registry, request: Request, output: KernelOutput, count: int) -> Any:
    """Return (rows, 2): position in the flattened (b, h, n) and the largest error over channels, of `count` rows.

    Cost: 2 m1 .. mk (d + e) flop a row.
    """
    xp = namespace_of_kind(request.array_kind)
    wide = xp.asarray(output.lse).dtype
    flat = xp.reshape(output.output, (-1, output.output.shape[-1]))
    rows = sampled_rows(request.problem, count)
    if not rows:
        return xp.zeros((0, 2), dtype=xp.float64, device=device(flat))
    errors = [
        xp.max(xp.abs(xp.astype(flat[row, :], wide) - xp.astype(exact, wide)))
        for row, exact in zip(rows, exact_rows(registry, request, rows), strict=True)
    ]
    # float64 holds every position; float32 does not beyond 2^24 rows
    return xp.stack(
        [xp.asarray(rows, dtype=xp.float64, device=device(flat)), xp.astype(xp.stack(errors), xp.float64)], axis=-1
    )


def sampled_rows(problem: Problem, count: int) -> tuple[int, ...]:
    """Return `count` positions spread evenly over the flattened (b, h, n) rows, ends included."""
    total = problem.batch * problem.heads * problem.queries
    if count >= total:
        return tuple(range(total))
    if count == 1:
        return (total // 2,)
    return tuple(round(index * (total - 1) / (count - 1)) for index in range(count))


def exact_rows(registry: Registry, request: Request, rows: tuple[int, ...]) -> list[Any]:
    """Return the exact output of single rows, each shaped (e,), by the exact method of whatever backend fits.

    Cost: 2 m1 .. mk (d + e) flop a row.
    """
    problem = request.problem
    outputs = []
    for row in rows:
        batch, rest = divmod(row, problem.heads * problem.queries)
        head, query = divmod(rest, problem.queries)
        operands = single_row(request.operands, batch, head, query, problem.heads // problem.groups)
        outputs.append(_run_exact(registry, request, operands).output[0, 0, 0, :])
    return outputs


def _run_exact(registry: Registry, request: Request, operands: Operands) -> KernelOutput:
    problem = row_problem(request.problem)
    prepared = prepare(registry, problem, request.array_kind, request.backend)
    return prepared.kernel.forward(operands, save=False)


def row_problem(problem: Problem) -> Problem:
    """Return the exact problem of one query of one head."""
    spec = problem.spec.model_copy(update={"method": Exact()})
    return replace(problem, spec=spec, batch=1, heads=1, groups=1, queries=1, statistics=None)


def single_row(operands: Operands, batch: int, head: int, query: int, group_size: int) -> Operands:
    """Return the operands of one query of one head, its position kept by the offset."""
    group = head // group_size

    def pick(bias: Any) -> Any:
        if bias is None:
            return None
        at = [min(index, size - 1) for index, size in zip((batch, head, query), bias.shape[:3], strict=True)]
        return bias[at[0] : at[0] + 1, at[1] : at[1] + 1, at[2] : at[2] + 1, :]

    def keys_of(array: Any) -> Any:
        return array[batch : batch + 1, group : group + 1, ...]

    def mask_of(mask: Any) -> Any:
        if mask is None:
            return None
        at = min(group, mask.shape[1] - 1)
        return mask[batch : batch + 1, at : at + 1, :]

    return Operands(
        query=operands.query[batch : batch + 1, head : head + 1, query : query + 1, :],
        keys=tuple(keys_of(key) for key in operands.keys),
        values=tuple(keys_of(value) for value in operands.values),
        key_masks=tuple(mask_of(mask) for mask in operands.key_masks),
        biases=tuple(pick(bias) for bias in operands.biases),
        weight=operands.weight,
        query_offset=operands.query_offset + query,
        key_offsets=operands.key_offsets,
    )
