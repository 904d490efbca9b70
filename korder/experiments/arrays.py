"""Operands from files: .npz, .safetensors or a directory of .npy. Nothing is unpickled; every misfit is named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
from numpy.typing import NDArray

from korder.errors import KorderError, OperandError, ShapeError, SpecError
from korder.experiments.inputs import FloatArray, Inputs

_NAME = re.compile(r"query|weight|(?:key|value|weight|bias|key_mask)_[1-9]\d*")
_PLACE = re.compile(r"\b(key_mask|biase|key|value|weight)s?\[(\d+)\]")
_MAGIC = b"\x93NUMPY"
_NAMES = ("query", "key_1", "value_1", "weight", "weight_1", "bias_1", "key_mask_1")


def read_inputs(path: Path) -> Inputs:
    """Return the operands of a file.

    Raises:
        SpecError: No such file, or one that is not what its ending says.
        OperandError: An unknown name, an integer, complex or object array.
        ShapeError: No query, no key matrix, or a mode without its key or value.
    """
    arrays = _read(path)
    for name, array in arrays.items():
        _check_name(path, name, arrays)
        _check_kind(name, array)
    return _assemble(path, arrays)


@contextmanager
def names_of_the_file() -> Iterator[None]:
    """Let errors call the arrays as the file does: key_1 for what Python calls keys[0]."""
    try:
        yield
    except (OperandError, ShapeError, SpecError) as error:
        error.message = _in_file_names(error.message)
        error.args = (error.message,)
        for name in ("expected", "got", "hint"):
            text = getattr(error, name)
            setattr(error, name, text and _in_file_names(text))
        raise


def _in_file_names(text: str) -> str:
    return _PLACE.sub(lambda place: f"{place[1].replace('biase', 'bias')}_{int(place[2]) + 1}", text)


def check_finite(inputs: Inputs) -> None:
    """Raise `OperandError` for the first NaN or infinity, with the tensor's name and the index."""
    named: list[tuple[str, FloatArray | None]] = [("query", inputs.query)]
    weight = inputs.weight if isinstance(inputs.weight, tuple) else (inputs.weight,)
    for prefix, group in (("key", inputs.keys), ("value", inputs.values), ("bias", inputs.biases or ())):
        named += [(f"{prefix}_{t}", array) for t, array in enumerate(group, start=1)]
    named += [(f"weight_{t}" if len(weight) > 1 else "weight", array) for t, array in enumerate(weight, start=1)]
    for name, array in named:
        if array is not None and not np.isfinite(array).all():
            wrong = np.argwhere(~np.isfinite(array))
            index = tuple(int(i) for i in wrong[0])
            raise OperandError(
                f"the array {name!r} holds a value that is not finite.",
                code="operand-nonfinite",
                expected="finite numbers, or data.allow_nonfinite = true",
                got=f"{name}[{', '.join(map(str, index))}] = {array[index]}, the first of {len(wrong)} such entries",
                hint="a masked key may hold anything; say so with data.allow_nonfinite = true.",
            )


def _read(path: Path) -> Mapping[str, NDArray[Any]]:
    if path.is_dir():
        return {file.stem: _load(file, file.stem) for file in sorted(path.glob("*.npy"))}
    if not path.exists():
        raise SpecError(
            f"there is no file {path}.",
            code="data-missing",
            expected="data.path: an .npz or .safetensors file, or a directory of .npy files",
            got=str(path.absolute()),
            hint="paths are relative to the working directory.",
        )
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    raise SpecError(
        f"the ending of {path.name!r} is not one that korder reads arrays from.",
        code="data-format",
        expected="a name ending in .npz or .safetensors, or a directory of .npy files",
        got=str(path),
        hint="an .npy file holds one array: put query.npy, key_1.npy, value_1.npy .. into a directory."
        if path.suffix == ".npy"
        else None,
    )


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    if path.is_file() and not is_zipfile(path):
        with path.open("rb") as file:
            start = file.read(8)
        raise SpecError(
            f"the file {path} is not an .npz archive.",
            code="data-unreadable",
            expected="an archive as numpy.savez writes it",
            got=f"{path.stat().st_size} bytes that begin with {start!r}" if start else "an empty file",
            hint="it is one .npy array: put it into a directory as query.npy, key_1.npy .. and name that."
            if start.startswith(_MAGIC)
            else "write it with numpy.savez(path, query=.., key_1=.., value_1=..).",
        )
    try:
        # Opened here: NumPy leaves a file open when it turns out to be no archive.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an .npz archive")
            return {name: _member(path, archive, name) for name in archive.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        if isinstance(error, KorderError):
            raise
        raise _unreadable(path, error) from None


def _member(path: Path, archive: Any, name: str) -> NDArray[Any]:
    try:
        return np.asarray(archive[name])
    except ValueError as error:
        raise _objects(name) if "pickle" in str(error).lower() else _unreadable(path, error) from None
    except Exception as error:  # a damaged member fails in zipfile or zlib, each with its own class
        raise _unreadable(path, error) from None


def _load(path: Path, name: str) -> NDArray[Any]:
    try:
        with path.open("rb") as file:
            start = file.read(len(_MAGIC))
        if start != _MAGIC:
            raise ValueError(f"the file begins with {start!r}, not as numpy.save writes it")
        return np.asarray(np.load(path, allow_pickle=False))
    except ValueError as error:
        raise _objects(name) if "pickle" in str(error).lower() else _unreadable(path, error) from None
    except (OSError, EOFError) as error:
        raise _unreadable(path, error) from None


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError:
        raise SpecError(
            f"reading {path.name} needs safetensors, which is not installed.",
            code="extra-missing",
            expected="the extra korder[safetensors]",
            got="no module named safetensors",
            hint="pip install 'korder[safetensors]', or use an .npz file.",
        ) from None
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> SpecError:
    return SpecError(
        f"the file {path} cannot be read as {path.suffix.lstrip('.')}.",
        code="data-unreadable",
        expected="an archive of plain arrays",
        got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}",
    )


