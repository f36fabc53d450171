"""Arrays of single examples on disk: written once by a command, then read by example id.

    DIR/facts.json                   what the arrays belong to, and their shapes and types
    DIR/part-WRITER-NNNNNN.safetensors   some examples each; the ids stand in the header

A part appears under its name when it is complete, so that a writer that was stopped goes on where it was. bfloat16 arrays
are kept as the bits they are.
"""

import json
import os
import pathlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from invideo_jax.errors import UserError

Arrays = dict[str, np.ndarray]

_FACTS = "facts.json"
_OPEN_FILES = 64


def _replace(path: pathlib.Path, write: Any) -> None:
    """Lets `write` fill a file that then takes the place of `path` in one step."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)


def _bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


def _shapes(arrays: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {k: [np.dtype(x.dtype).name, list(x.shape)] for k, x in sorted(arrays.items())}


def _require_same(folder: pathlib.Path, saved: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Raises UserError unless the folder belongs to what is wanted of it."""
    for name in sorted({*saved, *want} - {"arrays", "weights"}):
        if saved.get(name) != want.get(name):
            raise UserError(
                f"The features in {folder} must be of the same {name}; they are of "
                f"{name}={saved.get(name)!r}, wanted is {want.get(name)!r}. Make others: "
                "python -m invideo_jax.teacher_cache --config=... --output=ANOTHER_FOLDER"
            )


def _read_facts(folder: pathlib.Path) -> dict[str, Any] | None:
    path = folder / _FACTS
    return json.loads(path.read_text()) if path.exists() else None


def _parts(folder: pathlib.Path) -> dict[pathlib.Path, dict[str, Any]]:
    """The headers of the parts: `ids`, in the order of the rows, and `reached`."""
    found = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        try:
            with safe_open(path, framework="numpy") as file:
                found[path] = json.loads(file.metadata()["header"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path} is damaged ({error}). Delete it and run the same command again: it makes what "
                "is missing."
            ) from error
    return found


class Writer:
    """Adds examples to a folder; a context manager, whose end writes the last part.

    Args:
        folder: made if it is not there.
        facts: what the arrays belong to; a folder of other facts is an error. `weights` is kept beside
            them, and not compared.
        name: of this writer: several may write into one folder at the same time.
        part_bytes: about how large a part becomes.

    Attributes:
        done: ids of the examples that are there.
        reached: what the caller last set it to before the newest part of this writer; {} at first.

    Raises:
        UserError: a folder of other features, or a damaged part.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        facts: Mapping[str, Any],
        *,
        name: str = "0",
        part_bytes: int = 256 * 2**20,
    ):
        self.folder, self.facts, self.name = folder, dict(facts), name
        self.part_bytes = part_bytes
        folder.mkdir(parents=True, exist_ok=True)
        self._saved = _read_facts(folder)
        if self._saved is not None:
            _require_same(folder, self._saved, self.facts)
        parts = _parts(folder)
        self.done = {i for header in parts.values() for i in header["ids"]}
        own = [path for path in parts if path.name.startswith(f"part-{name}-")]
        self.reached: dict[str, Any] = parts[own[-1]]["reached"] if own else {}
        self._next = int(own[-1].stem[-6:]) + 1 if own else 0
        self._rows: dict[str, Arrays] = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self._flush()

    def add(self, example: str, arrays: Arrays) -> None:
        """Keeps the arrays of one example; they have equal shapes and types for all examples."""
        if example in self.done:
            return
        shapes = _shapes(arrays)
        if self._saved is None:
            self._saved = self.facts | {"arrays": shapes}
            text = json.dumps(self._saved, indent=1, sort_keys=True)
            _replace(self.folder / _FACTS, lambda path: path.write_text(text))
        if shapes != self._saved["arrays"]:
            raise UserError(
                f"All examples in {self.folder} must have arrays of the same shapes and types; "
                f"{example} has {shapes}, the others {self._saved['arrays']}. Use another folder."
            )
        self._rows[example] = arrays
        self.done.add(example)
        if len(self._rows) * sum(x.nbytes for x in arrays.values()) >= self.part_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        names = next(iter(self._rows.values()))
        stacked = {n: _bits(np.stack([r[n] for r in self._rows.values()])) for n in names}
        header = {"header": json.dumps({"ids": list(self._rows), "reached": self.reached})}
        path = self.folder / f"part-{self.name}-{self._next:06d}.safetensors"
        _replace(path, lambda partial: partial.write_bytes(save(stacked, metadata=header)))
        self._rows, self._next = {}, self._next + 1


class Reader:
    """Looks examples up by id.

    Args:
        folder: what `Writer` made.
        facts: what the arrays must belong to.

    Attributes:
        arrays: name -> dtype and shape of one example.
        weights: digest of the weights that made them.

    Raises:
        UserError: no such folder, or features that belong to something else.
    """

    def __init__(self, folder: pathlib.Path, facts: Mapping[str, Any]):
        self.folder = folder
        saved = _read_facts(folder)
        if saved is None:
            raise UserError(
                f"The folder of features must have been made before; {folder} holds no {_FACTS}. Make it: "
                "python -m invideo_jax.teacher_cache --config=... --output=FOLDER"
            )
        _require_same(folder, saved, facts)
        self.weights: str = saved.get("weights") or saved.get("teacher", "")
        self.arrays = {
            name: (dtype, tuple(shape)) for name, (dtype, shape) in saved["arrays"].items()
        }
        self._places = {
            example: (path, row)
            for path, header in _parts(folder).items()
            for row, example in enumerate(header["ids"])
        }
        self._open: OrderedDict[pathlib.Path, Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._places)

    def missing(self, examples: Iterable[str]) -> list[str]:
        """Those of the examples that are not there."""
        return [example for example in examples if example not in self._places]

    def rows(self, examples: Sequence[str | None]) -> Arrays:
        """Arrays [rows, ...] of these examples; zeros for None, a row without an example.

        Raises:
            UserError: an example that is not there.
        """
        if lost := self.missing(e for e in examples if e is not None):
            raise UserError(
                f"{self.folder} must hold every example that is trained on; it has {len(self)}, but not "
                f"{lost[0]!r}{f' and {len(lost) - 1} more of this batch' if lost[1:] else ''}. Run the "
                "command that made it again on the same data: it makes what is missing."
            )
        return {name: self._stacked(name, examples) for name in self.arrays}

    def _stacked(self, name: str, examples: Sequence[str | None]) -> np.ndarray:
        dtype, shape = self.arrays[name]
        dtype = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
        out = np.zeros((len(examples), *shape), dtype)
        for i, example in enumerate(examples):
            if example is not None:
                path, row = self._places[example]
                _bits(out)[i] = self._file(path).get_slice(name)[row]
        return out

    def _file(self, path: pathlib.Path) -> Any:
        if path not in self._open:
            self._open[path] = safe_open(path, framework="numpy")
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(path)
        return self._open[path]
