"""korder: order-k generalized attention, exact or certified near-linear, on any backend.

Names load on first use, so that `import korder` costs next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from korder.api import attend, attend_result, backends, measure, merge, plan, register_backend
    from korder.decoding.calls import decode, decode_result, load_state, prefill
    from korder.decoding.state import DecodeState
    from korder.errors import (
        AccuracyError,
        AccuracyWarning,
        BackendUnavailableError,
        ConformanceFailure,
        KernelError,
        KorderError,
        OperandError,
        PluginLoadError,
        ShapeError,
        SpecError,
        UnknownBackendError,
        UnsupportedProblemError,
    )
    from korder.operators import KhatriRao, Kronecker
    from korder.planning.regime import Regime, regime
    from korder.result import Certificate, Provenance, Result
    from korder.spec import AttentionSpec, Auto, Causal, Exact, Full, Ordered, Policy, Polynomial, Split, Window
    from korder.spec.layers import AttentionLayerSpec, TransformerBlockSpec
    from korder.weights import marginals, top_tuples

__version__ = "0.1.0"

_HOMES = {
    "korder.api": ("attend", "attend_result", "backends", "measure", "merge", "plan", "register_backend"),
    "korder.decoding.calls": ("decode", "decode_result", "load_state", "prefill"),
    "korder.decoding.state": ("DecodeState",),
    "korder.errors": (
        "AccuracyError",
        "AccuracyWarning",
        "BackendUnavailableError",
        "ConformanceFailure",
        "KernelError",
        "KorderError",
        "OperandError",
        "PluginLoadError",
        "ShapeError",
        "SpecError",
        "UnknownBackendError",
        "UnsupportedProblemError",
    ),
    "korder.operators": ("KhatriRao", "Kronecker"),
    "korder.planning.regime": ("Regime", "regime"),
    "korder.result": ("Certificate", "Provenance", "Result"),
    "korder.spec": (
        "AttentionSpec",
        "Auto",
        "Causal",
        "Exact",
        "Full",
        "Ordered",
        "Policy",
        "Polynomial",
        "Split",
        "Window",
    ),
    "korder.spec.layers": ("AttentionLayerSpec", "TransformerBlockSpec"),
    "korder.weights": ("marginals", "top_tuples"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AccuracyError",
    "AccuracyWarning",
    "AttentionLayerSpec",
    "AttentionSpec",
    "Auto",
    "BackendUnavailableError",
    "Causal",
    "Certificate",
    "ConformanceFailure",
    "DecodeState",
    "Exact",
    "Full",
    "KernelError",
    "KhatriRao",
    "KorderError",
    "Kronecker",
    "OperandError",
    "Ordered",
    "PluginLoadError",
    "Policy",
    "Polynomial",
    "Provenance",
    "Regime",
    "Result",
    "ShapeError",
    "SpecError",
    "Split",
    "TransformerBlockSpec",
    "UnknownBackendError",
    "UnsupportedProblemError",
    "Window",
    "__version__",
    "attend",
    "attend_result",
    "backends",
    "decode",
    "decode_result",
    "load_state",
    "marginals",
    "measure",
    "merge",
    "plan",
    "prefill",
    "regime",
    "register_backend",
    "top_tuples",
]


_SUBMODULES = frozenset({"conformance", "jax", "spec", "spi", "torch"})
"""Reached as attributes without an import of their own; those of a framework import it then and not before."""


def __getattr__(name: str) -> Any:
    import importlib

    if name in _SUBMODULES:
        return importlib.import_module(f"korder.{name}")  # which sets the attribute
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'korder' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