def _objects(name: str) -> OperandError:
    return OperandError(
        f"the array {name!r} holds Python objects.",
        code="operand-objects",
        expected="real floating-point numbers",
        got="dtype object, which would have to be unpickled; korder never does that",
        hint="save it again as numpy.asarray(x, dtype='float32').",
    )


def _check_name(path: Path, name: str, arrays: Mapping[str, Any]) -> None:
    if _NAME.fullmatch(name):
        return
    near = difflib.get_close_matches(name, _NAMES, n=1, cutoff=0.5)
    raise OperandError(
        f"{path} holds an array of unknown name.",
        code="operand-unknown",
        expected="query, key_t, value_t, weight, weight_t, bias_t, key_mask_t with t = 1, 2, ..",
        got=f"{name!r} among {', '.join(sorted(arrays))}",
        hint=f"did you mean {near[0]!r}?" if near else None,
    )


def _check_kind(name: str, array: NDArray[Any]) -> None:
    mask = name.startswith("key_mask")
    if array.dtype.kind == "O":
        raise _objects(name)
    if array.dtype.kind == ("b" if mask else "f"):
        return
    raise OperandError(
        f"the array {name!r} must hold {'booleans, True = may be attended to' if mask else 'real numbers'}.",
        code="dtype-unsupported",
        expected="dtype bool" if mask else "dtype float16, float32 or float64",
        got=f"dtype {array.dtype.name}",
        hint=f"save it as {name}.astype({'bool' if mask else repr('float32')}); korder converts nothing silently.",
    )


def _assemble(path: Path, arrays: Mapping[str, NDArray[Any]]) -> Inputs:
    order = max((int(name.split("_")[-1]) for name in arrays if re.match(r"(key|value)_\d", name)), default=0)
    if order == 0:
        raise ShapeError(
            f"{path} holds no key matrix.",
            code="keys-missing",
            expected="query, key_1, value_1 and so on, one key and one value per mode",
            got=", ".join(sorted(arrays)) or "no arrays",
        )
    wanted = ["query", *(f"{kind}_{t}" for kind in ("key", "value") for t in range(1, order + 1))]
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise ShapeError(
            f"{path} lacks {', '.join(missing)}.",
            code="modes-mismatch",
            expected=", ".join(wanted),
            got=", ".join(sorted(arrays)),
        )
    for name in arrays:
        _check_mode(path, name, order)
    biases, key_masks = _per_mode(arrays, "bias", order), _per_mode(arrays, "key_mask", order)
    return Inputs(
        query=arrays["query"],
        keys=tuple(arrays[f"key_{t}"] for t in range(1, order + 1)),
        values=tuple(arrays[f"value_{t}"] for t in range(1, order + 1)),
        weight=_weight(arrays),
        biases=biases if any(bias is not None for bias in biases) else None,
        key_masks=key_masks if any(mask is not None for mask in key_masks) else None,
    )


def _check_mode(path: Path, name: str, order: int) -> None:
    prefix, _, mode = name.rpartition("_")
    limit = order + 1 if prefix == "weight" else order
    if mode.isdigit() and int(mode) > limit:
        raise ShapeError(
            f"{path} holds {name!r}, but only {order} key matrices.",
            code="modes-mismatch",
            expected=f"{prefix}_1 .. {prefix}_{limit}",
            got=name,
        )


def _per_mode(arrays: Mapping[str, NDArray[Any]], prefix: str, order: int) -> tuple[NDArray[Any] | None, ...]:
    return tuple(arrays.get(f"{prefix}_{t}") for t in range(1, order + 1))


def _weight(arrays: Mapping[str, NDArray[Any]]) -> FloatArray | tuple[FloatArray, ...] | None:
    factors = sorted((name for name in arrays if name.startswith("weight_")), key=lambda name: int(name[7:]))
    if "weight" in arrays and factors:
        raise OperandError(
            "the file holds a full weight and CP factors.",
            code="weight-mismatch",
            expected="one of them",
            got=", ".join(["weight", *factors]),
        )
    return tuple(arrays[name] for name in factors) if factors else arrays.get("weight")
