"""The kit of korder itself: all that is mandatory, and some single behaviours of what is claimed beyond that."""

from __future__ import annotations

from collections.abc import Callable

from korder.conformance import parametrize_with_checks
from korder_jax.backend import JaxBackend


@parametrize_with_checks(JaxBackend(), only="core")
def test_core(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(JaxBackend(), only="value.one_kernel")
def test_one_kernel_for_all_offsets(check: Callable[[], None]) -> None:
    check()


@parametrize_with_checks(JaxBackend(), only="polynomial.positive")
def test_a_sum_that_is_not_positive(check: Callable[[], None]) -> None:
    check()
