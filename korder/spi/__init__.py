"""THE CONTRACT: everything that a backend imports from korder, and nothing else of korder need be imported."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from korder.errors import KernelError, UnsupportedProblemError
from korder.planning.plan import ContractionStep, Cost, Plan, PolynomialPlan, Pruning, Tiling
from korder.planning.slicing import choose_tiling, folded_blocks
from korder.problem import Problem
from korder.spi.availability import Availability
from korder.spi.backend import API_VERSION, Backend, Kernel, StateKernel
from korder.spi.capabilities import Capabilities, MethodSupport, Reason
from korder.spi.hooks import ENTRY_POINT_GROUP, hookimpl
from korder.spi.operands import NEEDS, KernelOutput, OperandGradients, Operands, OutputGradients
from korder.spi.progress import PROGRESS

if TYPE_CHECKING:
    from korder.methods.exact import ExactKernel
    from korder.methods.gradients import GradientSums
    from korder.methods.layout import Layout
    from korder.methods.masks import TileMask
    from korder.methods.tiles import Contracted, Folded, RowCotangent, RowState, TileArithmetic, TileGradients, Wanted
    from korder.planning.pruning import KeptMonomials, kept_monomials
    from korder.spi.namespace import NamespaceBackend, PolynomialKernel

__all__ = [
    "API_VERSION",
    "ENTRY_POINT_GROUP",
    "NEEDS",
    "PROGRESS",
    "Availability",
    "Backend",
    "Capabilities",
    "Contracted",
    "ContractionStep",
    "Cost",
    "ExactKernel",
    "Folded",
    "GradientSums",
    "KeptMonomials",
    "Kernel",
    "KernelError",
    "KernelOutput",
    "Layout",
    "MethodSupport",
    "NamespaceBackend",
    "OperandGradients",
    "Operands",
    "OutputGradients",
    "Plan",
    "PolynomialKernel",
    "PolynomialPlan",
    "Problem",
    "Pruning",
    "Reason",
    "RowCotangent",
    "RowState",
    "StateKernel",
    "TileArithmetic",
    "TileGradients",
    "TileMask",
    "Tiling",
    "UnsupportedProblemError",
    "Wanted",
    "choose_tiling",
    "folded_blocks",
    "hookimpl",
    "kept_monomials",
]

_LAZY = {
    "ExactKernel": "korder.methods.exact",
    "GradientSums": "korder.methods.gradients",
    "KeptMonomials": "korder.planning.pruning",
    "kept_monomials": "korder.planning.pruning",
    "Layout": "korder.methods.layout",
    "NamespaceBackend": "korder.spi.namespace",
    "PolynomialKernel": "korder.methods.polynomial",
    "TileMask": "korder.methods.masks",
    **dict.fromkeys(
        ("Contracted", "Folded", "RowCotangent", "RowState", "TileArithmetic", "TileGradients", "Wanted"),
        "korder.methods.tiles",
    ),
}


def __getattr__(name: str) -> Any:
    # The generic methods import this package's records, so they load only when a backend asks for them.
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
