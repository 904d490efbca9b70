"""The factor cache: keys and values themselves, read by the exact method of whatever backend fits.

Buffers grow by doubling and are shared between states, so appending costs its tokens. Lengths are padded to a few
sizes, under a causal mask that hides the padding, so that a plan serves many tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from array_api_compat import device

from korder.decoding.state import DecodeState, changed_spec
from korder.decoding.tokens import TokenLayout, Tokens
from korder.dispatch.prepare import prepare
from korder.dispatch.registry import default_registry
from korder.dispatch.run import Outcome, Request, run
from korder.errors import ShapeError
from korder.problem import ITEM_BYTES, Problem
from korder.spec import AttentionSpec, Causal, Ordered, Window
from korder.spi.operands import Operands

Array = Any
SHORTEST = 16


def padded_length(length: int) -> int:
    """Return the length that is planned for: at most an eighth more, one of eight sizes between powers of two."""
    step = max(SHORTEST, 1 << max(length.bit_length() - 4, 0))
    return max(-(-length // step), 1) * step


class KeyBuffer:
    """Memory for the keys of one mode, filled from the front; what is written is never written again."""

    def __init__(self, xp: Any, like: tuple[Array, Array], capacity: int, *, masked: bool) -> None:
        key, value = like
        batch, groups = key.shape[:2]
        self.xp, self.capacity = xp, capacity
        self.keys, self.values = (
            xp.zeros((batch, groups, capacity, x.shape[3]), dtype=x.dtype, device=device(x)) for x in (key, value)
        )
        shape = (batch, groups, capacity)
        self.mask = xp.zeros(shape, dtype=xp.bool, device=device(key)) if masked else None
        self._used = 0
        self._lock = threading.Lock()

    def claim(self, start: int, stop: int) -> bool:
        """Return whether the positions are free to write, and keep them for the caller if they are."""
        with self._lock:
            if self._used != start or stop > self.capacity:
                return False
            self._used = stop
            return True

    def write(self, start: int, keys: Array, values: Array, mask: Array | None) -> None:
        """Write tokens from a position on, which was claimed."""
        stop = start + keys.shape[2]
        self.keys[:, :, start:stop, :] = keys
        self.values[:, :, start:stop, :] = values
        if self.mask is not None:
            shape = (*keys.shape[:2], stop - start)
            given = self.xp.ones(shape, dtype=self.xp.bool, device=device(keys)) if mask is None else mask
            self.mask[:, :, start:stop] = self.xp.broadcast_to(given, shape)


@dataclass(frozen=True, slots=True)
class ModeCache:
    """The keys of one mode: positions start to stop of a buffer, which may hold later ones of other states."""

    buffer: KeyBuffer
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Keys."""
        return self.stop - self.start

    def extended(self, keys: Array, values: Array, mask: Array | None, window: int | None) -> ModeCache:
        """Return the keys with more at their end, the last `window` of them."""
        count = int(keys.shape[2])
        if count == 0:
            return self
        stop = self.stop + count
        start = self.start if window is None else max(self.start, stop - window)
        fits = start + padded_length(stop - start) <= self.buffer.capacity
        if fits and (mask is None or self.buffer.mask is not None) and self.buffer.claim(self.stop, stop):
            self.buffer.write(self.stop, keys, values, mask)
            return ModeCache(self.buffer, start, stop)
        return self._moved(keys, values, mask, start)

    def _moved(self, keys: Array, values: Array, mask: Array | None, start: int) -> ModeCache:
        """Return the keys from `start` on, and more, in a buffer of their own with as much room again."""
        old = self.buffer
        kept = max(self.stop - start, 0)
        later = slice(max(start - self.stop, 0), None)
        new = (keys[:, :, later, :], values[:, :, later, :], None if mask is None else mask[:, :, later])
        length = kept + int(new[0].shape[2])
        masked = old.mask is not None or mask is not None
        buffer = KeyBuffer(old.xp, (keys, values), padded_length(2 * length), masked=masked)
        buffer.claim(0, length)
        if kept:
            before = slice(start, self.stop)
            old_mask = None if old.mask is None else old.mask[:, :, before]
            buffer.write(0, old.keys[:, :, before, :], old.values[:, :, before, :], old_mask)
        buffer.write(kept, *new)
        return ModeCache(buffer, 0, length)

    def arrays(self, length: int) -> tuple[Array, Array, Array | None]:
        """Return keys, values and mask of a length from the first key on, whatever lies behind the last."""
        part, mask = slice(self.start, self.start + length), self.buffer.mask
        keys, values = self.buffer.keys[:, :, part, :], self.buffer.values[:, :, part, :]
        return keys, values, None if mask is None else mask[:, :, part]


