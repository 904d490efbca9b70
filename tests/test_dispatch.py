"""Loading isolates broken plugins; selection follows priority, never falls back from a name, keeps every reason."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from korder import AttentionSpec, Policy
from korder.dispatch import plugins, registry
from korder.dispatch.cache import BoundedCache
from korder.dispatch.plugins import Loaded, Origin
from korder.dispatch.prepare import prepare
from korder.dispatch.registry import Registry
from korder.dispatch.select import select
from korder.errors import (
    BackendUnavailableError,
    OperandError,
    PluginLoadError,
    SpecError,
    UnknownBackendError,
    UnsupportedProblemError,
)
from korder.planning.candidates import candidate_plans
from korder.problem import Shapes, make_problem
from korder.spi import Availability, Backend, Capabilities, MethodSupport, Plan, hookimpl


class Stub(Backend):
    """A backend that answers questions and computes nothing."""

    name: ClassVar[str] = "stub"
    api_version: ClassVar[int] = 1
    array_kinds: ClassVar[frozenset[str]] = frozenset({"numpy"})

    def __init__(self, name: str, priority: int = 0, *, answer: Any = None, orders: Sequence[int] = (1, 2)) -> None:
        self.name = name  # type: ignore[misc]
        self.priority = priority  # type: ignore[misc]
        self.answer = answer or Availability.yes()
        self.orders = frozenset(orders)
        self.asked = 0

    def capabilities(self) -> Capabilities:
        exact = MethodSupport("exact", masks=frozenset({"full"}))
        return Capabilities(self.orders, frozenset({"float32"}), frozenset({"cpu"}), (exact,))

    def availability(self) -> Availability:
        self.asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def compile(self, plan: Plan) -> Any:
        return SimpleNamespace(plan=plan)


def registered(*backends: Backend) -> Registry:
    return Registry([Loaded(backend, Origin("test")) for backend in backends])


def plans(**spec: Any) -> tuple[Plan, ...]:
    shapes = Shapes((5, 3), ((7, 3), (11, 3)), ((7, 2), (11, 2)), offsets_given=True)
    return candidate_plans(make_problem(AttentionSpec(order=2, **spec), shapes, "float32"))


def test_highest_priority_first_and_ties_by_name() -> None:
    found = registered(Stub("b", 5), Stub("c", 5), Stub("a", 1), Stub("top", 9, orders=(1,)))
    selection = select(found, plans(), array_kind="numpy")
    assert selection.backend.name == "b"
    assert [(r.backend, r.reasons) for r in selection.rejected] == [("top", ("order=2 (supported: 1)",))]


def test_every_reason_is_kept() -> None:
    refused = Stub("x", answer=Availability.no("package 'y' is not installed", "pip install y"), orders=(1,))
    with pytest.raises(UnsupportedProblemError) as caught:
        select(registered(refused), plans(mask={"kind": "causal"}), array_kind="numpy")
    text = str(caught.value)
    for reason in (
        "order=2 (supported: 1)",
        "mask=causal (supported: full",
        "package 'y' is not installed; pip install y",
    ):
        assert reason in text


def test_a_named_backend_runs_it_or_raises() -> None:
    found = registered(Stub("fast", 9), Stub("slow", 0, orders=(1,)))
    with pytest.raises(UnsupportedProblemError, match="slow"):
        select(found, plans(), array_kind="numpy", requested="slow")
    with pytest.raises(UnknownBackendError, match="'fsat'") as caught:
        select(found, plans(), array_kind="numpy", requested="fsat")
    assert "'fast'" in (caught.value.hint or "")


def test_unavailable_by_name() -> None:
    found = registered(Stub("gone", answer=Availability.no("no such device", "plug it in")))
    with pytest.raises(BackendUnavailableError) as caught:
        select(found, plans(), array_kind="numpy", requested="gone")
    assert (caught.value.got, caught.value.hint) == ("no such device", "plug it in")


def test_availability_is_asked_once_and_not_of_backends_for_other_arrays() -> None:
    backend = Stub("a")
    found = registered(backend)
    with pytest.raises(UnsupportedProblemError, match="array kind=torch"):
        select(found, plans(), array_kind="torch")
    assert backend.asked == 0
    for _ in range(3):
        select(found, plans(), array_kind="numpy")
    assert backend.asked == 1
    with pytest.raises(OperandError, match="does not take torch arrays"):
        select(found, plans(), array_kind="torch", requested="a")


def test_availability_that_raises_is_an_answer() -> None:
    with pytest.raises(UnsupportedProblemError, match="RuntimeError: driver too old"):
        select(registered(Stub("a", answer=RuntimeError("driver too old"))), plans(), array_kind="numpy")


def test_availability_that_hangs_is_given_up_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    never = threading.Event()
    backend = Stub("a")
    monkeypatch.setattr(backend, "availability", never.wait)
    monkeypatch.setattr(registry, "AVAILABILITY_SECONDS", 0.05)
    with pytest.raises(UnsupportedProblemError, match=r"did not answer within 0\.05 s"):
        select(registered(backend), plans(), array_kind="numpy")
    never.set()


def test_a_backend_without_a_backward_is_not_chosen_for_one() -> None:
    forward_only = Stub("a", 9)
    with pytest.raises(UnsupportedProblemError, match=r"pass=backward \(supported: forward"):
        select(registered(forward_only), plans(), array_kind="numpy", backward=True)
    problem = plans()[0].problem
    assert prepare(registered(forward_only), problem, "numpy").selection.backend is forward_only
    with pytest.raises(UnsupportedProblemError, match="pass=backward"):
        prepare(registered(forward_only), problem, "numpy", backward=True)


def test_environment_and_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    found = registered(Stub("a", 5), Stub("b", 1))
    monkeypatch.setenv("KORDER_BACKEND", "b")
    assert select(found, plans(), array_kind="numpy").backend.name == "b"
    assert select(found, plans(), array_kind="numpy", requested="a").backend.name == "a"
    with pytest.raises(SpecError, match="'b' is not among"):
        select(found, plans(policy=Policy(backends=("a",))), array_kind="numpy")
    monkeypatch.setenv("KORDER_BACKEND", "")
    assert select(found, plans(), array_kind="numpy").backend.name == "a"
    monkeypatch.delenv("KORDER_BACKEND")
    assert select(found, plans(policy=Policy(backends=("b",))), array_kind="numpy").backend.name == "b"
    with pytest.raises(UnknownBackendError):
        select(found, plans(policy=Policy(backends=("b", "nobody"))), array_kind="numpy")


def test_prepared_kernels_are_reused_until_a_backend_is_added() -> None:
    found = registered(Stub("a", 1))
    problem = plans()[0].problem
    first = prepare(found, problem, "numpy")
    assert prepare(found, problem, "numpy") is first
    found.register(Stub("b", 2))
    assert prepare(found, problem, "numpy").selection.backend.name == "b"
    with pytest.raises(PluginLoadError, match="two backends"):
        found.register(Stub("b", 3))


def test_cache_is_bounded_and_drops_the_least_used() -> None:
    cache: BoundedCache[str, int] = BoundedCache(2)
    cache.put("a", 1)
    cache.put("b", 2)
    cache.get("a")
    cache.put("c", 3)
    assert (len(cache), cache.get("a"), cache.get("b"), cache.get("c")) == (2, 1, None, 3)


class FakePoint:
    """An entry point whose plugin is made by a function."""

    def __init__(self, name: str, distribution: str, make: Any) -> None:
        self.name = name
        self.dist = SimpleNamespace(metadata={"Name": distribution}, version="1.0")
        self.load = make


def plugin(*backends: Any, hook: str = "korder_backends") -> Any:
    def korder_backends() -> Sequence[Any]:
        if backends and isinstance(backends[0], Exception):
            raise backends[0]
        return backends

    korder_backends.__name__ = hook
    return SimpleNamespace(**{hook: hookimpl(korder_backends)})


def broken_import() -> Any:
    raise ImportError("libfast.so is missing")


def old() -> Backend:
    backend = Stub("old")
    backend.api_version = 0  # type: ignore[misc]
    return backend


def exits() -> Any:
    raise SystemExit("no licence")


def altered(**attributes: Any) -> Backend:
    backend = Stub("odd")
    for name, value in attributes.items():
        setattr(backend, name, value)
    return backend


def unable() -> Any:
    raise RuntimeError("no device table")


BROKEN = {
    "import exits": (exits, "no licence"),
    "capabilities raise": (lambda: plugin(altered(capabilities=unable)), "no device table"),
    "capabilities wrong": (lambda: plugin(altered(capabilities=dict)), "a Capabilities"),
    "a list of orders": (lambda: plugin(altered(capabilities=lambda: Capabilities([1, 2]))), "of frozensets"),  # type: ignore[arg-type]
    "methods by name": (lambda: plugin(altered(capabilities=lambda: Capabilities(methods="exact"))), "of frozensets"),  # type: ignore[arg-type]
    "priority": (lambda: plugin(altered(priority="high")), "an integer"),
    "array kinds": (lambda: plugin(altered(array_kinds="numpy")), "a frozenset"),
    "import": (broken_import, "libfast.so is missing"),
    "hook raises": (lambda: plugin(RuntimeError("boom")), "boom"),
    "misspelt hook": (lambda: plugin(Stub("x"), hook="korder_backend"), "korder_backend"),
    "no hook": (SimpleNamespace, "implements no hook"),
    "not a backend": (lambda: plugin("cuda"), "'cuda'"),
    "class, not instance": (lambda: plugin(Stub), "not a Backend"),
    "version": (lambda: plugin(old()), "api_version == 0"),
    "taken name": (lambda: plugin(Stub("good")), "two backends"),
}


@pytest.mark.parametrize(("make", "text"), BROKEN.values(), ids=BROKEN)
def test_a_broken_plugin_is_recorded_and_hides_nobody(make: Any, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        FakePoint("good", "alpha", lambda: plugin(Stub("good"))),
        FakePoint("bad", "beta", make),
        FakePoint("also", "gamma", lambda: plugin(Stub("also"))),
    ]
    loaded, failures = plugins.load(points)  # type: ignore[arg-type]
    assert [item.backend.name for item in loaded] == ["good", "also"]
    assert [failure.origin.entry_point for failure in failures] == ["bad"]
    assert text in str(failures[0].error)
    assert "beta" in str(failures[0].error)
    status = Registry(loaded, failures).status()
    assert [(line.name, line.available) for line in status] == [("also", True), ("good", True), ("bad", False)]
    monkeypatch.setenv("KORDER_STRICT_PLUGINS", "1")
    with pytest.raises(PluginLoadError):
        plugins.load(points)  # type: ignore[arg-type]


def test_discovery_puts_our_own_first_and_can_be_told_to_leave_out(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [FakePoint("zeta", "aaa", None), FakePoint("numpy", "korder", None), FakePoint("eta", "bbb", None)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)

    def names() -> list[str]:
        return [point.name for point in plugins.discover()]

    assert names() == ["numpy", "zeta", "eta"]
    monkeypatch.setenv("KORDER_DISABLE_PLUGINS", "zeta, nobody")
    assert names() == ["numpy", "eta"]
    monkeypatch.setenv("KORDER_DISABLE_PLUGINS", "1")
    assert names() == ["numpy"]


def test_numpy_backend_comes_by_entry_point() -> None:
    from importlib.metadata import entry_points

    found: list[EntryPoint] = [point for point in entry_points(group="korder.backends") if point.name == "numpy"]
    assert [point.value for point in found] == ["korder_numpy"]
