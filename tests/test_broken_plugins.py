"""Installed distributions that are broken, each in one way: the others work, and the user is told who and why."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import korder
from korder.dispatch import registry
from korder.dispatch.registry import Registry
from korder.errors import (
    BackendUnavailableError,
    KernelError,
    PluginLoadError,
    UnknownBackendError,
    UnsupportedProblemError,
)
from tests.command_line import call
from tests.installed import HOOK, in_a_process, install


@dataclass(frozen=True)
class Broken:
    """What stands in the module, and what the reason must say; `metadata` is whether its name can be read."""

    source: str
    says: tuple[str, ...]
    metadata: bool = True


def changed(line: str) -> str:
    """Return a module whose backend has one line more."""
    return "\nclass Sound(Sound):\n" + "".join(f"    {part}\n" for part in line.splitlines()) + HOOK


UNLOADABLE = {
    "imports": Broken("import libfast_of_acme", ("could not be imported", "No module named 'libfast_of_acme'")),
    "exits": Broken("raise SystemExit('no licence')", ("could not be imported", "SystemExit: no licence")),
    "unwritten": Broken("def (:", ("could not be imported", "SyntaxError")),
    "raises": Broken(
        "@hookimpl\ndef korder_backends():\n    raise RuntimeError('no table of devices')",
        ("raised in korder_backends()", "RuntimeError: no table of devices"),
    ),
    "leaves": Broken(
        "@hookimpl\ndef korder_backends():\n    raise SystemExit(3)", ("raised in korder_backends()", "SystemExit: 3")
    ),
    "misspelt": Broken("@hookimpl\ndef korder_backend():\n    return (Sound(),)", ("korder_backend'", "unknown hook")),
    "unmarked": Broken("def korder_backends():\n    return (Sound(),)", ("implements no hook", "@korder.spi.hookimpl")),
    "usurps": Broken(
        changed("name = 'numpy'"),
        ("two backends called 'numpy'", "korder 0.1.0 (entry point 'numpy')", "KORDER_DISABLE_PLUGINS"),
    ),
    "old": Broken(changed("api_version = 99"), ("api_version == 1", "api_version == 99")),
    "text": Broken("@hookimpl\ndef korder_backends():\n    return ('cuda',)", ("not a Backend", "'cuda' of type str")),
    "nothing": Broken("@hookimpl\ndef korder_backends():\n    return None", ("no sequence", "None of type NoneType")),
    "single": Broken("@hookimpl\ndef korder_backends():\n    return Sound()", ("no sequence", "(backend,)")),
    "abstract": Broken(
        "class Half(Backend):\n    name = 'half'\n@hookimpl\ndef korder_backends():\n    return (Half(),)",
        ("raised in korder_backends()", "abstract"),
    ),
    "nameless": Broken(changed("name = 'auto'"), ("neither empty nor 'auto'",)),
    "property": Broken(
        changed("@property\ndef priority(self):\n    raise OSError('no such bus')"), ("OSError: no such bus",)
    ),
    "claims": Broken(changed("def capabilities(self):\n    return Capabilities(orders=[1, 2])"), ("frozensets",)),
    "halved": Broken("import libfast_of_acme", ("unknown distribution (entry point 'halved')",), metadata=False),
}
MUTE = {
    "hangs": Broken(
        "import threading\nNEVER = threading.Event()" + changed("def availability(self):\n    return NEVER.wait()"),
        ("did not answer within 0.05 s",),
    ),
    "throws": Broken(
        changed("def availability(self):\n    raise OSError('driver too old')"), ("OSError: driver too old",)
    ),
    "stops": Broken(changed("def availability(self):\n    raise SystemExit('off')"), ("SystemExit: off",)),
    "says_yes": Broken(changed("def availability(self):\n    return True"), ("returned True",)),
}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of distributions that this process sees, beside a sound plugin; what it imports is forgotten."""
    site = tmp_path / "site"
    install(site, "sound")
    monkeypatch.syspath_prepend(str(site))
    for variable in ("KORDER_BACKEND", "KORDER_DISABLE_PLUGINS", "KORDER_STRICT_PLUGINS"):
        monkeypatch.delenv(variable, raising=False)
    before = set(sys.modules)
    yield site
    for name in {name for name in sys.modules if name.startswith("korder_")} - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(site)):
            del sys.modules[name]


