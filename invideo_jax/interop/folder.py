"""Folders of weights in this package's own names.

    DIR/model.json            what model it is, with all its arguments; the files' hashes
    DIR/params.safetensors    parameter path ('encoder/norm/scale') -> array; above 5 GB in several files

`python -m invideo_jax.interop.from_torch` writes them.
"""

import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from invideo_jax.errors import UserError
from invideo_jax.interop import safetensors_io
from invideo_jax.interop.leaves import Leaf, leaf

PyTree = Any
META, STEM, FORMAT = "model.json", "params", 1


class Lazy(Mapping):
    """Path -> array, each read from its file when it is asked for.

    Attributes:
        leaves: path -> `Leaf`, which knows the shape and dtype without reading.
    """

    def __init__(self, leaves: Mapping[str, Leaf]):
        self.leaves = dict(leaves)

    def __getitem__(self, path: str) -> np.ndarray:
        return self.leaves[path].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.leaves)

    def __len__(self) -> int:
        return len(self.leaves)


def save_params(folder: str | pathlib.Path, params: PyTree, model: Mapping[str, Any]) -> None:
    """Writes parameters, leaf by leaf, and what model they are of.

    Args:
        folder: made when missing; must not hold a model yet.
        params: nested dictionary, or path -> value; of arrays or of `Leaf`s.
        model: JSON-able; 'model' (its name) and 'arguments' (of its constructor) at least.

    Raises:
        UserError: the folder holds a model already.
    """
    folder = pathlib.Path(folder)
    if (folder / META).exists():
        raise UserError(f"{folder} holds a model already. Give another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    flat = {path: leaf(value) for path, value in flatten_dict(params, sep="/").items()}
    files = safetensors_io.write_shards(folder, STEM, flat)
    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in flat.values())
    meta = {"format": FORMAT, **model, "parameters": count, "files": files}
    (folder / META).write_text(json.dumps(meta, indent=1) + "\n")  # last: it says all is there


def is_folder(path: str | pathlib.Path) -> bool:
    """Whether `save_params` wrote there."""
    return (pathlib.Path(path) / META).is_file()


def open_params(folder: str | pathlib.Path) -> tuple[dict[str, Any], Lazy]:
    """What model it is, and its parameters, read when asked for.

    Returns:
        model.json; path -> array (`flax.traverse_util.unflatten_dict(lazy, sep='/')` is the tree).

    Raises:
        UserError: no such folder, or files that do not fit together.
    """
    folder = pathlib.Path(folder)
    if not is_folder(folder):
        raise UserError(
            f"A folder of weights holds {META}; {folder} does not. Make one with python -m "
            "invideo_jax.interop.from_torch, or give another."
        )
    try:
        meta = json.loads((folder / META).read_text())
        names = list(meta["files"])
        if meta["format"] != FORMAT:
            raise UserError(f"{folder} has format {meta['format']}; this version reads {FORMAT}.")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / META} cannot be read: {error}. Convert again.") from error
    leaves: dict[str, Leaf] = {}
    for name in names:
        if name != pathlib.Path(name).name or not (folder / name).is_file():
            raise UserError(f"{folder} must hold {name}, which {META} names. Convert again.")
        leaves |= safetensors_io.read(folder / name)
    count = sum(int(np.prod(x.shape, dtype=np.int64)) for x in leaves.values())
    if count != meta.get("parameters"):
        raise UserError(f"{folder} holds {count:,} parameters, not {meta.get('parameters')}.")
    return meta, Lazy(leaves)
