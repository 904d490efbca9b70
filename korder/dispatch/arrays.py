"""Reads kind, dtype, device and shape off the user's arrays, and lays them out as kernels want them."""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from korder.errors import OperandError, ShapeError, SpecError
from korder.problem import Shapes, check_dtype
from korder.spec import MAX_ORDER, AttentionSpec, Full
from korder.spi.operands import Operands

Array = Any
_ROOTS = {"jaxlib": "jax", "jax": "jax"}
LARGEST_OFFSET = 2**60
"""Positions are 64-bit integers, and sums of a few of them must be too."""
_NOT_PLAIN = ("MaskedArray", "matrix")


@dataclass(frozen=True, slots=True)
class Given:
    """The operands as the user gave them, read once."""

    query: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    weight: Array | tuple[Array, ...] | None
    biases: tuple[Array | None, ...]
    key_masks: tuple[Array | None, ...]
    query_offset: int | None
    key_offsets: tuple[int, ...] | None
    shapes: Shapes
    kind: str
    dtype: str
    device: str


@lru_cache(maxsize=64)
def _kind_of_type(kind: type) -> str | None:
    if not (hasattr(kind, "shape") and hasattr(kind, "dtype")):
        return None
    # A subclass written by a user is of the kind of the library's class that it derives from.
    roots = [base.__module__.split(".")[0] for base in kind.__mro__]
    if any(base.__name__ in _NOT_PLAIN and base.__module__.startswith("numpy") for base in kind.__mro__):
        return None  # numpy's masked arrays hide values, its matrices change what indexing means
    for root in roots:
        if root in ("numpy", "torch", *_ROOTS):
            return _ROOTS.get(root, root)
    return roots[0] if hasattr(kind, "__array_namespace__") else None


def array_kind(array: Array, name: str = "the operand") -> str:
    """Return "numpy", "torch", "jax", or the package of any other Array API array.

    Raises:
        OperandError: Not an array.
    """
    kind = _kind_of_type(type(array))  # type: ignore[arg-type]
    if kind is None:
        raise OperandError(
            f"{name} is not an array.",
            code="not-an-array",
            expected="a NumPy array, a torch tensor, a JAX array, or another Array API array",
            got=type(array).__name__,
            hint="wrap it, for example numpy.asarray(values, dtype='float32').",
        )
    return kind


def dtype_name(array: Array) -> str:
    """Return the dtype's plain name: "float32", "bool", "bfloat16"."""
    return _dtype_text(array.dtype)


@lru_cache(maxsize=64, typed=True)  # by type too: dtypes of different libraries may hash alike but must not be compared
def _dtype_text(dtype: Any) -> str:
    name = getattr(dtype, "name", None)
    return name if isinstance(name, str) else str(dtype).rsplit(".", 1)[-1]


def device_name(array: Array) -> str:
    """Return the device as text, "cpu" where arrays have none."""
    if array_kind(array) == "jax":
        return _jax_platform(array)
    device = str(getattr(array, "device", "cpu")).lower()
    return "cpu" if "cpu" in device else device


def _jax_platform(array: Array) -> str:
    """Return the platform of a JAX array, on however many devices; for a traced one that of the default backend."""
    jax = sys.modules["jax"]  # whoever made the array has imported it
    if isinstance(array, jax.core.Tracer):
        return str(jax.default_backend())
    return str(next(iter(array.devices())).platform)


@lru_cache(maxsize=16)
def namespace_of_kind(kind: str) -> Any:
    """Return the Array API namespace of a kind, through array-api-compat where that wraps the library."""
    if kind == "numpy":
        import array_api_compat.numpy as xp

        return xp
    import importlib

    return importlib.import_module(f"array_api_compat.{kind}" if kind == "torch" else _plain_namespace(kind))


def _plain_namespace(kind: str) -> str:
    return "jax.numpy" if kind == "jax" else kind


