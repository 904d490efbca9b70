"""The run files: what `korder run` and `korder bench` read. Loaded with a run file, never by `import korder`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from korder.errors import SpecError
from korder.spec.attention import AttentionSpec
from korder.spec.base import SpecModel
from korder.spec.masks import Full

Count = Annotated[int, Field(ge=1, strict=True)]
Seed = Annotated[int, Field(ge=0, strict=True)]
Positive = Annotated[float, Field(gt=0, strict=True)]


class ArraysData(SpecModel):
    """Operands from a file: an .npz or .safetensors archive, or a directory of .npy files. Nothing is unpickled.

    Names: query, key_1 .. key_k, value_1 .. value_k; optional weight (full), weight_1 .. weight_{k+1} (CP factors, the
    query's first), bias_t, key_mask_t.
    """

    kind: Literal["arrays"] = "arrays"
    path: Annotated[str, Field(min_length=1)]
    """The archive or directory, relative to the working directory."""
    allow_nonfinite: Annotated[bool, Field(strict=True)] = False
    """Accept NaN and infinities in the arrays and in the output; otherwise both are errors."""


class RandomData(SpecModel):
    """Seeded random operands, a different one in every place."""

    kind: Literal["random"] = "random"
    n: Count
    """Queries."""
    lengths: tuple[Annotated[int, Field(ge=0, strict=True)], ...] | None = None
    """Keys of each mode, one number per mode; n for every mode when omitted."""
    width: Count
    """Columns of the query and of every key, d."""
    value_width: Count | None = None
    """Columns of every value, e; the width when omitted."""
    heads: Count = 1
    """Query heads, h."""
    groups: Count | None = None
    """Key/value heads, g, which must divide the heads; the heads when omitted."""
    batch: Count = 1
    """Batch size, b."""
    seed: Seed = 0
    """Seed of the generator; the same seed gives the same arrays."""
    distribution: Literal["normal", "uniform"] = "normal"
    """Standard normal entries, or uniform ones on [-1, 1]."""
    score_rms: Positive | None = None
    """Rescale the query so that the root mean square of all scores is this; not rescaled when omitted."""
    dtype: Literal["float16", "float32", "float64"] = "float32"
    """Dtype of every operand."""


class SetCardsData(SpecModel):
    """Cards of the game SET dealt from the 81: which of them take part in a SET, decided by one order-2 layer.

    Source: the construction that detects triples with order-2 attention, arXiv 2310.04064.
    """

    kind: Literal["set_cards"] = "set_cards"
    table: Annotated[int, Field(ge=3, le=81, strict=True)] = 12
    """Cards on the table."""
    seed: Seed = 0
    """Seed of the deal."""


class TextData(SpecModel):
    """Byte n-grams of real text through a fixed seeded random projection: one token per byte position."""

    kind: Literal["text"] = "text"
    path: Annotated[str, Field(min_length=1)] | None = None
    """A text file; the documentation topics and module sources that ship with Python when omitted."""
    tokens: Count
    """Tokens, taken from the start of the text."""
    width: Count
    """Columns of the query and of every key, d."""
    value_width: Count | None = None
    """Columns of every value, e; the width when omitted."""
    ngram: Annotated[int, Field(ge=1, le=8, strict=True)] = 3
    """Bytes in a token."""
    seed: Seed = 0
    """Seed of the projections."""
    score_rms: Positive | None = None
    """Rescale the query so that the root mean square of all scores is this."""
    score_bound: Positive | None = None
    """Rescale the query so that no score exceeds this in size; not together with score_rms."""
    dtype: Literal["float32", "float64"] = "float32"
    """Dtype of every operand."""

    @model_validator(mode="after")
    def _one_rescaling(self) -> Self:
        if self.score_rms is not None and self.score_bound is not None:
            raise ValueError("give score_rms or score_bound, not both")
        return self


Data = Annotated[ArraysData | RandomData | SetCardsData | TextData, Field(discriminator="kind")]


class Output(SpecModel):
    """Where results go."""

    directory: Annotated[str, Field(min_length=1)] | None = None
    """Directory for the results, relative to the working directory; nothing is written when omitted."""
    overwrite: Annotated[bool, Field(strict=True)] = False
    """Replace the results of an earlier run; files that korder did not write are never touched."""


class AttendOutput(Output):
    """Where the results of one attention go, and in which form."""

    arrays: Literal["npz", "safetensors"] = "npz"
    """Format of the array file."""
    plot: Annotated[bool, Field(strict=True)] = True
    """Draw plot.png where matplotlib is installed."""


class AttendRun(SpecModel):
    """One attention: data, spec, backend, output."""

    schema_version: Literal[1]
    """Version of this file format."""
    kind: Literal["attend"]
    """What the file describes."""
    data: Data
    """Where the operands come from."""
    attention: AttentionSpec
    """What to compute."""
    backend: Annotated[str, Field(min_length=1)] = "auto"
    """A backend's name, or "auto" for the best that can run it."""
    output: AttendOutput = AttendOutput()
    """Where results go."""

    @model_validator(mode="after")
    def _data_fits_attention(self) -> Self:
        order = self.attention.order
        if isinstance(self.data, RandomData) and self.data.lengths is not None and len(self.data.lengths) != order:
            raise ValueError(
                f"data.lengths has {len(self.data.lengths)} numbers, attention.order = {order} needs {order}"
            )
        if self.attention.score == "kronecker" and not isinstance(self.data, ArraysData):
            raise ValueError("attention.score = 'kronecker' needs a weight, which only data.kind = 'arrays' carries")
        if isinstance(self.data, SetCardsData):
            _check_set_cards(self.attention)
        return self


def _check_set_cards(attention: AttentionSpec) -> None:
    """A SET has three cards: the query's and one of each of two modes, scored without further scaling."""
    if attention.order != 2:
        raise ValueError(f"data.kind = 'set_cards' needs attention.order = 2, not {attention.order}")
    if attention.scale != 1.0:
        raise ValueError("data.kind = 'set_cards' needs attention.scale = 1.0, the sharpness is in the query")
    if not isinstance(attention.mask, Full):
        raise ValueError("data.kind = 'set_cards' needs the full mask, every card may meet every other")


class BenchmarkRun(SpecModel):
    """Which benchmark rows to measure, and how often."""

    schema_version: Literal[1]
    """Version of this file format."""
    kind: Literal["benchmark"]
    """What the file describes."""
    rows: tuple[str, ...] | None = None
    """Names of the rows to measure; when omitted, all that take seconds."""
    repeats: Annotated[int, Field(ge=1, le=100, strict=True)] = 5
    """Runs of which the median is reported."""
    quick: Annotated[bool, Field(strict=True)] = False
    """Smaller sizes, for a first look."""
    backend: Annotated[str, Field(min_length=1)] = "auto"
    """A backend's name, or "auto" for the best that can run it."""
    output: Output = Output()
    """Where results go."""


Run = AttendRun | BenchmarkRun
RUN_KINDS: dict[str, type[AttendRun] | type[BenchmarkRun]] = {"attend": AttendRun, "benchmark": BenchmarkRun}


def parse_run(content: Mapping[str, Any]) -> Run:
    """Return the run that a mapping describes.

    Raises:
        SpecError: An unknown kind or key, a missing key or a wrong type; the key path and the value are named.
    """
    kind = content.get("kind")
    if isinstance(kind, str) and kind in RUN_KINDS:
        return RUN_KINDS[kind].model_validate(dict(content))
    near = difflib.get_close_matches(str(kind), RUN_KINDS, n=1, cutoff=0.4)
    raise SpecError(
        "the run file does not say what it is." if "kind" not in content else "the run file is of an unknown kind.",
        code="spec-unknown-kind",
        expected="kind = " + " or ".join(f'"{name}"' for name in RUN_KINDS),
        got="no key `kind`" if "kind" not in content else f"kind = {kind!r}",
        hint=f"did you mean {near[0]!r}?" if near else "`korder schema` prints every key.",
    )
