"""The NumPy backend: the reference on every machine, and the default where nothing else is installed."""

from __future__ import annotations

from collections.abc import Sequence

from korder.spi import Backend, hookimpl


@hookimpl
def korder_backends() -> Sequence[Backend]:
    """Return the NumPy backend."""
    from korder_numpy.backend import NumpyBackend

    return (NumpyBackend(),)
