"""Where decoding begins and ends: refusals before any work, and states on disk, whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import korder
from korder.spec import Causal, Exact, Polynomial, Window
from tests.decode_cases import decode_case, fed, spec_of, with_method

Array = Any
X = np.ones((2, 3, 4), dtype="float32")
SPEC = spec_of(2, Exact())


CHOOSES = spec_of(2, Exact())
CHOOSES.__dict__["method"] = SimpleNamespace(kind="auto")  # whatever such a method is called


def tokens(*shapes: tuple[int, ...], dtype: str = "float32") -> tuple[Array, ...]:
    return tuple(np.ones(shape, dtype=dtype) for shape in shapes)


PREFILLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no keys": ({"keys": (), "values": ()}, korder.ShapeError, "at least one key matrix"),
    "not a tuple": ({"keys": X}, korder.OperandError, "keys must be a tuple"),
    "one value": ({"values": (X,)}, korder.ShapeError, "values must have one entry per mode"),
    "order": ({"spec": spec_of(3, Exact())}, korder.SpecError, "order must equal the number"),
    "not a spec": ({"spec": "exact"}, korder.SpecError, "spec must be an AttentionSpec"),
    "integers": ({"keys": (X.astype(int),) * 2}, korder.OperandError, "real floating-point"),
    "a vector": ({"keys": (X[0, 0],) * 2, "values": (X[0, 0],) * 2}, korder.ShapeError, "at least two axes"),
    "another dtype": ({"keys": (X, X.astype("float64"))}, korder.OperandError, r"keys\[1\] has another dtype"),
    "another kind": ({"keys": (X, torch.ones(2, 3, 4))}, korder.OperandError, r"keys\[1\] has another array kind"),
    "another width": ({"keys": (X, X[..., :3])}, korder.ShapeError, r"keys\[1\].*another shape"),
    "other values": ({"values": (X, X[:, :2])}, korder.ShapeError, r"values\[1\].*another shape"),
    "other heads": ({"keys": (X, X[:1])}, korder.ShapeError, r"keys\[1\].*another shape"),
    "a long mask": ({"key_masks": (None, np.ones((2, 4), bool))}, korder.ShapeError, r"key_masks\[1\] must have one"),
    "a mask of floats": ({"key_masks": (X[:, :, 0], None)}, korder.OperandError, r"key_masks\[0\] must be a boolean"),
    "a method that chooses": ({"spec": CHOOSES},
                              korder.UnsupportedProblemError, "made for one method"),
    "no backend": ({"spec": spec_of(2, Exact(), policy={"backends": ("torch",)})}, korder.UnsupportedProblemError,
                   "array kind=numpy"),
    "capacity": ({"capacity": 2.5}, korder.SpecError, "capacity must be a number of keys"),
    "negative capacity": ({"capacity": -1}, korder.SpecError, "capacity must be a number of keys"),
    "kronecker": ({"spec": korder.AttentionSpec(order=2, score="kronecker")}, korder.SpecError, "no score weight"),
    "window": ({"spec": spec_of(2, Polynomial(degree=2), mask=Window(sizes=(2, 2)))}, korder.UnsupportedProblemError,
               "forgets none"),
    "exact later": ({"spec": spec_of(2, Polynomial(degree=2, tolerance=0.1, on_exceed="exact"))},
                    korder.UnsupportedProblemError, "needs the keys"),
    "rows": ({"spec": spec_of(2, Polynomial(degree=2, estimate_rows=1))}, korder.UnsupportedProblemError,
             "needs the keys"),
    "tolerance": ({"spec": spec_of(2, Polynomial(tolerance=0.1))}, korder.SpecError, "a state keeps one degree"),
    "no key to measure": ({"spec": spec_of(2, Polynomial(tolerance=0.1)), "query_bound": 1.0,
                           "keys": (X[:, :0],) * 2, "values": (X[:, :0],) * 2}, korder.SpecError, "keeps one degree"),
    "bound": ({"spec": spec_of(2, Polynomial(degree=2)), "query_bound": -1.0}, korder.SpecError, "must be positive"),
    "bound of text": ({"spec": spec_of(2, Polynomial(degree=2)), "query_bound": "1"}, korder.SpecError, "a number"),
    "memory": ({"spec": spec_of(2, Polynomial(degree=30), policy={"memory_limit": 10**6})},
               korder.UnsupportedProblemError, "more memory than the policy allows"),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFILLS)
def test_prefill_refuses(name: str) -> None:
    changes, error, message = PREFILLS[name]
    with pytest.raises(error, match=message):
        korder.prefill(**{"keys": (X, X), "values": (X, X), "spec": SPEC, **changes})


def test_jax_arrays_are_refused() -> None:
    # known by the module of its type, so that JAX need not be loaded
    x = type("Array", (), {"__module__": "jax.array", "shape": (3, 4), "dtype": np.dtype("float32"), "ndim": 2})()
    with pytest.raises(korder.UnsupportedProblemError, match="does not take JAX arrays"):
        korder.prefill((x, x), (x, x), SPEC)


@pytest.mark.parametrize("method", [Exact(), Polynomial(degree=2)])
def test_tokens_and_queries_must_be_like_those_before(method: Any) -> None:
    state = korder.prefill((X, X), (X, X), spec_of(2, method))
    for keys, message in [
        ((X,), "keys must have one entry per mode"),
        ((X, X[..., :2]), r"keys\[1\].*another shape"),
        ((X[:1], X), r"keys\[0\].*another shape"),
        ((X.astype("float64"), X), r"keys\[0\] has another dtype"),
        ((torch.ones(2, 3, 4), X), r"keys\[0\] has another array kind"),
    ]:
        with pytest.raises((korder.ShapeError, korder.OperandError), match=message):
            state.append(keys, (X, X))
    for query, text in [
        (X[..., :2], "does not fit the keys"),
        (X[0], "does not fit the keys"),
        (X[None], "does not fit the keys"),
        (tokens((3, 1, 4))[0], "must divide the number of query heads"),
        (X.astype("float64"), "query has another dtype"),
    ]:
        with pytest.raises((korder.ShapeError, korder.OperandError), match=text):
            korder.decode(query, state)
    with pytest.raises(korder.OperandError, match="second argument must be a state"):
        korder.decode(state, X)  # type: ignore[arg-type]
    assert state.lengths == (3, 3)


METHODS = {
    "exact": Exact(),
    "polynomial": Polynomial(degree=4),
    "minimax": Polynomial(degree=3, coefficients="minimax", interval=2.0),
}
KINDS = {
    "numpy": np.asarray,
    "torch": torch.as_tensor,
    "bfloat16": lambda x: torch.as_tensor(x, dtype=None if x.dtype == bool else torch.bfloat16),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_state_that_was_saved_goes_on_as_if_it_had_not(method: str, kind: str, masked: bool, tmp_path: Path) -> None:
    masks = {"key_masks": (True, True)} if masked else {}
    case = with_method(decode_case(2, seed=1, dtype="float32", mask=Causal(), **masks), METHODS[method])
    make = KINDS[kind]
    state = fed(case, asarray=make)
    state.save(tmp_path / "state")
    again = korder.load_state(tmp_path / "state")
    assert os.listdir(tmp_path) == ["state"]
    assert (again.spec, again.layout, again.lengths) == (state.spec, state.layout, state.lengths)
    more = [tuple(make(x[:, :, :2]) for x in arrays) for arrays in (case.values, case.keys)]
    query = make(case.query)
    pairs = [(state, again), (state.append(more[1], more[0]), again.append(more[1], more[0]))]
    for one, other in pairs:
        first, second = korder.decode_result(query, one), korder.decode_result(query, other)
        assert type(first.output) is type(second.output)
        for name in ("output", "lse"):
            got, wanted = (getattr(x, name) for x in (second, first))
            assert got.dtype == wanted.dtype
            assert bool((got == wanted).all())
        if first.certificate is not None:
            assert bool((first.certificate.bound == second.certificate.bound).all())  # type: ignore[union-attr]


def test_a_window_and_a_query_bound_are_saved_too(tmp_path: Path) -> None:
    case = decode_case(2, seed=2, mask=Window(sizes=(3, 2)))
    fed(case).save(tmp_path / "w")
    again = korder.load_state(tmp_path / "w")
    assert again.lengths == (3, 2)
    longer = [state.append(case.keys, case.values) for state in (fed(case), again)]
    np.testing.assert_array_equal(*(korder.decode(case.query, state) for state in longer))
    bounded = decode_case(2, seed=2, scale=0.02, method=Polynomial(tolerance=0.1))
    state: Any = fed(bounded, cuts=(), query_bound=4.0)
    state.save(tmp_path / "b")
    found: Any = korder.load_state(tmp_path / "b")
    assert found.method == state.method
    with pytest.raises(korder.AccuracyError):
        korder.decode(1e3 * bounded.query, found)


def saved(path: Path, method: Any = None) -> Path:
    case = decode_case(2, seed=3, method=method or Polynomial(degree=2))
    fed(case).save(path)
    return path


def rewritten(path: Path, change: Any) -> None:
    """Change the record and the arrays of a saved state."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    record = json.loads(str(arrays.pop("record")))
    change(record, arrays)
    with path.open("wb") as out:
        np.savez(out, record=np.array(json.dumps(record)), **arrays)


