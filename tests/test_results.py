"""Results on disk: whole or not at all, and nothing is deleted that korder did not write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from korder.errors import SpecError
from korder.experiments import results
from korder.experiments.results import array_writer, check_output, check_replaceable, publish
from korder.spec.runs import AttendOutput, Output


def text_writer(text: str) -> Any:
    return lambda path: path.write_text(text, encoding="utf-8")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def publish_one(directory: Path, text: str = "first", overwrite: bool = False) -> list[Path]:
    return publish(directory, {"a.txt": text_writer(text)}, {"value": text}, overwrite)


def test_files_and_record_appear_together(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "result"
    paths = publish_one(target)
    assert [path.name for path in paths] == ["a.txt", "result.json"]
    assert all(path.is_file() for path in paths)
    assert json.loads((target / "result.json").read_text()) == {
        "written_by": "korder",
        "files": ["a.txt", "result.json"],
        "value": "first",
    }
    assert [p.name for p in target.parent.iterdir()] == ["result"], "something was left beside the result"


def test_the_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    publish_one(tmp_path / "a")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("failing", ["first", "second", "record"])
def test_an_exception_in_the_middle_leaves_nothing(tmp_path: Path, failing: str) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise RuntimeError("disk on fire")

    writers = {"a": text_writer("a"), "b": text_writer("b")}
    record: dict[str, Any] = {"fine": 1}
    if failing == "record":
        record = {"not_json": object()}
    else:
        writers["a" if failing == "first" else "b"] = fail
    with pytest.raises((RuntimeError, TypeError)):
        publish(tmp_path / "new" / "parents" / "result", writers, record, False)
    assert tree(tmp_path) == {}


def test_an_exception_while_overwriting_leaves_the_old_result(tmp_path: Path) -> None:
    publish_one(tmp_path / "r")
    before = tree(tmp_path)

    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "r", {"a.txt": fail}, {}, True)
    assert tree(tmp_path) == before


def test_a_failing_rename_puts_the_old_result_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish_one(tmp_path / "r")
    before = tree(tmp_path)
    rename = os.rename

    def fail_on_new(source: Any, target: Any) -> None:
        if ".partial-" in str(source):
            raise OSError("no space")
        rename(source, target)

    monkeypatch.setattr(results.os, "rename", fail_on_new)
    with pytest.raises(OSError, match="no space"):
        publish_one(tmp_path / "r", "second", overwrite=True)
    assert tree(tmp_path) == before


def test_a_second_result_is_refused_unless_it_may_overwrite(tmp_path: Path) -> None:
    publish_one(tmp_path / "r")
    before = tree(tmp_path)
    with pytest.raises(SpecError) as caught:
        publish_one(tmp_path / "r", "second")
    assert caught.value.code == "output-exists"
    assert "--overwrite" in caught.value.hint
    assert tree(tmp_path) == before
    publish_one(tmp_path / "r", "second", overwrite=True)
    assert (tmp_path / "r" / "a.txt").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_files_of_the_old_result_do_not_survive_in_the_new_one(tmp_path: Path) -> None:
    publish(tmp_path / "r", {"old.txt": text_writer("x")}, {}, False)
    publish_one(tmp_path / "r", overwrite=True)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["a.txt", "result.json"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("foreign", ["notes.txt", "folder", "alone"])
def test_foreign_files_are_never_touched(tmp_path: Path, overwrite: bool, foreign: str) -> None:
    target = tmp_path / "r"
    if foreign == "alone":
        target.mkdir()
        (target / "thesis.txt").write_text("ten years of work")
    else:
        publish_one(target)
        if foreign == "folder":
            (target / "folder").mkdir()
        else:
            (target / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    with pytest.raises(SpecError) as caught:
        publish_one(target, "second", overwrite=overwrite)
    assert caught.value.code == "output-foreign"
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "record",
    ["{", "[]", '{"files": ["thesis.txt"]}', '{"written_by": "korder"}', '{"written_by": "korder", "files": 3}'],
)
def test_a_record_that_is_not_korders_protects_everything(tmp_path: Path, record: str) -> None:
    target = tmp_path / "r"
    target.mkdir()
    (target / "thesis.txt").write_text("ten years of work")
    (target / "result.json").write_text(record)
    before = tree(tmp_path)
    with pytest.raises(SpecError):
        publish_one(target, overwrite=True)
    assert tree(tmp_path) == before


def test_a_file_added_during_the_replacement_survives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "r"
    publish_one(target)
    rename = os.rename

    def add_then_rename(source: Any, destination: Any) -> None:
        if Path(source).name == "r":
            (Path(source) / "late.txt").write_text("mine")
        rename(source, destination)

    monkeypatch.setattr(results.os, "rename", add_then_rename)
    publish_one(target, "second", overwrite=True)
    assert (target / "a.txt").read_text() == "second"
    assert [p.read_text() for p in tmp_path.rglob("late.txt")] == ["mine"]


def test_an_empty_directory_is_free(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    publish_one(tmp_path / "r")
    assert (tmp_path / "r" / "a.txt").exists()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    publish_one(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "a.txt").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("a file")
    with pytest.raises(SpecError) as caught:
        check_replaceable(tmp_path / "r", True)
    assert caught.value.code == "output-exists"
    with pytest.raises(SpecError) as caught:
        publish_one(tmp_path / "r" / "below")
    assert caught.value.code == "output-unwritable"
    assert (tmp_path / "r").read_text() == "a file"


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_arrays_read_back_equal(tmp_path: Path, form: str) -> None:
    generator = np.random.default_rng(0)
    arrays = {"output": generator.standard_normal((5, 3)).T, "lse": np.float32([-np.inf, 1.5, 2])}
    path = tmp_path / f"arrays.{form}"
    array_writer(arrays, form)(path)
    if form == "npz":
        loaded = dict(np.load(path, allow_pickle=False))
    else:
        from safetensors.numpy import load_file

        loaded = load_file(path)
    assert sorted(loaded) == ["lse", "output"]
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_no_directory_means_nothing_to_check() -> None:
    check_output(Output())


def test_missing_safetensors_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    with pytest.raises(SpecError) as caught:
        check_output(AttendOutput(directory=str(tmp_path / "r"), arrays="safetensors"))
    assert "korder[safetensors]" in caught.value.hint
