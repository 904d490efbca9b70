"""The JAX door: order-k attention of JAX arrays, under `jit`, `grad`, `vmap` and `shard_map`, by whatever backend."""

from korder.jax.functional import attend, attend_result

__all__ = ["attend", "attend_result"]
