"""Lists of videos: a folder, or a CSV / JSON / JSONL / plain-list manifest, read into rows of one shape.

A row is a dict with the keys of `FIELDS` that were given; `path` and `line` are always there:

    path        str, as written (relative paths are resolved by the source, not here)
    start, end  seconds into the file, floats; absent: the whole file
    captions    list of str, cleaned and non-empty
    label       int (class number) or str (class name); absent: unknown
    split       str; transcript: str; id: str
    flip        bool: False where mirroring the picture changes the meaning
    seconds     length of the file (a scan writes it)
    error       why a scan found the file unusable
    line        where the row stands in its file, for messages
"""

import csv
import difflib
import json
import logging
import math
import os
import pathlib
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mkv .webm .mov .avi .mpg .mpeg .ts .m2ts .mts .3gp .3g2 .wmv .flv .ogv .mjpeg".split()
)
MANIFEST_SUFFIXES = frozenset({".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson"})

FIELDS = {  # field -> the column names that mean it, the first given one wins
    "path": ("path", "file", "video", "filename", "video_path", "file_path"),
    "start": ("start", "start_time", "start_seconds"),
    "end": ("end", "end_time", "end_seconds"),
    "captions": ("captions", "caption", "text"),
    "label": ("label", "class", "label_name"),
    "split": ("split", "subset"),
    "transcript": ("transcript", "speech"),
    "flip": ("flip",),
    "id": ("id",),
    "seconds": ("seconds", "duration"),
    "error": ("error",),
}
_COLUMNS = {alias: field for field, aliases in FIELDS.items() for alias in aliases}
MAX_TEXT = 20_000  # characters kept of one caption or transcript; longer is a mistake in the list
_SHOWN_ERRORS = 10


class ManifestError(UserError):
    """A manifest that can't be read as asked; the message says where and what to do."""


def list_videos(folder: str | os.PathLike) -> list[str]:
    """Video files below `folder`, found by extension.

    Hidden files and folders are left out; links to folders are followed, each folder once.

    Returns:
        Paths relative to `folder` with '/', sorted by their characters (the same on every host).
    """
    folder = os.fspath(folder)
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True):
        status = os.stat(parent)
        if (
            status.st_dev,
            status.st_ino,
        ) in seen:  # a link back to a folder above, or a second link
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and pathlib.PurePath(name).suffix.lower() in VIDEO_SUFFIXES:
                relative = os.path.relpath(os.path.join(parent, name), folder)
                found.append(relative.replace(os.sep, "/"))
    return sorted(found)


def read_manifest(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Reads a whole manifest; see the top of this file for the rows.

    Formats by extension: `.csv`, `.tsv` (with a header; or without one, `path` or `path,label`),
    `.txt` or `.csv` separated by spaces as VideoMAE's lists are (`path`, `path label`, `path 0 -1`),
    `.json` (a list of rows, or an object that holds one list), `.jsonl`.

    Raises:
        ManifestError: missing or unreadable file, no path column, broken rows (the first ten are
            named with their line numbers).
    """
    path = pathlib.Path(path)
    suffix = path.suffix.lower()
    if suffix not in MANIFEST_SUFFIXES:
        raise ManifestError(
            f"A manifest must end in one of {sorted(MANIFEST_SUFFIXES)}; got {path}. "
            "Rename it, or give a folder of videos."
        )
    rows, problems = [], []
    for line, raw in _raw_rows(path, suffix):
        try:
            if isinstance(raw, Exception):
                raise raw
            rows.append(_normalise(raw, line))
        except ManifestError as error:
            problems.append(f"  line {line}: {error}")
    if problems:
        more = len(problems) - _SHOWN_ERRORS
        raise ManifestError(
            f"Every row of a manifest must be readable; {len(problems)} of "
            f"{len(rows) + len(problems)} rows of {path} are not:\n"
            + "\n".join(problems[:_SHOWN_ERRORS])
            + (f"\n  and {more} more" if more > 0 else "")
            + "\nCorrect or delete these rows."
        )
    return rows


def clean_text(value: Any) -> str:
    """One caption or transcript as tidy text: NFC, no control or zero-width characters, one line.

    Lone surrogates (bytes that were not UTF-8) become U+FFFD; None and NaN become ''.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    text = str(value)[: 4 * MAX_TEXT].encode("utf-8", "replace").decode("utf-8", "replace")
    text = unicodedata.normalize("NFC", text)
    kept = (" " if c.isspace() else c for c in text if c.isspace() or _printable(c))
    return " ".join("".join(kept).split())[:MAX_TEXT]


def _printable(character: str) -> bool:
    # Joiners U+200C/U+200D carry meaning in Persian, Hindi and emoji; the other Cf are invisible.
    category = unicodedata.category(character)
    return category not in ("Cc", "Cf", "Cs") or character in "\u200c\u200d"


# ---------------------------------------------------------------- files to raw rows


def _raw_rows(path: pathlib.Path, suffix: str) -> Iterator[tuple[int, dict | ManifestError]]:
    """(line or item number from 1, dict of the file's own columns or the error of that line)."""
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
    if first and _is_video(cells[0]):
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _positional(_cells(line, "\t" if "\t" in first else ","))
    elif first and (match := _SPACED.match(first)) and _is_video(match[1]):
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
    r"\s*(.+?(?:" + "|".join(re.escape(s) for s in sorted(VIDEO_SUFFIXES)) + r"))(?=\s|$)(.*)",
    re.IGNORECASE,
)


