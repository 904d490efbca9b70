"""C3: relations between results that need no oracle, so they hold at sizes where there are many blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.claims import Claims, respelt, with_spec
from korder.conformance.limits import agree, as_dtype
from korder.conformance.records import Check
from korder.conformance.subject import Found, Subject

Array = Any
SIZES: dict[str, Any] = {"queries": 19, "lengths": (31, 23, 13), "batch": 1, "heads": 2, "small_blocks": False}
POLYNOMIAL_SLACK = 64.0
"""Sums of monomials cancel; their condition numbers are below this in the cases here."""


def _slack(case: Case) -> float:
    return 1.0 if case.spec.polynomial is None else POLYNOMIAL_SLACK


def _same(case: Case, found: Found, other: Found) -> None:
    agree("output", found.output, other.output, dtype=case.dtype, slack=_slack(case))
    agree("lse", found.lse, other.lse, dtype=case.good_to(found.dtypes["lse"]), slack=_slack(case))


def swapped_modes(subject: Subject, case: Case) -> None:
    """Modes change places together with their values."""
    turned = replace(case, keys=case.keys[::-1], values=case.values[::-1])
    _same(case, subject.forward(turned), subject.forward(case))


def permuted_keys(subject: Subject, case: Case) -> None:
    """The keys of a mode are a set."""
    reference = subject.forward(case)
    for mode in range(case.order):
        shuffle = np.random.default_rng(mode).permutation(case.keys[mode].shape[2])
        changed = _in_mode(case, mode, case.keys[mode][:, :, shuffle], case.values[mode][:, :, shuffle])
        _same(case, subject.forward(changed), reference)


def _in_mode(case: Case, mode: int, keys: Array, values: Array, **changes: Any) -> Case:
    return replace(
        case,
        keys=(*case.keys[:mode], keys, *case.keys[mode + 1 :]),
        values=(*case.values[:mode], values, *case.values[mode + 1 :]),
        **changes,
    )


def linear_in_values(subject: Subject, case: Case) -> None:
    """The output is linear in the values of each mode."""
    for mode in range(case.order):
        values = case.values[mode]
        other = np.roll(values, 1, axis=2) * 0.5
        mixed = as_dtype(2.0 * values - 0.5 * other, case.dtype)
        outputs = [
            subject.forward(_in_mode(case, mode, case.keys[mode], value)).output for value in (values, other, mixed)
        ]
        wanted = 2.0 * outputs[0] - 0.5 * outputs[1]
        agree(
            f"output for a sum of values in mode {mode}", outputs[2], wanted, dtype=case.dtype, slack=4 * _slack(case)
        )


def mode_of_ones(subject: Subject, case: Case) -> None:
    """A mode whose keys and values are ones drops out; lse gains the logarithm of its visible keys."""
    for mode in range(case.order):
        ones = _in_mode(case, mode, np.ones_like(case.keys[mode]), np.ones_like(case.values[mode]))
        rest = [t for t in range(case.order) if t != mode]
        smaller = replace(
            with_spec(case, order=case.order - 1, scale=case.scale),
            keys=tuple(case.keys[t] for t in rest),
            values=tuple(case.values[t] for t in rest),
            biases=tuple(case.biases[t] for t in rest),
            key_masks=tuple(case.key_masks[t] for t in rest),
            key_offsets=tuple(case.key_offsets[t] for t in rest),
        )
        length, queries = case.keys[mode].shape[2], case.query.shape[2]
        causal = case.spec.mask.kind == "causal"
        copies = np.minimum(np.arange(queries) + 1, length) if causal else np.full(queries, length)
        found, wanted = subject.forward(ones), subject.forward(smaller)
        agree("output", found.output, wanted.output, dtype=case.dtype, slack=_slack(case))
        agree(
            "lse", found.lse, wanted.lse + np.log(copies), dtype=case.good_to(found.dtypes["lse"]), slack=_slack(case)
        )


def masked_is_removed(subject: Subject, case: Case) -> None:
    """Masking keys of a mode gives what removing them gives."""
    for mode in range(case.order):
        kept = np.random.default_rng(mode).random(case.keys[mode].shape[2]) < 0.6
        kept[0] = True
        masks = list(case.key_masks)
        masks[mode] = np.broadcast_to(kept, (case.query.shape[0], 1, kept.size))
        removed = _in_mode(case, mode, case.keys[mode][:, :, kept], case.values[mode][:, :, kept])
        _same(case, subject.forward(replace(case, key_masks=tuple(masks))), subject.forward(removed))


def merged_parts(subject: Subject, case: Case) -> None:
    """Parts over disjoint keys of a mode make the whole, weighted by their lse."""
    mode = case.order - 1
    length = case.keys[mode].shape[2]
    parts = []
    for start, stop in ((0, length // 3), (length // 3, length)):
        keys, values = case.keys[mode][:, :, start:stop], case.values[mode][:, :, start:stop]
        offsets = (*case.key_offsets[:mode], case.key_offsets[mode] + start)
        parts.append(subject.forward(_in_mode(case, mode, keys, values, key_offsets=offsets)))
    whole = subject.forward(case)
    with np.errstate(all="ignore"):
        lse = np.logaddexp(parts[0].lse, parts[1].lse)
        lse = np.where(np.isnan(lse), -np.inf, lse)
        shares = [np.where(part.lse == -np.inf, 0.0, np.exp(part.lse - lse)) for part in parts]
    output = sum(part.output * share[..., None] for part, share in zip(parts, shares, strict=True))
    agree("output", output, whole.output, dtype=case.dtype, slack=4.0)
    agree("lse", lse, whole.lse, dtype=case.good_to(whole.dtypes["lse"]), slack=4.0)


def shard_of_rows(subject: Subject, case: Case) -> None:
    """Some of the queries, with their offset, give their rows of the whole."""
    whole = subject.forward(case)
    start, stop = 5, 14
    shard = replace(case, query=case.query[:, :, start:stop], query_offset=case.query_offset + start)
    found = subject.forward(shard)
    agree("output", found.output, whole.output[:, :, start:stop], dtype=case.dtype, slack=_slack(case))
    agree("lse", found.lse, whole.lse[:, :, start:stop], dtype=case.good_to(found.dtypes["lse"]), slack=_slack(case))


def _cases(*masks: str, methods: tuple[str, ...] = ("exact", "polynomial"), orders: tuple[int, ...] = (1, 2, 3)) -> Any:
    def cases(claims: Claims) -> Iterable[Case]:
        for method in claims.methods():
            if method not in methods:
                continue
            for order in claims.orders(*orders):
                for mask in claims.masks(method):
                    if mask not in masks:
                        continue
                    # every key in sight of the last query, unequal lengths in every mode
                    options = SIZES | ({"query_offset": 8, "key_offsets": (0, 3, 1)} if mask != "full" else {})
                    if method == "polynomial":
                        options = options | {"query_width": 3}
                    yield claims.case("relations", order, method=method, mask=mask, **options)

    return cases


def _smaller_order(claims: Claims) -> Iterable[Case]:
    for order in claims.orders(2, 3):
        for mask in claims.masks("exact"):
            if mask in ("full", "causal") and claims.orders(order - 1):
                yield claims.case("relations", order, mask=mask, **SIZES)


def _masked(claims: Claims) -> Iterable[Case]:
    for case in _cases("full")(claims):
        support = claims.method(case.spec.method.kind)
        if support is not None and support.key_masks:
            yield respelt(case, "masked")


ALL_MASKS = ("full", "causal", "window", "ordered")
CHECKS = (
    Check(
        "C3.1",
        "relation.swap",
        "Modes that change places with their values change nothing.",
        swapped_modes,
        _cases("full", orders=(2, 3)),
    ),
    Check("C3.2", "relation.permute", "The keys of a mode are a set.", permuted_keys, _cases("full")),
    Check(
        "C3.3",
        "relation.linear",
        "The output is linear in the values of each mode.",
        linear_in_values,
        _cases(*ALL_MASKS),
    ),
    Check(
        "C3.4",
        "relation.ones",
        "A mode of ones drops out, and lse gains the logarithm of its visible keys.",
        mode_of_ones,
        _smaller_order,
    ),
    Check("C3.5", "relation.masked", "A masked key is a removed key.", masked_is_removed, _masked),
    Check(
        "C3.6",
        "relation.merge",
        "Parts over disjoint keys make the whole, weighted by their lse.",
        merged_parts,
        _cases(*ALL_MASKS, methods=("exact",)),
    ),
    Check(
        "C3.7",
        "relation.shard",
        "A shard of queries with its offset gives the rows of the whole.",
        shard_of_rows,
        _cases(*ALL_MASKS),
    ),
)
