"""NumPy arrays and PyTorch tensors as addresses and strides, and new ones like them. torch is never imported here."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from korder_native import _native

Array = Any
View = tuple[int, int, int, int, int]
"""Address, then strides in elements of batch, head, row and column; 0 along an axis that is shared."""
NUMBERS = {"float32": 0, "float64": 1, "bfloat16": 2}
"""The kernels' numbers of dtypes."""
_LOADED_IN = os.getpid()


def namespace(array: Array) -> Any:
    """Return the Array API namespace of an array."""
    if _is_torch(array):
        import array_api_compat.torch as xp
    else:
        import array_api_compat.numpy as xp
    return xp


def readable(array: Array) -> Array:
    """Return an array that can be read by address; a copy only where strides are no multiples of the element."""
    if _is_torch(array):
        return array.detach().resolve_neg()
    if any(stride % array.itemsize for stride in array.strides) or not array.flags.aligned:
        return array.copy()
    return array


def view(array: Array) -> View:
    """Return where a readable array (b, h, n, width) lies."""
    batch, head, row, column = _strides(array)
    return _address(array), batch, head, row, column


def plain_view(array: Array) -> View:
    """Return where a readable matrix (n, width) lies."""
    row, column = _strides(array)
    return _address(array), 0, 0, row, column


def mask_view(array: Array | None) -> View | None:
    """Return where a mask of keys (b, 1 or g, m) lies."""
    if array is None:
        return None
    batch, head, column = _strides(array)
    return _address(array), batch, head, 0, column


def new(like: Array, shape: Sequence[int], dtype: str, *, zeros: bool = False) -> Array:
    """Return a dense array of the same kind, of zeros or of whatever is in its memory."""
    xp = namespace(like)
    return (xp.zeros if zeros else xp.empty)(tuple(shape), dtype=getattr(xp, dtype))


def address(array: Array | None) -> int | None:
    """Return where a dense array begins."""
    return None if array is None else _address(array)


def cast(array: Array, dtype: Any) -> Array:
    """Return an array in another dtype, itself if it has it."""
    return namespace(array).astype(array, dtype, copy=False)


def dense(array: Array) -> Array:
    """Return an array without gaps, itself if it has none."""
    if _is_torch(array):
        return array.detach().contiguous()
    return namespace(array).asarray(array, order="C")


def summed_to(array: Array, shape: Sequence[int]) -> Array:
    """Return an array summed over the axes that are 1 in a shape."""
    axes = tuple(axis for axis, (size, wanted) in enumerate(zip(array.shape, shape, strict=True)) if size != wanted)
    return namespace(array).sum(array, axis=axes, keepdims=True) if axes else array


@contextmanager
def quietly(array: Array) -> Iterator[None]:
    """Let array operations neither warn of NaN and infinities nor be recorded for gradients."""
    with np.errstate(all="ignore"), sys.modules["torch"].no_grad() if _is_torch(array) else nullcontext():
        yield


def thread_count() -> int:
    """Return the threads to work with: PyTorch's number where it is loaded, else OpenMP's, within the usable cores.

    A process that was forked from one with OpenMP threads has none of them and would wait for them: it gets one.
    """
    if os.getpid() != _LOADED_IN:
        return 1
    torch = sys.modules.get("torch")
    ask = getattr(torch, "get_num_threads", None)
    count = _native.thread_limit() if ask is None else ask()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(int(count), cores))


def _is_torch(array: Array) -> bool:
    return type(array).__module__.partition(".")[0] == "torch"


def _address(array: Array) -> int:
    return int(array.data_ptr() if _is_torch(array) else array.__array_interface__["data"][0])


def _strides(array: Array) -> list[int]:
    if _is_torch(array):
        found = list(array.stride())
    else:
        found = [stride // array.itemsize for stride in array.strides]
    return [0 if size == 1 else stride for size, stride in zip(array.shape, found, strict=True)]
