"""Turns the data of a run file into operands, and into their shapes alone where planning needs no more."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

from korder.experiments import set_cards, text
from korder.experiments.arrays import check_finite, names_of_the_file, read_inputs
from korder.experiments.inputs import FloatArray, Inputs, Outline, rescaled, score_rms
from korder.problem import Problem, Shapes, make_problem
from korder.spec.runs import ArraysData, AttendRun, RandomData, SetCardsData, TextData


def outline(run: AttendRun) -> Outline:
    """Return shapes and dtype of a run's operands; only arrays from a file are read for it."""
    data, order = run.data, run.attention.order
    if isinstance(data, ArraysData):
        return read_inputs(Path(data.path)).outline()
    if isinstance(data, SetCardsData):
        width = len(set_cards.ATTRIBUTES) * set_cards.COLUMNS
        card, value = (data.table, width), (data.table, data.table)
        return Outline(Shapes(card, (card,) * order, (value,) * order), "float32")
    if isinstance(data, TextData):
        token, value = (data.tokens, data.width), (data.tokens, data.value_width or data.width)
        return Outline(Shapes(token, (token,) * order, (value,) * order), data.dtype)
    return Outline(_random_shapes(data, order), data.dtype)


def check_problem(run: AttendRun, known: Outline) -> Problem:
    """Check shapes, dtype and spec against each other before any array is made.

    Raises:
        ShapeError, OperandError, SpecError: As `korder.problem.make_problem`.
    """
    with names_in(run):
        return make_problem(run.attention, known.shapes, known.dtype)


def names_in(run: AttendRun) -> AbstractContextManager[None]:
    """Return the context in which errors call operands as the run's file does, where they come from one."""
    return names_of_the_file() if isinstance(run.data, ArraysData) else nullcontext()


def build_inputs(run: AttendRun) -> Inputs:
    """Return the operands of a run.

    Raises:
        SpecError, OperandError, ShapeError: Files or texts that do not hold what was asked for, shapes that do not
            fit, NaN or infinities where they are not allowed.
    """
    data = run.data
    if isinstance(data, ArraysData):
        inputs = read_inputs(Path(data.path))
        check_problem(run, inputs.outline())
        if not data.allow_nonfinite:
            check_finite(inputs)
        return inputs
    check_problem(run, outline(run))
    if isinstance(data, SetCardsData):
        return set_cards.build(data)
    if isinstance(data, TextData):
        return text.build(data, run.attention)
    return _random_inputs(data, run)


def _random_shapes(data: RandomData, order: int) -> Shapes:
    groups = data.groups or data.heads
    lengths = data.lengths or (data.n,) * order
    return Shapes(
        query=(data.batch, data.heads, data.n, data.width),
        keys=tuple((data.batch, groups, length, data.width) for length in lengths),
        values=tuple((data.batch, groups, length, data.value_width or data.width) for length in lengths),
    )


def _random_inputs(data: RandomData, run: AttendRun) -> Inputs:
    shapes = _random_shapes(data, run.attention.order)
    generator = np.random.default_rng(data.seed)

    def draw(shape: tuple[int, ...]) -> FloatArray:
        wide = np.float64 if data.dtype == "float64" else np.float32
        if data.distribution == "normal":
            array = generator.standard_normal(shape, dtype=wide)
        else:
            array = 2 * generator.random(shape, dtype=wide) - 1
        return array.astype(data.dtype, copy=False)

    query, keys = draw(shapes.query), tuple(map(draw, shapes.keys))
    if data.score_rms is not None:
        present = score_rms(query, keys, run.attention.score_factor(data.width))
        query = rescaled(query, present, data.score_rms, "data.score_rms")
    return Inputs(query, keys, tuple(map(draw, shapes.values)))
