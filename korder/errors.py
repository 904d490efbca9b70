"""The errors that korder raises: each says what is wrong, what was expected, what came, and what to do.

Every class is also a built-in type, so that callers may catch either, and carries a stable `code`.
"""

from __future__ import annotations


class KorderError(Exception):
    """Base of every error of korder.

    Args:
        message: What is wrong, in the user's terms, one sentence.
        code: Stable identifier; the class default when omitted.
        expected: What would have been right.
        got: What came instead, with real values.
        hint: What to do about it.
    """

    default_code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        expected: str | None = None,
        got: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.expected = expected
        self.got = got
        self.hint = hint

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.message}"]
        for label, text in (("expected:", self.expected), ("got:", self.got), ("hint:", self.hint)):
            if text is not None:
                lines.append(f"  {label:<9} {text}")
        return "\n".join(lines)

    def report(self) -> str:
        """Return the text that the command line prints: class name, code, message, details."""
        return f"{type(self).__name__} {self}"

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.message,), self.__dict__.copy()


class SpecError(KorderError, ValueError):
    """A spec or a run file says something that cannot be meant."""

    default_code = "spec-invalid"


class ShapeError(KorderError, ValueError):
    """Shapes that do not fit each other."""

    default_code = "shape-mismatch"


class OperandError(KorderError, TypeError):
    """An operand of a wrong dtype, array kind or device."""

    default_code = "operand-invalid"


class UnknownBackendError(KorderError, LookupError):
    """A backend name that nothing registered."""

    default_code = "backend-unknown"


class BackendUnavailableError(KorderError, RuntimeError):
    """A known backend that cannot run on this machine, now."""

    default_code = "backend-unavailable"


class UnsupportedProblemError(KorderError, NotImplementedError):
    """A valid problem that nothing at hand can run."""

    default_code = "problem-unsupported"


class KernelError(KorderError, RuntimeError):
    """A kernel broke its contract."""

    default_code = "kernel-failed"


class AccuracyError(KorderError, ArithmeticError):
    """The certificate of an approximate method misses what was asked, or the result is unusable."""

    default_code = "accuracy-missed"


class AccuracyWarning(UserWarning):
    """Issued instead of `AccuracyError` under `on_exceed="warn"`."""


class PluginLoadError(KorderError, ImportError):
    """A plugin that could not be loaded."""

    default_code = "plugin-failed"


class ConformanceFailure(KorderError, AssertionError):  # noqa: N818 - the design names it so
    """A backend that does not do what it claims."""

    default_code = "conformance-failed"
