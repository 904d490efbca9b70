"""Whether a backend can run here and now, with the reason and the remedy when it cannot."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec


@dataclass(frozen=True, slots=True)
class Availability:
    """The answer to "can it run on this machine, now?"."""

    available: bool
    reason: str = ""
    remedy: str = ""

    @classmethod
    def yes(cls, reason: str = "") -> Availability:
        """Available; a reason may carry a caveat."""
        return cls(True, reason)

    @classmethod
    def no(cls, reason: str, remedy: str = "") -> Availability:
        """Not available, why, and what to do about it."""
        return cls(False, reason, remedy)

    @classmethod
    def of_packages(cls, *packages: str, remedy: str) -> Availability:
        """Available if every package can be found; nothing is imported."""
        missing = [package for package in packages if find_spec(package) is None]
        if not missing:
            return cls.yes()
        return cls.no(f"package {missing[0]!r} is not installed", remedy)
