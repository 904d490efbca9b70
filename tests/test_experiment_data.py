"""Operands of run files: built as asked, refused by name when they cannot be used, never unpickled."""

from __future__ import annotations

from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from korder.errors import KorderError, OperandError, ShapeError, SpecError
from korder.experiments import set_cards
from korder.experiments import text as texts
from korder.experiments.arrays import read_inputs
from korder.experiments.data import build_inputs, outline
from korder.experiments.inputs import score_bound, score_rms
from korder.spec import AttentionSpec
from korder.spec.runs import AttendRun, SetCardsData, TextData, parse_run

N, M1, M2, D, E = 7, 5, 3, 4, 2


def arrays(**changes: Any) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(3)
    shapes = {"query": (N, D), "key_1": (M1, D), "key_2": (M2, D), "value_1": (M1, E), "value_2": (M2, E)}
    made = {name: generator.standard_normal(shape).astype("float32") for name, shape in shapes.items()}
    return {name: array for name, array in {**made, **changes}.items() if array is not None}


def run_of(data: dict[str, Any], **attention_keys: Any) -> AttendRun:
    run = parse_run({"schema_version": 1, "kind": "attend", "data": data, "attention": {"order": 2, **attention_keys}})
    assert isinstance(run, AttendRun)
    return run


def saved(folder: Path, content: dict[str, Any], name: str = "x.npz") -> dict[str, Any]:
    path = folder / name
    if name.endswith(".npz"):
        np.savez(path, **content)
    elif name.endswith(".safetensors"):
        from safetensors.numpy import save_file

        save_file(content, path)
    else:
        path.mkdir()
        for key, array in content.items():
            np.save(path / f"{key}.npy", array)
    return {"kind": "arrays", "path": str(path)}


@pytest.mark.parametrize("name", ["x.npz", "x.safetensors", "folder"])
def test_arrays_from_every_format(tmp_path: Path, name: str) -> None:
    content = arrays(bias_2=np.zeros((1, M2), "float32"), key_mask_1=np.array([True, True, False, True, True]))
    inputs = build_inputs(run_of(saved(tmp_path, content, name)))
    np.testing.assert_array_equal(inputs.query, content["query"])
    for t in (0, 1):
        np.testing.assert_array_equal(inputs.keys[t], content[f"key_{t + 1}"])
        np.testing.assert_array_equal(inputs.values[t], content[f"value_{t + 1}"])
    assert inputs.biases is not None
    assert inputs.key_masks is not None
    assert inputs.biases[0] is None
    np.testing.assert_array_equal(inputs.biases[1], content["bias_2"])
    np.testing.assert_array_equal(inputs.key_masks[0], content["key_mask_1"])
    assert inputs.key_masks[1] is None


def test_weights_from_a_file(tmp_path: Path) -> None:
    factors = {f"weight_{t}": np.full((D, 6), float(t), "float32") for t in (1, 2, 3)}
    inputs = build_inputs(run_of(saved(tmp_path, arrays(**factors)), score="kronecker"))
    assert isinstance(inputs.weight, tuple)
    assert [factor[0, 0] for factor in inputs.weight] == [1.0, 2.0, 3.0]
    full = build_inputs(
        run_of(saved(tmp_path, arrays(weight=np.ones((D, D, D), "float32")), "full.npz"), score="kronecker")
    )
    assert full.outline().shapes.weight == (D, D, D)


