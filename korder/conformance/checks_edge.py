"""C6: the edges: empty and single lengths, nothing to attend to, large scores, NaN, views with gaps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from korder.conformance.cases import Case
from korder.conformance.checks_gradient import compare_gradients, differentiable, rounding_of, upstream
from korder.conformance.checks_polynomial import output_matches
from korder.conformance.checks_value import matches_oracle
from korder.conformance.claims import Claims, shifted
from korder.conformance.limits import agree, as_dtype, require
from korder.conformance.oracle import live_tuples
from korder.conformance.records import Check
from korder.conformance.subject import Found, Subject, named_gradients
from korder.spi import NEEDS

Array = Any
POISON = (np.nan, -np.inf, 1e30)
SMALL: dict[str, Any] = {"batch": 1, "heads": 2, "queries": 7}
SLACK = 64.0
"""A kernel may compute another way where operands are not finite; the results agree to this many relation limits."""


def right(subject: Subject, case: Case) -> None:
    """Raise unless a case of either method comes out right, and its gradients with it where those are claimed."""
    if case.spec.polynomial is None:
        matches_oracle(subject, case)
    else:
        output_matches(subject, case)
    if case.spec.polynomial is None and differentiable(subject.claims):
        pair = upstream(case)
        result, found = subject.backward(case, *pair)
        compare_gradients(subject, case, named_gradients(found), pair, condition=rounding_of(result))


def nothing_but_zeros(subject: Subject, case: Case) -> None:
    """Raise unless rows that see nothing give zeros, lse -inf, and no gradient; the shapes are right even if empty."""
    found = subject.forward(case)
    dead = ~live_tuples(case).any(axis=tuple(range(3, 3 + case.order)))
    rows = case.query.shape[:3]
    require(
        found.output.shape == (*rows, case.values[0].shape[3]) and found.lse.shape == rows,
        "an empty problem has results of its own shape.",
        expected=f"{(*rows, case.values[0].shape[3])} and {rows}",
        got=f"{found.output.shape} and {found.lse.shape}",
    )
    require(bool(np.all(found.output[dead] == 0.0)), "a query with nothing to attend to gives zeros.",
            expected="0", got=_some(found.output[dead]))  # fmt: skip
    require(bool(np.all(found.lse[dead] == -np.inf)), "lse of a query with nothing to attend to is -inf.",
            expected="-inf", got=_some(found.lse[dead]))  # fmt: skip
    if not differentiable(subject.claims, case.spec.method.kind):
        return
    output, lse = upstream(case)
    # the gradients of the rows that see something are looked at elsewhere
    pair = np.where(dead[..., None], output, 0.0), np.where(dead, lse, 0.0)
    _, gradients = subject.backward(case, *pair)
    operands = case.arrays()
    for name, gradient in named_gradients(gradients).items():
        values = subject.arrays.numpy(gradient)
        require(
            values.shape == operands[name].shape and bool(np.all(values == 0.0)),
            f"a query with nothing to attend to gives no gradient of {name}.",
            expected=f"zeros {operands[name].shape}",
            got=f"{_some(values)} {values.shape}",
        )


def _some(x: Array) -> str:
    odd = np.ravel(x)
    odd = odd[(odd != 0) | np.isnan(odd)]
    return np.array2string(odd[:3], precision=4)


def masked_never_leaks(subject: Subject, case: Case) -> None:
    """Whatever masked keys and their values hold, result and gradients are as without; theirs are zero."""
    clean = subject.forward(case)
    pair = upstream(case)
    backward = differentiable(subject.claims, case.spec.method.kind)
    wanted = named_gradients(subject.backward(case, *pair)[1]) if backward else {}
    for poison in POISON:
        spoilt = _poisoned(case, float(as_dtype(np.asarray(poison), case.dtype)))
        _agrees(case, subject.forward(spoilt), clean)
        if not backward:
            continue
        found = named_gradients(subject.backward(spoilt, *pair)[1])
        for name, gradient in wanted.items():
            got, plain = subject.arrays.numpy(found[name]), subject.arrays.numpy(gradient)
            agree(f"gradient of {name} beside masked {poison}", got, plain, dtype=case.dtype, slack=SLACK)


def _agrees(case: Case, found: Found, clean: Found) -> None:
    agree("output", found.output, clean.output, dtype=case.dtype, slack=SLACK)
    agree("lse", found.lse, clean.lse, dtype=case.good_to(clean.dtypes["lse"]), slack=SLACK)


def _poisoned(case: Case, poison: float) -> Case:
    """Return a case whose masked keys hold `poison`, and their values too."""
    groups = {"keys": list(case.keys), "values": list(case.values)}
    for t in range(case.order):
        dead = _closed(case, t)
        for arrays in groups.values():
            arrays[t] = np.where(np.broadcast_to(dead[..., None], arrays[t].shape), poison, arrays[t])
    return replace(case, keys=tuple(groups["keys"]), values=tuple(groups["values"]))


def _closed(case: Case, mode: int) -> Array:
    """Return which keys of a mode no query may see, (b, 1 or g, m): masked, or under a shared bias of -inf."""
    mask, bias = case.key_masks[mode], case.biases[mode]
    closed = np.zeros((1, 1, case.keys[mode].shape[2]), dtype=bool) if mask is None else ~mask
    return closed if bias is None else closed | (bias[:, :, 0, :] == -np.inf)


def nan_reaches_rows_that_see_it(subject: Subject, case: Case) -> None:
    """A NaN in a key, a value or a query reaches every row that sees it and leaves all others as they are."""
    clean = subject.forward(case)
    for mode in range(case.order):
        place = case.keys[mode].shape[2] - 2
        sees = np.take(live_tuples(case), place, axis=3 + mode).any(axis=tuple(range(3, 2 + case.order)))
        for name in ("keys", "values"):
            arrays = list(getattr(case, name))
            arrays[mode] = arrays[mode].copy()
            arrays[mode][:, :, place, :] = np.nan
            changed: dict[str, Any] = {name: tuple(arrays)}
            found = subject.forward(replace(case, **changed))
            _spoils(case, found, clean, sees, with_lse=name == "keys")
    query = case.query.copy()
    query[:, 0, 5, 1] = np.nan
    hit = np.zeros(case.query.shape[:3], dtype=bool)
    hit[:, 0, 5] = True
    hit &= clean.lse != -np.inf
    _spoils(case, subject.forward(replace(case, query=query)), clean, hit, with_lse=True)


def _spoils(case: Case, found: Found, clean: Found, rows: Array, *, with_lse: bool) -> None:
    output = np.where(rows[..., None], np.nan, clean.output)
    agree("output", found.output, output, dtype=case.dtype, slack=SLACK)
    if with_lse:
        agree("lse", found.lse, np.where(rows, np.nan, clean.lse), dtype=case.good_to(clean.dtypes["lse"]), slack=SLACK)


def strided_operands(subject: Subject, case: Case) -> None:
    """Operands that are views with gaps give what contiguous ones give."""
    clean = subject.forward(case)
    kernel, operands = subject.kernel(case), subject.operands(case, strided=True)
    with np.errstate(all="ignore"):
        raw = kernel.forward(operands, save=True)
        _agrees(case, subject.read(raw), clean)
        if not differentiable(subject.claims, case.spec.method.kind):
            return
        pair = upstream(case)
        grads = subject.upstream(case, clean, *pair)
        found = named_gradients(kernel.backward(operands, raw, grads, needs=NEEDS))
    for name, wanted in named_gradients(subject.backward(case, *pair)[1]).items():
        got, plain = subject.arrays.numpy(found[name]), subject.arrays.numpy(wanted)
        agree(f"gradient of {name}", got, plain, dtype=case.dtype, slack=SLACK)


def _for_methods(
    masks: tuple[str, ...], make: Callable[[Claims, str, str, int], Iterable[Case]], orders: tuple[int, ...] = (1, 2, 3)
) -> Callable[[Claims], Iterable[Case]]:
    def cases(claims: Claims) -> Iterable[Case]:
        for method in claims.methods():
            for mask in claims.masks(method):
                for order in claims.orders(*orders) if mask in masks else ():
                    yield from make(claims, method, mask, order)

    return cases


def _lengths(*chosen: tuple[int, tuple[int, ...]]) -> Any:
    """Return a maker of cases with those (queries, lengths)."""

    def make(claims: Claims, method: str, mask: str, order: int) -> Iterable[Case]:
        for queries, lengths in chosen:
            label = f"n={queries} m={'x'.join(map(str, lengths[:order]))}"
            yield claims.case(label, order, method=method, mask=mask, queries=queries, lengths=lengths)

    return make


def _empty_batch(claims: Claims, method: str, mask: str, order: int) -> Iterable[Case]:
    yield claims.case("no batch entry", order, method=method, mask=mask, batch=0)


def _closed_rows(claims: Claims, method: str, mask: str, order: int) -> Iterable[Case]:
    if mask != "full":
        yield claims.case("keys come late", order, method=method, mask=mask, key_offsets=(4, 2, 3))
        yield claims.case(
            "keys come after all", order, method=method, mask=mask, key_offsets=(*(0, 2, 3)[: order - 1], 40)
        )
    support = claims.method(method)
    if support is not None and support.key_masks:
        case = claims.case("a mode all masked", order, method=method, mask=mask, key_masks=True)
        masks = [mask.copy() for mask in case.key_masks if mask is not None]
        masks[-1][0, 0] = False
        yield replace(case, key_masks=tuple(masks))


def _large(claims: Claims) -> Iterable[Case]:
    """Yield integer operands, so that scores near +-1e4 are exact in every dtype."""
    for mask in claims.masks("exact"):
        for order in claims.orders(1, 2, 3):
            rng = np.random.default_rng(order)
            top = {1: 40, 2: 12, 3: 6}[order]
            scale = 2.0 ** round(np.log2(1e4 / top ** (order + 1)))
            case = claims.case("large scores", order, mask=mask, query_width=4, spec={"scale": scale})
            query, *keys = (rng.integers(-top, top + 1, x.shape).astype(np.float64) for x in (case.query, *case.keys))
            yield replace(case, query=query, keys=tuple(keys))


def _wide(claims: Claims) -> Iterable[Case]:
    for order in claims.orders(1, 2):
        yield claims.case("wide", order, query_width=2053, value_width=3, batch=1, heads=2, queries=5)
        yield claims.case("wide values", order, query_width=3, value_width=1031, batch=1, heads=2, queries=5)


def _with_masks(claims: Claims, method: str, mask: str, order: int) -> Iterable[Case]:
    support = claims.method(method)
    if support is not None and support.key_masks:
        offsets = shifted(mask, query_offset=4)
        yield claims.case("poisoned", order, method=method, mask=mask, key_masks=True, **SMALL, **offsets)


def _closed_by_bias(claims: Claims, method: str, mask: str, order: int) -> Iterable[Case]:
    support = claims.method(method)
    if support is not None and "key" in support.biases:
        case = claims.case("closed by a bias", order, method=method, mask=mask, biases=("shared",) * 3, **SMALL)
        biases = []
        for bias in case.biases:
            assert bias is not None
            closed = bias.copy()
            closed[..., -2] = -np.inf
            biases.append(closed)
        yield replace(case, biases=tuple(biases))


def _seen(claims: Claims, method: str, mask: str, order: int) -> Iterable[Case]:
    offsets = shifted(mask, key_offsets=(0, 2, 4))
    yield claims.case("NaN", order, method=method, mask=mask, **SMALL, **offsets)


def _strided(claims: Claims, method: str, mask: str, order: int) -> Iterable[Case]:
    support = claims.method(method)
    options: dict[str, Any] = {"key_masks": True} if support is not None and support.key_masks else {}
    if support is not None and "key" in support.biases:
        options["biases"] = ("key",) * 3
    yield claims.case("strided", order, method=method, mask=mask, **options)
    if support is not None and "full" in support.weights and mask == "full":
        yield claims.case("strided weight", order, method=method, mask=mask, weight="full")


ALL = ("full", "causal", "window", "ordered")
ZERO = _lengths((5, (0, 3, 2)), (5, (3, 0, 2)), (0, (3, 2, 5)))
ONE = _lengths((1, (1, 1, 1)), (7, (1, 1, 1)), (5, (1, 3, 2)))
CHECKS = (
    Check("C6.1", "edge.length_one", "Modes and queries of length 1 are like any other.", right,
          _for_methods(("full", "causal"), ONE)),
    Check("C6.2", "edge.one_query", "One query against many keys is like any other.", right,
          _for_methods(("full",), _lengths((1, (7, 5, 3))))),
    Check("C6.3", "edge.length_zero", "A mode of length 0, or no query, gives zeros, lse -inf, zero gradients.",
          nothing_but_zeros, _for_methods(("full", "causal"), ZERO)),
    Check("C6.4", "edge.no_batch", "A batch of no entries gives results of its shape.", nothing_but_zeros,
          _for_methods(("full", "causal"), _empty_batch, (2,))),
    Check("C6.5", "edge.nothing_live", "A query with nothing to attend to gives zeros, lse -inf and zero gradients.",
          nothing_but_zeros, _for_methods(ALL, _closed_rows)),
    Check("C6.6", "edge.large_scores", "Scores of +-1e4 overflow nothing.", right, _large),
    Check("C6.7", "edge.wide", "Thousands of columns are like any other number.", right, _wide),
    Check("C6.8", "edge.masked_nan", "NaN and infinities in masked keys and their values never leak.",
          masked_never_leaks, _for_methods(ALL, _with_masks)),
    Check("C6.9", "edge.closed_by_bias", "A bias of -inf closes its keys as a mask does.", masked_never_leaks,
          _for_methods(("full", "causal"), _closed_by_bias)),
    Check("C6.10", "edge.seen_nan", "An unmasked NaN reaches exactly the rows that see it.",
          nan_reaches_rows_that_see_it, _for_methods(ALL, _seen)),
    Check("C6.11", "edge.strided", "Operands may be views with gaps.", strided_operands,
          _for_methods(("full", "causal"), _strided)),
)  # fmt: skip
