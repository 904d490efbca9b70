"""What the tests of plugins share: distributions on disk, as importlib.metadata finds them, and korder in a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PRELUDE = """
from dataclasses import replace
from korder.spi import Availability, Backend, Capabilities, KernelError, NamespaceBackend, hookimpl

class Sound(NamespaceBackend):
    name = "{name}"
    array_kinds = frozenset({{"numpy"}})
    priority = -1

    def namespace(self):
        import array_api_compat.numpy as xp
        return xp
"""
HOOK = """
@hookimpl
def korder_backends():
    return (Sound(),)
"""


def install(site: Path, name: str, source: str = HOOK, *, metadata: bool = True, prelude: str = PRELUDE) -> None:
    """Write distribution korder-NAME 1.5 with module korder_NAME and entry point NAME; `source` follows the prelude."""
    site.mkdir(exist_ok=True)
    (site / f"korder_{name}.py").write_text(prelude.format(name=name) + source, encoding="utf-8")
    facts = site / f"korder_{name}-1.5.dist-info"
    facts.mkdir()
    if metadata:
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: korder-{name}\nVersion: 1.5\n", encoding="utf-8")
    (facts / "entry_points.txt").write_text(f"[korder.backends]\n{name} = korder_{name}\n", encoding="utf-8")


def environment(site: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a process that sees the distributions of `site`, and no settings but these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KORDER_")}
    return {**kept, "PYTHONPATH": str(site), **variables}


def in_a_process(site: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `korder ARGUMENTS`."""
    program = "from korder.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, check=False, cwd=site, env=environment(site, **variables),
    )  # fmt: skip
