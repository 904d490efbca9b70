"""Mutants whose results are wrong: tuples, masks, heads, scores, softmax, edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.oracle import bias_of, live_tuples, scores_of, value_factors
from korder.spec import Causal
from korder.spi import Kernel, KernelOutput, Operands, Plan
from tests.mutants import (
    Forward,
    Mutant,
    after,
    before,
    by_key_head,
    reuse_first_mode,
    scaled,
    swapped,
    ungrouped,
    with_mask,
)

Array = Any


def case_of(plan: Plan, operands: Operands) -> Case:
    """The problem as the kit's oracle takes it; the dense mutants make their mistakes on explicit scores."""
    return Case(
        name="", spec=plan.problem.spec, dtype=plan.problem.dtype, device="cpu", query=operands.query,
        keys=operands.keys, values=operands.values, biases=operands.biases, key_masks=operands.key_masks,
        weight=operands.weight, query_offset=operands.query_offset, key_offsets=operands.key_offsets,
    )  # fmt: skip


def dense(weigh: Any) -> Forward:
    """A forward on explicit scores; `weigh` returns weights (b, h, n, m1, .., mk) and lse (b, h, n)."""

    def forward(plan: Plan, kernel: Kernel, operands: Operands, save: bool, residuals: Any) -> KernelOutput:
        if plan.polynomial is not None:
            return kernel.forward(operands, save=save, residuals=residuals)
        case = case_of(plan, operands)
        weights, lse = weigh(scores_of(case, np.float64) + bias_of(case, np.float64), live_tuples(case))
        factors = value_factors(case, np.float64)
        modes = "uvwxyz"[: case.order]
        subscripts = ",".join([f"bhi{modes}", *(part for _, part in factors.values())])
        output = np.einsum(f"{subscripts}->bhie", weights, *(x for x, _ in factors.values()), optimize="greedy")
        return KernelOutput(output.astype(plan.problem.dtype), lse, residuals={} if save else None)

    return forward


def _axes(x: Array) -> tuple[int, ...]:
    return tuple(range(3, x.ndim))


def mask_after_softmax(scores: Array, live: Array) -> Any:
    top = scores.max(axis=_axes(scores), keepdims=True, initial=-1e300)
    weights = np.exp(scores - top)
    total = weights.sum(axis=_axes(scores), keepdims=True)
    lse = np.log(total) + top
    return np.where(live, weights / total, 0.0), lse.reshape(scores.shape[:3])


def last_mode_only(scores: Array, live: Array) -> Any:
    logits = np.where(live, scores, -np.inf)
    lse = np.logaddexp.reduce(logits.reshape(*logits.shape[:3], -1), axis=-1)
    rows = np.logaddexp.reduce(logits, axis=-1)
    weights = np.exp(logits - np.where(np.isfinite(rows), rows, 0.0)[..., None])
    return weights / max(int(np.prod(scores.shape[3:-1])), 1), lse


def no_maximum(scores: Array, live: Array) -> Any:
    weights = np.where(live, np.exp(scores), 0.0)
    total = weights.sum(axis=_axes(scores))
    safe = np.where(total == 0.0, 1.0, total)
    return weights / safe.reshape(*safe.shape, *(1,) * (scores.ndim - 3)), np.where(total == 0, -np.inf, np.log(safe))


