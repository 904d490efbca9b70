"""The C++ backend: the exact method as kernels for the CPU's own instruction sets."""

from __future__ import annotations

from collections.abc import Sequence

from korder.spi import Backend, hookimpl


@hookimpl
def korder_backends() -> Sequence[Backend]:
    """Return the C++ backend; neither the kernels nor a framework are loaded."""
    from korder_native.backend import NativeBackend

    return (NativeBackend(),)
