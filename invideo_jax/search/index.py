"""Embeddings of the clips of many videos on disk, in parts that are written once.

    DIR/index.json                  what the embeddings belong to
    DIR/seen                        the source of videos that was looked at last
    DIR/part_000000.safetensors     rows, and the videos that they are of

A part is there wholly or not at all, and it holds whole videos, so that a killed indexing loses no more than its last
part. Of a video that is in several parts the last one counts. What changes is added as a new part; when too much is
out of date, one part is written that says which it replaces.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from invideo_jax.errors import UserError
from invideo_jax.metrics import replace_file

FORMAT = 1
MANY_PARTS = 16  # above so many, or
OUTDATED = 0.25  # when so large a share of the rows is of no use, they become one
_ARRAYS = ("embedding", "video", "window", "start", "end")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One video of the index.

    Attributes:
        stamp: changes with the file: its size and time, or the hash of its bytes.
        bad: why it has no clips; '' where it has.
        lost: clips of it that could not be read.
        detail: of `bad`, for people.
    """

    stamp: str
    bad: str = ""
    lost: int = 0
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Clips, ordered by video and window.

    Attributes:
        embedding: float32 [R, P], of length 1.
        video: int64 [R], which of the keys asked for.
        window: int64 [R], which of its video.
        start, end: float64 [R], seconds into the file.
    """

    embedding: np.ndarray
    video: np.ndarray
    window: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def __len__(self) -> int:
        return len(self.video)


@dataclasses.dataclass(frozen=True)
class Part:
    """One file: the keys of its videos, their entries, and its rows."""

    name: str
    keys: tuple[str, ...]
    entries: tuple[Entry, ...]
    arrays: Mapping[str, np.ndarray]


def digest(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of JSON-able facts."""
    text = json.dumps(facts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


class Index:
    """The index of one folder of videos by one model.

    Args:
        folder: its place below is named by the facts' digest: other facts are another index.
        facts: what its embeddings belong to, JSON-able.

    Attributes:
        folder: of this index alone.
        entries: key of a video -> `Entry`.
        damaged: names of parts that could not be read; their videos count as new.
    """

    def __init__(self, folder: pathlib.Path, facts: Mapping[str, Any]):
        self.facts = {"format": FORMAT, **facts}
        self.folder = pathlib.Path(folder) / digest(self.facts)
        self.entries: dict[str, Entry] = {}
        self.damaged: list[str] = []
        self._parts: list[Part] = []
        self.reload()

    def reload(self) -> None:
        """Reads what is on disk now."""
        self.entries, self.damaged, self._parts = {}, [], []
        found, replaced = [], set()
        for path in sorted(self.folder.glob("part_*.safetensors")):
            try:
                part, instead = _read(path)
            except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
                self.damaged.append(path.name)
                continue
            found.append(part)
            replaced |= instead
        for part in found:
            if part.name not in replaced:
                self._take(part)

    def _take(self, part: Part) -> None:
        self._parts.append(part)
        self.entries |= zip(part.keys, part.entries)

    def seen(self) -> str:
        """Fingerprint of the source that the index was last brought up to date with; '' for none."""
        file = self.folder / "seen"
        return file.read_text() if file.is_file() else ""

    def saw(self, fingerprint: str) -> None:
        """Keeps that the index is up to date with this source."""
        replace_file(self.folder / "seen", fingerprint.encode())

    def forget_damaged(self) -> None:
        """Deletes parts that cannot be read."""
        for name in self.damaged:
            (self.folder / name).unlink(missing_ok=True)
        self.damaged = []

    def add(self, entries: Mapping[str, Entry], arrays: Mapping[str, np.ndarray]) -> None:
        """Writes one part.

        Args:
            entries: key -> entry of whole videos.
            arrays: as of `Rows`; `video` says which of the entries.
        """
        self._take(self._write(tuple(entries), tuple(entries.values()), arrays, ()))

    def rows(self, keys: Sequence[str]) -> Rows:
        """The clips of these videos, in this order."""
        taken = {name: [] for name in _ARRAYS}
        for part, owner in self._owners(keys):
            real = owner >= 0
            for name, x in part.arrays.items():
                x = owner if name == "video" else x
                taken[name].append(x if real.all() else x[real])
        if not taken["video"]:
            none = np.zeros(0)
            return Rows(np.zeros((0, 1), np.float32), none.astype(np.int64), none, none, none)
        join = lambda pieces: pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        whole = {name: join(pieces) for name, pieces in taken.items()}
        order = np.lexsort((whole["window"], whole["video"]))
        if (order[1:] > order[:-1]).all():  # as they are, without a copy of all embeddings
            return Rows(**whole)
        return Rows(**{name: x[order] for name, x in whole.items()})

    def _owners(self, keys: Sequence[str]) -> Iterator[tuple[Part, np.ndarray]]:
        """Each part that has rows, and of each row the number of its key, -1 for none of these or an older part."""
        place = {key: number for number, key in enumerate(keys)}
        newest = {key: part.name for part in self._parts for key in part.keys}
        for part in self._parts:
            if not len(part.arrays["video"]):
                continue
            number = [place.get(k, -1) if newest[k] == part.name else -1 for k in part.keys]
            yield part, np.array(number, np.int64)[part.arrays["video"]]

    def tidy(self, keys: Collection[str]) -> bool:
        """Makes one part of all, without videos that are gone, where that is worth it; says whether it did."""
        wanted, enough = set(keys), 1 - OUTDATED
        kept = [key for key in self.entries if key in wanted]
        found = [owner >= 0 for _, owner in self._owners(kept)]
        few = sum(map(np.sum, found)) >= enough * sum(map(len, found))
        if len(self._parts) <= MANY_PARTS and few and len(kept) >= enough * len(self.entries):
            return False
        rows = self.rows(kept)
        old = [part.name for part in self._parts]
        entries = tuple(self.entries[key] for key in kept)
        arrays = {name: getattr(rows, name) for name in _ARRAYS}
        whole = self._write(tuple(kept), entries, arrays, old)
        self.entries, self._parts = {}, []
        self._take(whole)
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
        return True

    def _write(self, keys, entries, arrays, instead) -> Part:
        if not (self.folder / "index.json").exists():
            replace_file(self.folder / "index.json", json.dumps(self.facts, indent=1).encode())
        numbers = [int(path.stem[5:]) for path in self.folder.glob("part_*.safetensors")]
        name = f"part_{max(numbers, default=-1) + 1:06d}.safetensors"
        kinds = dict(embedding=np.float32, start=np.float64, end=np.float64)
        whole = {
            key: np.ascontiguousarray(arrays[key], kinds.get(key, np.int64)) for key in _ARRAYS
        }
        told = dict(keys=keys, entries=[dataclasses.astuple(e) for e in entries], instead=instead)
        # As an array: the header of the format, where metadata go, has room for 100 MB only.
        told = np.frombuffer(json.dumps(told).encode(), np.uint8)
        replace_file(self.folder / name, safetensors.numpy.save(whole | {"part": told}))
        return Part(name, keys, entries, whole)


def _read(path: pathlib.Path) -> tuple[Part, set[str]]:
    with safetensors.safe_open(path, framework="np") as file:
        told = json.loads(file.get_tensor("part").tobytes())
        arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    entries = tuple(Entry(*row) for row in told["entries"])
    return Part(path.name, tuple(told["keys"]), entries, arrays), set(told["instead"])


def place_of(checkpoint: str, given: str, videos: str) -> pathlib.Path:
    """The folder of all indexes: as given, or below the workdir, or beside a folder of weights.

    Raises:
        UserError: it would lie among the user's videos.
    """
    folder = pathlib.Path(checkpoint)
    if given:
        place = pathlib.Path(given)
    elif (folder / "checkpoints").is_dir():
        place = folder / "search"
    else:
        place = folder.with_name(f"{folder.name}.search")
    home = pathlib.Path(videos)
    if home.is_dir() and place.resolve().is_relative_to(home.resolve()):
        raise UserError(
            f"The index must not lie among the videos; got --index={place} and --videos={videos}. Give "
            "--index=DIR somewhere else."
        )
    return place