def _is_video(name: str) -> bool:
    return pathlib.PurePath(name.strip()).suffix.lower() in VIDEO_SUFFIXES


def _cells(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))


def _header_delimiter(first: str) -> str | None:
    """The separator that makes the first line a header with a path column; None: no header."""
    for delimiter in (",", "\t", ";", " "):
        names = [cell.strip().lower() for cell in _cells(first, delimiter)] if first else []
        if any(name in FIELDS["path"] for name in names):
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
            yield number, {name: cell for name, cell in zip(names, cells) if cell.strip()}


def _positional(cells: list[str]) -> dict | ManifestError:
    """A row of a list without header: `path`, `path label`, or VideoMAE's `path 0 -1`."""
    cells = [cell.strip() for cell in cells]
    if not _is_video(cells[0]):
        return ManifestError(f"first cell must be a video file, got {cells[0]!r}")
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
        close = difflib.get_close_matches(name, list(_COLUMNS), n=1, cutoff=0.8)
        if name not in _COLUMNS and close and _COLUMNS[close[0]] not in map(_COLUMNS.get, lowered):
            log.warning('Column "%s" of a manifest is not used. Did you mean "%s"?', name, close[0])


# ---------------------------------------------------------------- raw row to row


def _normalise(raw: dict[str, Any], line: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in raw.items():
        field = _COLUMNS.get(str(name).strip().lower())
        if field and value is not None and value != "" and not _is_nan(value):
            aliases = FIELDS[field]
            rank = aliases.index(str(name).strip().lower())
            if field not in given or rank < given[field][0]:
                given[field] = (rank, value)
    row = {field: _PARSE[field](value) for field, (_, value) in given.items()}
    if "path" not in row:
        raise ManifestError("no path in this row")
    if row.get("end", math.inf) <= row.get("start", 0.0):
        raise ManifestError(
            f"end must be after start; got start={row.get('start', 0.0)}, end={row['end']}"
        )
    row["line"] = line
    return {key: value for key, value in row.items() if value not in ("", [])}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _path(value: Any) -> str:
    if not isinstance(value, str) or "\x00" in value:
        raise ManifestError(f"path must be text, got {value!r}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", value):
        raise ManifestError(
            f"path must be a local file; got {value[:200]!r}. Download it, or mount its storage"
        )
    return value.strip()


def _seconds(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ManifestError(f"a time must be a number of seconds, got {value!r}") from None
    if not math.isfinite(number) or number < 0:
        raise ManifestError(f"a time must be zero or more seconds, got {value!r}")
    return number


def _captions(value: Any) -> list[str]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            pass  # a caption that begins with a bracket
    values = value if isinstance(value, list) else [value]
    return [text for text in map(clean_text, values) if text]


def _label(value: Any) -> int | str:
    if isinstance(value, bool) or isinstance(value, list | dict):
        raise ManifestError(f"label must be a class number or a name, got {value!r}")
    if isinstance(value, float):
        if not value.is_integer():
            raise ManifestError(f"label must be a class number or a name, got {value!r}")
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d+\s*", value):
        return int(value)
    return value if isinstance(value, int) else clean_text(value)


def _flip(value: Any) -> bool:
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if str(value).strip().lower() not in known:
        raise ManifestError(f"flip must be true or false, got {value!r}")
    return known[str(value).strip().lower()]


_PARSE = {
    "path": _path,
    "start": _seconds,
    "end": _seconds,
    "seconds": _seconds,
    "captions": _captions,
    "label": _label,
    "split": clean_text,
    "transcript": clean_text,
    "flip": _flip,
    "id": clean_text,
    "error": clean_text,
}
