"""What the CUDA backend claims, and when it can run; the kernels are those of the PyTorch backend."""

from __future__ import annotations

import sys
from ctypes.util import find_library
from dataclasses import replace
from typing import ClassVar

from korder.spi import Availability, Capabilities
from korder_torch.backend import TorchBackend


class CudaBackend(TorchBackend):
    """PyTorch on NVIDIA GPUs; 16-bit operands are computed in float32."""

    name: ClassVar[str] = "cuda"
    priority: ClassVar[int] = 200

    def availability(self) -> Availability:
        """Available if torch is installed and there is a GPU; torch is asked only where it is imported already."""
        installed = Availability.of_packages("torch", remedy="pip install 'korder[cuda]'")
        if not installed.available:
            return installed
        torch = sys.modules.get("torch")
        if torch is not None and not torch.cuda.is_available():
            remedy = "install an NVIDIA driver and a CUDA build of torch"
            return Availability.no("torch finds no CUDA device", remedy)
        if torch is None and find_library("cuda") is None and find_library("nvcuda") is None:
            return Availability.no("no NVIDIA driver found", "install an NVIDIA driver")
        return Availability.yes()

    def capabilities(self) -> Capabilities:
        """Return those of the PyTorch backend, on CUDA devices."""
        return replace(super().capabilities(), devices=frozenset({"cuda"}))
