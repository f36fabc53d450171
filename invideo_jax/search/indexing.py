"""Brings an index up to date with the videos: new and changed ones are embedded, those gone are left out."""

import contextlib
import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from invideo_jax import runtime, sharding, workdir
from invideo_jax.data.audio import load_audio
from invideo_jax.data.decode import BadVideo, Limits
from invideo_jax.data.sources import Example, Source
from invideo_jax.errors import UserError
from invideo_jax.features.reading import Item, Reading
from invideo_jax.features.windows import Rule
from invideo_jax.progress import duration
from invideo_jax.search.index import Entry, Index
from invideo_jax.search.opening import Opened

MODALITIES = ("video", "audio", "audio_video")
TELL_SECONDS = 10.0
NO_SOUND = "no_sound"
_BYTES = "bytes:"
_NO_STAMP = "?"  # of what cannot be looked at; never equal to what is kept


@dataclasses.dataclass(frozen=True)
class Settings:
    """How videos become rows.

    Attributes:
        by: which embedding, one of `MODALITIES`.
        rule: windows.
        batch_size: clips computed together; the mesh divides it.
        limits: what one video may cost.
        threads: videos decoded at a time.
        save_seconds: longest time of work that a kill can lose, but for one video.
    """

    by: str = "video"
    rule: Rule = Rule()
    batch_size: int = 8
    limits: Limits = Limits()
    threads: int = 2
    save_seconds: float = 30.0


@dataclasses.dataclass(frozen=True)
class Listing:
    """The videos of a source, each once.

    Attributes:
        keys: file and seconds, or the record's place.
        numbers: of the (first) example of each key in the source.
        stamps: see `Entry`.
    """

    keys: tuple[str, ...]
    numbers: tuple[int, ...]
    stamps: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Update:
    """What an update did: videos embedded, of them those changed; videos dropped; clips; seconds."""

    added: int = 0
    changed: int = 0
    dropped: int = 0
    clips: int = 0
    seconds: float = 0.0


def check_towers(opened: Opened, by: str, *, rerank: int = 0) -> None:
    """Raises UserError where the model lacks what is asked for."""
    if by not in MODALITIES:
        raise UserError(f"--by must be one of {', '.join(MODALITIES)}; got --by={by}.")
    if getattr(opened.towers, by) is None:
        known = [name for name in MODALITIES if getattr(opened.towers, name) is not None]
        raise UserError(
            f"--by={by} needs a model that embeds {by}; {opened.name} embeds {', '.join(known)}. Give "
            f"one of these, or a checkpoint that was trained with sound."
        )
    if rerank and (opened.towers.match is None or by != "video"):
        why = "there is none" if opened.towers.match is None else f"it judges video; got --by={by}"
        raise UserError(
            f"--rerank needs the match score of a model with fusion layers and the loss vtm; {why} in "
            f"{opened.name}. Leave --rerank out."
        )


def list_videos(source: Source, index: Index) -> Listing:
    """What there is now; files are looked at, not read, and records read only in a source that changed."""
    known = source.fingerprint()
    numbers: dict[str, int] = {}
    for number, key in enumerate(source.keys()):
        numbers.setdefault(key, number)
    stamps, unchanged = [], index.seen() == known
    for key, number in numbers.items():
        kept = index.entries[key].stamp if key in index.entries else ""
        # Bytes of a source that did not change need no reading to know that they are the same.
        same = unchanged and kept.startswith(_BYTES)
        stamps.append(kept if same else _stamp(source, number))
    return Listing(tuple(numbers), tuple(numbers.values()), tuple(stamps))


def _stamp(source: Source, number: int) -> str:
    try:
        example = source[number]
        if isinstance(example["video"], bytes):
            return _BYTES + hashlib.blake2b(example["video"], digest_size=16).hexdigest()
        about = os.stat(example["video"])
    except (BadVideo, OSError):
        return _NO_STAMP
    return f"{about.st_size}:{about.st_mtime_ns}"


