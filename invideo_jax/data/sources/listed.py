"""The rows of a manifest, filtered once while opening, so that the order over them stays a pure function."""

import collections
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from invideo_jax.data.decode import BadVideo
from invideo_jax.data.list_files import media_of
from invideo_jax.data.manifest import read_manifest
from invideo_jax.data.sources.base import (
    ROOTS_OPTION,
    TEXTS,
    Example,
    Roots,
    Source,
    SourceError,
    check_sample,
    digest,
    existing_folder,
    find_split,
    make_example,
)
from invideo_jax.data.speech import Piece, SpeechError, read_subtitles
from invideo_jax.registry import nearest

_TEXTS = ("captions", "audio_captions", "audio_video_captions", "fused_captions")

Row = dict[str, Any]


class ManifestSource(Source):
    """The rows of a manifest that passed its filters, in the order of the file.

    Rows are kept as one block of JSON and an offset each: ten million of them are a few gigabytes, not tens, and
    workers receive the block, not the objects.
    """

    def __init__(self, name: str, rows: Sequence[Row], roots: Roots, classes: tuple[str, ...]):
        self.name, self.classes, self._roots = name, classes, roots
        self.media = _one_media(name, rows)
        coded = [json.dumps(row, separators=(",", ":")).encode() for row in rows]
        self._offsets = np.cumsum([0, *map(len, coded)], dtype=np.int64)
        self._block = b"".join(coded)
        # Of every value of every row: a corrected label or another cut is another dataset.
        self._fingerprint = digest([self._offsets.tobytes(), self._block, *classes])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def row(self, index: int) -> Row:
        """The row as read: path, start, end, ...; no file is touched."""
        if not 0 <= index < len(self):
            raise IndexError(f"row must be in [0, {len(self)}); got {index}")
        return json.loads(self._block[self._offsets[index] : self._offsets[index + 1]])

    def __getitem__(self, index: int) -> Example:
        row = self.row(index)
        full = self._roots.check(row["path"])
        label = row.get("label", -1)
        return make_example(
            id=row["id"],
            media=media_of(full) or "video",
            video=full,
            path=full,
            start=row.get("start"),
            end=row.get("end"),
            **self._said(row),
            label=label,
            label_name=self.classes[label] if self.classes and label >= 0 else "",
            split=row.get("split", ""),
            flip=row.get("flip", True),
        )

    def texts(self, index: int) -> dict[str, Any]:
        """What the row says of its example; of files only one of subtitles is read."""
        said = make_example(**self._said(self.row(index)))
        return {key: said[key] for key in TEXTS}

    def _said(self, row: Row) -> dict[str, Any]:
        return {field: tuple(row.get(field, ())) for field in _TEXTS} | dict(
            transcript=row.get("transcript", ""), speech=self._speech(row.get("speech", ()))
        )

    def _speech(self, value: list | str) -> tuple[Piece, ...]:
        """Pieces of a row, read from its subtitle file where it names one."""
        if isinstance(value, str):
            full = self._roots.check(value)
            try:
                value = read_subtitles(full)
            except (OSError, SpeechError) as error:
                raise BadVideo("subtitles", full, str(error)) from None
        return tuple(map(tuple, value))

    def identify(self, index: int) -> str:
        return self.row(index)["id"]

    def keys(self) -> Iterator[str]:
        for row in map(self.row, range(len(self))):
            begin, end = float(row.get("start", 0)), row.get("end", "")
            yield f"{self._roots.locate(row['path'])[0]}#{begin}-{end}"

    def fingerprint(self) -> str:
        return self._fingerprint


def open_source(
    path: str,
    *,
    split: str | None = None,
    roots: Sequence[str] = (),
    roots_option: str = ROOTS_OPTION,
    min_seconds: float | None = None,
    max_seconds: float | None = None,
    labelled: bool = False,
    captioned: bool = False,
    classes: Sequence[str] = (),
) -> ManifestSource:
    """A manifest, filtered.

    Rows that a scan marked with `error` are left out, and each filter says in `notes` how many rows it took.

    Args:
        split: keep rows of this split; a manifest without the column serves whole.
        roots: folders besides the manifest's own that its paths may lie in.
        roots_option: how the user sets `roots`, for messages.
        min_seconds, max_seconds: keep clips this long (end - start, or the column `seconds`).
        labelled: keep rows with a label. captioned: keep rows with a caption of any kind.
        classes: class names by number, where labels are names; default: the names of the whole list, sorted, so that
            every split of one manifest counts alike. Give the training source's `classes` for a separate list.

    Raises:
        SourceError, ManifestError: nothing there or nothing left; the message says which filter took the rows.
    """
    rows = read_manifest(path)
    if not rows:
        raise SourceError(
            f"A manifest must hold at least one row; {os.path.abspath(path)} holds 0."
        )
    located = Roots(pathlib.Path(path).absolute().parent, roots, roots_option)
    names = _number_labels(path, rows, tuple(classes))
    notes = _name_rows(path, rows)
    for what, keep in _filters(
        path, rows, split, min_seconds, max_seconds, labelled, captioned, notes
    ):
        left = [row for row in rows if keep(row)]
        if len(left) < len(rows):
            notes.append(f"{path}: {len(rows) - len(left)} of {len(rows)} rows left out: {what}")
        if not left:
            errors = collections.Counter(row.get("error") for row in rows).most_common(3)
            raise SourceError(
                f"A source must keep at least one row; the filter '{what}' left 0 of {len(rows)} rows of {path}."
                + (f" Errors of the scan: {errors}." if "scan" in what else " Loosen it.")
            )
        rows = left
    paths = [row["path"] for row in rows]
    outside = located.outside(paths)
    if outside:
        raise located.refusal(path, outside, len(rows))
    check_sample(path, located, paths)
    kept = ("id", "path", "start", "end", *_TEXTS, "label", "split", "transcript", "speech", "flip")
    source = ManifestSource(
        path, [{k: row[k] for k in kept if k in row} for row in rows], located, names
    )
    source.notes = tuple(notes)
    return source


