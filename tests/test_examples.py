"""The examples run, and their answers are checked."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from korder.cli.app import app
from korder.experiments import set_cards
from tests.command_line import stored

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(name: str, *overrides: str) -> tuple[int, str]:
    arguments = ["run", str(EXAMPLES / name)]
    for override in overrides:
        arguments += ["--set", override]
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_quickstart_finds_every_set() -> None:
    status, text = run("quickstart.toml")
    assert status == 0, text
    assert "peak memory" in text
    assert "ok    cards: 12 of 12" in text
    assert "2 SETs: " in text
    folder = Path("runs/quickstart")
    record = json.loads((folder / "result.json").read_text())
    assert record["passed"]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    output = stored("runs/quickstart/arrays.npz")["output"]
    # A row of the output is the chance of each card to be the first partner: 1 over the matching tuples.
    assert output.shape == (12, 12)
    np.testing.assert_allclose(output.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("table", "seed"), [(3, 0), (15, 2), (21, 11)])
def test_other_tables(table: int, seed: int) -> None:
    status, text = run("quickstart.toml", f"data.table={table}", f"data.seed={seed}", "output.plot=false")
    assert status == 0, text


def test_a_layer_that_is_wrong_exits_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    # Too blunt a layer cannot tell a SET from three cards that miss it by one attribute.
    monkeypatch.setattr(set_cards, "sharpness", lambda cards: 0.2)
    status, text = run("quickstart.toml", "output.plot=false")
    assert status == 1
    assert "FAIL" in text


def test_the_polynomial_method_refuses_the_quickstart() -> None:
    """Deciding triples needs large scores, where no degree worth its cost can be certified."""
    status, text = run("quickstart.toml", "attention.method={kind='polynomial', tolerance=1e-3}")
    assert status == 1, text
    assert "tolerance 0.001" in text
    assert not Path("runs").exists()


@pytest.mark.parametrize("degree", [4, 8])
def test_a_degree_too_low_for_the_quickstart_is_judged_by_its_own_answer(degree: int) -> None:
    status, text = run("quickstart.toml", f"attention.method={{kind='polynomial', degree={degree}}}")
    assert status == 1, text
    assert "FAIL  cards: " in text
    assert "certificate (" in text


@pytest.mark.parametrize("lse", [-np.inf, 0.0, 60.0, 1e30])
def test_cards_match_no_more_often_than_there_are_tuples(lse: float) -> None:
    counts = set_cards.matches(np.full(12, lse, "float32"))
    assert ((counts >= -1) & (counts < 144)).all()


def test_long_text_at_a_small_size() -> None:
    status, text = run("long_text.toml", "data.tokens=1009", "attention.method.estimate_rows=7")
    assert status == 0, text
    assert "certificate (" in text
    assert "exact would need" in text
    record = json.loads(Path("runs/long_text/result.json").read_text())
    measured = record["measured_rows"]
    assert len(measured["errors"]) == 7
    assert all(0 < e <= c for e, c in zip(measured["errors"], measured["certified"], strict=True))
    assert record["exact_would_need"]["flops"] >= 2 * 1009**3 * 16


def test_long_text_is_long() -> None:
    import tomllib

    content = tomllib.loads((EXAMPLES / "long_text.toml").read_text())
    assert content["data"]["tokens"] >= 100_000
    assert content["attention"]["method"]["estimate_rows"] >= 4


def test_order_two_by_hand() -> None:
    script = EXAMPLES / "01_order2_by_hand.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert "largest difference" in done.stdout


def test_training_a_set_layer_says_what_it_learned() -> None:
    pytest.importorskip("torch")
    script = EXAMPLES / "02_train_set_layer.py"
    command = [sys.executable, str(script), "--steps", "3"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert re.fullmatch(r"majority guess: 5\d\.\d% of 24000 held-out cards", lines[0])
    counts = [
        re.fullmatch(rf"order {order}: \d+\.\d% right, (\d+) parameters, \d+ s", line).group(1)
        for order, line in zip((2, 1), lines[1:], strict=True)
    ]
    assert counts[0] == counts[1]  # the comparison is of equal sizes


def test_the_tables_of_the_training_example_are_judged_right() -> None:
    torch = pytest.importorskip("torch")
    deal = runpy.run_path(str(EXAMPLES / "02_train_set_layer.py"))["deal"]
    tables, truth = deal(20, torch.Generator().manual_seed(5))
    for table, answers in zip(tables.unflatten(-1, (4, 3)).argmax(-1).tolist(), truth.tolist(), strict=True):
        assert len(set(map(tuple, table))) == 12
        assert set_cards.brute_force(tuple(map(tuple, table))).in_a_set == tuple(answers)


def test_the_plots_of_the_docs_are_drawn(tmp_path: Path) -> None:
    script = EXAMPLES.parent / "docs" / "plots" / "polynomial.py"
    subprocess.run([sys.executable, str(script), "--quick", "--output", str(tmp_path)], check=True)
    drawn = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert drawn == ["polynomial_crossover.svg", "polynomial_error.svg", "polynomial_time.svg"]
    assert {path.name for path in script.parent.glob("*.svg")} == set(drawn)
    text = (script.parents[1] / "method_polynomial.md").read_text(encoding="utf-8")
    assert all(f"](plots/{name})" in text for name in drawn)
