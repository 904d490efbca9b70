"""`korder bench --backend native`: its rows and its roofline; that they run is tested where the plugin is built."""

from __future__ import annotations

from pathlib import Path

import pytest

from korder.errors import SpecError
from korder.experiments import benchmark_native
from korder.experiments.benchmark_cases import make_case
from korder.experiments.roofline import check_plot, measured_roofs, moved_bytes, point_of
from korder.spec import AttentionSpec, Causal
from tests.command_line import assert_refused, call


def test_every_row_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    own = text[text.index("`korder bench --backend native` measures") :]
    for name in benchmark_native.ROWS:
        assert f"| `{name}` |" in own, name


def test_a_point_counts_what_must_move_and_what_a_mask_leaves() -> None:
    n, d = 7, 3
    case = make_case(AttentionSpec(order=2), n, d, "numpy", dtype="float64")
    operands, output, lse = 5 * n * d, n * d, n
    assert moved_bytes(case) == 8 * (operands + output + lse)
    assert moved_bytes(case, backward=True) == 8 * (operands + output + lse + output + operands)
    full = point_of("full", case, 0.5)
    assert full.dtype == "float64"
    assert full.rate == 2 * n**3 * (d + d) / 0.5
    assert full.intensity == 2 * n**3 * (d + d) / moved_bytes(case)
    assert point_of("back", case, 0.5, backward=True).rate == 3 * full.rate
    masked = make_case(AttentionSpec(order=2, mask=Causal()), n, d, "numpy", dtype="float64")
    live = sum(j1 <= i and j2 <= i for i in range(n) for j1 in range(n) for j2 in range(n))
    assert point_of("causal", masked, 0.5).rate == pytest.approx(full.rate * live / n**3)


def test_roofs_are_the_fastest_product_and_both_ways_of_a_copy() -> None:
    copied = []

    def turns(*works: object) -> list[float]:
        copied.append(works[-1]())  # type: ignore[operator]
        return [4.0, 2.0, 8.0, 0.5]

    work = lambda: None  # noqa: E731
    roofs = measured_roofs(turns, {"float32": [work, work], "float64": [work]}, 1000, 2)
    assert roofs.products == {"float32": 2 * 2048**3 / 2.0, "float64": 2 * 2048**3 / 8.0}
    assert roofs.bandwidth == 2 * 1000 / 0.5
    assert len(copied[0]) == 2


def test_a_plot_that_nobody_can_draw_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("bench", "--row", "overhead", "--backend", "numpy", "--plot", str(tmp_path / "x.png"))
    assert_refused(call(*arguments, "--format", "json"), 2, "plot-unavailable", [])
    pytest.importorskip("matplotlib")
    for path in (tmp_path / "x.bmp", tmp_path / "nowhere" / "x.png", tmp_path):
        with pytest.raises(SpecError, match="no plot can be written"):
            check_plot(path)
    check_plot(tmp_path / "x.png")


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from korder.experiments import roofline

    monkeypatch.setattr(roofline, "find_spec", lambda name: None)
    with pytest.raises(SpecError) as caught:
        check_plot(tmp_path / "x.png")
    assert "korder[plot]" in (caught.value.hint or "")
