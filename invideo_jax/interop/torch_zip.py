"""PyTorch's zip files (.pt, .pth, .bin) read and written without PyTorch, and without running them.

Such a file holds a pickle of the structure, and the bytes of each storage beside it. A pickle can call
any function; here it can call only those below, which describe tensors, and names none that exists.
"""

import argparse
import collections
import dataclasses
import io
import math
import pathlib
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.interop.leaves import Leaf, deferred, leaf
from invideo_jax.interop.safetensors_io import fill, stored

MAX_PICKLE = 1 << 26  # bytes; that of a 6B model has a few hundred thousand
_STORAGES = {
    "DoubleStorage": np.float64,
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "int64": np.int64,
    "bfloat16": ml_dtypes.bfloat16, "int32": np.int32, "int16": np.int16, "int8": np.int8,
    "uint8": np.uint8, "bool": np.bool_, "uint16": np.uint16, "uint32": np.uint32,
    "uint64": np.uint64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Storage:
    name: str
    dtype: np.dtype | None  # None: bytes
    numel: int


@dataclasses.dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage, offset, size, stride, *_rest) -> _Tensor:
    return _Tensor(storage, storage.dtype, offset, tuple(size), tuple(stride))


def _typed_tensor(storage, offset, size, stride, _grad, _hooks, dtype, *_rest) -> _Tensor:
    return _Tensor(storage, dtype, offset, tuple(size), tuple(stride))


class _Aside:
    """Stands for argparse.Namespace, which training scripts keep in their files; never looked into."""


_CALLS: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _typed_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda data, *_rest: data,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): None,
    (argparse.Namespace.__module__, argparse.Namespace.__name__): _Aside,
    **{("torch", name): np.dtype(kind) for name, kind in (_STORAGES | _DTYPES).items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CALLS:
            raise _Refused(f"{module}.{name}")
        return _CALLS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, name, _device, numel = pid
        if kind != "storage" or not isinstance(name, str) or not isinstance(numel, int):
            raise ValueError("a storage is not described as PyTorch does")
        return _Storage(name, dtype, numel)


class _Refused(Exception):
    """The name of something that is no part of a tensor."""


def read(path: pathlib.Path) -> Any:
    """What was saved; each tensor is a `Leaf`, read when asked for.

    Raises:
        UserError: not such a file, damaged, or one that names anything but tensors.
    """
    try:
        archive = zipfile.ZipFile(path)
        members = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in members if name.split("/", 1)[-1] == "data.pkl"]
        if len(pickles) != 1:
            raise ValueError("it holds no data.pkl")
        root = pickles[0].removesuffix("data.pkl")
        if members[pickles[0]].file_size > MAX_PICKLE:
            raise ValueError(f"its data.pkl is larger than {MAX_PICKLE:,} bytes")
        order = members.get(root + "byteorder")
        if order and (order.file_size > 16 or archive.read(order) != b"little"):
            raise ValueError("it was not written on a little-endian machine")
        found = _unpickled(archive.read(pickles[0]))
        return _with_leaves(found, path, root, members)
    except _Refused as error:
        raise UserError(
            f"{path} must hold tensors and nothing else; it names {error}, which is not looked up, since "
            "a file could so run any program. Where you trust it, save the weights alone: torch.save("
            "torch.load(FILE, weights_only=False)['model'], NEW), or use safetensors."
        ) from error
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise UserError(
            f"{path} must be a whole file of torch.save; {error}. Copy or download it again."
        ) from error


def _unpickled(data: bytes) -> Any:
    # The unpickler would make a memo table of any size that one opcode names.
    puts = 0
    for opcode, argument, _ in pickletools.genops(data):
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            puts += 1
            if argument is not None and int(argument) > puts:
                raise ValueError("its pickle numbers its parts in an odd way")
    return _Unpickler(io.BytesIO(data)).load()


def _with_leaves(found: Any, path: pathlib.Path, root: str, members: dict, depth: int = 4) -> Any:
    """Dictionaries, with tensors as leaves; other things as they are."""
    if isinstance(found, _Tensor):
        return _leaf(found, path, members[f"{root}data/{found.storage.name}"])
    if isinstance(found, dict) and depth:
        return {k: _with_leaves(v, path, root, members, depth - 1) for k, v in found.items()}
    return found


