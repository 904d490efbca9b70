"""The kernel of a request as one node for JAX's transformations: its own backward as the `custom_vjp`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from korder.dispatch.prepare import prepare
from korder.dispatch.registry import default_registry
from korder.dispatch.run import Request
from korder.dispatch.select import Selection
from korder.errors import UnsupportedProblemError
from korder.problem import Problem
from korder.spi import Kernel
from korder.spi.operands import KernelOutput, Operands, OutputGradients

Array = Any
T = TypeVar("T")
_OUTPUTS = ("output", "lse", "normaliser", "moments", "magnitude", "residuals")


@dataclass(frozen=True, slots=True)
class _Call:
    """What of a request is not an array; offsets that are traced are None here and among the arrays."""

    problem: Problem
    array_kind: str
    backend: str
    offsets: tuple[int | None, ...]

    @property
    def twice_differentiable(self) -> bool:
        """Whether JAX may differentiate what the kernel does: not float64 sums while such arrays are switched off."""
        narrow = self.problem.spec.polynomial is None and self.problem.accumulation == "float32"
        return narrow or bool(jax.config.jax_enable_x64)

    def selection(self, *, backward: bool) -> tuple[Selection, Kernel]:
        """Return who runs it by which plan, the first that fits; and the kernel."""
        prepared = prepare(default_registry(), self.problem, self.array_kind, self.backend, backward=backward)
        return prepared.selection, prepared.kernel


@dataclass(frozen=True, slots=True)
class _Arrays:
    """The arrays of a request: those that carry gradients, and the rest."""

    variables: tuple[Any, ...]
    """query, keys, values, biases, weight"""
    masks: tuple[Array | None, ...]
    offsets: tuple[Array, ...]

    def operands(self, call: _Call) -> Operands:
        """Return the operands as a kernel takes them."""
        query, keys, values, biases, weight = self.variables
        traced = iter(self.offsets)
        first, *others = (next(traced) if offset is None else offset for offset in call.offsets)
        return Operands(query, keys, values, self.masks, biases, weight, first, tuple(others))


jax.tree_util.register_dataclass(_Arrays, ["variables", "masks", "offsets"], [])


def traced_rows(request: Request) -> tuple[Array, Array, Selection]:
    """Return output, lse and the selection of a request on traced arrays; differentiable in reverse mode."""
    operands = request.operands
    given = (operands.query_offset, *operands.key_offsets)
    traced = tuple(x for x in given if isinstance(x, jax.core.Tracer))
    offsets = tuple(None if isinstance(x, jax.core.Tracer) else x for x in given)
    call = _Call(request.problem, request.array_kind, request.backend, offsets)
    variables = (operands.query, operands.keys, operands.values, operands.biases, operands.weight)
    arrays = _alike(_Arrays(variables, operands.key_masks, traced))
    output, lse = _attend(call, arrays)
    return output, lse, call.selection(backward=False)[0]


def _alike(arrays: _Arrays) -> _Arrays:
    """Return the arrays as varying over the same mesh axes; inside `shard_map` some are shared and some are not."""
    kinds = [jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(arrays)]
    axes = frozenset[str]().union(*kinds)

    def widened(x: Array) -> Array:
        missing = axes - jax.typeof(x).manual_axis_type.varying
        return lax.pcast(x, tuple(sorted(missing)), to="varying") if missing else x

    return jax.tree.map(widened, arrays) if axes else arrays


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: _Call, arrays: _Arrays) -> tuple[Array, Array]:
    selection, kernel = call.selection(backward=False)
    found = _traceable(selection, lambda: kernel.forward(arrays.operands(call), save=False))
    return found.output, _usual(found.lse)


def _forward(call: _Call, arrays: _Arrays) -> tuple[tuple[Array, Array], tuple[_Arrays, dict[str, Any]]]:
    kept = _saved(call, arrays) if call.twice_differentiable else _once(_saved)(call, arrays)
    return (kept["output"], _usual(kept["lse"])), (arrays, kept)


def _saved(call: _Call, arrays: _Arrays) -> dict[str, Any]:
    """Return the kernel's output with what its backward wants."""
    selection, kernel = call.selection(backward=True)
    found = _traceable(selection, lambda: kernel.forward(arrays.operands(call), save=True))
    return {name: getattr(found, name) for name in _OUTPUTS}


def _backward(call: _Call, kept: tuple[_Arrays, dict[str, Any]], gradients: tuple[Array, Array]) -> tuple[_Arrays]:
    found = _gradients if call.twice_differentiable else _once(_gradients)
    return (_Arrays(found(call, *kept, gradients), None, None),)  # type: ignore[arg-type]


def _gradients(
    call: _Call, arrays: _Arrays, outputs: dict[str, Any], gradients: tuple[Array, Array]
) -> tuple[Any, ...]:
    """Return the kernel's gradients of the variables."""
    selection, kernel = call.selection(backward=True)
    weighted = arrays.variables[4] is not None
    biased = any(bias is not None for bias in arrays.variables[3])
    needs = {"query", "keys", "values"} | ({"biases"} if biased else set()) | ({"weight"} if weighted else set())
    found = _traceable(
        selection,
        lambda: kernel.backward(
            arrays.operands(call), KernelOutput(**outputs), OutputGradients(*gradients), needs=frozenset(needs)
        ),
    )
    return found.query, found.keys, found.values, found.biases or (None,) * len(found.keys), found.weight


def _once(function: Callable[..., T]) -> Callable[..., T]:
    """Return a function of a call and arrays that says so when it is differentiated."""
    node = jax.custom_vjp(function, nondiff_argnums=(0,))

    def refuse(call: _Call, _: None, gradients: Any) -> Any:
        raise UnsupportedProblemError(
            "second derivatives of the polynomial method need float64 sums, which JAX does not differentiate now.",
            code="second-derivative",
            expected="jax_enable_x64 on, or the exact method",
            got="jax_enable_x64 off",
            hint='jax.config.update("jax_enable_x64", True); operands may stay float32.',
        )

    node.defvjp(lambda call, *arrays: (function(call, *arrays), None), refuse)
    return node  # type: ignore[no-any-return]


_attend.defvjp(_forward, _backward)


def _usual(lse: Array) -> Array:
    """Return lse in a dtype that the caller's arrays may have."""
    if lse.dtype == jnp.float64 and not jax.config.jax_enable_x64:
        return lse.astype(jnp.float32)
    return lse


def _traceable(selection: Selection, call: Callable[[], T]) -> T:
    """Return what a kernel returns, or say that it looks at numbers."""
    try:
        return call()
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        raise UnsupportedProblemError(
            f"backend {selection.backend.name!r} cannot run under jit, vmap or grad: it looks at numbers.",
            code="not-traceable",
            expected="a kernel of traceable functions, as the plugin korder-jax has",
            got=f"{type(error).__name__} in {selection.plan.name}",
            hint='backend="jax", or call it outside of the transformation.',
        ) from error