CHANGES: dict[str, tuple[Any, str, str]] = {
    "version": (lambda r, a: r.update(version=2), "state-version", "version 2"),
    "format": (lambda r, a: r.update(format="recipe"), "state-invalid", "something else"),
    "no spec": (lambda r, a: r.pop("spec"), "state-invalid", "spec"),
    "another spec": (lambda r, a: r["spec"].update(order=3), "state-invalid", ""),
    "a wrong spec": (lambda r, a: r["spec"].update(order=0), "state-invalid", "order"),
    "fewer arrays": (lambda r, a: a.pop("sums_1"), "state-invalid", "arrays"),
    "another shape": (lambda r, a: a.update(sums_0=a["sums_0"][:, :-1]), "state-invalid", "sums_0 of shape"),
    "another dtype": (lambda r, a: a.update(sums_0=a["sums_0"].astype("float32")), "state-invalid", "float32"),
    "another width": (lambda r, a: r["layout"].update(width=7), "state-invalid", "of shape"),
    "a large batch": (lambda r, a: r["layout"].update(leading=[10**12, 2]), "state-invalid", "of shape"),
    "no layout": (lambda r, a: r.update(layout=3), "state-invalid", ""),
    "lengths": (lambda r, a: r["values"].update(lengths=["many", 2]), "state-invalid", "many"),
    "another library": (lambda r, a: r["layout"].update(kind="cupynumeric"), "state-kind", "cupynumeric"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_state_that_was_changed_is_refused(name: str, tmp_path: Path) -> None:
    change, code, text = CHANGES[name]
    path = saved(tmp_path / "state.npz")
    rewritten(path, change)
    with pytest.raises(korder.SpecError) as caught:
        korder.load_state(path)
    assert caught.value.code == code
    assert text in str(caught.value)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole").read_bytes()
    middle = len(whole) // 2
    broken = bytearray(whole)
    broken[middle] ^= 0xFF
    contents = {
        "empty": b"",
        "text": b"not a state\n",
        "short": whole[:middle],
        "broken": bytes(broken),
        "pickle": b"\x80\x04N.",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", np.ones(3))
    np.savez(tmp_path / "arrays.npz", x=np.ones(3))
    for name in (*contents, "array.npy", "arrays.npz"):
        with pytest.raises(korder.SpecError, match="does not hold a state"):
            korder.load_state(tmp_path / name)
    with pytest.raises(korder.SpecError, match="there is no file"):
        korder.load_state(tmp_path / "missing")
    with pytest.raises(korder.SpecError, match="does not hold a state"):
        korder.load_state(tmp_path)


def test_a_state_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "state")
    before = path.read_bytes()
    state = fed(decode_case(2, seed=9, method=Polynomial(degree=2)))
    with monkeypatch.context() as patch:

        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(korder.SpecError, match="cannot be written"):
            state.save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["state"]
    with pytest.raises(korder.SpecError, match="cannot be written"):
        state.save(tmp_path / "no" / "state")
    state.save(path)
    assert path.read_bytes() != before
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
