"""What parameters can be handed over from: the stage before, a workdir, a folder or file of imported weights."""

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from invideo_jax import digests, stored
from invideo_jax.errors import UserError
from invideo_jax.interop import folder as weights

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Source:
    """Parameters by path; nothing is read before `get` is called.

    Attributes:
        shapes: path -> shape and dtype.
        get: path -> array.
        about: what the hand-over's table keeps: name, weights, step, digest.
        meta: of a workdir the meta of its checkpoint (`config`, `stage`), of a folder its model.json; else {}.
    """

    shapes: Mapping[str, Any]
    get: Callable[[str], Any]
    about: Mapping[str, Any]
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def from_tree(params: PyTree, name: str, *, which: str = "params") -> Source:
    """Parameters in memory (or abstract ones, to plan with).

    Args:
        params: nested dictionaries of arrays.
        name: of the stage that they come from.
        which: 'params' or 'ema', for the table.
    """
    named = digests.named_leaves(params)
    return Source(named, named.__getitem__, dict(name=f"stage {name}", weights=which))


def from_state(state: Any, name: str, *, ema: bool = True) -> Source:
    """Parameters of a (sharded or abstract) `TrainState`: their average where it keeps one and `ema` asks for it."""
    kept = bool(jax.tree.leaves(state.ema)) and ema
    return from_tree(state.ema if kept else state.params, name, which="ema" if kept else "params")


def open_source(spec: str, *, ema: bool = True, key: str = "stages.NAME.init") -> Source:
    """What `spec` names.

    Args:
        spec: a workdir, or 'WORKDIR@STEP' for another than its newest checkpoint; or a folder that
            `python -m invideo_jax.interop.from_torch` wrote; or several of these for the parts of a
            model, 'PART=SPEC;PART=SPEC': paths then begin with the part's name.
        ema: take the moving average of a workdir that keeps one.
        key: config section, or a flag of a command, for messages.

    Raises:
        UserError: nothing of the kind there. CheckpointError: damaged.
    """
    name = key if key.startswith("--") else f"{key}.source"
    if all(re.match(r"\w+=", part) for part in spec.split(";")):
        pairs = [part.partition("=")[::2] for part in spec.split(";")]
        return _joined({part: open_source(where, ema=ema, key=key) for part, where in pairs})
    folder, _, step = spec.partition("@") if re.search(r"@\d+$", spec) else (spec, "", "")
    place = pathlib.Path(folder)
    if weights.is_folder(place):
        return _folder(place)
    if place.is_file() or (place / "config.json").is_file() and _torch_files(place):
        what = "file" if place.is_file() else "folder for PyTorch"
        raise UserError(
            f"{name} must be a folder of ours; got the {what} {place}. Convert it once: python -m "
            f"invideo_jax.interop.from_torch --layout=NAME --input={place} --output=DIR"
        )
    if not place.is_dir() or not stored.numbered(stored.find(place)):
        raise UserError(
            f"{name} must be the workdir of a run with a checkpoint, or a folder of imported "
            f"weights; got {spec!r}, which is {'neither' if place.is_dir() else 'not there'}."
        )
    return _workdir(place, int(step) if step else None, ema)


def _torch_files(place: pathlib.Path) -> bool:
    return any(x.suffix in (".safetensors", ".pt", ".pth", ".bin") for x in place.iterdir())


def _joined(parts: Mapping[str, Source]) -> Source:
    """Several sources as one, each under its name."""
    shapes = {f"{n}/{path}": x for n, source in parts.items() for path, x in source.shapes.items()}

    def get(path: str):
        part, _, rest = path.partition("/")
        return parts[part].get(rest)

    told = lambda name: {part: source.about.get(name) for part, source in parts.items()}
    about = dict(name=told("name"), weights=told("weights"), digest=told("digest"))
    return Source(shapes, get, about)


def _folder(place: pathlib.Path) -> Source:
    meta, lazy = weights.open_params(place)
    about = dict(name=str(place), weights="params", digest=meta["files"])
    return Source(lazy.leaves, lazy.__getitem__, about, meta)


def _workdir(place: pathlib.Path, step: int | None, ema: bool) -> Source:
    directory = stored.find(place)
    if step is None:
        good = [s for s in stored.numbered(directory) if stored.looks(directory, s) == "good"]
        step = max(good, default=None)
        if step is None:
            raise UserError(f"{directory} must hold a whole checkpoint; all are damaged.")
    meta = stored.meta_of(directory, step)
    leaves = meta["checkpoint"]["leaves"]
    which = "ema" if ema and any(name.startswith("ema/") for name in leaves) else "params"
    shapes = {
        name.partition("/")[2]: jax.ShapeDtypeStruct(tuple(row[0]), row[1])
        for name, row in leaves.items()
        if name.startswith(f"{which}/")
    }

    def get(path: str):
        # One leaf at a time, its digest compared: damage is an error here, never other weights.
        return stored.read_arrays(directory, step, under=f"{which}/{path}")[f"{which}/{path}"]

    about = dict(
        name=str(place), weights=which, step=step, digest=meta["checkpoint"]["digests"][which]
    )
    return Source(shapes, get, about, meta)
