"""WHAT to compute: frozen pydantic models, no arrays, no framework."""

from korder.spec.attention import MAX_ORDER, AttentionSpec
from korder.spec.masks import Causal, Full, Mask, Ordered, Window
from korder.spec.methods import Auto, Exact, Method, Polynomial, Split
from korder.spec.policy import Policy

__all__ = [
    "MAX_ORDER",
    "AttentionSpec",
    "Auto",
    "Causal",
    "Exact",
    "Full",
    "Mask",
    "Method",
    "Ordered",
    "Policy",
    "Polynomial",
    "Split",
    "Window",
]