BAD_ARRAYS = {
    "no key": ({"key_1": None, "key_2": None, "value_1": None, "value_2": None}, ShapeError, "keys-missing"),
    "no query": ({"query": None}, ShapeError, "modes-mismatch"),
    "no value": ({"value_2": None}, ShapeError, "modes-mismatch"),
    "a gap": ({"key_1": None, "value_1": None}, ShapeError, "modes-mismatch"),
    "integers": ({"key_2": np.ones((M2, D), "int64")}, OperandError, "dtype-unsupported"),
    "complex": ({"query": np.ones((N, D), "complex64")}, OperandError, "dtype-unsupported"),
    "text": ({"query": np.full((N, D), "a")}, OperandError, "dtype-unsupported"),
    "objects": ({"value_1": np.array([[None] * E] * M1)}, OperandError, "operand-objects"),
    "a float mask": ({"key_mask_1": np.ones(M1, "float32")}, OperandError, "dtype-unsupported"),
    "unknown name": ({"qeury": np.ones((N, D), "float32")}, OperandError, "operand-unknown"),
    "a bias too many": ({"bias_3": np.zeros((1, M2), "float32")}, ShapeError, "modes-mismatch"),
    "two weights": (
        {"weight": np.ones((D, D, D), "float32"), "weight_1": np.ones((D, 2), "float32")},
        OperandError,
        "weight-mismatch",
    ),
    "width": ({"key_2": np.ones((M2, D + 1), "float32")}, ShapeError, "shape-mismatch"),
    "length": ({"value_2": np.ones((M2 + 1, E), "float32")}, ShapeError, "shape-mismatch"),
    "axes": ({"value_2": np.ones((1, M2, E), "float32")}, ShapeError, "shape-mismatch"),
    "order": ({"key_2": None, "value_2": None}, SpecError, "order-mismatch"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_cannot_be_used(tmp_path: Path, case: str) -> None:
    changes, kind, code = BAD_ARRAYS[case]
    with pytest.raises(kind) as caught:
        build_inputs(run_of(saved(tmp_path, arrays(**changes))))
    assert caught.value.code == code
    assert caught.value.expected
    assert caught.value.got


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["query", "key_2", "value_1", "bias_2"])
def test_nonfinite_entries_are_named_with_their_index(tmp_path: Path, name: str, value: float) -> None:
    content = arrays(bias_2=np.zeros((N, M2), "float32"))
    content[name][2, 1] = value
    data = saved(tmp_path, content)
    with pytest.raises(OperandError) as caught:
        build_inputs(run_of(data))
    assert caught.value.code == "operand-nonfinite"
    assert f"{name}[2, 1] = {value}" in caught.value.got
    build_inputs(run_of({**data, "allow_nonfinite": True}))


def test_a_pickle_is_never_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    np.savez(tmp_path / "x.npz", **arrays(query=np.array([Evil()], dtype=object)))
    with pytest.raises(OperandError):
        read_inputs(tmp_path / "x.npz")
    import pickle

    (tmp_path / "y.npz").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(SpecError):
        read_inputs(tmp_path / "y.npz")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["gone.npz", "x.csv", "x.npy", "torn.npz", "torn.safetensors", "half.npz"])
