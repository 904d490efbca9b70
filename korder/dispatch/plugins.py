"""Loads backend plugins one at a time, so that a broken one is recorded as data and never hides the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, cast

import pluggy

from korder.errors import PluginLoadError
from korder.spi import API_VERSION, ENTRY_POINT_GROUP, Backend, Capabilities, MethodSupport, hooks

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
                _check(backend, origin, loaded)
                loaded.append(Loaded(backend, origin))
        except PluginLoadError as error:
            if strict:
                raise
            failures.append(LoadFailure(origin, error))
    return loaded, failures


def _check(backend: Any, origin: Origin, loaded: Sequence[Loaded]) -> None:
    try:
        check_backend(backend, origin, loaded)
    except PluginLoadError:
        raise
    except (Exception, SystemExit) as error:  # an attribute may be a property, and raise anything
        what = f"brings {type(backend).__name__}, which raised when its attributes were read"
        raise _failed(origin, what, error) from error


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
    if backend.api_version != API_VERSION:
        raise PluginLoadError(
            f"backend {backend.name!r} speaks another version of the backend contract; it comes from {origin}.",
            code="plugin-api-version",
            expected=f"api_version == {API_VERSION}",
            got=f"api_version == {backend.api_version!r}",
            hint="install a release of the plugin made for this korder, or the korder that it was made for.",
        )
    _check_facts(backend, origin)
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
    except (Exception, SystemExit) as error:  # a backend that cannot state its facts must not stop the others
        raise _failed(origin, f"brings a backend {backend.name!r} whose capabilities() raised", error) from error
    named = isinstance(backend.name, str) and backend.name not in ("", "auto")
    facts = {
        "name": (backend.name, named, "a text that is neither empty nor 'auto', which asks for any backend"),
        "array_kinds": (backend.array_kinds, isinstance(backend.array_kinds, frozenset), "a frozenset of texts"),
        "priority": (backend.priority, type(backend.priority) is int, "an integer"),
        "capabilities()": (capabilities, _well_formed(capabilities), "a Capabilities, of frozensets throughout"),
    }
    for what, (value, fits, expected) in facts.items():
        if not fits:
            raise PluginLoadError(
                f"{what} of backend {backend.name!r} is not what the contract says; it comes from {origin}.",
                code="plugin-malformed",
                expected=expected,
                got=repr(value),
            )


def _well_formed(facts: object) -> bool:
    if not isinstance(facts, Capabilities):
        return False
    methods: tuple[object, ...] = facts.methods if isinstance(facts.methods, tuple) else (None,)
    sets: list[object] = [facts.orders, facts.dtypes, facts.devices, facts.accumulation]
    for method in methods:
        known = isinstance(method, MethodSupport)
        sets += [getattr(method, name) if known else None for name in ("masks", "biases", "weights", "closed_form")]
    return all(isinstance(entries, frozenset) for entries in sets)


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
            hint="mark it with @korder.spi.hookimpl, in the module that the entry point names.",
        )
    return [backend for implementation in implementations for backend in _returned(implementation.function, origin)]


def _returned(hook: Callable[[], object], origin: Origin) -> list[Backend]:
    try:
        found = hook()
        if isinstance(found, Iterable) and not isinstance(found, str):
            return list(cast(Iterable[Backend], found))
    except (Exception, SystemExit) as error:  # a hook that raises is that plugin's failure alone
        raise _failed(origin, "raised in korder_backends()", error) from error
    raise PluginLoadError(
        f"{origin} returns no sequence from korder_backends().",
        code="plugin-not-a-sequence",
        expected="a sequence of backends, for one of them (backend,)",
        got=f"{found!r} of type {type(found).__name__}",
    )


def _failed(origin: Origin, what: str, error: BaseException) -> PluginLoadError:
    return PluginLoadError(f"{origin} {what}.", got=f"{type(error).__name__}: {error}")


def _origin(point: EntryPoint) -> Origin:
    # A distribution that was removed by halves has entry points and neither name nor version.
    try:
        metadata: Any = point.dist.metadata if point.dist is not None else None
    except FileNotFoundError:
        metadata = None
    name, version = (str(metadata[key]) if metadata and key in metadata else "" for key in ("Name", "Version"))
    return Origin(name or "unknown distribution", version, point.name)
