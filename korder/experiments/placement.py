"""Moves operands to the kind of array and the device that a named backend takes, and its answers back to NumPy.

Only a name moves them: "auto" chooses among the backends that take NumPy arrays.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from korder.dispatch.arrays import namespace_of_kind
from korder.dispatch.registry import default_registry
from korder.experiments.inputs import Inputs


@dataclass(frozen=True, slots=True)
class Placement:
    """What arrays a run is made of, and where they lie."""

    kind: str = "numpy"
    device: str = "cpu"


def placement_for(requested: str) -> Placement:
    """Return where the operands of a run belong.

    Args:
        requested: A backend name, or "auto", which `KORDER_BACKEND` may replace.

    Raises:
        UnknownBackendError: No backend has that name.
    """
    named = requested if requested != "auto" else os.environ.get("KORDER_BACKEND", "auto")
    if named == "auto":
        return Placement()
    backend = default_registry().get(named)
    if "numpy" in backend.array_kinds or not backend.array_kinds & {"torch", "jax"}:
        return Placement()  # what takes neither is refused by dispatch, with its reason
    devices = backend.capabilities().devices
    device = "cpu" if "cpu" in devices else min(devices, default="cpu")
    return Placement("torch" if "torch" in backend.array_kinds else "jax", device)


def place(inputs: Inputs, placement: Placement) -> Inputs:
    """Return the operands as arrays of the placement's kind, on its device."""
    if placement.kind == "numpy":
        return inputs
    return replace(
        inputs,
        query=_moved(inputs.query, placement),
        keys=_moved(inputs.keys, placement),
        values=_moved(inputs.values, placement),
        weight=_moved(inputs.weight, placement),
        biases=_moved(inputs.biases, placement),
        key_masks=_moved(inputs.key_masks, placement),
    )


def _moved(operand: Any, placement: Placement) -> Any:
    if operand is None:
        return None
    if isinstance(operand, tuple):
        return tuple(_moved(item, placement) for item in operand)
    # Elsewhere than on the CPU only torch knows a device by its name.
    where = {} if placement.device == "cpu" else {"device": placement.device}
    return namespace_of_kind(placement.kind).asarray(operand, **where)


def to_numpy(array: Any) -> NDArray[Any]:
    """Return an array of any kind as a NumPy array."""
    return np.asarray(array.detach().cpu() if hasattr(array, "detach") else array)
