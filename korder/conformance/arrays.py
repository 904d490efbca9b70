"""Array kinds: from the kit's numpy arrays to a backend's own and back, and what can be asked of their memory."""

from __future__ import annotations

import os
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from korder.conformance.records import UnverifiedError
from korder.dispatch.arrays import dtype_name, namespace_of_kind

Array = Any
ToArray = Callable[[Any, str, str], Any]
"""(numpy array, dtype name, device) -> an array of the backend's kind."""
FromArray = Callable[[Any], Any]
"""An array of the backend's kind -> a numpy array."""


class ArrayKind:
    """Arrays of one kind on one device.

    Args:
        kind: "numpy", "torch", "jax", or the package of any other Array API array.
        device: Device type, "cpu", "cuda".
        to_array: Makes an array; the kind's usual way when None.
        from_array: Reads an array; the kind's usual way when None.
    """

    def __init__(
        self, kind: str, device: str, to_array: ToArray | None = None, from_array: FromArray | None = None
    ) -> None:
        self.kind = kind
        self.device = device
        self._to_array = to_array or _WRITERS.get(kind, self._through_namespace)
        self._from_array = from_array or _READERS.get(kind, np.asarray)

    def check(self, dtype: str) -> None:
        """Raise `UnverifiedError` unless an array of a dtype can be made here, on this device."""
        try:
            made = self._to_array(np.ones((1, 1)), dtype, self.device)
        except Exception as error:
            raise UnverifiedError(
                f"no {dtype} {self.kind} array can be made on {self.device}: {type(error).__name__}: {error}"
            ) from error
        if dtype_name(made) != dtype:
            raise UnverifiedError(f"{self.kind} makes {dtype_name(made)} where {dtype} was asked for")

    def can_make(self, dtype: str) -> bool:
        """Return whether an array of a dtype can be made here."""
        try:
            self.check(dtype)
        except UnverifiedError:
            return False
        return True

    def array(self, x: Array, dtype: str) -> Array:
        """Return a numpy array as one of this kind; booleans stay booleans."""
        return self._to_array(np.ascontiguousarray(x), "bool" if x.dtype == bool else dtype, self.device)

    def strided(self, x: Array, dtype: str) -> Array:
        """Return the same as a view with gaps in its last two axes, NaN between the entries."""
        gaps = False if x.dtype == bool else np.nan
        wide = np.full((*x.shape[:-2], 2 * x.shape[-2], 2 * x.shape[-1]), gaps, dtype=x.dtype)
        wide[..., ::2, ::2] = x
        return self.array(wide, dtype)[..., ::2, ::2]

    def numpy(self, array: Array) -> Array:
        """Return a numpy copy: float64, or bool."""
        plain = np.asarray(self._from_array(array))
        return plain.copy() if plain.dtype == bool else plain.astype(np.float64)

    def in_numpy(self, array: Array) -> Array:
        """Return a numpy array of the same dtype; float32 where numpy has none such."""
        name = dtype_name(array)
        return self.numpy(array).astype("float32" if name == "bfloat16" else name)

    def shares_memory(self, one: Array, other: Array) -> bool:
        """Return whether two arrays lie in the same memory; immutable arrays count as apart."""
        if self.kind == "jax":
            return False
        if self.kind == "torch":
            mine, its = one.untyped_storage(), other.untyped_storage()
            return bool(mine.nbytes() > 0 and mine.data_ptr() == its.data_ptr())
        try:
            mine, its = (x if isinstance(x, np.ndarray) else np.from_dlpack(x) for x in (one, other))
        except Exception as error:
            raise UnverifiedError(f"memory of {self.kind} arrays cannot be compared: {error}") from error
        return bool(np.shares_memory(mine, its))

    def peak_bytes(self, call: Callable[[], list[Array]]) -> int:
        """Return the most bytes that a call held beyond what it returned; what only the first one builds is left out.

        Raises:
            UnverifiedError: Memory of this kind cannot be measured on this device.
        """
        measures = {
            ("numpy", "cpu"): _traced_peak,
            ("torch", "cpu"): _profiled_peak,
            ("torch", "cuda"): _cuda_peak,
        }
        measure = measures.get((self.kind, self.device.partition(":")[0]))
        if measure is None:
            raise UnverifiedError(f"memory of {self.kind} arrays on {self.device} cannot be measured")
        call()
        peak, returned = measure(call)
        return peak - sum(int(x.nbytes) for x in returned)

    def _through_namespace(self, x: Array, dtype: str, device: str) -> Array:
        xp = namespace_of_kind(self.kind)
        return xp.asarray(x if dtype == "bool" else x.astype(dtype), dtype=getattr(xp, dtype))


def _numpy_writer(x: Array, dtype: str, device: str) -> Array:
    if device != "cpu":
        raise ValueError("numpy arrays are on the cpu")
    with np.errstate(over="ignore"):
        return np.array(x, dtype=dtype)


def _torch_writer(x: Array, dtype: str, device: str) -> Array:
    import torch

    return torch.from_numpy(np.array(x)).to(dtype=getattr(torch, dtype), device=device)


def _torch_reader(array: Array) -> Array:
    import torch

    plain = array.detach().to("cpu")
    return plain.numpy() if plain.dtype == torch.bool else plain.to(torch.float64).numpy()


def _jax_writer(x: Array, dtype: str, device: str) -> Array:
    import jax
    import jax.numpy as jnp

    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise ValueError("JAX makes float64 arrays only with JAX_ENABLE_X64=1")
    return jax.device_put(jnp.asarray(x, dtype=dtype), jax.devices(device)[0])


_WRITERS: dict[str, ToArray] = {"numpy": _numpy_writer, "torch": _torch_writer, "jax": _jax_writer}
_READERS: dict[str, FromArray] = {"torch": _torch_reader}


def _traced_peak(call: Callable[[], list[Array]]) -> tuple[int, list[Array]]:
    tracing = tracemalloc.is_tracing()
    if not tracing:
        tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        returned = call()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        if not tracing:
            tracemalloc.stop()
    return peak - before, returned


def _profiled_peak(call: Callable[[], list[Array]]) -> tuple[int, list[Array]]:
    """Add up what PyTorch's allocator tells its profiler, in the order of time."""
    from torch.autograd.profiler import profile

    with _silent_stderr(), profile(use_kineto=False, profile_memory=True) as profiler:
        returned = call()
    if profiler.kineto_results is None:
        raise UnverifiedError("this build of PyTorch has no profiler of memory")
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0)), returned


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what the process writes to stderr: some builds of the profiler say there that they start and stop."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _cuda_peak(call: Callable[[], list[Array]]) -> tuple[int, list[Array]]:
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, returned
