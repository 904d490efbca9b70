"""What is masked never matters, not even NaN; what is not masked reaches the rows that see it, and no other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from reference import Case, largest_error, random_case

import korder
from korder.spi import NEEDS, KernelOutput, OutputGradients

CAUSAL = random_case(2, mask=korder.Causal(), key_masks=True, query_offset=-2)
ORDERED = random_case(2, mask=korder.Ordered(), query_offset=1)
UNITS = jnp.ones((2, 4, 11, 4)), jnp.ones((2, 4, 11))


def with_entry(arrays: tuple[Any, ...], mode: int, at: tuple[Any, ...], value: float) -> tuple[Any, ...]:
    changed = arrays[mode].copy()
    changed[at] = value
    return (*arrays[:mode], changed, *arrays[mode + 1 :])


def results(case: Case, kernel: Any = None) -> tuple[KernelOutput, Any]:
    kernel, operands = kernel or case.kernel(small=True), case.operands()
    found = kernel.forward(operands, save=True)
    return found, kernel.backward(operands, found, OutputGradients(*UNITS), needs=NEEDS)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_masked_key_or_value_changes_nothing(value: float) -> None:
    mask = np.array(CAUSAL.key_masks[0])
    mask[:, :, 3] = False
    case = replace(CAUSAL, key_masks=(mask, CAUSAL.key_masks[1]))
    kernel = case.kernel(small=True)
    clean, gradients = results(case, kernel)
    spoilt = replace(
        case,
        keys=with_entry(case.keys, 0, (..., 3, slice(None)), value),
        values=with_entry(case.values, 0, (..., 3, slice(None)), value),
    )
    found, spoilt_gradients = results(spoilt, kernel)
    assert largest_error((found.output, found.lse), (clean.output, clean.lse)) == 0.0
    for name in ("query", "keys", "values"):
        assert largest_error(getattr(spoilt_gradients, name), getattr(gradients, name)) == 0.0


@pytest.mark.parametrize("case", [CAUSAL, ORDERED], ids=["causal", "ordered"])
def test_rows_that_do_not_see_nan_are_clean_and_so_are_their_gradients(case: Case) -> None:
    # key 4 of mode 1 is visible, but from position 4 on only; the query offset moves that to row 4 - offset
    kernel = case.kernel(small=True)
    first = 4 - case.query_offset
    clean, gradients = results(case, kernel)
    for field in ("keys", "values"):
        found, spoilt = results(
            replace(case, **{field: with_entry(getattr(case, field), 1, (0, 0, 4, 2), np.nan)}), kernel
        )
        rows = np.isnan(np.asarray(found.output)).any(-1)
        sees = np.isfinite(np.asarray(clean.lse)) & (np.arange(11) >= first)
        masked = np.zeros((2, 4, 1), bool)
        masked[0, :2] = True if case.key_masks[1] is None else case.key_masks[1][0, 0, 4]
        np.testing.assert_array_equal(rows, sees & masked)
        keep = ~rows
        assert keep.any()
        assert largest_error(found.output[keep], clean.output[keep]) == 0.0
        assert largest_error(spoilt.query[keep], gradients.query[keep]) == 0.0
        other = np.asarray(spoilt.values[0])[1]
        assert largest_error(other, gradients.values[0][1]) == 0.0


def test_nan_in_one_channel_of_a_value_stays_in_that_channel() -> None:
    case = replace(CAUSAL, key_masks=tuple(np.ones_like(mask) for mask in CAUSAL.key_masks))
    kernel = case.kernel(small=True)
    found, _ = results(replace(case, values=with_entry(case.values, 0, (1, 0, 0, 3), np.nan)), kernel)
    clean, _ = results(case, kernel)
    nan = np.isnan(np.asarray(found.output))
    wanted = np.zeros_like(nan)
    wanted[1, :2, 2:, 3] = True
    np.testing.assert_array_equal(nan, wanted)
    assert largest_error(np.asarray(found.output)[~nan], np.asarray(clean.output)[~nan]) == 0.0
    assert largest_error(found.lse, clean.lse) == 0.0


def test_an_infinite_value_is_infinite_in_order_one() -> None:
    case = random_case(1, mask=korder.Causal())
    found = case.kernel(small=True).forward(
        replace(case, values=with_entry(case.values, 0, (0, 1, 5, 1), -np.inf)).operands(), save=False
    )
    infinite = np.isneginf(np.asarray(found.output))
    wanted = np.zeros_like(infinite)
    wanted[0, 2:, 5:, 1] = True
    np.testing.assert_array_equal(infinite, wanted)
    assert not np.isnan(np.asarray(found.output)).any()


def test_a_bias_of_minus_infinity_closes_whatever_the_score_is() -> None:
    case = random_case(2, biases=("full", None))
    biases = with_entry(case.biases, 0, (..., slice(0, 6), 2), -np.inf)
    closed = replace(case, biases=biases)
    kernel = case.kernel(small=True)
    clean = kernel.forward(closed.operands(), save=False)
    found = kernel.forward(replace(closed, keys=with_entry(case.keys, 0, (..., 2, 1), np.nan)).operands(), save=False)
    assert largest_error(found.output[:, :, :6], clean.output[:, :, :6]) == 0.0
    assert bool(jnp.all(jnp.isnan(found.output[:, :, 6:])))
