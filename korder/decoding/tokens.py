"""What all tokens of a state share: axes, widths, dtype, kind, device. Tokens and queries are checked against it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

from korder.dispatch.arrays import array_kind, device_name, dtype_name, each_mode, namespace_of_kind
from korder.errors import OperandError, ShapeError, UnsupportedProblemError
from korder.problem import check_dtype

Array = Any
Arrays = tuple[Array, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Keys and values in the kernel layout, and masks (b, 1 or g, c) or None, one per mode."""

    keys: Arrays
    values: Arrays
    key_masks: tuple[Array | None, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each mode."""
        return tuple(int(key.shape[2]) for key in self.keys)


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """The shape of every token, less its mode's length.

    Args:
        leading: Axes before the length, (*batch, g), or () for one head.
        width: Columns of queries and keys.
        value_width: Columns of values.
        order: Number of modes.
        kind: Array kind.
        dtype: Name of the dtype.
        device: Name of the device.
    """

    leading: tuple[int, ...]
    width: int
    value_width: int
    order: int
    kind: str
    dtype: str
    device: str

    @classmethod
    def of(cls, keys: Any, values: Any) -> TokenLayout:
        """Return the layout that the first key matrix and the first values set.

        Raises:
            ShapeError, OperandError: They set none.
            UnsupportedProblemError: Arrays that cannot be written in place.
        """
        keys, values = each_mode(keys, "keys"), each_mode(values, "values")
        if not keys or not values:
            raise ShapeError(
                "at least one key matrix and one value matrix are needed.",
                code="keys-missing",
                expected="keys and values: tuples with one array per mode; an empty state has arrays of length 0",
                got=f"{len(keys)} keys and {len(values)} values",
            )
        kind = array_kind(keys[0], "keys[0]")
        if kind == "jax":
            raise UnsupportedProblemError(
                "decoding does not take JAX arrays.",
                code="decode-unsupported",
                expected="NumPy arrays, PyTorch tensors, or other Array API arrays that can be written in place",
                got="jax arrays",
                hint="pass numpy.asarray(array), or call korder.attend with query_offset under jit.",
            )
        check_dtype("keys[0]", dtype_name(keys[0]))
        key, value = (tuple(x.shape) for x in (keys[0], values[0]))
        if len(key) < 2 or not value or key[-1] < 1 or value[-1] < 1 or 0 in key[-3:-2]:
            raise ShapeError(
                "keys[0] and values[0] must have at least two axes, a head and a column.",
                expected="(length, width), (heads, length, width) or (batch, heads, length, width)",
                got=f"keys[0].shape == {key}, values[0].shape == {value}",
            )
        return cls(key[:-2], key[-1], value[-1], len(keys), kind, dtype_name(keys[0]), device_name(keys[0]))

    @property
    def batch(self) -> int:
        """Batch entries, all batch axes together."""
        return prod(self.leading[:-1])

    @property
    def groups(self) -> int:
        """Key heads."""
        return self.leading[-1] if self.leading else 1

    @property
    def namespace(self) -> Any:
        """The Array API namespace of the arrays."""
        return namespace_of_kind(self.kind)

    def read(self, keys: Any, values: Any, key_masks: Any, source: str) -> Tokens:
        """Return tokens in the kernel layout.

        Args:
            keys: One array per mode.
            values: One array per mode.
            key_masks: One boolean array or None per mode, or None.
            source: What set the layout, for messages.

        Raises:
            ShapeError, OperandError: Tokens that are not of this layout.
        """
        given = [each_mode(keys, "keys"), each_mode(values, "values")]
        given.append(each_mode(key_masks, "key_masks") if key_masks is not None else (None,) * self.order)
        for name, arrays in zip(("keys", "values", "key_masks"), given, strict=True):
            if len(arrays) != self.order:
                raise ShapeError(
                    f"{name} must have one entry per mode.",
                    code="modes-mismatch",
                    expected=f"{self.order} entries, as {source} has modes",
                    got=f"{len(arrays)} entries",
                )
        for t, (key, value, mask) in enumerate(zip(*given, strict=True)):
            self._check_array(f"keys[{t}]", key, source)
            self._check_array(f"values[{t}]", value, source)
            length = key.shape[-2] if key.ndim > 1 else 0
            self._check_shape(f"keys[{t}]", key, (*self.leading, length, self.width), source)
            self._check_shape(f"values[{t}]", value, (*self.leading, length, self.value_width), source)
            if mask is not None:
                self._check_mask(f"key_masks[{t}]", mask, length)
        without_graph = [self._detached(arrays) for arrays in given]
        return Tokens(
            tuple(map(self._four_axes, without_graph[0])),
            tuple(map(self._four_axes, without_graph[1])),
            tuple(None if mask is None else self._mask_axes(mask) for mask in without_graph[2]),
        )

    def read_query(self, query: Array) -> Array:
        """Return queries in the kernel layout (b, h, n, d).

        Raises:
            ShapeError, OperandError: Queries that do not fit this layout.
        """
        self._check_array("query", query, "the state")
        shape = tuple(query.shape)
        fits = len(shape) == len(self.leading) + 2 and shape[:-3] == self.leading[:-1] and shape[-1] == self.width
        if not fits:
            heads = f"a multiple of {self.groups} heads, " if self.leading else ""
            raise ShapeError(
                "the query does not fit the keys of the state.",
                expected=f"batch axes {self.leading[:-1]}, {heads}queries, d = {self.width} columns",
                got=f"query.shape == {shape}",
            )
        if self.leading and (shape[-3] == 0 or shape[-3] % self.groups):
            raise ShapeError(
                "the number of key/value heads must divide the number of query heads.",
                code="heads-mismatch",
                expected=f"a multiple of g = {self.groups} query heads",
                got=f"h = {shape[-3]}",
                hint="query head i reads key/value head i // (h // g).",
            )
        return self._four_axes(self._detached((query,))[0])

    def quiet(self) -> AbstractContextManager[object]:
        """Return a context in which no gradient is recorded and nothing cast by the arrays' framework."""
        if self.kind != "torch":
            return nullcontext()
        from korder.torch.inference import quiet

        return quiet(self.device)

    def _detached(self, arrays: Arrays) -> Arrays:
        if self.kind != "torch":
            return arrays
        from korder.torch.inference import detached

        return detached(arrays)

    def _four_axes(self, x: Array) -> Array:
        heads = x.shape[-3] if x.ndim > 2 else 1
        return self.namespace.reshape(x, (self.batch, heads, *x.shape[-2:]))

    def _mask_axes(self, mask: Array) -> Array:
        heads = self.groups if self.leading and mask.ndim == len(self.leading) + 1 else 1
        return self.namespace.reshape(mask, (self.batch, heads, mask.shape[-1]))

    def _check_array(self, name: str, x: Array, source: str) -> None:
        found = (array_kind(x, name), dtype_name(x), device_name(x))
        wanted = (self.kind, self.dtype, self.device)
        for what, expected, got in zip(("array kind", "dtype", "device"), wanted, found, strict=True):
            if expected != got:
                raise OperandError(
                    f"{name} has another {what} than it must have.",
                    code=f"{what.replace(' ', '-')}-mismatch",
                    expected=f"{expected}, as {source} has",
                    got=got,
                    hint="korder converts nothing silently; convert the operand yourself.",
                )

    def _check_shape(self, name: str, x: Array, wanted: tuple[int, ...], source: str) -> None:
        if tuple(x.shape) != wanted:
            raise ShapeError(
                f"{name} has another shape than it must have.",
                expected=f"{name}.shape == {wanted}: axes as {source} has them, the length that of its keys",
                got=f"{name}.shape == {tuple(x.shape)}",
            )

    def _check_mask(self, name: str, mask: Array, length: int) -> None:
        found = (array_kind(mask, name), dtype_name(mask), device_name(mask))
        if found != (self.kind, "bool", self.device):
            raise OperandError(
                f"{name} must be a boolean array of the keys' kind and device.",
                code="mask-not-boolean",
                expected=f"{self.kind}, bool, on {self.device}; True = may be attended to",
                got=f"{found[0]}, {found[1]}, on {found[2]}",
            )
        allowed = [(*self.leading[:-1], length), (*self.leading, length)]
        if tuple(mask.shape) not in allowed:
            raise ShapeError(
                f"{name} must have one entry per key of its mode.",
                expected=" or ".join(f"{name}.shape == {shape}" for shape in dict.fromkeys(allowed)),
                got=f"{name}.shape == {tuple(mask.shape)}",
            )
