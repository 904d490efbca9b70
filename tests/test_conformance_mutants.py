"""Every mutant is caught by every check meant for it, and every check of the kit catches some mutant.

`python -m tests.test_conformance_mutants` prints the table of docs/backends/conformance.md.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest

from korder.conformance.attempts import ask, attempt
from korder.conformance.levels import CHECKS, Item, items, subjects
from tests.mutants import Mutant
from tests.mutants_contract import CONTRACT
from tests.mutants_forward import FORWARD

MUTANTS: dict[str, Mutant] = {**FORWARD, **CONTRACT}
BY_ID = {check.id: check for check in CHECKS}
ELSEWHERE = {"contract.import"}
"""Needs an installed plugin; see test_conformance.py."""
RAISES = {"empty refused"}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "backends" / "conformance.md"
PAIRS = [(name, check) for name, mutant in MUTANTS.items() for check in mutant.caught]


@lru_cache(maxsize=8)
def control_items(check: str) -> dict[str, Item]:
    """The items of a check on the same kernels with nothing changed, by id."""
    backend = Mutant("nothing", ()).backend()
    return {item.id: item for item in items(subjects(backend, "quick"), (BY_ID[check],))}


def first_failure(name: str, check: str) -> str:
    """The first item that a mutant fails and the unchanged kernels do not, for being wrong and not for breaking."""
    backend = MUTANTS[name].backend()
    answer = ask(backend)
    for item in items(subjects(backend, "quick"), (BY_ID[check],)):
        status, message = attempt(item, answer)
        wrong = message.startswith("[conformance-failed]") or name in RAISES
        if status == "failed" and wrong and _control_holds(check, item.id):
            return item.id
    return ""


def _control_holds(check: str, item: str) -> bool:
    control = control_items(check).get(item)
    return control is not None and attempt(control, ask(control.subject.backend))[0] in ("passed", "refused")


def first_catcher(name: str) -> str:
    """The first check, in the kit's order, that a mutant fails."""
    known = (check.id for check in CHECKS if check.id not in ELSEWHERE)
    return next((check for check in known if first_failure(name, check)), "")


def table() -> str:
    """The table of the docs."""
    rows = ["| mutant | what is wrong | first caught by |", "|---|---|---|"]
    rows += [f"| {name} | {mutant.wrong} | `{first_catcher(name)}` |" for name, mutant in MUTANTS.items()]
    return "\n".join(rows)


@pytest.mark.parametrize(("name", "check"), PAIRS)
def test_mutant_is_caught(name: str, check: str) -> None:
    assert first_failure(name, check), f"{check} passes the mutant {name!r}"


def test_every_check_catches_a_mutant() -> None:
    caught = {check for mutant in MUTANTS.values() for check in mutant.caught}
    assert caught | ELSEWHERE == set(BY_ID)


def test_page_lists_every_mutant_with_a_check_that_catches_it() -> None:
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([a-z_.]+)` \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [(name, wrong) for name, wrong, _ in rows] == [(name, mutant.wrong) for name, mutant in MUTANTS.items()]
    for name, _, first in rows:
        assert first_failure(name, first), f"{first} does not catch {name!r}"


@pytest.mark.heavy
def test_page_names_the_first_check_that_catches_a_mutant() -> None:
    assert table() in PAGE.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(table())