def uniform_where_empty(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    empty = found.lse == -np.inf
    means = np.asarray(1.0)
    for value in operands.values:
        means = means * value.mean(axis=2, keepdims=True)
    means = np.repeat(means, plan.problem.heads // plan.problem.groups, axis=1)
    output = np.where(empty[..., None], means, found.output).astype(found.output.dtype)
    return replace(found, output=output)


def leaks_masked(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    """Zero times a masked key is NaN where the key is."""
    nothing: Any = 0.0
    for key in operands.keys:
        nothing = nothing + 0.0 * key.sum()
    return replace(found, output=found.output + found.output.dtype.type(nothing))


def as_if_contiguous(plan: Plan, operands: Operands) -> Operands:
    """Reads memory from the start of a view as if nothing lay between its entries."""

    def read(x: Array) -> Array:
        strides = np.empty(x.shape, x.dtype).strides
        return np.array(np.lib.stride_tricks.as_strided(x, strides=strides)) if x.size else x

    return replace(operands, query=read(operands.query), keys=tuple(map(read, operands.keys)))


def narrow_sums(plan: Plan, operands: Operands) -> Operands:
    """Rounds keys as sums in a narrower float would."""
    return replace(operands, keys=tuple(x.astype(_narrower(x)).astype(x.dtype) for x in operands.keys))


def _narrower(x: Array) -> Any:
    return np.float32 if x.dtype == np.float64 else np.float16


def without_last_bias(plan: Plan, operands: Operands) -> Operands:
    last = operands.biases[-1]
    return replace(operands, biases=(*operands.biases[:-1], None if last is None else np.zeros_like(last)))


def own_head_masks(plan: Plan, operands: Operands) -> Operands:
    return replace(operands, key_masks=tuple(m if m is None else m[:, :1] for m in operands.key_masks))


def first_columns(plan: Plan, operands: Operands) -> Operands:
    query = operands.query.copy()
    query[..., 1024:] = 0.0
    return replace(operands, query=query)


def shared_weight(plan: Plan, operands: Operands) -> Operands:
    """Takes the size of a weight's entries for the entries."""
    weight = operands.weight
    if isinstance(weight, tuple):
        weight = (*weight[:-1], np.abs(weight[-1]))
    return replace(operands, weight=np.abs(weight) if isinstance(weight, np.ndarray) else weight)


def refuse_empty(plan: Plan, operands: Operands) -> Operands:
    if 0 in (plan.problem.queries, plan.problem.batch, *plan.problem.lengths):
        raise ZeroDivisionError("a launch grid of size 0")
    return operands


def squeeze_ones(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    return found if plan.problem.queries > 1 else replace(found, output=found.output[:, :, 0], lse=found.lse[:, :, 0])


def bias_as_number(plan: Plan, operands: Operands) -> Operands:
    """Adds a large negative number for a bias of -inf, so that what it closes is only unlikely."""
    biases = tuple(None if b is None else np.maximum(b, b.dtype.type(-1e4)) for b in operands.biases)
    return replace(operands, biases=biases)


def near_offsets(plan: Plan, operands: Operands) -> Operands:
    """Keeps positions in 32 bits of a float."""
    return replace(
        operands,
        query_offset=int(np.float32(operands.query_offset)),
        key_offsets=tuple(int(np.float32(offset)) for offset in operands.key_offsets),
    )


def hide_nan(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    return replace(found, output=np.nan_to_num(found.output), lse=np.where(np.isnan(found.lse), 0.0, found.lse))


def value_of_other_width(plan: Plan, operands: Operands, found: KernelOutput) -> KernelOutput:
    """Drops channels beyond the score's width."""
    output = found.output.copy()
    output[..., plan.problem.query_width :] = 0.0
    return replace(found, output=output)


def first_mode_alone(plan: Plan, operands: Operands) -> Operands:
    """Moves the keys of all other modes before every query."""
    if plan.problem.spec.mask.kind != "causal":
        return operands
    return replace(operands, key_offsets=(operands.key_offsets[0], *(-(10**6) for _ in operands.key_offsets[1:])))


FORWARD: dict[str, Mutant] = {
    "values swapped": Mutant(
        "values pair with the keys of another mode", ("value.core", "relation.permute"), before(swapped("values"))
    ),
    "keys swapped": Mutant("keys pair with the values of another mode", ("value.core",), before(swapped("keys"))),
    "mode reused": Mutant(
        "the keys of mode 1 stand in every mode",
        ("value.core", "relation.swap", "relation.ones"),
        before(reuse_first_mode),
    ),
    "scale missing": Mutant(
        "scores are not scaled",
        ("value.core", "value.scale"),
        before(scaled(lambda plan: 1.0 / (plan.problem.scale or 1.0))),
    ),
    "scale 1/d": Mutant(
        "1/d where 1/sqrt(d) was asked for",
        ("value.core",),
        before(scaled(lambda plan: plan.problem.query_width**-0.5)),
    ),
    "causal off by one": Mutant(
        "a query sees one key too many",
        ("value.masks", "relation.ones"),
        before(lambda plan, x: replace(x, query_offset=x.query_offset + (plan.problem.spec.mask.kind == "causal"))),
    ),
    "offsets ignored": Mutant(
        "positions are indices",
        ("value.offsets", "value.one_kernel", "relation.shard", "relation.merge"),
        before(lambda plan, x: replace(x, query_offset=0, key_offsets=(0,) * len(x.keys))),
    ),
    "offsets in 32 bits": Mutant("far positions lose their last digits", ("value.one_kernel",), before(near_offsets)),
    "mask on one mode": Mutant(
        "only the keys of mode 1 are masked causally",
        ("value.masks",),
        before(first_mode_alone),
    ),
    "window without end": Mutant(
        "a window is a causal mask", ("value.masks",), compiled=with_mask("window", mask=Causal())
    ),
    "order ignored": Mutant(
        "an ordered mask is a causal one", ("value.masks",), compiled=with_mask("ordered", mask=Causal())
    ),
    "mask after the softmax": Mutant(
        "closed tuples take their share of the sum",
        ("value.masks", "value.key_masks", "relation.masked"),
        dense(mask_after_softmax),
        declares=False,
    ),
    "softmax over the last mode": Mutant(
        "weights sum to 1 over the last mode alone",
        ("value.core", "relation.swap"),
        dense(last_mode_only),
        declares=False,
    ),
    "no maximum subtracted": Mutant(
        "exp of the scores themselves", ("edge.large_scores",), dense(no_maximum), declares=False
    ),
    "uniform where empty": Mutant(
        "a query with nothing to attend to gets the mean value",
        ("edge.nothing_live", "value.offsets"),
        after(uniform_where_empty),
    ),
    "masked NaN leaks": Mutant("a masked key is multiplied by zero", ("edge.masked_nan",), after(leaks_masked)),
    "closed by a large number": Mutant("-inf in a bias becomes -1e4", ("edge.closed_by_bias",), before(bias_as_number)),
    "NaN hidden": Mutant("NaN in a result becomes 0", ("edge.seen_nan",), after(hide_nan)),
    "heads grouped by remainder": Mutant(
        "query head i reads key head i % g",
        ("value.core", "value.orders"),
        before(by_key_head(lambda head, heads, groups: head % groups)),
        compiled=ungrouped,
    ),
    "one head shared": Mutant(
        "every query head reads key head 0",
        ("value.heads",),
        before(by_key_head(lambda head, heads, groups: 0)),
        compiled=ungrouped,
    ),
    "masks of one head": Mutant(
        "the key mask of key head 0 stands for all", ("value.key_masks", "value.together"), before(own_head_masks)
    ),
    "last bias ignored": Mutant("the bias of the last mode is not added", ("value.biases",), before(without_last_bias)),
    "weight without signs": Mutant("entries of the weight lose their sign", ("value.weights",), before(shared_weight)),
    "lse in base 2": Mutant(
        "lse is a binary logarithm",
        ("value.core", "relation.merge"),
        after(lambda plan, x, found: replace(found, lse=found.lse / np.log(2.0))),
    ),
    "sums too narrow": Mutant(
        "operands are rounded to half their bits",
        ("value.core", "value.dtypes", "value.precision"),
        before(narrow_sums),
    ),
    "no negative values": Mutant(
        "value products lose their sign",
        ("relation.linear",),
        before(lambda plan, x: replace(x, values=tuple(np.abs(value) for value in x.values))),
    ),
    "channels cut": Mutant("no more value channels than score columns", ("value.sizes",), after(value_of_other_width)),
    "columns cut": Mutant("columns beyond 1024 are not read", ("edge.wide",), before(first_columns)),
    "strides ignored": Mutant("a view is read as if contiguous", ("edge.strided",), before(as_if_contiguous)),
    "empty refused": Mutant("raises for an empty array", ("edge.length_zero", "edge.no_batch"), before(refuse_empty)),
    "ones squeezed": Mutant(
        "an axis of length 1 is dropped", ("edge.length_one", "edge.one_query"), after(squeeze_ones)
    ),
}
