"""Real text as operands: every byte n-gram is a token, projected by seeded random matrices, one per operand."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from korder.errors import SpecError
from korder.experiments.inputs import FloatArray, Inputs, rescaled, score_bound, score_rms
from korder.spec.attention import AttentionSpec
from korder.spec.runs import TextData


def build(data: TextData, spec: AttentionSpec) -> Inputs:
    """Return the operands of self-attention over a text; query and every key and value have a projection of their own.

    Shapes:  query, keys[t] (tokens, width); values[t] (tokens, value_width).
    Raises:  SpecError where the text is shorter than the tokens asked for.
    """
    letters = np.frombuffer(read_text(data), dtype=np.uint8)
    generator = np.random.default_rng(data.seed)
    query = _projected(letters, data, data.width, generator)
    keys = tuple(_projected(letters, data, data.width, generator) for _ in range(spec.order))
    values = tuple(_projected(letters, data, data.value_width or data.width, generator) for _ in range(spec.order))
    factor = spec.score_factor(data.width)
    if data.score_bound is not None:
        query = rescaled(query, score_bound(query, keys, factor), data.score_bound, "data.score_bound")
    elif data.score_rms is not None:
        query = rescaled(query, score_rms(query, keys, factor), data.score_rms, "data.score_rms")
    return Inputs(query, keys, values)


def read_text(data: TextData) -> bytes:
    """Return exactly the bytes that the tokens are made of: tokens + ngram - 1."""
    wanted = data.tokens + data.ngram - 1
    parts: list[bytes] = []
    size = 0
    for part in _file(data.path) if data.path is not None else _python_text():
        parts.append(part)
        size += len(part)
        if size >= wanted:
            return b"".join(parts)[:wanted]
    most = size - data.ngram + 1
    raise SpecError(
        "the text is shorter than the tokens asked for.",
        code="data-short",
        expected=f"at least {wanted} bytes for data.tokens = {data.tokens} of {data.ngram} bytes each",
        got=f"{size} bytes in {data.path or 'the text that ships with this Python'}",
        hint=f"set data.tokens to at most {most}, or data.path to a longer text."
        if most > 0
        else "set data.path to a longer text.",
    )


def _file(path: str) -> Iterator[bytes]:
    try:
        yield Path(path).read_bytes()
    except OSError as error:
        raise SpecError(
            f"the text {path} cannot be read.",
            code="data-missing",
            expected="data.path: a file, relative to the working directory",
            got=error.strerror or str(error),
        ) from None


def _python_text() -> Iterator[bytes]:
    """The language reference that `help()` prints, then the sources of the standard library, in order of name."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        yield topics[name].encode()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_bytes()


def _projected(letters: NDArray[np.uint8], data: TextData, width: int, generator: np.random.Generator) -> FloatArray:
    """Sum one random row per byte of the n-gram: the one-hot n-gram times a random matrix, without the one-hot."""
    rows = generator.standard_normal((data.ngram, 256, width)) / np.sqrt(data.ngram)
    rows = rows.astype(data.dtype)
    tokens: FloatArray = rows[0][letters[: data.tokens]]
    for place in range(1, data.ngram):
        tokens += rows[place][letters[place : place + data.tokens]]
    return tokens