def _one_media(name: str, rows: Sequence[Row]) -> str:
    """What the files of all rows hold, by their names; of those without a known ending a video."""
    lines = {media_of(row["path"]) or "video": row["path"] for row in rows}
    if len(lines) > 1:
        named = ", ".join(f"{media} ({path})" for media, path in sorted(lines.items()))
        raise SourceError(
            f"All files of a list must be of one kind; {name} has {named}. Make a list of each, and join them: "
            "'videos.csv,0.5;images.csv,0.5'."
        )
    return next(iter(lines), "video")


def open_synthetic(folder: str, **options: Any) -> ManifestSource:
    """The manifest of the built-in dataset in `folder`."""
    command = f"python -m invideo_jax.data.synthetic --output={folder}"
    if not os.path.isdir(folder):
        raise SourceError(
            f"The built-in dataset must be made first; no folder {folder}. Run: {command}"
        )
    manifest = existing_folder(folder, "synthetic:") / "manifest.jsonl"
    if not manifest.is_file():
        raise SourceError(f"{folder} must hold manifest.jsonl, and doesn't. Run: {command}")
    if not options.get("classes"):
        labels = json.loads((manifest.parent / "dataset.json").read_text(encoding="utf-8"))[
            "labels"
        ]
        options["classes"] = tuple(labels)
    return open_source(str(manifest), **options)


def _number_labels(path: str, rows: list[Row], classes: tuple[str, ...]) -> tuple[str, ...]:
    """Turns every label into a class number in place; returns the class names, () where labels were numbers."""
    given = {row["label"] for row in rows if row.get("label") not in (None, -1)}
    if all(isinstance(label, int) for label in given):
        low, high = min(given, default=0), max(given, default=0)
        if low < 0 or (classes and high >= len(classes)) or high >= 2**31:
            limit = f" and below {len(classes)}, the number of classes" if classes else ""
            wrong = next(r for r in rows if r.get("label") in (low if low < 0 else high,))
            raise SourceError(
                f"A class number must be 0 or more (-1: unknown){limit}; got label={wrong['label']} "
                f"in line {wrong['line']} of {path}."
            )
        return classes
    classes = classes or tuple(sorted(map(str, given)))
    numbers = {name: number for number, name in enumerate(classes)}
    for row in rows:
        label = row.get("label")
        if label in (None, -1):
            continue
        if str(label) not in numbers:
            raise SourceError(
                f'A label must be one of the {len(classes)} classes; got "{label}" in line {row["line"]} '
                f"of {path}.{nearest(str(label), classes)}"
            )
        row["label"] = numbers[str(label)]
    return classes


def _name_rows(path: str, rows: list[Row]) -> list[str]:
    """Gives each row an id; returns a note when ids repeat."""
    for row in rows:
        if "id" not in row:
            part = (
                f"#{row.get('start', 0):g}-{row.get('end', '')}"
                if {"start", "end"} & row.keys()
                else ""
            )
            row["id"] = row["path"] + part
    repeated = {k: n for k, n in collections.Counter(row["id"] for row in rows).items() if n > 1}
    if not repeated:
        return []
    first = next(iter(repeated))
    return [
        f"{path}: {len(repeated)} ids stand in more than one row (first: {first}, {repeated[first]} times)"
    ]


def _filters(
    path, rows, split, min_seconds, max_seconds, labelled, captioned, notes
) -> list[tuple[str, Callable[[Row], bool]]]:
    """(what it asks for, test of a row) for each filter in use."""
    filters: list[tuple[str, Callable[[Row], bool]]] = [
        ("a scan marked the file as unusable", lambda row: "error" not in row)
    ]
    if split is not None:
        known = {row["split"] for row in rows if "split" in row}
        if not known:
            if split != "train":
                notes.append(f"{path} has no column split: all its rows serve as {split}")
        else:
            wanted = find_split(path, split, known)
            filters.append((f"split {wanted}", lambda row: row.get("split") == wanted))
    if min_seconds is not None or max_seconds is not None:
        if all(_length(row) is None for row in rows):
            raise SourceError(
                f"Filtering by length needs a column `seconds` (or start and end); {path} has none. "
                f"Run: python -m invideo_jax.data.scan {path} --output=scanned.jsonl"
            )
        low, high = min_seconds or 0.0, float("inf") if max_seconds is None else max_seconds
        filters.append(
            (f"length in [{low:g}, {high:g}] s", lambda row: low <= (_length(row) or -1.0) <= high)
        )
    if labelled:
        filters.append(("has a label", lambda row: row.get("label", -1) != -1))
    if captioned:
        filters.append(("has a caption", lambda row: any(map(row.get, _TEXTS))))
    return filters


def _length(row: Row) -> float | None:
    end = row.get("end", row.get("seconds"))
    return None if end is None else end - row.get("start", 0.0)
