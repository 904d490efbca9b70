"""Operands as the exact method wants them: one entry per key head, scaled, projected, masked keys zeroed.

A pure function of the arrays that carry gradients, so its adjoint is `jax.vjp` of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from korder.spi import Operands, Problem
from korder_jax.arrays import HIGHEST

Array = Any


class Variables(NamedTuple):
    """The operands that carry gradients, as the user gave them."""

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    weight: Array | tuple[Array, ...] | None


class Layout(NamedTuple):
    """The operands in the dtype of the sums.

    Shapes:  query (u, c, n, d), u = b * g key heads of c query heads each; keys[t] (u, m_t, d_t);
        values[t] (u, m_t, e); biases[t] (b, g, c, n, m_t) or None, any axis but the last may be 1; weight None or the
        full (d, d1, .., dk).
    """

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    biases: tuple[Array | None, ...]
    weight: Array | None


def variables_of(operands: Operands) -> Variables:
    """Return the operands that carry gradients."""
    missing = (None,) * len(operands.keys)
    return Variables(
        operands.query,
        tuple(operands.keys),
        tuple(operands.values),
        tuple(operands.biases) or missing,
        operands.weight,
    )


def wanted(gradients: Variables, needs: frozenset[str]) -> Variables:
    """Return the gradients that `needs` names, None in place of the others."""
    nothing = (None,) * len(gradients.keys)
    none = Variables(None, nothing, nothing, nothing, None)
    return none._replace(**{name: getattr(gradients, name) for name in needs})


def masks_of(operands: Operands) -> tuple[Array | None, ...]:
    """Return the key masks, one entry per mode."""
    return tuple(operands.key_masks) or (None,) * len(operands.keys)


def lay_out(problem: Problem, variables: Variables, masks: tuple[Array | None, ...]) -> Layout:
    """Return the operands laid out; `masks` (b, 1 or g, m_t) or None."""
    wide = jnp.dtype(problem.accumulation)
    units, share = problem.batch * problem.groups, problem.heads // problem.groups
    query = variables.query.astype(wide) * jnp.asarray(problem.scale, wide)
    keys = [_selected(key.astype(wide), mask) for key, mask in zip(variables.keys, masks, strict=True)]
    values = [_selected(value.astype(wide), mask) for value, mask in zip(variables.values, masks, strict=True)]
    weight = variables.weight
    if isinstance(weight, tuple):
        factors = [factor.astype(wide) for factor in weight]
        query = jnp.matmul(query, factors[0], precision=HIGHEST)
        keys = [jnp.matmul(key, u, precision=HIGHEST) for key, u in zip(keys, factors[1:], strict=True)]
        weight = None
    return Layout(
        query.reshape(units, share, *query.shape[2:]),
        tuple(key.reshape(units, *key.shape[2:]) for key in keys),
        tuple(value.reshape(units, *value.shape[2:]) for value in values),
        tuple(None if bias is None else _by_key_head(bias.astype(wide), problem.groups) for bias in variables.biases),
        None if weight is None else weight.astype(wide),
    )


def _selected(x: Array, mask: Array | None) -> Array:
    """Zero the rows of masked keys; selected, not multiplied, so that whatever they hold is gone."""
    return x if mask is None else jnp.where(mask[..., None], x, jnp.zeros_like(x))


def _by_key_head(x: Array, groups: int) -> Array:
    """(b, h, ..) to (b, g, c, ..); a head axis of 1 becomes (1, 1)."""
    split = (1, 1) if x.shape[1] == 1 else (groups, x.shape[1] // groups)
    return x.reshape(x.shape[0], *split, *x.shape[2:])
