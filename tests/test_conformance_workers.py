"""Items of the kit shared out between processes end as in one process."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from korder.conformance import run_conformance
from korder.dispatch.registry import default_registry
from korder.errors import SpecError
from tests.installed import in_a_process, install
from tests.mutants_forward import FORWARD

NUMPY = default_registry().get("numpy")

DIES = """
import os

class Dying(Sound):
    def compile(self, plan):
        os._exit(1)

@hookimpl
def korder_backends():
    return (Dying(),)
"""


def test_endings_are_those_of_one_process() -> None:
    expected = {"value.core": "said to be wrong"}
    told: list[str] = []
    alone = run_conformance(NUMPY, only="core", expected_failures=expected)
    shared = run_conformance(
        NUMPY, only="core", expected_failures=expected, workers=2, on_item=lambda ending: told.append(ending.id)
    )
    assert [(e.id, e.status, e.message) for e in shared.endings] == [(e.id, e.status, e.message) for e in alone.endings]
    assert sorted(told) == sorted(ending.id for ending in shared.endings)
    assert shared.places == alone.places


def test_the_environment_is_left_as_it_was() -> None:
    before = dict(os.environ)
    run_conformance(NUMPY, only="contract.name", workers=2)
    assert dict(os.environ) == before


@pytest.mark.parametrize("workers", [0, -1, 1.5, True, "2"])
def test_the_number_of_workers_is_checked(workers: object) -> None:
    with pytest.raises(SpecError, match="number of workers"):
        run_conformance(NUMPY, workers=workers)  # type: ignore[arg-type]


def test_what_no_other_process_would_find_is_refused() -> None:
    with pytest.raises(SpecError, match="cannot be shared out"):
        run_conformance(FORWARD["lse in base 2"].backend(), workers=2)
    with pytest.raises(SpecError, match="cannot be shared out"):
        run_conformance(NUMPY, workers=2, from_array=np.asarray)


def test_a_process_that_dies_fails_its_items_and_ends(tmp_path: Path) -> None:
    install(tmp_path, "dying", DIES)
    ended = in_a_process(tmp_path, "conformance", "dying", "--only", "value.core", "--workers", "2")
    assert ended.returncode == 1
    assert "does not conform" in ended.stdout
    assert "the process that was to run it ended before" in ended.stdout
