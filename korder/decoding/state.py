"""`DecodeState`: what `korder.prefill` returns, whatever the method; a value that appending leaves as it was."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from korder.decoding.tokens import TokenLayout, Tokens
from korder.spec import AttentionSpec

if TYPE_CHECKING:
    from korder.dispatch.run import Outcome

Array = Any


class DecodeState(ABC):
    """The keys and values so far, in the form that a spec's method reads.

    A state is a value: `append` returns another one and leaves it as it was, so that several continuations may start
    from one state. Made by `korder.prefill`, read by `korder.decode`.
    """

    spec: AttentionSpec
    layout: TokenLayout

    def append(
        self, keys: Sequence[Array], values: Sequence[Array], *, key_masks: Sequence[Array | None] | None = None
    ) -> DecodeState:
        """Return the state with more keys and values in every mode; modes may get different numbers of them.

        Shapes:  keys[t] (b, g, c_t, d), values[t] (b, g, c_t, e), key_masks[t] bool (b, c_t) or (b, g, c_t), leading
                 axes as those of `prefill`.
        Raises:  ShapeError, OperandError: Tokens unlike those of the state.
        """
        tokens = self.layout.read(keys, values, key_masks, "the state")
        with self.layout.quiet():
            return self.extended(tokens)

    def save(self, path: str | Path) -> None:
        """Write the state to one file, whole or not at all; `korder.load_state` reads it.

        Raises:
            SpecError: The file cannot be written.
        """
        from korder.decoding.files import write_state

        write_state(self, Path(path))

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Keys of each mode that a query sees, masked ones counted."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of the arrays that the state holds on to."""

    @abstractmethod
    def extended(self, tokens: Tokens) -> DecodeState:
        """Return the state with more tokens, which were checked."""

    @abstractmethod
    def answer(self, query: Array, *, certify: bool) -> Outcome:
        """Return what queries (b, h, n, d), which were checked, make of the keys."""

    @abstractmethod
    def contents(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the arrays and the plain values by which `korder.load_state` makes the state again."""


def changed_spec(spec: AttentionSpec, **changes: Any) -> AttentionSpec:
    """Return a spec with some fields changed."""
    return AttentionSpec(**{name: getattr(spec, name) for name in type(spec).model_fields} | changes)