def test_files_that_hold_no_arrays(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "half.npz":
        np.savez(path, **arrays())
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif name != "gone.npz":
        path.write_bytes(b"PK\x03\x04 this is not an archive")
    with pytest.raises(SpecError) as caught:
        read_inputs(path)
    assert caught.value.got
    assert caught.value.code.startswith("data-")


def test_a_damaged_member_is_an_error_of_korders(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **arrays())
    content = bytearray((tmp_path / "x.npz").read_bytes())
    at = content.find(b"NUMPY")
    content[at + 80 : at + 120] = b"\0" * 40
    (tmp_path / "x.npz").write_bytes(bytes(content))
    with pytest.raises(KorderError):
        read_inputs(tmp_path / "x.npz")


RANDOM = {
    "kind": "random", "n": N, "lengths": [M1, M2], "width": D, "value_width": E, "heads": 6, "groups": 3, "batch": 2,
    "seed": 5,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_random_operands(dtype: str, distribution: str) -> None:
    run = run_of({**RANDOM, "dtype": dtype, "distribution": distribution})
    inputs = build_inputs(run)
    assert inputs.outline() == outline(run)
    assert inputs.query.shape == (2, 6, N, D)
    assert [key.shape for key in inputs.keys] == [(2, 3, M1, D), (2, 3, M2, D)]
    assert [value.shape for value in inputs.values] == [(2, 3, M1, E), (2, 3, M2, E)]
    everything = np.concatenate([x.ravel() for x in (inputs.query, *inputs.keys, *inputs.values)])
    assert everything.dtype == dtype
    assert len(np.unique(everything)) > (0.5 if dtype == "float16" else 0.99) * len(everything)
    if distribution == "uniform":
        assert np.abs(everything).max() <= 1
    again = build_inputs(run)
    np.testing.assert_array_equal(again.values[1], inputs.values[1])
    other = build_inputs(run_of({**RANDOM, "dtype": dtype, "distribution": distribution, "seed": 6}))
    assert not np.array_equal(other.values[1], inputs.values[1])


def brute_scores(inputs: Any, factor: float) -> np.ndarray:
    """Every score, by loops over batch, head and tuple."""
    scores = []
    heads, groups = inputs.query.shape[1], inputs.keys[0].shape[1]
    for b, h in product(range(inputs.query.shape[0]), range(heads)):
        keys = [key[b, h // (heads // groups)].astype(float) for key in inputs.keys]
        for row in inputs.query[b, h].astype(float):
            for pair in product(*keys):
                scores.append(factor * np.prod([row, *pair], axis=0).sum())
    return np.asarray(scores)


def test_score_rms_is_met() -> None:
    run = run_of({**RANDOM, "score_rms": 0.37}, scale=2.5)
    inputs = build_inputs(run)
    scores = brute_scores(inputs, 2.5)
    assert np.sqrt(np.mean(scores**2)) == pytest.approx(0.37, rel=1e-5)
    assert score_rms(inputs.query, inputs.keys, 2.5) == pytest.approx(0.37, rel=1e-5)
    assert np.abs(scores).max() <= score_bound(inputs.query, inputs.keys, 2.5) * (1 + 1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_text_tokens_are_their_bytes(tmp_path: Path, order: int) -> None:
    (tmp_path / "t.txt").write_bytes(b"abcabcabd")
    data = TextData(path=str(tmp_path / "t.txt"), tokens=7, width=4, value_width=3, ngram=3)
    inputs = texts.build(data, AttentionSpec(order=order))
    everything = (inputs.query, *inputs.keys, *inputs.values)
    assert [x.shape for x in everything] == [(7, 4)] * (order + 1) + [(7, 3)] * order
    for array in everything:
        np.testing.assert_array_equal(array[0], array[3])  # abc
        np.testing.assert_array_equal(array[1], array[4])  # bca
        assert not np.array_equal(array[3], array[6])  # abc, abd
    for one, other in pairwise(everything):
        assert one.shape != other.shape or not np.allclose(one, other)


def test_text_scores_are_bounded() -> None:
    spec = AttentionSpec(order=2)
    inputs = texts.build(TextData(tokens=29, width=5, score_bound=0.75), spec)
    scores = np.einsum("il,jl,kl->ijk", inputs.query, *inputs.keys) * spec.score_factor(5)
    assert 0.05 < np.abs(scores).max() <= 0.75
    inputs = texts.build(TextData(tokens=29, width=5, score_rms=0.2), spec)
    scores = np.einsum("il,jl,kl->ijk", inputs.query, *inputs.keys) * spec.score_factor(5)
    assert np.sqrt(np.mean(scores.astype(float) ** 2)) == pytest.approx(0.2, rel=1e-4)


def test_the_default_text_is_long_and_the_same_every_time() -> None:
    data = TextData(tokens=1_000_000, width=2)
    text = texts.read_text(data)
    assert len(text) == 1_000_002
    assert text == texts.read_text(data)
    assert b"statement" in text


def test_a_short_text_says_how_short(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"abcde")
    with pytest.raises(SpecError) as caught:
        texts.read_text(TextData(path=str(tmp_path / "t.txt"), tokens=4, width=2))
    assert "at most 3" in caught.value.hint
    with pytest.raises(SpecError):
        texts.read_text(TextData(path=str(tmp_path / "gone.txt"), tokens=4, width=2))


def test_dealt_cards_are_cards() -> None:
    cards = set_cards.deal(SetCardsData(table=81, seed=1))
    assert sorted(cards) == sorted(product(range(3), repeat=4))
    assert len(set_cards.brute_force(cards).sets) == 81 * 80 // 6
    assert set_cards.deal(SetCardsData(seed=1)) != set_cards.deal(SetCardsData(seed=2))
    assert set_cards.describe((1, 0, 2, 1)) == "two red open ovals"


@pytest.mark.parametrize(("table", "seed"), [(3, 0), (12, 7), (20, 3), (31, 4)])
def test_the_layer_of_the_cards_decides_by_score(table: int, seed: int) -> None:
    """Against the oracle: all matching tuples have the highest score, and the others together weigh less than 1/4."""
    data = SetCardsData(table=table, seed=seed)
    inputs = set_cards.build(data)
    cards = np.asarray(set_cards.deal(data))
    scores = np.einsum("il,jl,kl->ijk", *(x.astype(float) for x in (inputs.query, *inputs.keys)))
    matching = ((cards[:, None, None] + cards[None, :, None] + cards[None, None, :]) % 3 == 0).all(axis=-1)
    highest = 4 * set_cards.sharpness(table)
    np.testing.assert_allclose(scores[matching], highest, rtol=1e-5)
    others = np.where(matching, 0, np.exp(scores - highest)).sum(axis=(1, 2))
    assert 0 < others.max() <= 0.2501
    lse = np.log(np.exp(scores).sum(axis=(1, 2)))
    np.testing.assert_array_equal(set_cards.matches(lse), matching.sum(axis=(1, 2)) - 1)


def test_a_wrong_answer_about_the_cards_is_seen() -> None:
    data = SetCardsData(table=12, seed=7)
    truth = set_cards.brute_force(set_cards.deal(data))
    inputs = set_cards.build(data)
    scores = np.einsum("il,jl,kl->ijk", *(x.astype(float) for x in (inputs.query, *inputs.keys)))
    lse = np.log(np.exp(scores).sum(axis=(1, 2)))
    tuples = np.stack(np.divmod(np.argsort(-scores.reshape(12, -1), axis=1)[:, :9], 12), axis=-1)
    assert set_cards.verdict(lse, tuples) == truth
    assert set_cards.verdict(lse[::-1], tuples) != truth
    assert set_cards.verdict(lse, tuples[::-1]) != truth


@pytest.mark.parametrize("content", [b"", b"no archive at all", b"\x80\x04K\x01."])
def test_a_file_that_is_no_archive_is_called_that(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(SpecError) as caught:
        read_inputs(tmp_path / "x.npz")
    assert "is not an .npz archive" in caught.value.message
    assert "pickle" not in str(caught.value)
    assert (repr(content[:8]) if content else "an empty file") in caught.value.got


def test_one_array_is_no_archive_and_junk_is_no_array(tmp_path: Path) -> None:
    np.save(tmp_path / "query.npy", np.ones((2, 2)))
    (tmp_path / "query.npy").rename(tmp_path / "x.npz")
    with pytest.raises(SpecError) as caught:
        read_inputs(tmp_path / "x.npz")
    assert "directory" in caught.value.hint
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "query.npy").write_bytes(b"junk")
    with pytest.raises(SpecError) as caught:
        read_inputs(tmp_path / "folder")
    assert "pickle" not in str(caught.value)
    assert "junk" in caught.value.got


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("data", "keys"),
    [({"score_rms": 1e5, "dtype": "float16"}, {}), ({"score_rms": 1.0}, {"scale": 1e-300})],
)
def test_a_rescaling_that_overflows_names_its_keys(data: dict[str, Any], keys: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        build_inputs(run_of({"kind": "random", "n": 5, "width": 3, **data}, **keys))
    assert caught.value.code == "data-overflow"
    assert "data.score_rms or attention.scale" in caught.value.message
    assert f"data.score_rms = {data['score_rms']:g}" in caught.value.got


def test_an_empty_text_gets_no_impossible_hint(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"")
    with pytest.raises(SpecError) as caught:
        texts.read_text(TextData(path=str(tmp_path / "t.txt"), tokens=4, width=2))
    assert caught.value.hint == "set data.path to a longer text."
