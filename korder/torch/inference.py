"""What decoding asks of tensors: no graph, no autocast, and a refusal where a gradient would silently be lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from korder.errors import OperandError


@contextmanager
def quiet(device: str) -> Iterator[None]:
    """Record no gradient and cast nothing on a device."""
    with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
        yield


def detached(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return tensors without their graph, None as it is.

    Raises:
        OperandError: A tensor that requires a gradient while gradients are recorded.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arrays):
        raise OperandError(
            "decoding records no gradient, and one was asked for.",
            code="gradient-unsupported",
            expected="tensors that require no gradient, or a call under torch.no_grad()",
            got="requires_grad=True",
            hint="korder.attend is differentiable: train with it, decode with a state.",
        )
    return tuple(None if x is None else x.detach() for x in arrays)
