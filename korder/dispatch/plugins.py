"""Loads backend plugins one at a time, so that a broken one is recorded as data and never hides the others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy

from korder.errors import PluginLoadError
from korder.spi import API_VERSION, ENTRY_POINT_GROUP, Backend, Capabilities, hooks

OWN_DISTRIBUTION = "korder"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a backend came from."""

    distribution: str
    version: str = ""
    entry_point: str = ""

    def __str__(self) -> str:
        where = f"{self.distribution} {self.version}".strip()
        return f"{where} (entry point {self.entry_point!r})" if self.entry_point else where


@dataclass(frozen=True, slots=True)
class LoadFailure:
    """A plugin that could not be used, and why."""

    origin: Origin
    error: PluginLoadError


@dataclass(frozen=True, slots=True)
class Loaded:
    """A backend and the distribution that brought it."""

    backend: Backend
    origin: Origin


def discover() -> tuple[EntryPoint, ...]:
    """Return the entry points to load, korder's own first, then by distribution and name; never install order.

    `KORDER_DISABLE_PLUGINS` leaves out the named entry points (comma separated), or with "1" all that are not korder's.
    """
    disabled = {name.strip() for name in os.environ.get("KORDER_DISABLE_PLUGINS", "").split(",") if name.strip()}
    found = {(_origin(point).distribution, point.name): point for point in entry_points(group=ENTRY_POINT_GROUP)}
    ordered = sorted(found.items(), key=lambda item: (item[0][0] != OWN_DISTRIBUTION, item[0]))
    return tuple(
        point
        for (distribution, name), point in ordered
        if name not in disabled and not ("1" in disabled and distribution != OWN_DISTRIBUTION)
    )


def load(points: Iterable[EntryPoint]) -> tuple[list[Loaded], list[LoadFailure]]:
    """Load every entry point by itself and return what works and what does not.

    Raises:
        PluginLoadError: Only under `KORDER_STRICT_PLUGINS=1`, at the first plugin that fails.
    """
    strict = os.environ.get("KORDER_STRICT_PLUGINS") == "1"
    loaded: list[Loaded] = []
    failures: list[LoadFailure] = []
    for point in points:
        origin = _origin(point)
        try:
            for backend in _backends_of(point, origin):
                check_backend(backend, origin, loaded)
                loaded.append(Loaded(backend, origin))
        except PluginLoadError as error:
            if strict:
                raise
            failures.append(LoadFailure(origin, error))
    return loaded, failures


def check_backend(backend: Any, origin: Origin, loaded: Sequence[Loaded]) -> None:
    """Raise `PluginLoadError` unless `backend` speaks this contract under a name that is free."""
    if not isinstance(backend, Backend):
        raise PluginLoadError(
            f"{origin} brings something that is not a Backend.",
            code="plugin-not-a-backend",
            expected="instances of korder.spi.Backend",
            got=f"{backend!r} of type {type(backend).__name__}",
            hint="korder_backends() returns instances, not classes or names.",
        )
    missing = [name for name in ("name", "api_version", "array_kinds") if not hasattr(backend, name)]
    if missing:
        raise PluginLoadError(
            f"backend {type(backend).__name__} lacks required attributes; it comes from {origin}.",
            code="plugin-incomplete",
            expected="class attributes name, api_version and array_kinds",
            got=f"no {', '.join(missing)}",
        )
    _check_facts(backend, origin)
    if backend.api_version != API_VERSION:
        raise PluginLoadError(
            f"backend {backend.name!r} speaks another version of the backend contract; it comes from {origin}.",
            code="plugin-api-version",
            expected=f"api_version == {API_VERSION}",
            got=f"api_version == {backend.api_version!r}",
            hint="install a release of the plugin made for this korder, or the korder that it was made for.",
        )
    for other in loaded:
        if other.backend.name == backend.name:
            raise PluginLoadError(
                f"there are two backends called {backend.name!r}.",
                code="plugin-duplicate",
                expected="one backend for each name",
                got=f"one from {other.origin}, one from {origin}",
                hint="give one another name, uninstall one, or name its entry point in KORDER_DISABLE_PLUGINS.",
            )


def _check_facts(backend: Backend, origin: Origin) -> None:
    """Raise unless the static facts are what the contract says, so that no question about them can fail later."""
    try:
        capabilities: object = backend.capabilities()
    except Exception as error:  # a backend that cannot state its facts must not stop the others
        raise _failed(origin, f"brings a backend {backend.name!r} whose capabilities() raised", error) from error
    facts = {
        "name": (backend.name, isinstance(backend.name, str) and bool(backend.name), "a text that is not empty"),
        "array_kinds": (backend.array_kinds, isinstance(backend.array_kinds, frozenset), "a frozenset of texts"),
        "priority": (backend.priority, type(backend.priority) is int, "an integer"),
        "capabilities()": (capabilities, isinstance(capabilities, Capabilities), "a Capabilities"),
    }
    for what, (value, fits, expected) in facts.items():
        if not fits:
            raise PluginLoadError(
                f"{what} of backend {backend.name!r} is not what the contract says; it comes from {origin}.",
                code="plugin-malformed",
                expected=expected,
                got=repr(value),
            )


def _backends_of(point: EntryPoint, origin: Origin) -> list[Backend]:
    try:
        plugin = point.load()
    except (Exception, SystemExit) as error:  # whatever a third party's import raises is recorded, never passed on
        raise _failed(origin, "could not be imported", error) from error
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    try:
        manager.register(plugin, point.name)
        manager.check_pending()
    except Exception as error:  # pluggy's own validation: unknown hook names, wrong arguments
        raise _failed(origin, "does not fit the hook specification", error) from error
    implementations = manager.hook.korder_backends.get_hookimpls()
    if not implementations:
        raise PluginLoadError(
            f"{origin} implements no hook.",
            code="plugin-no-hook",
            expected="a function korder_backends marked with korder.spi.hookimpl",
            got=f"{plugin!r} without one",
        )
    found: list[Backend] = []
    for implementation in implementations:
        try:
            found.extend(cast(Iterable[Backend], implementation.function()))
        except Exception as error:  # a hook that raises is that plugin's failure alone
            raise _failed(origin, "raised in korder_backends()", error) from error
    return found


def _failed(origin: Origin, what: str, error: BaseException) -> PluginLoadError:
    return PluginLoadError(f"{origin} {what}.", got=f"{type(error).__name__}: {error}")


def _origin(point: EntryPoint) -> Origin:
    distribution = point.dist
    if distribution is None:
        return Origin("unknown distribution", entry_point=point.name)
    return Origin(distribution.metadata["Name"], distribution.version, point.name)
