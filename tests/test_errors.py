"""Errors say what is wrong, expected, got and hint, are built-in types too, and survive pickling."""

from __future__ import annotations

import pickle

import pytest

from korder import errors

CLASSES = {
    errors.SpecError: ValueError,
    errors.ShapeError: ValueError,
    errors.OperandError: TypeError,
    errors.UnknownBackendError: LookupError,
    errors.BackendUnavailableError: RuntimeError,
    errors.UnsupportedProblemError: NotImplementedError,
    errors.KernelError: RuntimeError,
    errors.AccuracyError: ArithmeticError,
    errors.PluginLoadError: ImportError,
    errors.ConformanceFailure: AssertionError,
}


@pytest.mark.parametrize(("error", "builtin"), CLASSES.items(), ids=lambda item: item.__name__)
def test_each_error_is_a_builtin_with_a_code(error: type[errors.KorderError], builtin: type[Exception]) -> None:
    raised = error("it broke.", expected="a", got="b", hint="c")
    assert isinstance(raised, builtin)
    assert isinstance(raised, errors.KorderError)
    lines = raised.report().splitlines()
    assert lines[0] == f"{error.__name__} [{error.default_code}] it broke."
    assert [line.split()[0] for line in lines[1:]] == ["expected:", "got:", "hint:"]


def test_codes_are_distinct() -> None:
    codes = [error.default_code for error in CLASSES]
    assert len(set(codes)) == len(codes)


def test_pickling_keeps_everything() -> None:
    error = errors.ShapeError("a.", code="x-y", expected="1", got="2", hint="3")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_parts_that_are_not_given_are_not_printed() -> None:
    assert str(errors.SpecError("only this.")) == "[spec-invalid] only this."
