"""Run files: read, overridden, refused with one clear error, written back equal."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from korder.errors import SpecError
from korder.spec.files import apply_override, format_run, read_run, run_schema, write_run
from korder.spec.runs import AttendRun, BenchmarkRun, SetCardsData, parse_run

ATTEND = {
    "schema_version": 1,
    "kind": "attend",
    "data": {"kind": "random", "n": 7, "lengths": [5, 3], "width": 4},
    "attention": {"order": 2, "mask": {"kind": "causal", "align": "end"}},
}


def changed(**tables: object) -> dict[str, object]:
    return {**ATTEND, **tables}


def refused(content: object) -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_run(content)  # type: ignore[arg-type]
    return caught.value


def written(folder: Path, text: str, name: str = "run.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_three_formats_say_the_same(tmp_path: Path) -> None:
    run = parse_run(ATTEND)
    for suffix in (".toml", ".json", ".yaml", ".yml"):
        path = tmp_path / f"run{suffix}"
        write_run(run, path)
        assert read_run(path) == run


def test_json_and_yaml_written_by_hand(tmp_path: Path) -> None:
    run = parse_run(ATTEND)
    assert read_run(written(tmp_path, json.dumps(ATTEND), "a.json")) == run
    assert read_run(written(tmp_path, yaml.safe_dump(ATTEND), "a.yaml")) == run


methods = st.one_of(
    st.just({"kind": "exact"}),
    st.builds(
        lambda degree, tolerance, rows: {
            "kind": "polynomial", "degree": degree, "tolerance": tolerance, "estimate_rows": rows
        },
        st.integers(0, 64), st.floats(1e-9, 0.5), st.integers(0, 9),
    ),
)  # fmt: skip
datas = st.one_of(
    st.builds(
        lambda path, flag: {"kind": "arrays", "path": path, "allow_nonfinite": flag},
        st.text(st.characters(codec="utf-8"), min_size=1), st.booleans(),
    ),
    st.builds(lambda n, seed: {"kind": "text", "tokens": n, "width": 3, "seed": seed}, st.integers(1), st.integers(0)),
    st.builds(
        lambda n, rms: {"kind": "random", "n": n, "width": 2, "score_rms": rms},
        st.integers(1, 99), st.floats(1e-300, 1e300),
    ),
)  # fmt: skip


@example({"kind": "arrays", "path": "\x85"}, {"kind": "exact"}, ".yaml", "\x85")
@given(datas, methods, st.sampled_from([".toml", ".json", ".yaml"]), st.text(st.characters(codec="utf-8"), min_size=1))
def test_what_is_written_reads_back_equal(data: object, method: object, suffix: str, directory: str) -> None:
    content = changed(data=data, attention={"order": 2, "method": method}, output={"directory": directory})
    run = parse_run(content)
    text = format_run(run, suffix)
    import tomllib

    loaded = {".toml": tomllib.loads, ".json": json.loads, ".yaml": yaml.safe_load}[suffix](text)
    assert parse_run(loaded) == run


def test_examples_are_valid_by_model_and_by_schema() -> None:
    import tomllib

    examples = sorted((Path(__file__).parents[1] / "examples").glob("*.toml"))
    assert len(examples) >= 2
    schema = run_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in examples:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        assert parse_run(content).schema_version == 1
        jsonschema.validate(content, schema)


def test_the_schema_refuses_what_the_models_refuse() -> None:
    validator = jsonschema.Draft202012Validator(run_schema())
    assert validator.is_valid(ATTEND)
    assert not validator.is_valid(changed(kind="atend"))
    assert not validator.is_valid(changed(data={"kind": "random", "n": "five", "width": 4}))
    assert not validator.is_valid(changed(attention={"order": 0}))
    assert not validator.is_valid({**ATTEND, "atention": {}})


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("attention.order=3", ("attention", "order"), 3),
        ("data.score_rms = 1e-3", ("data", "score_rms"), 1e-3),
        ("data.lengths=[5, 3, 2]", ("data", "lengths"), [5, 3, 2]),
        ("output.directory=runs/a b", ("output", "directory"), "runs/a b"),
        ('output.directory="runs/c"', ("output", "directory"), "runs/c"),
        ("output.overwrite=true", ("output", "overwrite"), True),
        ('attention.mask={kind = "full"}', ("attention", "mask"), {"kind": "full"}),
        ("backend=numpy", ("backend",), "numpy"),
        ("output.directory=a=b", ("output", "directory"), "a=b"),
    ],
)
def test_overrides(override: str, path: tuple[str, ...], value: object) -> None:
    before = json.dumps(ATTEND)
    found: object = apply_override(ATTEND, override)
    for part in path:
        assert isinstance(found, dict)
        found = found[part]
    assert found == value
    assert type(found) is type(value)
    assert json.dumps(ATTEND) == before


def test_overrides_apply_in_order_and_are_checked(tmp_path: Path) -> None:
    path = written(tmp_path, format_run(parse_run(ATTEND)))
    run = read_run(path, ["data.n=9", "data.n=11", "attention.method={kind='polynomial', degree=2}"])
    assert isinstance(run, AttendRun)
    assert run.data.n == 11  # type: ignore[union-attr]
    assert run.attention.method.degree == 2  # type: ignore[union-attr]
    with pytest.raises(SpecError, match=r"attention\.order"):
        read_run(path, ["attention.order=7"])


def test_options_come_after_overrides_and_are_taken_as_they_are(tmp_path: Path) -> None:
    path = written(tmp_path, json.dumps(ATTEND), "a.json")
    run = read_run(path, ["output.directory=first"], {"output.directory": "1 = [", "output.overwrite": True})
    assert (run.output.directory, run.output.overwrite) == ("1 = [", True)
    with pytest.raises(SpecError) as caught:
        read_run(path, ["output=3"], {"output.directory": "x"})
    assert caught.value.code == "override-path"


@pytest.mark.parametrize("override", ["attention.order", "=3", "attention..order=3", "a=[1", "a=", 'a="x', "kind.x=1"])
def test_overrides_that_cannot_be_read(override: str) -> None:
    with pytest.raises(SpecError) as caught:
        apply_override(ATTEND, override)
    assert caught.value.code in ("override-syntax", "override-path")
    assert caught.value.expected
    assert caught.value.got


@pytest.mark.parametrize(
    ("name", "text", "where"),
    [
        ("a.toml", "schema_version = 1\nkind = attend\n", "line 2, column 8"),
        ("a.toml", "[data\n", "line 1, column 6"),
        ("a.toml", 'a = 1\nb = """never closed', "line 2, column"),
        ("a.json", '{"schema_version": 1,\n "kind": }', "line 2, column 10"),
        ("a.yaml", "a: 1\nb: [1, 2\nc: 3\n", "line 3, column 2"),
        ("a.yaml", "a: !!python/object:os.system x\n", "line 1, column 4"),
    ],
)
def test_broken_syntax_names_line_and_column(tmp_path: Path, name: str, text: str, where: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_run(written(tmp_path, text, name))
    assert caught.value.code == "file-syntax"
    assert where in caught.value.message
    assert caught.value.expected.startswith("valid")
    assert caught.value.got


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("a.toml", b"", "file-empty"),
        ("a.yaml", b" \n\n", "file-empty"),
        ("a.json", b"[1, 2]", "file-syntax"),
        ("a.json", b'{"kind": 1, "kind": 2}', "file-syntax"),
        ("a.json", b"[" * 100_000, "file-syntax"),
        ("a.toml", b"kind = '\xff'", "file-encoding"),
        ("a.ini", b"kind = 1", "file-format"),
    ],
)
def test_files_that_are_not_run_files(tmp_path: Path, name: str, content: bytes, code: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SpecError) as caught:
        read_run(path)
    assert caught.value.code == code


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    written(tmp_path, "x = 1", "quickstart.toml")
    with pytest.raises(SpecError) as caught:
        read_run(tmp_path / "quikstart.toml")
    assert caught.value.code == "file-missing"
    assert "quickstart.toml" in caught.value.hint
    with pytest.raises(SpecError) as caught:
        read_run(tmp_path.with_suffix(".toml"))
    assert caught.value.code == "file-missing"


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.toml").mkdir()
    with pytest.raises(SpecError) as caught:
        read_run(tmp_path / "a.toml")
    assert caught.value.code == "file-unreadable"


