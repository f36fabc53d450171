"""Files of lists as raw rows: CSV, TSV, plain lists, JSON, JSON Lines; columns still named and filled as in the file."""

import csv
import difflib
import json
import logging
import os
import pathlib
import re
from collections.abc import Iterator

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mkv .webm .mov .avi .mpg .mpeg .ts .m2ts .mts .3gp .3g2 .wmv .flv .ogv".split()
)
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp".split())
AUDIO_SUFFIXES = frozenset(".wav .mp3 .flac .m4a .ogg .aac".split())
MEDIA = {"video": VIDEO_SUFFIXES, "image": IMAGE_SUFFIXES, "audio": AUDIO_SUFFIXES}
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson"})

FIELDS = {  # field -> the column names that mean it, the first given one wins
    "path": ("path", "file", "video", "filename", "video_path", "file_path", "image", "audio"),
    "start": ("start", "start_time", "start_seconds"),
    "end": ("end", "end_time", "end_seconds"),
    "captions": ("captions", "caption", "text"),
    "audio_captions": ("audio_captions", "audio_caption"),
    "audio_video_captions": ("audio_video_captions", "audio_video_caption"),
    "fused_captions": ("fused_captions", "fused_caption"),
    "label": ("label", "class", "label_name"),
    "split": ("split", "subset"),
    "transcript": ("transcript",),
    "speech": ("speech",),
    "flip": ("flip",),
    "id": ("id",),
    "seconds": ("seconds", "duration"),
    "error": ("error",),
}
COLUMNS = {alias: field for field, aliases in FIELDS.items() for alias in aliases}


class ManifestError(UserError):
    """A manifest that can't be read as asked; the message says where and what to do."""


def raw_rows(path: pathlib.Path, suffix: str) -> Iterator[tuple[int, dict | ManifestError]]:
    """(line or item number from 1, dict of the file's own columns or the error of that line).

    Raises:
        ManifestError: a file that cannot be read at all.
    """
    try:
        # utf-8-sig drops the byte-order mark of Windows editors; surrogateescape keeps the bytes of
        # file names that are not UTF-8, so that they can still be opened.
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise ManifestError(
            f"A manifest must be a readable file; got {path} ({error.strerror}; working directory "
            f"{os.getcwd()})." + _nearby(path)
        ) from error
    if "\x00" in text[:1000]:
        raise ManifestError(
            f"A manifest must be text in UTF-8; {path} holds zero bytes (UTF-16, or not text)."
        )
    if suffix in (".jsonl", ".ndjson"):
        yield from _jsonl(text)
    elif suffix == ".json":
        yield from _json(path, text)
    else:
        yield from _separated(path, text, suffix)


def _nearby(path: pathlib.Path) -> str:
    """' Did you mean ...' among the neighbours of a missing path."""
    try:
        names = [p.name for p in path.parent.iterdir() if not p.name.startswith(".")]
    except OSError:
        return f" Its folder {path.parent} doesn't exist either."
    return nearest(path.name, names[:1000]) if names else ""


def _jsonl(text: str) -> Iterator[tuple[int, dict | ManifestError]]:
    checked = False
    # Not splitlines(): U+2028 and its kin may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            row = ManifestError(f"not JSON ({error.msg} at column {error.colno})")
        if not isinstance(row, dict | ManifestError):
            row = ManifestError(f"must be a JSON object, got {type(row).__name__}")
        if not checked and isinstance(row, dict):
            _check_columns(list(row), "keys of the first row")
            checked = True
        yield number, row


def _json(path: pathlib.Path, text: str) -> Iterator[tuple[int, dict | ManifestError]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"{path} must be JSON; line {error.lineno}, column {error.colno}: {error.msg}."
            + (
                " One object a line is JSON Lines: name it .jsonl."
                if "Extra data" in error.msg
                else ""
            )
        ) from error
    if isinstance(rows, dict):
        lists = [key for key, value in rows.items() if isinstance(value, list)]
        if len(lists) != 1:
            raise ManifestError(
                f"{path} must hold a list of rows, or an object with exactly one list; "
                f"its lists: {lists}, its keys: {sorted(rows)[:20]}."
            )
        rows = rows[lists[0]]
    if not isinstance(rows, list):
        raise ManifestError(f"{path} must hold a list of rows; got {type(rows).__name__}.")
    for number, row in enumerate(rows, 1):
        if isinstance(row, str):
            row = {"path": row}
        if not isinstance(row, dict):
            row = ManifestError(f"must be an object or a path, got {type(row).__name__}")
        elif number == 1:
            _check_columns(list(row), "keys of the first row")
        yield number, row