def _leaf(tensor: _Tensor, path: pathlib.Path, info: zipfile.ZipInfo) -> Leaf:
    dtype, shape, stride = np.dtype(tensor.dtype), tensor.shape, tensor.stride
    numbers = (tensor.offset, *shape, *stride)
    if not all(isinstance(n, int) and n >= 0 for n in numbers) or len(shape) != len(stride):
        raise ValueError("a tensor has a negative size")
    reach = sum((n - 1) * s for n, s in zip(shape, stride)) + 1 if math.prod(shape) else 0
    if (tensor.offset + reach) * dtype.itemsize > info.file_size:
        raise ValueError("a tensor reaches beyond its storage")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError("its tensors are compressed, which torch.save never does")
    place = _place(path, info)
    whole = math.prod(shape) * dtype.itemsize == info.file_size
    if stride == _contiguous(shape) or math.prod(shape) <= 1:
        part = stored(path, place + tensor.offset * dtype.itemsize, shape, dtype)
        return _checked(part, path, info) if whole else part
    span = stored(path, place + tensor.offset * dtype.itemsize, (reach,), dtype)
    steps = tuple(s * dtype.itemsize for s in stride)
    view = lambda: np.lib.stride_tricks.as_strided(span.read(), shape, steps)
    return deferred(shape, dtype, view)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _checked(part: Leaf, path: pathlib.Path, info: zipfile.ZipInfo) -> Leaf:
    """Compares the checksum where all of a storage is read at once."""

    def rows(start: int, stop: int) -> np.ndarray:
        found = part.rows(start, stop)
        if found.nbytes == info.file_size and found.size:
            if zlib.crc32(memoryview(found.reshape(-1).view(np.uint8))) != info.CRC:
                raise UserError(
                    f"{path} is damaged: the checksum of {info.filename} differs. Copy or download it "
                    "again."
                )
        return found

    return Leaf(part.shape, part.dtype, rows)


def _place(path: pathlib.Path, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a member begin."""
    head = np.empty(30, np.uint8)
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        if not fill(file, head) or head[:4].tobytes() != b"PK\x03\x04":
            raise ValueError(f"{info.filename} is not where the file says")
        size = file.seek(0, io.SEEK_END)
    name, extra = struct.unpack("<HH", head[26:30].tobytes())
    place = info.header_offset + 30 + name + extra
    if place + info.file_size > size:
        raise ValueError(f"it ends before {info.filename} does")
    return place


# ---- writing ----------------------------------------------------------------------------------------


def write(path: pathlib.Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays or leaves as torch.save writes an OrderedDict of tensors, one after the other."""
    leaves = {key: leaf(value) for key, value in arrays.items()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        root = path.stem

        def member(name: str):
            info = zipfile.ZipInfo(f"{root}/{name}")  # a fixed date: equal weights, equal files
            return archive.open(info, "w", force_zip64=True)

        with member("data.pkl") as file:
            file.write(_pickle_of(leaves))
        for name, text in (("byteorder", b"little"), ("version", b"3\n")):
            with member(name) as file:
                file.write(text)
        for number, value in enumerate(leaves.values()):
            array = np.asarray(value.read(), order="C")
            with member(f"data/{number}") as file:
                if array.size:
                    file.write(memoryview(array.reshape(-1).view(np.uint8)))


def _pickle_of(leaves: Mapping[str, Leaf]) -> bytes:
    kinds = {np.dtype(kind): name for name, kind in _STORAGES.items()}
    text = lambda x: b"X" + struct.pack("<I", len(x.encode())) + x.encode()
    number = lambda n: b"\x8a\x08" + struct.pack("<q", n)
    numbers = lambda row: b"(" + b"".join(map(number, row)) + b"t"
    empty = b"ccollections\nOrderedDict\n)R"
    parts = [b"\x80\x02", empty, b"("]
    for i, (key, value) in enumerate(leaves.items()):
        storage = text("storage") + f"ctorch\n{kinds[value.dtype]}\n".encode() + text(str(i))
        storage += text("cpu") + number(math.prod(value.shape))
        place = number(0) + numbers(value.shape) + numbers(_contiguous(value.shape))
        parts += [text(key), b"ctorch._utils\n_rebuild_tensor_v2\n(", b"(", storage, b"tQ"]
        parts += [place, b"\x89", empty, b"tR"]
    return b"".join([*parts, b"u."])
