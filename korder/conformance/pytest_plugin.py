"""The pytest front end: one parametrised test is the whole kit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from korder.conformance.arrays import FromArray, ToArray
from korder.conformance.attempts import Reasons, ask, collect
from korder.conformance.levels import Item
from korder.conformance.records import RefusedError, UnverifiedError
from korder.errors import ConformanceFailure
from korder.spi import Backend

if TYPE_CHECKING:
    import pytest


class BoundCheck:
    """One item, to be called by a test: returns if it passes, raises `ConformanceFailure`, or skips as unverified."""

    def __init__(self, item: Item) -> None:
        self.item = item

    def __repr__(self) -> str:
        return self.item.id

    def __call__(self) -> None:
        """Run the check."""
        import pytest

        subject = self.item.subject
        answer = ask(subject.backend)
        if not self.item.check.static and not answer.available:
            pytest.skip(f"unverified: not available: {answer.reason}")
        try:
            self.item.run()
        except UnverifiedError as reason:
            pytest.skip(f"unverified: {reason}")
        except RefusedError:
            return  # refused with reasons: as it must be
        except ConformanceFailure:
            raise
        except Exception as error:
            raise ConformanceFailure(
                f"{self.item.check.number} {self.item.id} raised {type(error).__name__}: {error}",
                hint=self.item.check.behaviour,
            ) from error


def parametrize_with_checks(
    backend: Backend,
    *,
    expected_failures: Reasons | None = None,
    depth: str = "quick",
    only: str | None = None,
    to_array: ToArray | None = None,
    from_array: FromArray | None = None,
) -> pytest.MarkDecorator:
    """Return a decorator that turns a test with one argument, `check`, into the whole kit.

    Args:
        backend: The backend, or what its entry point brings.
        expected_failures: As `run_conformance`; they become strict xfails.
        depth: "quick" or "full".
        only: Pattern of the ids to run, or a level.
        to_array: As `run_conformance`.
        from_array: As `run_conformance`.

    Raises:
        SpecError: An expected failure that is no item of this backend.
    """
    import pytest

    def marks(reason: str | None) -> Any:
        return () if reason is None else (pytest.mark.xfail(reason=reason, strict=True, raises=ConformanceFailure),)

    found = collect(backend, depth, expected_failures, only=only, to_array=to_array, from_array=from_array)
    return pytest.mark.parametrize(
        "check", [pytest.param(BoundCheck(item), id=item.id, marks=marks(reason)) for item, reason in found]
    )
