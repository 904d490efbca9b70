"""Queries shared out over eight devices: every shard, given the offset of its first row, has the rows of the whole.

The devices are forced ones of the CPU, which a process has to ask for before JAX starts; so this is one subprocess.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OWN_FLAGS

DEVICES = "--xla_force_host_platform_device_count=8"
PROGRAM = Path(__file__).with_name("sharded_program.py")


@pytest.mark.parametrize("name", ["full", "causal", "polynomial"])
def test_shards_are_the_rows_of_the_whole(name: str) -> None:
    flags = f"{OWN_FLAGS} {DEVICES}".strip()
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(PROGRAM), name]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["8", "devices,", "equal"]
