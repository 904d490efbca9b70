"""The JAX backend: the exact and polynomial methods as functions that XLA compiles, one for each plan."""

from __future__ import annotations

from collections.abc import Sequence

from korder.spi import Backend, hookimpl


@hookimpl
def korder_backends() -> Sequence[Backend]:
    """Return the JAX backend; jax itself is not imported."""
    from korder_jax.backend import JaxBackend

    return (JaxBackend(),)