def update(
    index: Index,
    source: Source,
    opened: Opened,
    settings: Settings,
    *,
    say: Callable[[str], None] = print,
) -> tuple[Listing, Update]:
    """Embeds what is new or has changed.

    Raises:
        UserError: another process writes the index.
    """
    began, before = time.monotonic(), dict(index.entries)
    listing = list_videos(source, index)
    stale = _stale(index, listing)
    gone = len(before.keys() - set(listing.keys))
    if not (stale or gone or index.damaged):
        return listing, Update()
    with _alone(index):
        index.reload()
        if index.damaged:
            say(f"note: {len(index.damaged)} parts of the index are damaged; making them again")
            index.forget_damaged()
        stale = _stale(index, listing)
        clips = _embed(index, source, opened, settings, listing, stale, say) if stale else 0
        index.tidy(listing.keys)
        index.saw(source.fingerprint())
    changed = sum(listing.keys[place] in before for place in stale)
    return listing, Update(len(stale), changed, gone, clips, time.monotonic() - began)


@contextlib.contextmanager
def _alone(index: Index) -> Iterator[None]:
    """Holds the index's lock."""
    with contextlib.ExitStack() as stack:
        lock = workdir.Lock(index.folder)
        try:
            stack.enter_context(lock)
        except runtime.RunError as error:
            if error.exit_code != runtime.USER_ERROR:
                raise
            raise UserError(
                f"Another process brings the index up to date: {lock.path} says which. Wait until it is "
                "done, or give another --index."
            ) from None
        yield


def _stale(index: Index, listing: Listing) -> list[int]:
    """Places in the listing of what is new, or not as it was."""
    entries = index.entries
    return [
        place
        for place, (key, stamp) in enumerate(zip(listing.keys, listing.stamps))
        if stamp == _NO_STAMP or key not in entries or entries[key].stamp != stamp
    ]


def _embed(index, source, opened, settings, listing, stale, say) -> int:
    chosen = _Chosen(source, [listing.numbers[place] for place in stale])
    job = _Job(index, chosen, opened, settings, [listing.keys[p] for p in stale], say)
    say(f"indexing {len(stale):,} videos")
    with Reading(
        chosen,
        settings.rule,
        opened.clip,
        limits=settings.limits,
        threads=settings.threads,
        ahead=2 * max(settings.batch_size, settings.threads),
    ) as reading:
        for item in reading:
            job.take(item, listing.stamps[stale[item.video]])
        job.save()
    return job.clips


class _Chosen(Source):
    """Some examples of a source."""

    def __init__(self, source: Source, numbers: Sequence[int]):
        self.name, self.media, self._source, self._numbers = (
            source.name,
            source.media,
            source,
            numbers,
        )

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Example:
        return self._source[self._numbers[index]]

    def identify(self, index: int) -> str:
        return self._source.identify(self._numbers[index])

    def fingerprint(self) -> str:
        return self._source.fingerprint()