def load(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """Load the plugins anew, as the registry of every door."""
    own = Registry.from_entry_points()
    monkeypatch.setattr(registry, "_only_registry", lambda: own)
    return own


def attended(backend: str = "auto", **options: Any) -> Any:
    rng = np.random.default_rng(5)
    query, *rest = (rng.standard_normal((m, 3)) for m in (5, 7, 2, 7, 2))
    return korder.attend_result(query, rest[:2], rest[2:], backend=backend, **options)


def status_of(name: str) -> korder.dispatch.registry.BackendStatus:
    return next(status for status in korder.backends() if status.entry_point == name)


@pytest.mark.parametrize("name", UNLOADABLE)
def test_a_plugin_that_cannot_be_loaded(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = UNLOADABLE[name]
    install(site, name, broken.source, metadata=broken.metadata)
    load(monkeypatch)
    status = status_of(name)
    assert (status.loaded, status.available) == (False, False)
    assert all(text in status.reason for text in broken.says), status.reason
    if broken.metadata:
        assert (status.distribution, status.version) == (f"korder-{name}", "1.5")
        assert f"korder-{name} 1.5 (entry point '{name}')" in status.reason
    assert attended("sound").provenance.backend == "sound"
    assert attended().provenance.backend == "numpy"
    if name != "usurps":
        with pytest.raises(UnknownBackendError, match=f"entry point '{name}'. failed to load") as caught:
            attended(name)
        assert caught.value.hint == "`korder backends` says why it failed to load."
    monkeypatch.setenv("KORDER_STRICT_PLUGINS", "1")
    with pytest.raises(PluginLoadError) as strict:
        Registry.from_entry_points()
    assert f"entry point '{name}'" in str(strict.value)
    assert all(text in str(strict.value) for text in broken.says)


@pytest.mark.parametrize("name", MUTE)
def test_a_backend_that_does_not_answer(name: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = MUTE[name]
    install(site, name, broken.source.replace("class Sound(Sound):\n", "class Sound(Sound):\n    priority = 900\n"))
    monkeypatch.setattr(registry, "AVAILABILITY_SECONDS", 0.05 if name == "hangs" else 60.0)
    monkeypatch.setenv("KORDER_STRICT_PLUGINS", "1")  # it is loaded, so there is nothing to be strict about
    load(monkeypatch)
    status = status_of(name)
    assert (status.loaded, status.available) == (True, False)
    assert all(text in status.reason for text in broken.says), status.reason
    result = attended()
    assert result.provenance.backend == "numpy"
    (rejection,) = [found for found in result.provenance.rejected if found.backend == name]
    assert status.reason in str(rejection)
    with pytest.raises(BackendUnavailableError, match=name) as caught:
        attended(name)
    assert caught.value.got == status.reason
    if name == "hangs":
        sys.modules["korder_hangs"].NEVER.set()  # type: ignore[attr-defined]


LIES = {
    "forward": ("def forward(self, operands, *, save, residuals=None):\n    raise OSError('launch failed')", OSError),
    "kernel": (
        "def forward(self, operands, *, save, residuals=None):\n    raise KernelError('liar ran out of lanes')",
        KernelError,
    ),
    "nothing": ("def forward(self, operands, *, save, residuals=None):\n    return None", KernelError),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_kernel_that_fails_is_not_hidden(lie: str, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method, error = LIES[lie]
    body = "".join(f"    {line}\n" for line in method.splitlines())
    kernel = f"\nclass Liar:\n{body}"
    install(site, "liar", kernel + changed("priority = 900\ndef compile(self, plan):\n    return Liar()"))
    load(monkeypatch)
    assert status_of("liar").available
    says = {"forward": "launch failed", "kernel": "liar ran out", "nothing": "backend 'liar'.*NoneType"}[lie]
    for backend in ("auto", "liar"):
        with pytest.raises(error, match=f"(?s){says}"):
            attended(backend)
    assert attended("sound").provenance.backend == "sound"


def test_a_plan_that_cannot_be_compiled_is_not_hidden(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "liar", changed("priority = 900\ndef compile(self, plan):\n    raise OSError('no compiler')"))
    load(monkeypatch)
    with pytest.raises(OSError, match="no compiler"):
        attended()


def test_a_backend_that_cannot_be_asked_about_a_plan(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "priority = 900\ndef unsupported_reasons(self, plan):\n    raise KeyError(plan.name)"
    install(site, "dazed", changed(line))
    load(monkeypatch)
    result = attended()
    assert result.provenance.backend == "numpy"
    reason = "raised when it was asked about this plan: KeyError: 'exact'"
    assert [found.reasons for found in result.provenance.rejected if found.backend == "dazed"] == [(reason,)]
    with pytest.raises(UnsupportedProblemError, match="KeyError: 'exact'"):
        attended("dazed")


def test_only_backends_that_take_the_arrays_are_asked(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (
        "priority = 900\nasked = ()\n"
        "def availability(self):\n    type(self).asked += ('availability',)\n    return Availability.yes()\n"
        "def unsupported_reasons(self, plan):\n    type(self).asked += ('reasons',)\n    return ()\n"
        "def compile(self, plan):\n    type(self).asked += ('compile',)\n    return super().compile(plan)"
    )
    for name in ("one", "two", "three", "four"):
        install(site, name, changed(f"{asked}\narray_kinds = frozenset({{'kind_{name}'}})"))
    install(site, "five", changed(asked.replace("900", "800")))
    own = load(monkeypatch)
    for _ in range(2):
        assert attended().provenance.backend == "five"
    answers = {b.name: b.asked for b in own.ordered() if hasattr(b, "asked")}
    assert {name: sorted(set(answers[name])) for name in answers} == {
        "one": [], "two": [], "three": [], "four": [], "five": ["availability", "compile", "reasons"],
    }  # fmt: skip
    assert answers["five"].count("availability") == 1


def test_settings_choose_among_installed_plugins(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "imports", UNLOADABLE["imports"].source)
    monkeypatch.setenv("KORDER_BACKEND", "sound")
    load(monkeypatch)
    assert attended().provenance.backend == "sound"
    assert attended("numpy").provenance.backend == "numpy"
    monkeypatch.setenv("KORDER_BACKEND", "imports")
    with pytest.raises(UnknownBackendError, match=r"korder-imports 1\.5"):
        attended()
    monkeypatch.delenv("KORDER_BACKEND")
    for setting, left in (("imports", {"sound"}), ("imports, sound", set()), ("1", set()), ("", {"sound", "imports"})):
        monkeypatch.setenv("KORDER_DISABLE_PLUGINS", setting)
        load(monkeypatch)
        names = {status.name for status in korder.backends()}
        assert names & {"sound", "imports"} == left, setting
        assert "numpy" in names


def test_a_plugin_that_is_disabled_is_not_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KORDER_DISABLE_PLUGINS", "sound")
    load(monkeypatch)
    assert "korder_sound" not in sys.modules
    monkeypatch.delenv("KORDER_DISABLE_PLUGINS")
    load(monkeypatch)
    assert "korder_sound" in sys.modules


def test_the_command_names_everyone_in_100_columns(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, broken in {**UNLOADABLE, **{name: MUTE[name] for name in ("throws", "says_yes")}}.items():
        install(site, name, broken.source, metadata=broken.metadata)
    install(
        site, "wordy", changed(f"def availability(self):\n    return Availability.no('{'no card; ' * 30}', 'buy one')")
    )
    load(monkeypatch)
    text = call("backends")
    assert text.exit_code == 0
    # a path that does not fit stands alone on its line
    assert all(len(line) <= 100 or len(line.split()) == 1 for line in text.stdout.splitlines())
    joined = " ".join(text.stdout.split())
    for name, broken in UNLOADABLE.items():
        place = f"korder-{name} 1.5" if broken.metadata else "unknown distribution"
        assert f"{name} failed to load {place}, entry point '{name}'" in joined
        assert all(text in joined for text in broken.says), name
    assert "sound priority -1 korder-sound 1.5, entry point 'sound' runs here yes" in joined
    assert "runs here no: availability() raised OSError: driver too old" in joined
    assert "remedy buy one" in joined
    assert "arrays numpy on cpu; float32, float64 orders 1, 2, 3, 4, 5, 6; grouped heads" in joined
    assert "polynomial masks causal, full, ordered, window; biases key; weights cp, full; closed-form" in joined


def test_the_command_gives_everything_in_json(site: Path) -> None:
    install(site, "misspelt", UNLOADABLE["misspelt"].source)
    done = in_a_process(site, "backends", "--format", "json")
    assert done.returncode == 0, done.stderr
    records = {record["name"]: record for record in json.loads(done.stdout)}
    assert records["misspelt"].items() >= {
        "loaded": False, "available": False, "distribution": "korder-misspelt", "version": "1.5",
        "entry_point": "misspelt",
    }.items()  # fmt: skip
    assert "unknown hook" in records["misspelt"]["reason"]
    sound = records["sound"]
    assert sound.items() >= {
        "priority": -1, "loaded": True, "available": True, "distribution": "korder-sound", "version": "1.5",
        "array_kinds": ["numpy"], "orders": [1, 2, 3, 4, 5, 6], "devices": ["cpu"], "dtypes": ["float32", "float64"],
        "accumulation": ["float32", "float64"], "grouped_heads": True, "reason": "", "remedy": "",
    }.items()  # fmt: skip
    assert sound["methods"]["polynomial"] == {
        "masks": ["causal", "full", "ordered", "window"], "biases": ["key"], "weights": ["cp", "full"],
        "closed_form": ["full"], "key_masks": True, "backward": True, "state": True,
    }  # fmt: skip


def test_the_command_can_be_strict(site: Path) -> None:
    install(site, "misspelt", UNLOADABLE["misspelt"].source)
    done = in_a_process(site, "backends", "--format", "json", KORDER_STRICT_PLUGINS="1")
    assert done.returncode == 1
    error = json.loads(done.stderr)
    assert error["error"] == "PluginLoadError"
    assert "korder-misspelt 1.5 (entry point 'misspelt')" in error["message"]
    assert in_a_process(site, "backends", KORDER_STRICT_PLUGINS="1", KORDER_DISABLE_PLUGINS="misspelt").returncode == 0
