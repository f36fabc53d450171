"""Rows of features on disk: finished ones in parts beside the output, all of them in one file at the end.

    OUTPUT.parts/run.json             what was asked for; another question may not go on from here
    OUTPUT.parts/000000.safetensors   some rows, where reading goes on after them, and what was bad before
    OUTPUT, OUTPUT.bad.jsonl          appear when all rows are there; then the parts go

Each file appears whole or not at all, so a killed run loses at most the rows since its last part.
"""

import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from invideo_jax import metrics
from invideo_jax.errors import UserError

SUFFIXES = (".safetensors", ".parquet")
GROUP_BYTES = 1 << 26  # rows read at a time while merging; a row group of Parquet
_MAX_HEADER = 90_000_000  # bytes; the format's own limit is 100 MB
_NAMES = {"float16": "F16", "float32": "F32", "float64": "F64", "int32": "I32"}


class Parts:
    """The finished rows of a run.

    Args:
        output: the file to be.
        question: everything that the rows depend on; JSON-able.

    Attributes:
        cursor: (video, window) to go on with.
        rows: how many are there.
        failures: what could not be read so far.
        paths: video -> its file, of those read so far.

    Raises:
        UserError: parts of another question lie there, or a damaged part.
    """

    def __init__(self, output: pathlib.Path, question: Mapping[str, Any]):
        self.folder = parts_folder(output)
        self.cursor, self.rows = (0, 0), 0
        self.failures: list[Mapping[str, Any]] = []
        self.paths: dict[int, str] = {}
        self._files: list[tuple[pathlib.Path, int]] = []
        _same_question(self.folder, question)
        while (path := self._path(len(self._files))).exists():
            self._take(path)

    def _path(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:06d}.safetensors"

    def _take(self, path: pathlib.Path) -> None:
        try:
            with safetensors.safe_open(path, framework="np") as file:
                told = json.loads(file.metadata()["part"])
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path} must be a whole part of features; it cannot be read ({error}). Remove it and "
                "all after it; they are computed again."
            ) from error
        self.cursor = tuple(told["cursor"])
        self.failures += told["failures"]
        self.paths |= {int(video): name for video, name in told["paths"].items()}
        self.rows += told["rows"]
        self._files.append((path, told["rows"]))

    def add(
        self,
        arrays: Mapping[str, np.ndarray],
        cursor: tuple[int, int],
        failures: Sequence[Mapping[str, Any]],
        paths: Mapping[int, str],
    ) -> None:
        """Keeps rows for good; there may be none, only failures.

        Args:
            arrays: [rows, ...] each.
            cursor: the window to go on with.
            failures, paths: new ones.
        """
        rows = len(next(iter(arrays.values())))
        told = dict(cursor=cursor, failures=list(failures), paths=dict(paths), rows=rows)
        whole = {name: np.ascontiguousarray(x) for name, x in arrays.items()}
        data = safetensors.numpy.save(whole, metadata={"part": json.dumps(told)})
        path = self._path(len(self._files))
        metrics.replace_file(path, data)
        self._files.append((path, rows))
        self.cursor, self.rows = cursor, self.rows + rows
        self.failures += failures
        self.paths |= paths

    def read(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """One array in pieces of `rows` rows (the last may be shorter), whatever the parts are cut like."""
        waiting: list[np.ndarray] = []
        have = 0
        for path, count in self._files:
            with safetensors.safe_open(path, framework="np") as file:
                piece, low = file.get_slice(name), 0
                while low < count:
                    some = min(rows - have, count - low)
                    waiting.append(piece[low : low + some])
                    low, have = low + some, have + some
                    if have == rows:
                        yield np.concatenate(waiting)
                        waiting, have = [], 0
        if waiting:
            yield np.concatenate(waiting)

    def remove(self) -> None:
        """Deletes the parts: the output holds all of them."""
        shutil.rmtree(self.folder)


def parts_folder(output: pathlib.Path) -> pathlib.Path:
    """Where the parts of an output lie."""
    return output.with_name(output.name + ".parts")


def bad_file(output: pathlib.Path) -> pathlib.Path:
    """The list of what could not be read."""
    return output.with_name(output.name + ".bad.jsonl")


def _same_question(folder: pathlib.Path, question: Mapping[str, Any]) -> None:
    asked = json.loads(json.dumps(question))
    file = folder / "run.json"
    if not file.exists():
        metrics.replace_file(file, json.dumps(asked, indent=1).encode())
        return
    begun = json.loads(file.read_text())
    differ = [f"{k}: {begun.get(k)!r} then, {asked.get(k)!r} now" for k in sorted({*begun, *asked})]
    differ = [
        text for text, k in zip(differ, sorted({*begun, *asked})) if begun.get(k) != asked.get(k)
    ]
    if differ:
        raise UserError(
            f"{folder} holds the beginning of another run; {'; '.join(differ)[:1500]}. Give another "
            f"--output, or remove {folder}."
        )


def check_output(output: pathlib.Path, ids: Sequence[str]) -> None:
    """Raises UserError where the output cannot be written at the end; looked at before the work."""
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output must end in {' or '.join(SUFFIXES)}; got --output={output}.")
    if output.suffix == ".parquet":
        _pyarrow()
    elif 4 * sum(map(len, ids)) > _MAX_HEADER:  # ids and, likely longer, paths
        raise UserError(
            f"A safetensors file has no room for the names of {len(ids):,} videos; got "
            f"--output={output}. Write Parquet, or split the list."
        )
    if not output.parent.is_dir():
        raise UserError(
            f"--output must lie in a folder that is there; got --output={output}. Make {output.parent}."
        )


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "A .parquet output needs pyarrow: pip install 'invideo_jax[parquet]' (or pip install "
            "pyarrow). A .safetensors output needs nothing."
        ) from None
    return pyarrow


