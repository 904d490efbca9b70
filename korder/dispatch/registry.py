"""The registry of backends: built on first use, asked lazily, and the only state that korder keeps."""

from __future__ import annotations

import difflib
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from korder.dispatch.cache import BoundedCache
from korder.dispatch.plugins import Loaded, LoadFailure, Origin, check_backend, discover, load
from korder.errors import UnknownBackendError
from korder.spi import Availability, Backend, Capabilities

if TYPE_CHECKING:
    from korder.dispatch.prepare import Prepared

AVAILABILITY_SECONDS = 10.0
KERNELS_KEPT = 256


@dataclass(frozen=True, slots=True)
class BackendStatus:
    """One entry of `korder.backends()`: a backend, or a plugin that failed to load, by the name of its entry point."""

    name: str
    priority: int
    distribution: str
    available: bool
    reason: str = ""
    remedy: str = ""
    array_kinds: tuple[str, ...] = ()
    capabilities: Capabilities | None = None
    loaded: bool = True
    version: str = ""
    entry_point: str = ""


class Registry:
    """Backends by name, what they answered about availability, and the kernels they compiled.

    Args:
        loaded: Backends to start with.
        failures: Plugins that could not be loaded.
    """

    def __init__(self, loaded: list[Loaded] | None = None, failures: list[LoadFailure] | None = None) -> None:
        self._loaded = list(loaded or ())
        self.failures = tuple(failures or ())
        self._availability: dict[str, Availability] = {}
        self.prepared: BoundedCache[tuple[object, ...], Prepared] = BoundedCache(KERNELS_KEPT)
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self.generation = 0

    @classmethod
    def from_entry_points(cls) -> Registry:
        """Load every installed plugin."""
        return cls(*load(discover()))

    def register(self, backend: Backend) -> None:
        """Add a backend by hand.

        Raises:
            PluginLoadError: Not a backend, another contract version, or a name that is taken.
        """
        origin = Origin("register_backend in this process")
        with self._lock:
            check_backend(backend, origin, self._loaded)
            self._loaded.append(Loaded(backend, origin))
            self.generation += 1

    def ordered(self) -> tuple[Backend, ...]:
        """Return the backends, highest priority first, ties by name."""
        return tuple(sorted((item.backend for item in self._loaded), key=lambda b: (-b.priority, b.name)))

    def get(self, name: str) -> Backend:
        """Return the backend called `name`.

        Raises:
            UnknownBackendError: With the known names, the nearest one and the plugins that failed to load.
        """
        known = {item.backend.name: item.backend for item in self._loaded}
        if name in known:
            return known[name]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        failed = "; ".join(f"{failure.origin} failed to load" for failure in self.failures)
        hint = f"did you mean {near[0]!r}?" if near else "`korder backends` lists what is installed."
        if any(name == failure.origin.entry_point for failure in self.failures):
            hint = "`korder backends` says why it failed to load."
        raise UnknownBackendError(
            f"no backend is called {name!r}.",
            expected=f"one of {', '.join(sorted(known)) or 'none: no backend is installed'}"
            + (f"; {failed}" if failed else ""),
            got=repr(name),
            hint=hint,
        )

    def availability(self, backend: Backend) -> Availability:
        """Ask a backend whether it can run here; once, and for at most 10 seconds."""
        with self._asking:
            known = self._availability.get(backend.name)
            if known is None:
                known = self._availability[backend.name] = _ask(backend)
        return known

    def status(self) -> tuple[BackendStatus, ...]:
        """Return one status per backend, by priority, then the plugins that failed to load."""
        origins = {item.backend.name: item.origin for item in self._loaded}
        lines = [self._status(backend, origins[backend.name]) for backend in self.ordered()]
        return (*lines, *map(_failure_status, self.failures))

    def _status(self, backend: Backend, origin: Origin) -> BackendStatus:
        answer = self.availability(backend)
        return BackendStatus(
            name=backend.name,
            priority=backend.priority,
            distribution=origin.distribution,
            version=origin.version,
            entry_point=origin.entry_point,
            available=answer.available,
            reason=answer.reason,
            remedy=answer.remedy,
            array_kinds=tuple(sorted(backend.array_kinds)),
            capabilities=backend.capabilities(),
        )


def _failure_status(failure: LoadFailure) -> BackendStatus:
    origin = failure.origin
    return BackendStatus(
        name=origin.entry_point,
        priority=0,
        distribution=origin.distribution,
        version=origin.version,
        entry_point=origin.entry_point,
        available=False,
        reason=str(failure.error),
        loaded=False,
    )


def _ask(backend: Backend) -> Availability:
    """Run `availability()` in a thread that is given up on when it hangs, and turn exceptions into an answer."""
    answers: list[Availability] = []

    def ask() -> None:
        try:
            answer: object = backend.availability()
        except (Exception, SystemExit) as error:  # a backend that cannot even answer is not available, and says why
            answer = Availability.no(f"availability() raised {type(error).__name__}: {error}")
        if not isinstance(answer, Availability):
            answer = Availability.no(f"availability() returned {answer!r}, which is no korder.spi.Availability")
        answers.append(Availability(bool(answer.available), str(answer.reason or ""), str(answer.remedy or "")))

    thread = threading.Thread(target=ask, daemon=True, name=f"korder-availability-{backend.name}")
    thread.start()
    thread.join(AVAILABILITY_SECONDS)
    if answers:
        return answers[0]
    return Availability.no(f"availability() did not answer within {AVAILABILITY_SECONDS:g} s")


_building = threading.Lock()


def default_registry() -> Registry:
    """Return the process's registry, built from the entry points on the first call, once."""
    with _building:  # a cache alone would let two first calls build one each
        return _only_registry()


@lru_cache(maxsize=1)
def _only_registry() -> Registry:
    return Registry.from_entry_points()
