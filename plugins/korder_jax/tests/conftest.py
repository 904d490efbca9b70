"""The tests run with float64 switched on; those of the narrow mode switch it off for themselves."""

from __future__ import annotations

import jax

jax.config.update("jax_enable_x64", True)