def read_bad(output: pathlib.Path) -> list[dict[str, Any]]:
    """What `write_bad` wrote; no list means that nothing was bad."""
    file = bad_file(output)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write_bad(output: pathlib.Path, failures: Sequence[Mapping[str, Any]]) -> int:
    """Lists unreadable videos, one JSON object each, with the number of windows lost; returns how many."""
    videos: dict[int, dict[str, Any]] = {}
    for failure in failures:
        row = videos.setdefault(failure["video"], {**failure, "windows": 0})
        row["windows"] += 1
    lines = [json.dumps({k: v for k, v in row.items() if k != "video"}) for row in videos.values()]
    if lines:
        metrics.replace_file(bad_file(output), "".join(line + "\n" for line in lines).encode())
    else:
        bad_file(output).unlink(missing_ok=True)
    return len(videos)


def write_safetensors(
    output: pathlib.Path,
    parts: Parts,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    metadata: Mapping[str, str],
) -> None:
    """All rows in one file, array after array, a piece at a time in memory.

    Args:
        arrays: name -> (shape of a row, dtype name).
    """
    names = sorted(arrays, key=lambda name: (-np.dtype(arrays[name][1]).itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    place = 0
    for name in names:
        shape, dtype = arrays[name]
        size = parts.rows * math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = dict(
            dtype=_NAMES[dtype], shape=[parts.rows, *shape], data_offsets=[place, place + size]
        )
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = output.with_name(f".{output.name}.partial")
    with open(partial, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            for piece in parts.read(name, rows_at_once(arrays)):
                file.write(np.ascontiguousarray(piece).tobytes())
        _finish(file, partial, output)


def write_parquet(
    output: pathlib.Path,
    parts: Parts,
    arrays: Mapping[str, tuple[tuple[int, ...], str]],
    metadata: Mapping[str, str],
    ids: Sequence[str],
) -> None:
    """All rows in one table; features are lists of fixed size, their shapes are in the metadata."""
    arrow = _pyarrow()
    some, kinds = rows_at_once(arrays), {}
    for name, (shape, dtype) in arrays.items():
        plain = arrow.from_numpy_dtype(np.dtype(dtype))
        kinds[name] = arrow.list_(plain, math.prod(shape)) if shape else plain
    text = [arrow.field("id", arrow.string()), arrow.field("path", arrow.string())]
    fields = text + [arrow.field(name, kind) for name, kind in kinds.items()]
    shapes = {f"shape.{name}": json.dumps(list(shape)) for name, (shape, _) in arrays.items()}
    schema = arrow.schema(fields, metadata=dict(metadata) | shapes)
    partial = output.with_name(f".{output.name}.partial")
    with open(partial, "wb") as file:
        with arrow.parquet.ParquetWriter(file, schema) as writer:
            pieces = {name: parts.read(name, some) for name in arrays}
            for _ in range(0, parts.rows, some):
                columns = {name: next(pieces[name]) for name in arrays}
                videos = columns["video"].tolist()
                made = [
                    arrow.array([ids[v] for v in videos]),
                    arrow.array([parts.paths[v] for v in videos]),
                ]
                for name, values in columns.items():
                    flat = arrow.array(values.reshape(-1))
                    size = math.prod(arrays[name][0])
                    listed = arrays[name][0] != ()
                    made.append(
                        arrow.FixedSizeListArray.from_arrays(flat, size) if listed else flat
                    )
                writer.write_table(
                    arrow.Table.from_arrays(made, schema=schema), row_group_size=some
                )
        _finish(file, partial, output)


def rows_at_once(arrays: Mapping[str, tuple[tuple[int, ...], str]]) -> int:
    """Rows of at most `GROUP_BYTES` together."""
    one = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays.values())
    return max(1, min(GROUP_BYTES // one, 1 << 16))


def _finish(file, partial: pathlib.Path, output: pathlib.Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    os.replace(partial, output)


def read_metadata(output: pathlib.Path) -> dict[str, str]:
    """What a finished output says of itself; {} where it says nothing."""
    try:
        if output.suffix == ".parquet":
            found = _pyarrow().parquet.read_schema(output).metadata or {}
            return {k.decode(): v.decode() for k, v in found.items()}
        with safetensors.safe_open(output, framework="np") as file:
            return file.metadata() or {}
    except (OSError, ValueError, safetensors.SafetensorError):
        return {}
