"""`korder bench --backend native`: its rows are documented; that they run is tested where the plugin is built."""

from __future__ import annotations

from pathlib import Path

from korder.experiments import benchmark_native


def test_every_row_is_documented() -> None:
    text = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
    own = text[text.index("`korder bench --backend native` measures") :]
    for name in benchmark_native.ROWS:
        assert f"| `{name}` |" in own, name
