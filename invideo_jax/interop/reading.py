"""Files of PyTorch weights, in any of the forms they are handed around in."""

import collections
import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from invideo_jax.errors import UserError
from invideo_jax.interop import mapping, names, safetensors_io, torch_zip
from invideo_jax.interop.leaves import Leaf, deferred
from invideo_jax.registry import nearest

WRAPPERS = ("module", "model", "state_dict")  # entries that hold the weights, as loaders try them
PREFIXES = ("module.", "model.", "backbone.", "encoder.", "vision_encoder.")
TORCH = (".pt", ".pth", ".bin")
DEEPSPEED = "mp_rank_00_model_states.pt"  # beside it lie the optimiser's shards


@dataclasses.dataclass(frozen=True)
class Weights:
    """A state dict on disk.

    Attributes:
        state: key -> leaf, in the file's order.
        files: that it lies in.
        notes: what was taken off, in words.
    """

    state: dict[str, Leaf]
    files: tuple[pathlib.Path, ...]
    notes: tuple[str, ...] = ()


def open_weights(path: str | pathlib.Path, *, entry: str = "") -> Weights:
    """A state dict from a file or folder; nothing is read of its arrays yet.

    Args:
        path: .safetensors, .pt, .pth, .bin, an index of shards (.index.json), or a folder with one.
        entry: which entry of a file of torch.save holds the weights; by default the first of `WRAPPERS`.

    Raises:
        UserError: nothing there, several things there, damaged, or of a form that is not read.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise UserError(f"The input must be a file or folder; there is none at {path}.")
    if path.name.endswith(".index.json"):
        return _sharded(path, entry)
    state, notes = _file(path, entry)
    if entry and not notes:
        raise UserError(f"--entry belongs to files of torch.save; {path} is none. Leave it out.")
    return Weights(state, (path,), tuple(notes))


def settings(path: pathlib.Path, entry: str) -> dict[str, Any]:
    """Plain values in an entry of a file of torch.save, beside the weights; empty where there is none."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return {}
    found = torch_zip.read(path)
    inside = found.get(entry) if isinstance(found, dict) else None
    return dict(inside) if isinstance(inside, dict) else {}


