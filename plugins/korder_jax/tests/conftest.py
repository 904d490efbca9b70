"""The tests run with float64 switched on; those of the narrow mode switch it off for themselves.

Nearly all of their time is XLA compiling small functions, so it compiles them plainly, three times as fast. The tests
of `shard_map` run as a user's program does, with XLA's own choices.
"""

from __future__ import annotations

import os

OWN_FLAGS = os.environ.get("XLA_FLAGS", "")
PLAINLY = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
os.environ["XLA_FLAGS"] = " ".join([*PLAINLY, OWN_FLAGS]).strip()

import jax  # noqa: E402  (it reads the flags when it starts)

jax.config.update("jax_enable_x64", True)