class _Job:
    """Fills batches with clips, runs them, and writes whole videos into the index."""

    def __init__(self, index, source, opened, settings, keys, say):
        self._index, self._source, self._opened, self._keys = index, source, opened, keys
        self._settings, self._say = settings, say
        self._embed = Embedder(opened, settings.by, settings.batch_size)
        self._waiting: list[tuple[Item, Mapping[str, Any]]] = []  # clips of a batch to be
        self._made: list[tuple[list[Item], Any, Any]] = []
        self._entries: dict[str, Entry] = {}  # of videos begun since the last part
        self._numbers: dict[str, int] = {}
        self._video = -1
        self.clips = 0
        self._began = self._saved = self._told = time.monotonic()

    def take(self, item: Item, stamp: str) -> None:
        """The next clip, or why there is none."""
        if item.video != self._video:
            if time.monotonic() - self._saved > self._settings.save_seconds:
                self.save()
            self._video = item.video
            self._tell()
        key = self._keys[item.video]
        entry = self._entries.setdefault(key, Entry(stamp))
        self._numbers.setdefault(key, len(self._numbers))
        if item.bad is not None:
            about = dict(bad=item.bad.reason, detail=str(item.bad)[:300])
            self._entries[key] = dataclasses.replace(entry, lost=entry.lost + 1, **about)
            return
        heard = self._sound(item)
        if self._settings.by != "video" and not heard["audio_frames"]:
            self._entries[key] = dataclasses.replace(entry, bad=entry.bad or NO_SOUND)
            return
        self._waiting.append((item, heard))
        if len(self._waiting) == self._settings.batch_size:
            self._run()

    def _sound(self, item: Item) -> Mapping[str, Any]:
        if self._settings.by == "video":
            return {}
        video = self._source[item.video]["video"]
        return sound_of(self._opened, video, item.window, self._settings.limits)

    def _run(self) -> None:
        items, self._waiting = self._waiting, []
        clips = np.stack([item.clip for item, _ in items])
        sound = {name: np.stack([heard[name] for _, heard in items]) for name in items[0][1]}
        made = self._embed({"video": clips, **sound})
        self._made.append(([dataclasses.replace(i, clip=None) for i, _ in items], made))
        self.clips += len(items)

    def save(self) -> None:
        """Writes what there is, all of whole videos, as one part."""
        if self._waiting:
            self._run()
        if self._entries:
            self._write()
        self._saved = time.monotonic()

    def _write(self) -> None:
        items = [item for some, _ in self._made for item in some]
        rows = [np.asarray(made)[: len(some)] for some, made in self._made]
        if not all(np.isfinite(x).all() for x in rows):
            raise UserError(
                f"Embeddings must be finite; {self._opened.name} gives others. Give another checkpoint, or "
                "--dtype=float32."
            )
        owner = [self._numbers[self._keys[item.video]] for item in items]
        arrays = dict(
            embedding=np.concatenate(rows) if rows else np.zeros((0, 1)),
            video=np.array(owner, np.int64),
            window=np.array([item.number for item in items], np.int64),
            start=np.array([item.window.start for item in items], np.float64),
            end=np.array([item.window.end for item in items], np.float64),
        )
        real = {self._keys[item.video] for item in items}
        entries = {
            key: dataclasses.replace(entry, bad="", detail="") if key in real else entry
            for key, entry in self._entries.items()
        }
        self._index.add(entries, arrays)
        self._made, self._entries, self._numbers = [], {}, {}

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < TELL_SECONDS:
            return
        self._told = now
        done, total = self._video, len(self._keys)
        left = (now - self._began) / max(done, 1) * (total - done)
        rate = self.clips / (now - self._began)
        self._say(
            f"  {done:,} of {total:,} videos, {self.clips:,} clips, {rate:.1f} clips/s, "
            f"about {duration(left)} left"
        )


def sound_of(opened: Opened, video: str | bytes, window, limits: Limits) -> dict[str, Any]:
    """'audio' [F, mels] of a window, and 'audio_frames', 0 where there is none."""
    part = dict(start=window.start, end=window.end, times=window.times, limits=limits)
    try:
        bank, frames = load_audio(video, opened.audio, None, **part)
    except BadVideo:
        bank, frames = np.zeros(opened.audio.shape, np.float32), 0
    return {"audio": bank, "audio_frames": np.int32(frames)}


class Embedder:
    """A jitted tower for clips that come in any number up to `rows`."""

    def __init__(self, opened: Opened, by: str, rows: int):
        self._opened, self._rows = opened, rows
        tower = getattr(opened.towers, by)
        self._run = jax.jit(lambda params, batch: tower(params, batch)["embedding"])

    def __call__(self, host: Mapping[str, np.ndarray]) -> jax.Array:
        """Embeddings [rows, P]; those behind the given rows mean nothing."""
        mesh = self._opened.mesh
        batch = sharding.global_batch({k: fill(x, self._rows) for k, x in host.items()}, mesh)
        with sharding.use(mesh):
            return self._run(self._opened.params, batch)


def fill(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with rows of zeros behind it."""
    return np.pad(x, [(0, rows - len(x)), *[(0, 0)] * (x.ndim - 1)])


def bad_videos(index: Index, listing: Listing) -> Iterator[tuple[str, Entry]]:
    """Key and entry of the videos that cannot be found."""
    for key in listing.keys:
        if key in index.entries and index.entries[key].bad:
            yield key, index.entries[key]
