"""The PyTorch backend: the exact and polynomial methods on whatever device the tensors are on."""

from __future__ import annotations

from collections.abc import Sequence

from korder.spi import Backend, hookimpl


@hookimpl
def korder_backends() -> Sequence[Backend]:
    """Return the PyTorch backend; torch itself is not imported."""
    from korder_torch.backend import TorchBackend

    return (TorchBackend(),)
