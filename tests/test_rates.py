"""Machine rates: shipped, measured, or refused; they rank plans."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import numpy as np
import pytest

import korder
from korder.dispatch import rates
from korder.experiments import calibrate
from tests.command_line import call

MINE = rates.Rates(
    exact=1e9, exponentials=1e8, polynomial=2e9, wide=1e9, running=3e7, rows=2.0, exact_call=1e-4, call=1e-4
)


@pytest.fixture
def file(tmp_path, monkeypatch):
    path = tmp_path / "kept" / "rates.json"
    monkeypatch.setenv("KORDER_RATES", str(path))
    return path


def test_the_shipped_rates_serve_until_the_machine_is_measured(file):
    assert rates.rates_of("numpy") == rates.SHIPPED["numpy"]
    assert rates.rates_of("nobody") == rates.OTHERS
    assert calibrate.write_rates({"numpy": MINE}) == file
    assert rates.rates_of("numpy") == MINE
    assert rates.rates_of("torch") == rates.SHIPPED["torch"]
    assert [path.name for path in file.parent.iterdir()] == ["rates.json"]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"numpy": 3}', '{"numpy": {"exact": 1}}', json.dumps({"numpy": asdict(replace(MINE, call=-1.0))})],
)
def test_a_file_that_holds_no_rates_is_named(file, text):
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(korder.SpecError, match=r"rates\.json does not hold machine rates") as caught:
        rates.rates_of("numpy")
    assert all(name in str(caught.value).partition("expected:")[2].partition("got:")[0] for name in asdict(MINE))


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(korder.OperandError, match="cannot be written"):
        calibrate.write_rates({"numpy": MINE}, tmp_path / "file" / "rates.json")


def test_rates_decide_what_auto_takes(file):
    rng = np.random.default_rng(2)
    query, *keys = (rng.normal(size=(60, 3)) * 0.4 for _ in range(3))
    values = [rng.normal(size=(60, 2)) for _ in range(2)]
    spec = korder.AttentionSpec(order=2, method=korder.Auto(tolerance=0.1))

    def taken(**changes: float) -> str:
        calibrate.write_rates({"numpy": replace(MINE, **changes)})
        return korder.attend_result(query, keys, values, spec=spec).provenance.plan.method

    assert taken(exact=1e3, exponentials=1e3) == "split"
    assert taken(exact=1e15, exponentials=1e15) == "exact"


def test_few_rows_take_the_work_that_rows_share(file):
    calibrate.write_rates({"numpy": MINE})
    of_one, of_ten = (
        rates.whole_seconds(korder.plan(None, query=(rows, 4), keys=[(50, 4)], values=[(50, 3)])[0], "numpy") - 1e-4
        for rows in (1, 10)
    )
    assert of_ten == pytest.approx(of_one * 11 / 2)  # one row takes the time of two


def test_many_features_have_a_rate_of_their_own(file):
    calibrate.write_rates({"numpy": MINE})
    few, many = (
        korder.plan(
            korder.AttentionSpec(order=2, method=korder.Polynomial(degree=degree)),
            query=(9, 16), keys=[(50, 16)] * 2, values=[(50, 16)] * 2,
        )[0]
        for degree in (4, 6)
    )  # fmt: skip
    for plan, rate in ((few, MINE.polynomial), (many, MINE.wide)):
        assert rates.whole_seconds(plan, "numpy") == pytest.approx(MINE.call + plan.cost.flops / rate)


def test_a_part_takes_more_than_a_call_of_its_own(file):
    calibrate.write_rates({"numpy": MINE})
    exact, polynomial = (
        korder.plan(korder.AttentionSpec(order=1, method=method), query=(9, 4), keys=[(50, 4)], values=[(50, 3)])[0]
        for method in (korder.Exact(), korder.Polynomial(degree=2))
    )
    for plan, besides in ((exact, rates.CERTIFYING), (polynomial, rates.CHECKING)):
        alone = rates.whole_seconds(plan, "numpy")
        assert rates.part_seconds(plan, "numpy") == pytest.approx(alone + besides * MINE.call)
        assert rates.predicted_seconds(plan, ("numpy",)) == alone


def test_a_quick_calibration_is_positive(monkeypatch):
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    monkeypatch.setattr(calibrate, "MAKERS", {"numpy": calibrate.MAKERS["numpy"]})
    ((name, found),) = calibrate.calibrate().items()
    assert name == "numpy"
    assert all(value > 0.0 for value in asdict(found).values())


def test_calibrate_stands_alone():
    ended = call("bench", "--calibrate", "--quick")
    assert ended.exit_code == 2
    assert "stands alone" in ended.output + ended.stderr
