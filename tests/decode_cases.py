"""Decoding for several test files: a random case fed to a state in pieces, and a registry of a test's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import korder
from korder.dispatch.registry import Registry
from korder.spec import AttentionSpec
from tests.problems import Case, random_case

Array = Any


def decode_case(order: int, *, seed: int = 0, spread: float = 0.8, **options: Any) -> Case:
    """Return a case in which every query sees every key."""
    return random_case(order, seed=seed, spread=spread, **options)


def pieces(case: Case, cuts: tuple[int, ...]) -> Iterator[tuple[tuple[Array, ...], tuple[Array, ...], Any]]:
    """Yield keys, values and key masks of the case, mode t cut at `cut + t` for every cut; a piece may be empty."""
    ends = [[min(max(cut + t, 0), key.shape[2]) for cut in cuts] for t, key in enumerate(case.keys)]
    spans = [zip([0, *found], [*found, key.shape[2]], strict=True) for found, key in zip(ends, case.keys, strict=True)]
    masks = case.key_masks or (None,) * len(case.keys)
    for parts in zip(*spans, strict=True):
        slices = [slice(*part) for part in parts]
        keys, values = (
            tuple(x[:, :, at] for x, at in zip(arrays, slices, strict=True)) for arrays in (case.keys, case.values)
        )
        cut = tuple(None if m is None else m[..., at] for m, at in zip(masks, slices, strict=True))
        yield keys, values, cut if any(m is not None for m in cut) else None


def fed(case: Case, cuts: tuple[int, ...] = (0, 1, 4), asarray: Any = lambda x: x, **options: Any) -> Any:
    """Return the state of a case's keys, given in pieces."""
    state = None
    for keys, values, masks in pieces(case, cuts):
        keys, values = (tuple(map(asarray, arrays)) for arrays in (keys, values))
        masks = None if masks is None else tuple(None if m is None else asarray(m) for m in masks)
        if state is None:
            state = korder.prefill(keys, values, case.spec, key_masks=masks, **options)
        else:
            state = state.append(keys, values, key_masks=masks)
    return state


def with_method(case: Case, method: Any, **changes: Any) -> Case:
    """Return the case with another method."""
    return case.with_spec(method=method, **changes)


def own_registry(monkeypatch: pytest.MonkeyPatch, *backends: Any) -> Registry:
    """Make decoding, `attend` and `plan` use a registry that is the test's own, with more backends."""
    from korder import api
    from korder.decoding import factor_cache, polynomial_state

    registry = Registry.from_entry_points()
    for backend in backends:
        registry.register(backend)
    for module in (api, factor_cache, polynomial_state):
        monkeypatch.setattr(module, "default_registry", lambda: registry)
    return registry


def stretched(case: Case, mode: int, factors: Array) -> Case:
    """Return the case with the keys of a mode multiplied by factors, one per key or one per key and column."""
    factors = np.asarray(factors, dtype=case.dtype)
    factors = factors[:, None] if factors.ndim == 1 else factors
    keys = tuple(key * factors if t == mode else key for t, key in enumerate(case.keys))
    return replace(case, keys=keys)


def spec_of(order: int, method: Any, **changes: Any) -> AttentionSpec:
    """Return a spec."""
    return AttentionSpec(order=order, method=method, **changes)
