"""How a run tells what it is at, without knowing who listens."""

from __future__ import annotations


class Progress:
    """Listens and says nothing; the command line has one that draws."""

    def stage(self, text: str, total: int | None = None) -> None:
        """Begin a stage; `total` is the number of steps it will report, None where it reports none."""

    def note(self, text: str) -> None:
        """Say once, wherever the run is started, that something takes long."""

    def advance(self) -> None:
        """Report one step of the present stage."""

    def share(self, done: float) -> None:
        """Report the share of the present stage that is done, 0 to 1; smaller than before where it begins again."""
