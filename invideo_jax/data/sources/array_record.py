"""Encoded clips in ArrayRecord shards, one msgpack record each."""

import glob
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import msgpack

from invideo_jax.data.clean import clean_text
from invideo_jax.data.decode import BadVideo
from invideo_jax.data.list_files import MEDIA
from invideo_jax.data.manifest import FIELDS
from invideo_jax.data.sources.base import (
    ROOTS_OPTION,
    Example,
    Source,
    SourceError,
    digest,
    find_split,
    make_example,
    renumber,
)
from invideo_jax.data.speech import Piece, SpeechError, is_plain, parse_speech

INDEX = "index.json"
SUFFIX = ".array_record"


class ArrayRecordSource(Source):
    """Records of several shards, in the order of the shard names.

    A record is a msgpack map with `video` (encoded bytes); the other keys are those of a manifest row.

    Args:
        name: for messages.
        paths: the shards.
        counts: records of each shard as its index says; None where there is no index.
        own: class names by number, as the records have them.
        classes: class names by number, as they are wanted; default: as `own`.
        known: fingerprint from the index.
    """

    def __init__(self, name, paths: Sequence[str], counts=None, own=(), classes=(), known=""):
        from array_record.python import array_record_data_source  # 0.1 s; only where used

        self.name, self.classes = name, tuple(classes or own)
        self._numbers = renumber(name, own, classes)
        self._paths, self._known = list(paths), known
        try:
            # It opens its readers when first asked, in the process that asks, and pickles as paths.
            self._records = array_record_data_source.ArrayRecordDataSource(self._paths)
            self._size = len(self._records)
        except Exception as error:
            raise SourceError(
                f"Every shard must be a whole ArrayRecord file; {name} can't be opened: {error}. "
                "Copy or prepare it again."
            ) from error
        if counts is not None and sum(counts) != self._size:
            raise SourceError(
                f"Shards must hold what {INDEX} lists; {name} holds {self._size} records of {sum(counts)}."
            )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        where = self.identify(index)
        try:
            packed = self._records[index]
        except RuntimeError as error:  # the checksum of a chunk differs
            raise BadVideo("corrupt_record", where, str(error)[:300]) from error
        try:
            record = msgpack.unpackb(packed, unicode_errors="surrogateescape")
        except Exception as error:  # msgpack's errors share no base class
            raise BadVideo("corrupt_record", where, f"not msgpack: {error}") from error
        return from_record(record, where, self.classes, self._numbers)

    def fingerprint(self) -> str:
        files = [(os.path.basename(path), os.path.getsize(path)) for path in self._paths]
        return digest([self._known or self._size, *sum(files, ()), *self.classes])


def from_record(
    record: Any, where: str, classes: Sequence[str], numbers: Sequence[int] | None = None
) -> Example:
    """An example from a mapping with `video` bytes and a manifest row's keys.

    Args:
        classes: class names by number.
        numbers: the record's label -> number in `classes`; None where they are the same.

    Raises:
        BadVideo: no bytes under `video`, or a label outside the classes.
    """
    if not isinstance(record, dict) or not isinstance(record.get("video"), bytes):
        held = sorted(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise BadVideo("corrupt_record", where, f"no bytes under `video`; it holds {held}")
    get = lambda field: next((record[a] for a in FIELDS[field] if record.get(a) is not None), None)
    spoken, label = get("speech"), -1 if get("label") is None else get("label")
    if isinstance(label, str) and label in classes:
        label = classes.index(label)
    elif numbers is not None and isinstance(label, int) and 0 <= label < len(numbers):
        label = numbers[label]
    if isinstance(label, str) or (classes and label >= len(classes)):
        raise BadVideo(
            "corrupt_record", where, f"label {label!r} is none of {len(classes)} classes"
        )
    return make_example(
        id=str(record.get("id") or where),
        media=record["media"] if record.get("media") in MEDIA else "video",
        video=record["video"],
        path=where,
        start=record.get("start"),
        end=record.get("end"),
        **{f"{kind}captions": _texts(get(f"{kind}captions")) for kind in _KINDS},
        label=int(label),
        label_name=classes[label] if classes and label >= 0 else "",
        split=clean_text(get("split")),
        transcript=clean_text(get("transcript") or (spoken if is_plain(spoken) else None)),
        speech=() if not spoken or is_plain(spoken) else _speech(spoken, where),
        flip=bool(record.get("flip", True)),
    )


_KINDS = ("", "audio_", "audio_video_", "fused_")


def _texts(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(text for text in map(clean_text, values) if text)


def _speech(value: Any, where: str) -> tuple[Piece, ...]:
    try:
        return tuple(map(tuple, parse_speech(value)))
    except SpeechError as error:
        raise BadVideo("corrupt_record", where, str(error)) from None


def open_source(
    pattern: str,
    *,
    split: str | None = None,
    roots: Sequence[str] = (),
    roots_option: str = ROOTS_OPTION,
    classes: Sequence[str] = (),
) -> ArrayRecordSource:
    """Shards by a folder or a glob pattern; with an index beside them, `split` picks the shards of one split."""
    del roots, roots_option  # records hold bytes, no paths
    folder = pathlib.Path(pattern)
    paths = glob.glob(str(folder / ("*" + SUFFIX)) if folder.is_dir() else pattern)
    paths = sorted(path for path in paths if os.path.isfile(path) and not path.endswith(INDEX))
    if not paths:
        raise SourceError(
            f"A pattern of shards must match at least one file; got arrayrecord:{pattern}, 0 files "
            f"(working directory {os.getcwd()}). Shards are written by python -m invideo_jax.data.prepare."
        )
    index = _read_index(os.path.join(os.path.dirname(paths[0]), INDEX))
    notes = ()
    if index is None:
        if split not in (None, "train"):
            notes = (f"{pattern} has no {INDEX}: all its records serve as {split}",)
        source = ArrayRecordSource(pattern, paths, classes=classes)
    else:
        shards = {shard["file"]: shard for shard in index["shards"]}
        chosen = _choose(pattern, paths, shards, split)
        counts = [shards[os.path.basename(path)]["count"] for path in chosen]
        source = ArrayRecordSource(
            pattern, chosen, counts, index["classes"], classes, index["fingerprint"]
        )
        source.media = index.get("media", "video")
    source.notes = notes
    return source


def _read_index(path: str) -> dict[str, Any] | None:
    if not os.path.exists(path):
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def _choose(pattern: str, paths: list[str], shards: dict[str, Any], split: str | None) -> list[str]:
    """The matched shards that the index lists for `split`; all listed ones must be there for a folder."""
    names = {os.path.basename(path) for path in paths}
    strangers = sorted(names - shards.keys())
    missing = sorted(shards.keys() - names) if os.path.isdir(pattern) else []
    if strangers or missing:
        raise SourceError(
            f"The shards beside {INDEX} must be those it lists; in {pattern} {len(missing)} are missing "
            f"{missing[:3]} and {len(strangers)} are not listed {strangers[:3]}. Prepare it again."
        )
    known = {shards[name]["split"] for name in names}
    if split is not None and known != {""}:
        wanted = find_split(pattern, split, known)
        return [path for path in paths if shards[os.path.basename(path)]["split"] == wanted]
    return paths