@dataclass(frozen=True, eq=False)
class FactorCache(DecodeState):
    """Keys and values, O(m d) memory; a query costs what the exact method costs at this length."""

    spec: AttentionSpec
    layout: TokenLayout
    modes: tuple[ModeCache, ...]

    @classmethod
    def empty(cls, spec: AttentionSpec, layout: TokenLayout, tokens: Tokens, capacity: int | None) -> FactorCache:
        """Return the cache of no keys with room for `capacity` in every mode, or for as many tokens again."""
        modes = []
        for pair, count in zip(zip(tokens.keys, tokens.values, strict=True), tokens.counts, strict=True):
            room = padded_length(2 * count if capacity is None else capacity)
            masked = any(mask is not None for mask in tokens.key_masks)
            modes.append(ModeCache(KeyBuffer(layout.namespace, pair, room, masked=masked), 0, 0))
        made = cls(spec, layout, tuple(modes))
        made._require_backend()
        return made

    def _require_backend(self) -> None:
        """Raise at once, and not at the first query, where no backend takes such keys."""
        arrays = [mode.arrays(0) for mode in self.modes]
        problem = self._problem(self.layout.groups, 1, (SHORTEST,) * self.spec.order, arrays)
        prepare(default_registry(), problem, self.layout.kind)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Keys of each mode that a query sees, masked ones counted; under a window those that are left."""
        return tuple(mode.length for mode in self.modes)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        per_key = self.layout.batch * self.layout.groups * ITEM_BYTES[self.layout.dtype]
        widths = self.layout.width + self.layout.value_width
        return sum(mode.buffer.capacity for mode in self.modes) * per_key * widths

    def extended(self, tokens: Tokens) -> FactorCache:
        """Return the cache with more tokens."""
        mask = self.spec.mask
        lengths = tuple(a + b for a, b in zip(self.lengths, tokens.counts, strict=True))
        if isinstance(mask, Ordered) and mask.align != "end" and len(set(lengths)) > 1:
            raise ShapeError(
                "an ordered mask over modes of unequal lengths needs to know how positions line up.",
                code="alignment-missing",
                expected='as many tokens in every mode, or Ordered(align="end")',
                got=f"lengths {lengths}",
            )
        windows = mask.sizes if isinstance(mask, Window) else (None,) * self.spec.order
        parts = zip(self.modes, tokens.keys, tokens.values, tokens.key_masks, windows, strict=True)
        return replace(self, modes=tuple(mode.extended(*new) for mode, *new in parts))

    @cached_property
    def _kernel_spec(self) -> AttentionSpec:
        """The spec that kernels get: the newest key of every mode stands at position 0, where all queries stand."""
        return changed_spec(self.spec, mask=Ordered() if isinstance(self.spec.mask, Ordered) else Causal())

    def answer(self, query: Array, *, certify: bool) -> Outcome:
        """Return what queries (b, h, n, d) make of the keys; exact, so there is nothing to certify."""
        batch, heads, count, width = query.shape
        lengths = tuple(self._planned(mode, t) for t, mode in enumerate(self.modes))
        arrays = [mode.arrays(length) for mode, length in zip(self.modes, lengths, strict=True)]
        # every query stands at one position: a head of its own, so that a causal mask hides the same keys from all
        rows = self.layout.namespace.reshape(query, (batch, heads * count, 1, width)) if count else query
        problem = self._problem(heads * max(count, 1), min(count, 1), lengths, arrays)
        operands = Operands(
            query=rows,
            keys=tuple(keys for keys, _, _ in arrays),
            values=tuple(values for _, values, _ in arrays),
            key_masks=tuple(mask for _, _, mask in arrays),
            biases=(None,) * self.spec.order,
            query_offset=0,
            key_offsets=tuple(1 - length for length in self.lengths),
        )
        outcome = run(default_registry(), Request(problem, operands, self.layout.kind))
        xp, found = self.layout.namespace, outcome.output
        output = xp.reshape(found.output, (batch, heads, count, self.layout.value_width))
        shaped = replace(found, output=output, lse=xp.reshape(found.lse, (batch, heads, count)))
        return replace(outcome, output=shaped)

    def _planned(self, mode: ModeCache, t: int) -> int:
        """Return the length that a mode is planned for, never more than its window."""
        mask, padded = self.spec.mask, padded_length(mode.length)
        return min(padded, mask.sizes[t]) if isinstance(mask, Window) else padded

    def _problem(self, heads: int, queries: int, lengths: tuple[int, ...], arrays: list[Any]) -> Problem:
        layout, order = self.layout, self.spec.order
        return Problem(
            spec=self._kernel_spec,
            batch=layout.batch,
            heads=heads,
            groups=layout.groups,
            queries=queries,
            lengths=lengths,
            query_width=layout.width,
            key_widths=(layout.width,) * order,
            value_width=layout.value_width,
            dtype=layout.dtype,
            device=layout.device,
            biases=(None,) * order,
            key_masks=tuple(mask is not None for _, _, mask in arrays),
        )

    def contents(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return keys, values and masks of every mode, without room for more."""
        arrays: dict[str, Array] = {}
        for t, mode in enumerate(self.modes):
            keys, values, mask = mode.arrays(mode.length)
            arrays |= {f"keys_{t}": keys, f"values_{t}": values}
            arrays |= {} if mask is None else {f"mask_{t}": mask}
        masked = [mode.buffer.mask is not None for mode in self.modes]
        return arrays, {"lengths": list(self.lengths), "masked": masked}

    @classmethod
    def described(
        cls, spec: AttentionSpec, layout: TokenLayout, values: Mapping[str, Any]
    ) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape and dtype of every array of `contents`."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for t in range(spec.order):
            axes = (layout.batch, layout.groups, int(values["lengths"][t]))
            found[f"keys_{t}"] = ((*axes, layout.width), layout.dtype)
            found[f"values_{t}"] = ((*axes, layout.value_width), layout.dtype)
            if values["masked"][t]:
                found[f"mask_{t}"] = (axes, "bool")
        return found

    @classmethod
    def restored(
        cls, spec: AttentionSpec, layout: TokenLayout, arrays: Mapping[str, Array], values: Mapping[str, Any]
    ) -> FactorCache:
        """Return the cache that `contents` described."""
        order = range(spec.order)
        tokens = Tokens(
            tuple(arrays[f"keys_{t}"] for t in order),
            tuple(arrays[f"values_{t}"] for t in order),
            tuple(arrays.get(f"mask_{t}") for t in order),
        )
        return cls.empty(spec, layout, tokens, None).extended(tokens)