def on_host(kind: str, *records: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return the namespace in which many small operations on arrays of a kind are made, and the records there.

    JAX compiles each of them for each shape, so statistics and certificates of its arrays are computed in NumPy.
    """
    if kind != "jax":
        return namespace_of_kind(kind), records
    return namespace_of_kind("numpy"), tuple(_in_numpy(record) for record in records)


def _in_numpy(x: Any) -> Any:
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _in_numpy(getattr(x, field.name)) for field in fields(x)})
    if isinstance(x, tuple):
        return tuple(map(_in_numpy, x))
    if x is None or isinstance(x, (int, dict)):  # residuals are the kernel's own
        return x
    array = np.asarray(x)
    return array.astype(np.float32) if _dtype_text(array.dtype) == "bfloat16" else array


def read_operands(
    query: Array,
    keys: Sequence[Array],
    values: Sequence[Array],
    *,
    weight: Array | Sequence[Array] | None = None,
    biases: Sequence[Array | None] | None = None,
    key_masks: Sequence[Array | None] | None = None,
    query_offset: int | None = None,
    key_offsets: Sequence[int] | None = None,
) -> Given:
    """Read shapes, kind, dtype and device of every operand; one of each, or an error that names the odd one out.

    Raises:
        OperandError: Not arrays, or mixed kinds, dtypes or devices, or a key mask that is not boolean.
    """
    keys, values = each_mode(keys, "keys"), each_mode(values, "values")
    biases = each_mode(biases, "biases") if biases is not None else ()
    key_masks = each_mode(key_masks, "key_masks") if key_masks is not None else ()
    if isinstance(weight, list):
        weight = tuple(weight)
    kind, dtype, device = array_kind(query, "query"), dtype_name(query), device_name(query)
    check_dtype("query", dtype)
    for name, array in _operands(keys, values, weight, biases):
        _check_same(name, array, kind, dtype, device)
    for t, mask in enumerate(key_masks):
        if mask is not None:
            _check_same(f"key_masks[{t}]", mask, kind, "bool", device)
    offsets_given = query_offset is not None or key_offsets is not None
    return Given(
        query, keys, values, weight, biases, key_masks,
        _offset("query_offset", query_offset), _offsets(key_offsets, len(keys)),
        Shapes(
            query=tuple(query.shape),
            keys=tuple(tuple(key.shape) for key in keys),
            values=tuple(tuple(value.shape) for value in values),
            weight=_weight_shape(weight),
            biases=tuple(None if bias is None else tuple(bias.shape) for bias in biases),
            key_masks=tuple(None if mask is None else tuple(mask.shape) for mask in key_masks),
            offsets_given=offsets_given,
        ),
        kind, dtype, device,
    )  # fmt: skip


def each_mode(arrays: Any, name: str) -> tuple[Any, ...]:
    """Return a tuple with one entry per mode.

    Raises:
        OperandError: Something that is neither tuple nor list.
    """
    if isinstance(arrays, (tuple, list)):
        return tuple(arrays)
    raise OperandError(
        f"{name} must be a tuple with one entry per mode.",
        code="modes-not-a-tuple",
        expected=f"a tuple of arrays, for order 1: {name}=(array,)",
        got=type(arrays).__name__,
    )


def _offset(name: str, offset: Any) -> int | None:
    if offset is None:
        return None
    try:
        index = operator.index(offset)
    except TypeError:
        raise OperandError(
            f"{name} must be an integer: the position of the first element.",
            code="offset-not-an-integer",
            expected="an integer",
            got=f"{offset!r} of type {type(offset).__name__}",
        ) from None
    if abs(index) > LARGEST_OFFSET:
        raise OperandError(
            f"{name} is too far from position 0.",
            code="offset-too-large",
            expected=f"an integer within +-{LARGEST_OFFSET}",
            got=repr(offset),
        )
    return index


def _offsets(offsets: Any, order: int) -> tuple[int, ...] | None:
    if offsets is None:
        return None
    if not isinstance(offsets, Sequence) or len(offsets) != order:
        raise ShapeError(
            "key_offsets must have one entry per mode.",
            code="modes-mismatch",
            expected=f"{order} integers",
            got=repr(offsets),
        )
    return tuple(_offset(f"key_offsets[{t}]", offset) or 0 for t, offset in enumerate(offsets))


def _operands(
    keys: tuple[Array, ...], values: tuple[Array, ...], weight: Any, biases: tuple[Array | None, ...]
) -> list[tuple[str, Array]]:
    named = [(f"keys[{t}]", key) for t, key in enumerate(keys)]
    named += [(f"values[{t}]", value) for t, value in enumerate(values)]
    if isinstance(weight, tuple):
        named += [(f"weight[{t}]", factor) for t, factor in enumerate(weight)]
    elif weight is not None:
        named.append(("weight", weight))
    return named + [(f"biases[{t}]", bias) for t, bias in enumerate(biases) if bias is not None]


def _check_same(name: str, array: Array, kind: str, dtype: str, device: str) -> None:
    found = (array_kind(array, name), dtype_name(array), device_name(array))
    for what, expected, got in zip(("array kind", "dtype", "device"), (kind, dtype, device), found, strict=True):
        if expected != got:
            raise OperandError(
                f"{name} has another {what} than it must have.",
                code=f"{what.replace(' ', '-')}-mismatch",
                expected=expected + (", True = may be attended to" if dtype == "bool" else ", as the query has"),
                got=got,
                hint="korder converts nothing silently; convert the operand yourself.",
            )


def _weight_shape(weight: Any) -> Any:
    if weight is None:
        return None
    return tuple(tuple(factor.shape) for factor in weight) if isinstance(weight, tuple) else tuple(weight.shape)


def to_kernel_layout(given: Given, spec: AttentionSpec) -> Operands:
    """Return the operands in the kernel layout: (b, h, n, width), masks (b, 1 or g, m), offsets filled in."""
    xp = namespace_of_kind(given.kind)
    query_offset, key_offsets = _resolve_offsets(given, spec)
    missing = (None,) * len(given.keys)
    return Operands(
        query=_four_axes(xp, given.query),
        keys=tuple(_four_axes(xp, key) for key in given.keys),
        values=tuple(_four_axes(xp, value) for value in given.values),
        key_masks=tuple(_mask_layout(xp, mask, given.query.ndim) for mask in given.key_masks or missing),
        biases=tuple(_bias_layout(xp, bias, given.shapes.query) for bias in given.biases or missing),
        weight=given.weight,
        query_offset=query_offset,
        key_offsets=key_offsets,
    )


def _resolve_offsets(given: Given, spec: AttentionSpec) -> tuple[int, tuple[int, ...]]:
    lengths = tuple(key[-2] for key in given.shapes.keys)
    if not isinstance(spec.mask, Full) and spec.mask.align == "end":
        return 0, tuple(given.shapes.query[-2] - length for length in lengths)
    return given.query_offset or 0, given.key_offsets or (0,) * len(lengths)


def _four_axes(xp: Any, array: Array) -> Array:
    if array.ndim == 4:
        return array
    heads = array.shape[-3] if array.ndim > 2 else 1
    return xp.reshape(array, (prod(array.shape[:-3]), heads, *array.shape[-2:]))


def _mask_layout(xp: Any, mask: Array | None, query_axes: int) -> Array | None:
    """(*batch, m) or (*batch, g, m) -> (b, 1 or g, m)."""
    if mask is None:
        return None
    batch_axes = max(query_axes - 3, 0)
    per_head = mask.ndim == batch_axes + 2 and query_axes > 2
    return xp.reshape(mask, (prod(mask.shape[:batch_axes]), mask.shape[-2] if per_head else 1, mask.shape[-1]))


def _bias_layout(xp: Any, bias: Array | None, query_shape: tuple[int, ...]) -> Array | None:
    if bias is None or bias.ndim == 4:
        return bias
    batch = bias.shape[:-3]
    if any(size != 1 for size in batch):
        batch = query_shape[:-3]
        bias = xp.broadcast_to(bias, (*batch, *bias.shape[-3:]))
    heads = bias.shape[-3] if bias.ndim > 2 else 1
    return xp.reshape(bias, (prod(batch), heads, *bias.shape[-2:]))


def resolve_spec(spec: Any, order: int, *, weighted: bool) -> AttentionSpec:
    """Return the spec, or for None the exact, full one of that order; Kronecker scores if there is a weight.

    Raises:
        SpecError: Something that is not a spec.
    """
    if spec is None:
        # no key at all, or too many, is refused by the problem, which says what is wrong with them
        return _plain_spec(min(max(order, 1), MAX_ORDER), weighted)
    if not isinstance(spec, AttentionSpec):
        raise SpecError("spec must be an AttentionSpec.", expected="korder.AttentionSpec(...)", got=type(spec).__name__)
    return spec


@lru_cache(maxsize=2 * MAX_ORDER)
def _plain_spec(order: int, weighted: bool) -> AttentionSpec:
    return AttentionSpec(order=order, score="kronecker" if weighted else "khatri_rao")


def checked_backend_name(backend: Any) -> str:
    """Return a backend's name.

    Raises:
        OperandError: Not a text.
    """
    if not isinstance(backend, str):
        raise OperandError("backend must be a name.", expected='a name, or "auto"', got=repr(backend))
    return backend


def checked_shape(shape: Any, name: str) -> tuple[int, ...]:
    """Return a shape, also of an array, as a tuple of integers.

    Raises:
        ShapeError: Not a shape: not a sequence, or lengths that are no integers or below 0.
    """
    given = getattr(shape, "shape", shape)
    try:
        sizes = tuple(operator.index(size) for size in given)
        if min(sizes, default=0) >= 0:
            return sizes
    except TypeError:
        pass
    raise ShapeError(
        f"{name} is not a shape.",
        code="shape-invalid",
        expected="a tuple of integers, 0 or more, or an array",
        got=repr(given),
    )