def _separated(path, text: str, suffix: str) -> Iterator[tuple[int, dict | ManifestError]]:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    first = next((line for line in lines if line.strip()), "")
    delimiter = _header_delimiter(first)
    if delimiter is not None:
        yield from _with_header(lines, delimiter)
        return
    cells = _cells(first, "\t" if "\t" in first else ",")
    if first and media_of(cells[0].strip()):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _positional(_cells(line, "\t" if "\t" in first else ","))
    elif first and (match := _SPACED.match(first)) and media_of(match[1]):
        for number, line in enumerate(lines, 1):
            if line.strip():
                match = _SPACED.match(line.strip())
                yield (
                    number,
                    _positional([match[1], *match[2].split()])
                    if match
                    else ManifestError("no video file name (by extension) at its start"),
                )
    elif first:
        _check_columns(cells, f"columns of {path}")


_SPACED = re.compile(
    r"\s*(.+?(?:"
    + "|".join(re.escape(s) for s in sorted(frozenset.union(*MEDIA.values())))
    + r"))(?=\s|$)(.*)",
    re.IGNORECASE,
)


def media_of(name: str) -> str:
    """What a file's name says it holds: 'video', 'image' or 'audio'; '' for another ending."""
    suffix = pathlib.PurePath(name).suffix.lower()
    return next((media for media, suffixes in MEDIA.items() if suffix in suffixes), "")


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))


def _header_delimiter(first: str) -> str | None:
    """The separator that makes the first line a header with a path column; None: no header.

    `My video 1.mp4 0` is a row of a list: a line that names a video file is no header.
    """
    for delimiter in (",", "\t", ";", " "):
        names = [cell.strip().lower() for cell in _cells(first, delimiter)] if first else []
        if any(name in FIELDS["path"] for name in names) and not any(map(media_of, names)):
            return delimiter
    return None


def _with_header(lines: list[str], delimiter: str) -> Iterator[tuple[int, dict | ManifestError]]:
    csv.field_size_limit(1 << 26)  # the default of 128 kB stops at one long caption
    reader = csv.reader(
        (line + "\n" for line in lines), delimiter=delimiter, skipinitialspace=True, strict=True
    )
    names = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield (
                number,
                ManifestError(f"broken quoting ({error}); a quote opens here and never closes"),
            )
            return
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = [cell.strip() for cell in cells]
            _check_columns(names, "columns")
        elif len(cells) != len(names):
            yield (
                number,
                ManifestError(
                    f"{len(cells)} cells for {len(names)} columns; put text that holds "
                    f'"{delimiter}" in double quotes'
                ),
            )
        else:
            yield number, {name: cell.strip() for name, cell in zip(names, cells)}


def _positional(cells: list[str]) -> dict | ManifestError:
    """A row of a list without header: `path`, `path label`, or VideoMAE's `path 0 -1`."""
    cells = [cell.strip() for cell in cells]
    if not media_of(cells[0]):
        return ManifestError(
            f"first cell must be a file of video, image or sound, got {cells[0]!r}"
        )
    if len(cells) == 3 and cells[1:] == ["0", "-1"]:  # from the first frame to the last, no label
        cells = cells[:1]
    if len(cells) > 2:
        return ManifestError(
            f"{len(cells)} cells without a header; give `path` or `path label`, or a header line. "
            "Lists of frame folders (path, frames, label) aren't read"
        )
    return dict(zip(("path", "label"), cells))


def _check_columns(names: list[str], what: str) -> None:
    """An error when no column holds the path; a warning for a column that looks misspelt."""
    lowered = [str(name).strip().lower() for name in names]
    if not any(name in FIELDS["path"] for name in lowered):
        close = difflib.get_close_matches("path", lowered, n=1, cutoff=0.5) or [
            c
            for a in FIELDS["path"]
            for c in difflib.get_close_matches(a, lowered, n=1, cutoff=0.7)
        ]
        hint = f' Did you mean "{close[0]}" to be "path"?' if close else ""
        raise ManifestError(
            f"A manifest must have a column with the video's path, named one of "
            f"{', '.join(FIELDS['path'])}; {what}: {', '.join(map(str, names))[:500]}.{hint}"
        )
    for name in lowered:
        close = difflib.get_close_matches(name, list(COLUMNS), n=1, cutoff=0.8)
        if name not in COLUMNS and close and COLUMNS[close[0]] not in map(COLUMNS.get, lowered):
            log.warning('Column "%s" of a manifest is not used. Did you mean "%s"?', name, close[0])
