"""The row of the benchmark about decoding: what a token costs after many keys, against what it costs after few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from korder import api
from korder.decoding.calls import decode, prefill
from korder.decoding.state import DecodeState
from korder.experiments.benchmark_cases import Case, make_case, require_same
from korder.experiments.benchmark_figures import Measured, Settings, case_text, median_seconds, mib_text, time_text
from korder.spec import AttentionSpec, Policy, Polynomial

SCORE_RMS = 0.3
TARGET = 1.2
SIZES, QUICK_SIZES = (4096, 65536), (1024, 16384)
"""Keys before a token, early and late."""


def decode_token(settings: Settings) -> Measured:
    """Polynomial order 2: appending a token and decoding its query, late against early; the count of flop makes 1."""
    sizes = QUICK_SIZES if settings.quick else SIZES
    policy = Policy() if settings.backend == "auto" else Policy(backends=(settings.backend,))
    spec = AttentionSpec(order=2, method=Polynomial(degree=2), policy=policy)
    works, states, case = [], [], None
    for n in sizes:
        case = make_case(spec, n, 64, settings.backend, SCORE_RMS)
        state = prefill(case.operands.keys, case.operands.values, spec)
        _require_rows(case, state, spec, settings.backend)
        works.append(_step(case, state))
        states.append(state)
    assert case is not None
    early, late = median_seconds(40 if settings.quick else 200, *works)
    times = ", ".join(f"n = {n}: {time_text(t)}" for n, t in zip(sizes, (early, late), strict=True))
    return Measured(
        f"{late / early:.2f} x",
        f"<= {TARGET:.1f} x",
        late / early <= TARGET,
        f"{case_text(case).split(', n =')[0]}, d = e = 64, a token appended and decoded at {times}; "
        f"the state takes {mib_text(states[-1].nbytes)} at both",
        {"ratio": late / early, "early_seconds": early, "late_seconds": late, "state_bytes": states[-1].nbytes},
    )


def _require_rows(case: Case, state: DecodeState, spec: AttentionSpec, backend: str) -> None:
    """Compare decoded queries with `attend` over the same keys."""
    operands = case.operands
    query = operands.query[:, :, :2, :]
    expected = api.attend(query, operands.keys, operands.values, spec=spec, backend=backend)
    require_same(f"decoding after {state.lengths[0]} keys", decode(query, state), expected)


def _step(case: Case, state: DecodeState) -> Callable[[], Any]:
    """Return the work of one token."""
    operands = case.operands
    keys, values = (tuple(x[:, :, :1, :] for x in arrays) for arrays in (operands.keys, operands.values))
    query = operands.query[:, :, :1, :]
    return lambda: decode(query, state.append(keys, values))