def _in_folder(folder: pathlib.Path) -> pathlib.Path:
    found = sorted(p for p in folder.iterdir() if p.is_file() and p.stem != "certificate")
    for fits in (
        lambda p: p.name.endswith(".safetensors.index.json"),
        lambda p: p.suffix == ".safetensors",
        lambda p: p.name.endswith(".index.json"),
        lambda p: p.name == DEEPSPEED,
        lambda p: p.suffix in TORCH,
    ):
        fitting = [p for p in found if fits(p)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            some = ", ".join(p.name for p in fitting[:5])
            raise UserError(f"{folder} must hold one file of weights; it has {some}. Give one.")
    raise UserError(
        f"{folder} must hold weights (.safetensors, .pt, .pth, .bin); it has none. A folder of this "
        "package's own weights (model.json) needs no conversion."
    )


def _sharded(path: pathlib.Path, entry: str) -> Weights:
    try:
        places = dict(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} must be an index with a weight_map; {error}.") from error
    shards: dict[str, dict[str, Leaf]] = {}
    for name in sorted(set(places.values())):
        if not isinstance(name, str) or pathlib.Path(name).name != name:
            raise UserError(f"{path} must name files beside it; got {name!r}.")
        if not (path.parent / name).is_file():
            raise UserError(f"{path.parent} must hold {name}, which {path.name} names.")
        shards[name], _ = _file(path.parent / name, entry)
    missing = [key for key, name in places.items() if key not in shards[name]]
    if missing:
        raise UserError(f"{path.parent / places[missing[0]]} must hold {missing[0]}; it does not.")
    state = {key: shards[name][key] for key, name in places.items()}
    return Weights(state, (path, *(path.parent / name for name in shards)))


def _file(path: pathlib.Path, entry: str) -> tuple[dict[str, Leaf], list[str]]:
    with open(path, "rb") as file:
        head = file.read(512)
    if not head:
        raise UserError(f"{path} is empty. Copy or download it again.")
    if head[8:9] == b"{":  # behind the header's length, which can begin with any byte
        return safetensors_io.read(path), []
    if head[:4] == b"PK\x03\x04":
        return _unwrapped(torch_zip.read(path), path, entry)
    if head[:1] == b"\x80" or b"ustar" in head:
        raise UserError(
            f"{path} is of torch.save before version 1.6 (or a bare pickle), which cannot be read "
            "without running it. Where you trust it, save it anew: torch.save(torch.load(FILE), NEW)."
        )
    if path.suffix in TORCH:
        raise UserError(f"{path} is no file of torch.save. Copy or download it again.")
    return safetensors_io.read(path), []


def _unwrapped(found: Any, path: pathlib.Path, entry: str) -> tuple[dict[str, Leaf], list[str]]:
    notes = []
    if entry and not (isinstance(found, dict) and entry in found):
        have = list(found) if isinstance(found, dict) else []
        raise UserError(f"{path} must have an entry {entry!r}.{nearest(entry, map(str, have))}")
    while True:
        if not isinstance(found, dict):
            raise UserError(
                f"{path} must hold a dictionary of tensors; got {type(found).__name__}."
            )
        inside = [entry] if entry else [w for w in WRAPPERS if isinstance(found.get(w), dict)]
        if not inside or any(isinstance(value, Leaf) for value in found.values()) and not entry:
            break
        notes.append(f"taken from the entry {inside[0]!r}")
        others = [str(key) for key in found if key != inside[0]]
        if others:
            notes.append(f"left alone beside it: {', '.join(others)}")
        found, entry = found[inside[0]], ""
    odd = [key for key, value in found.items() if not isinstance(value, Leaf)]
    if len(odd) == len(found):
        raise UserError(
            f"{path} must hold tensors, or have an entry of {', '.join(WRAPPERS)}; it has "
            f"{', '.join(map(str, odd[:8])) or 'nothing'}. Name the right one: --entry=NAME."
        )
    if odd:
        notes.append(f"no tensors, left alone: {', '.join(map(str, odd[:8]))}")
    return {str(k): v for k, v in found.items() if isinstance(v, Leaf)}, notes


def without_prefixes(
    state: Mapping[str, Leaf], layout: str
) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """The keys as the layout spells them: prefixes of wrapping modules are taken off.

    A prefix goes where more keys are the layout's own without it. Keys that do not have it stay.

    Returns:
        The state; what was taken off, in words.
    """
    table, notes = names.get(layout), []
    state = dict(state)
    while True:
        own = count_known(state, table)
        single = (*PREFIXES, *table.prefixes)
        tried = (*single, *(a + b for a in single for b in single))
        scores = {p: count_known(_stripped(state, p), table) for p in tried}
        best = max(scores, key=scores.get)
        if scores[best] <= own:
            return state, tuple(notes)
        having = sum(key.startswith(best) for key in state)
        short = _stripped(state, best)
        if len(set(short)) != len(short):
            twice = next(k for k, n in collections.Counter(short).items() if n > 1)
            raise UserError(f"The file must not hold both {twice} and {best}{twice}.")
        state = dict(zip(short, state.values()))
        notes.append(f"prefix {best!r} taken off {having} of {len(state)} keys")


def with_time(state: Mapping[str, Leaf], layout: str) -> tuple[dict[str, Leaf], tuple[str, ...]]:
    """The state with an image's convolution (O, C, h, w) as that of one frame, where the layout has frames.

    Returns:
        The state; what was changed, in words.
    """
    cubes = {row.theirs for row in names.get(layout).rows if row.turn == "conv"}
    flat = [key for key in state if key in cubes and len(state[key].shape) == 4]

    def one(value: Leaf) -> Leaf:
        (out, channels, *size) = value.shape
        return deferred((out, channels, 1, *size), value.dtype, lambda: value.read()[:, :, None])

    notes = tuple(f"{key} is of images: taken as of one frame" for key in flat)
    return {key: one(x) if key in flat else x for key, x in state.items()}, notes


def _stripped(keys: Iterable[str], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in keys]


def count_known(keys: Iterable[str], table: names.Layout) -> int:
    """How many keys are the layout's."""
    spelt = {re.escape(row.theirs).replace(re.escape("{i}"), "[0-9]+") for row in table.rows}
    known = re.compile("|".join(spelt))
    return sum(bool(known.fullmatch(mapping.spelled(key, table))) for key in keys)
