"""The row that says what installed plugins add to the first `attend`: five, in processes that see them or not."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from pathlib import Path

from korder.experiments.benchmark_cases import Disagreement
from korder.experiments.benchmark_figures import Measured, Settings, run_python, time_text

PLUGINS = 5
TARGET_SECONDS = 20e-3
_SETTINGS = ("KORDER_BACKEND", "KORDER_DISABLE_PLUGINS", "KORDER_STRICT_PLUGINS")

_PLUGIN = """
from korder.spi import Availability, NamespaceBackend, hookimpl


class Probe(NamespaceBackend):
    name = "probe_{number}"
    array_kinds = frozenset({{"probe_{number}"}})
    priority = 1000
    asked = []

    def availability(self):
        self.asked.append("availability")
        return Availability.yes()

    def unsupported_reasons(self, plan):
        self.asked.append("unsupported_reasons")
        return super().unsupported_reasons(plan)


@hookimpl
def korder_backends():
    return (Probe(),)
"""
"""Takes arrays of a kind of its own, before every other backend, and keeps what it is asked."""

_PROGRAM = """
import json, time
import numpy as np
import korder
import korder.spi.namespace  # the generic methods, which korder's own backends load with or without plugins
from korder.dispatch.registry import default_registry
x = np.arange(6.0).reshape(3, 2)
attend = korder.attend
start = time.perf_counter()
registry = default_registry()
collected = time.perf_counter() - start
output = attend(x, (x, x[:2]), (x, x[:2]))
whole = time.perf_counter() - start
probes = [backend for backend in registry.ordered() if backend.name.startswith("probe_")]
asked = sorted({question for probe in probes for question in probe.asked})
print(json.dumps([collected, whole, len(probes), asked, output.tolist()]))
"""


def write_plugins(site: Path, count: int) -> None:
    """Write distributions with one backend each into a directory, as an installer would leave them."""
    for number in range(count):
        name = f"korder_probe_{number}"
        (site / f"{name}.py").write_text(_PLUGIN.format(number=number), encoding="utf-8")
        facts = site / f"{name}-1.0.dist-info"
        facts.mkdir()
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
        (facts / "entry_points.txt").write_text(f"[korder.backends]\nprobe_{number} = {name}\n", encoding="utf-8")


def plugins(settings: Settings) -> Measured:
    """What five more plugins add to the first `attend` of a process, and that none of another array kind is asked."""
    with tempfile.TemporaryDirectory(prefix="korder-plugins-") as directory:
        sites = [Path(directory) / name for name in ("none", "five")]
        for site, count in zip(sites, (0, PLUGINS), strict=True):
            site.mkdir()
            write_plugins(site, count)
            _first_attend(site, count)  # not counted: it writes the byte code
        rounds = [
            [_first_attend(site, count) for site, count in zip(sites, (0, PLUGINS), strict=True)]
            for _ in range(settings.repeats)
        ]
    if len({json.dumps(output) for turn in rounds for _, output in turn}) > 1:
        raise Disagreement("plugins of other array kinds change the output")
    seconds = {
        f"{what}_seconds_{name}": statistics.median(turn[place][0][field] for turn in rounds)
        for place, name in enumerate(("without", "with"))
        for field, what in enumerate(("collection", "attend"))
    }
    added = statistics.median(five[0] - none[0] for (none, _), (five, _) in rounds)
    collected, whole = (
        " against ".join(time_text(seconds[f"{what}_seconds_{name}"]) for name in ("with", "without"))
        for what in ("collection", "attend")
    )
    return Measured(
        f"{added * 1e3:.1f} ms",
        f"<= {TARGET_SECONDS * 1e3:.0f} ms",
        added <= TARGET_SECONDS,
        f"{PLUGINS} more plugins: collection of entry points {collected}, with the first attend {whole}; "
        "none of them was asked anything",
        {"seconds": added, **seconds},
    )


def _first_attend(site: Path, count: int) -> tuple[tuple[float, float], list[list[float]]]:
    """Return the seconds of collection and of collection with the first attend, and the output, in a new process.

    Raises:
        Disagreement: Not every plugin was loaded, or one was asked about arrays that it does not take.
    """
    path = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH"))))
    cleared = dict.fromkeys(_SETTINGS, "")
    found = json.loads(run_python(_PROGRAM, environment={**cleared, "PYTHONPATH": path}))
    collected, whole, loaded, asked, output = found
    if loaded != count:
        raise Disagreement(f"{loaded} of {count} plugins were loaded")
    if asked:
        raise Disagreement(f"a backend of another array kind was asked for {', '.join(asked)}")
    return (collected, whole), output
