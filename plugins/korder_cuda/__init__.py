"""The CUDA backend: the PyTorch kernels for tensors on NVIDIA GPUs."""

from __future__ import annotations

from collections.abc import Sequence

from korder.spi import Backend, hookimpl


@hookimpl
def korder_backends() -> Sequence[Backend]:
    """Return the CUDA backend; torch itself is not imported."""
    from korder_cuda.backend import CudaBackend

    return (CudaBackend(),)
