"""States on disk: one file of arrays with a record, which appears whole or not at all and is checked when read."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from array_api_compat import to_device

from korder.decoding.factor_cache import FactorCache
from korder.decoding.polynomial_state import PolynomialState
from korder.decoding.state import DecodeState
from korder.decoding.tokens import TokenLayout
from korder.dispatch.arrays import device_name, namespace_of_kind
from korder.errors import KorderError, SpecError
from korder.spec import AttentionSpec

VERSION = 1
_RECORD = "record"
_FORMAT = "korder decode state"
_CLASSES: dict[str, type[FactorCache] | type[PolynomialState]] = {"exact": FactorCache, "polynomial": PolynomialState}


def write_state(state: DecodeState, path: Path) -> None:
    """Write a state beside its place and move it there, flushed to disk.

    Raises:
        SpecError: The file cannot be written.
    """
    arrays, values = state.contents()
    record = {
        "format": _FORMAT,
        "version": VERSION,
        "spec": state.spec.model_dump(mode="json"),
        "layout": asdict(state.layout),
        "values": values,
    }
    plain = {name: _in_numpy(state.layout, array) for name, array in arrays.items()}
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.partial-", dir=path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **{_RECORD: np.array(json.dumps(record))}, **plain)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)  # mkstemp makes a private file; the result is to have the ordinary permissions
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise _unwritable(path, error) from None
        raise


def _in_numpy(layout: TokenLayout, array: Any) -> np.ndarray:
    """Return an array on the host; bfloat16, which NumPy lacks, as float32, which holds it exactly."""
    xp = layout.namespace
    if layout.kind == "torch":
        array = to_device(array, "cpu")
        array = xp.astype(array, xp.float32) if array.dtype == xp.bfloat16 else array
    return np.asarray(array)


def _unwritable(path: Path, error: OSError) -> SpecError:
    return SpecError(
        f"the state cannot be written to {path}.",
        code="output-unwritable",
        expected="a file in a directory that exists and may be written",
        got=error.strerror or str(error),
    )


def read_state(path: Path, device: Any) -> DecodeState:
    """Return the state of a file.

    Raises:
        SpecError: See `korder.load_state`.
    """
    record, arrays = _read(path)
    _check_record(path, record)
    try:
        spec = AttentionSpec.model_validate(record["spec"])
        layout = _layout(path, record["layout"], device)
        values, made = record["values"], _CLASSES[spec.method.kind]
        wanted = made.described(spec, layout, values)
        _check_arrays(path, arrays, wanted)
        placed = _placed(layout, arrays, wanted, device)
        return made.restored(spec, layout, placed, values)
    except SpecError as error:
        raise error if error.code.startswith("state-") else _invalid(path, error.message) from None
    except KorderError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
        raise _invalid(path, f"{type(error).__name__}: {error}") from None


def _read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile) or _RECORD not in found.files:
                raise _invalid(path, "no record")
            record = json.loads(str(found[_RECORD]))
            arrays = {name: found[name] for name in found.files if name != _RECORD}
    except FileNotFoundError:
        raise SpecError(
            f"there is no file {path}.", code="state-missing", expected="a file that state.save wrote", got=str(path)
        ) from None
    except SpecError:
        raise
    except OSError as error:
        raise _invalid(path, error.strerror or str(error)) from None
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise _invalid(path, f"{type(error).__name__}: {error}") from None
    return record, arrays


def _invalid(path: Path, got: str) -> SpecError:
    return SpecError(
        f"the file {path} does not hold a state.",
        code="state-invalid",
        expected="a file that state.save wrote, as it wrote it",
        got=got,
    )


def _check_record(path: Path, record: Any) -> None:
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise _invalid(path, "a record of something else")
    if record.get("version") != VERSION:
        raise SpecError(
            f"the state in {path} is of a version that this korder does not read.",
            code="state-version",
            expected=f"version {VERSION}",
            got=f"version {record.get('version')!r}",
            hint="read it with the korder that wrote it, or prefill again.",
        )


def _layout(path: Path, fields: Mapping[str, Any], device: Any) -> TokenLayout:
    """Return the saved layout, on the device where the arrays are to live."""
    leading = tuple(int(size) for size in fields["leading"])
    saved = TokenLayout(**{**fields, "leading": leading})
    try:
        xp = namespace_of_kind(saved.kind)
    except ImportError:
        raise SpecError(
            f"the state in {path} has {saved.kind} arrays, and {saved.kind} is not installed.",
            code="state-kind",
            expected=f"an environment with {saved.kind}",
            got=f"no module named {saved.kind}",
        ) from None
    place = device_name(xp.zeros((1,), dtype=xp.float32, device=device))
    return TokenLayout(**{**fields, "leading": leading, "device": place})


def _check_arrays(path: Path, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[Any, str]]) -> None:
    if set(arrays) != set(wanted):
        raise _invalid(path, f"arrays {', '.join(sorted(arrays)) or 'none'}")
    for name, (shape, dtype) in wanted.items():
        stored = "float32" if dtype == "bfloat16" else dtype
        if (arrays[name].shape, arrays[name].dtype.name) != (tuple(shape), stored):
            raise _invalid(
                path, f"{name} of shape {arrays[name].shape}, {arrays[name].dtype}; {shape}, {stored} expected"
            )


def _placed(
    layout: TokenLayout, arrays: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[Any, str]], device: Any
) -> dict[str, Any]:
    xp = layout.namespace
    return {
        name: xp.asarray(array, dtype=getattr(xp, wanted[name][1]), device=device) for name, array in arrays.items()
    }