def test_yaml_without_its_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    with pytest.raises(SpecError) as caught:
        read_run(written(tmp_path, "kind: attend", "a.yaml"))
    assert caught.value.code == "extra-missing"
    assert "korder[yaml]" in caught.value.hint


@pytest.mark.parametrize(
    ("content", "near"),
    [
        (changed(kind="atend"), "attend"),
        (changed(kind="benchmrk"), "benchmark"),
        (changed(data={"kind": "random", "n": 5, "widht": 4}), "width"),
        (changed(data={"kind": "rndom", "n": 5, "width": 4}), "random"),
        (changed(outptu={"directory": "x"}), "output"),
        (changed(attention={"order": 2, "mask": {"kind": "casual"}}), "causal"),
        (changed(attention={"order": 2, "methd": {"kind": "exact"}}), "method"),
        (changed(output={"direktory": "x"}), "directory"),
    ],
)
def test_unknown_names_come_with_the_nearest_known_one(content: object, near: str) -> None:
    error = refused(content)
    assert near in error.hint
    assert error.expected
    assert error.got


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (changed(data={"kind": "random", "n": "five", "width": 4}), "data.n"),
        (changed(data={"kind": "random", "n": 5.0, "width": 4}), "data.n"),
        (changed(data={"kind": "random", "n": True, "width": 4}), "data.n"),
        (changed(data={"kind": "random", "n": 5, "lengths": [3, -1], "width": 4}), "data.lengths[1]"),
        (changed(data={"kind": "random", "n": 5, "width": 4, "score_rms": 0.0}), "data.score_rms"),
        (changed(data={"kind": "random", "n": 5}), "data.width"),
        (changed(data={"n": 5, "width": 4}), "data"),
        (changed(data=3), "data"),
        (changed(attention={"order": 0}), "attention.order"),
        (changed(attention={"order": 7}), "attention.order"),
        (changed(attention={"order": 2, "method": "exact"}), "attention.method"),
        (changed(attention={"order": 2, "method": {"kind": "polynomial"}}), "attention.method"),
        (changed(attention={"order": 2, "policy": {"memory_limit": "lots"}}), "attention.policy.memory_limit"),
        (changed(output={"arrays": "pickle"}), "output.arrays"),
        (changed(output={"overwrite": "yes"}), "output.overwrite"),
        (changed(schema_version=2), "schema_version"),
        (changed(backend=3), "backend"),
        ({"schema_version": 1, "kind": "attend"}, "data"),
        ({"kind": "benchmark", "schema_version": 1, "repeats": 0}, "repeats"),
    ],
)
def test_wrong_values_name_the_key(content: object, where: str) -> None:
    error = refused(content)
    assert error.message.startswith(f"{where} is ")
    assert error.expected
    assert error.got
    assert error.hint


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (changed(data={"kind": "random", "n": 5, "width": 4, "lengths": [3]}), "data.lengths has 1"),
        (changed(attention={"order": 2, "score": "kronecker"}), "needs a weight"),
        (changed(data={"kind": "set_cards"}, attention={"order": 3, "scale": 1.0}), "attention.order = 2"),
        (changed(data={"kind": "set_cards"}, attention={"order": 2}), "attention.scale = 1.0"),
        (
            changed(data={"kind": "set_cards"}, attention={"order": 2, "scale": 1.0, "mask": {"kind": "causal"}}),
            "full mask",
        ),
        (changed(data={"kind": "text", "tokens": 3, "width": 2, "score_rms": 1.0, "score_bound": 1.0}), "not both"),
    ],
)
def test_parts_that_do_not_fit_each_other(content: object, words: str) -> None:
    assert words in refused(content).message


@pytest.mark.parametrize("output", [{"arrays": "npz"}, {"plot": False}])
def test_a_benchmark_takes_no_key_that_it_does_not_use(output: dict[str, object]) -> None:
    error = refused({"schema_version": 1, "kind": "benchmark", "output": output})
    assert error.message == f"unknown key 'output.{next(iter(output))}'."


def test_the_wrong_kind_is_named() -> None:
    assert "no key `kind`" in refused({}).got
    assert "3" in refused({"kind": 3}).got


def test_defaults() -> None:
    run = parse_run({"schema_version": 1, "kind": "benchmark"})
    assert isinstance(run, BenchmarkRun)
    assert (run.rows, run.repeats, run.quick, run.output.directory) == (None, 5, False, None)
    run = parse_run(changed(data={"kind": "set_cards"}, attention={"order": 2, "scale": 1.0}))
    assert isinstance(run, AttendRun)
    assert run.data == SetCardsData(table=12, seed=0)
    assert run.backend == "auto"
