"""Safetensors files, read and written array by array.

The library loads whole files, or maps them, which counts as memory of the process; and its NumPy side
has no bfloat16. The format: 8 bytes with the length of a JSON header, the header, the arrays' bytes.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.interop.leaves import Leaf, leaf

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes; the library's own limit
SHARD_BYTES = 5_000_000_000
CHUNK = 1 << 24


def read(path: pathlib.Path) -> dict[str, Leaf]:
    """The arrays of a file, none of them read yet.

    Raises:
        UserError: not a safetensors file, cut short, or with places that do not fit.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise _broken(path, f"its header would have {length:,} bytes, the file has {size:,}")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found = {name: _leaf(path, 8 + length, row) for name, row in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _broken(path, f"its header cannot be read ({error})") from error
    spans = sorted(tuple(row["data_offsets"]) for row in header.values())
    end = 0
    for start, stop in spans:
        if start != end:
            raise _broken(path, "its arrays overlap or leave gaps")
        end = stop
    if end != size - 8 - length:
        raise _broken(path, f"its arrays take {end:,} bytes, and {size - 8 - length:,} are there")
    return found


def _broken(path: pathlib.Path, why: str) -> UserError:
    return UserError(
        f"{path} must be a whole safetensors file; {why}. Copy or download the file again."
    )


def _leaf(path: pathlib.Path, base: int, row: Mapping[str, Any]) -> Leaf:
    if row["dtype"] not in DTYPES:
        raise ValueError(f"dtype {row['dtype']!r} is not known")
    dtype, shape = DTYPES[row["dtype"]], tuple(row["shape"])
    start, stop = row["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
        raise ValueError("shapes and places must be whole numbers of at least 0")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} has {stop - start} bytes")
    return stored(path, base + start, shape, dtype)


def stored(path: pathlib.Path, place: int, shape: tuple[int, ...], dtype: np.dtype) -> Leaf:
    """A contiguous array at byte `place` of a file."""
    one = math.prod(shape[1:]) * dtype.itemsize

    def rows(start: int, stop: int) -> np.ndarray:
        out = np.empty((stop - start, *shape[1:]) if shape else (), dtype)
        with open(path, "rb") as file:
            file.seek(place + start * one)
            whole = fill(file, out)
        if not whole:
            raise UserError(f"{path} ends before its arrays do. Copy or download the file again.")
        return out

    return Leaf(shape, dtype, rows)


def fill(file: BinaryIO, out: np.ndarray) -> bool:
    """Reads the bytes of a contiguous array from here on; False where the file ends too early."""
    left = memoryview(out.reshape(-1).view(np.uint8)) if out.size else memoryview(b"")
    while left and (got := file.readinto(left)):
        left = left[got:]
    return not left


def write(path: pathlib.Path, arrays: Mapping[str, Any]) -> str:
    """Writes arrays or leaves, in this order, one after the other.

    Returns:
        The file's sha256.
    """
    leaves = {name: leaf(value) for name, value in arrays.items()}
    header, end = {}, 0
    for name, value in leaves.items():
        header[name] = dict(
            dtype=_NAMES[value.dtype],
            shape=list(value.shape),
            data_offsets=[end, end + value.nbytes],
        )
        end += value.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at multiples of 8
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in _bytes(text, leaves):
            file.write(part)
            digest.update(part)
    return digest.hexdigest()


def _bytes(header: bytes, leaves: Mapping[str, Leaf]) -> Iterator[Any]:
    yield len(header).to_bytes(8, "little") + header
    for name, value in leaves.items():
        array = np.asarray(value.read(), order="C")
        if (array.shape, array.dtype) != (value.shape, value.dtype):
            raise AssertionError(f"{name} was announced as {value.shape} {value.dtype}")
        if array.size:
            yield memoryview(array.reshape(-1).view(np.uint8))


def write_shards(
    folder: pathlib.Path, stem: str, arrays: Mapping[str, Any], *, limit: int = SHARD_BYTES
) -> dict[str, str]:
    """STEM.safetensors, or above `limit` bytes several and STEM.safetensors.index.json.

    Returns:
        File name -> sha256.
    """
    groups: list[dict[str, Leaf]] = [{}]
    for name, value in arrays.items():
        value = leaf(value)
        if groups[-1] and sum(x.nbytes for x in groups[-1].values()) + value.nbytes > limit:
            groups.append({})
        groups[-1][name] = value
    if len(groups) == 1:
        return {f"{stem}.safetensors": write(folder / f"{stem}.safetensors", groups[0])}
    names = [f"{stem}-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    index = {
        "metadata": {"total_size": sum(x.nbytes for group in groups for x in group.values())},
        "weight_map": {key: name for name, group in zip(names, groups) for key in group},
    }
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return {name: write(folder / name, group) for name, group in zip(names, groups)}


def sha256(path: pathlib.Path) -> str:
    """Of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()
