"""Lists of videos: a folder, or a CSV / JSON / JSONL / plain-list manifest, read into rows of one shape.

A row is a dict with the keys of `FIELDS` that were given; `path` and `line` are always there:

    path        str, as written (relative paths are resolved by the source, not here)
    start, end  seconds into the file, floats; absent: the whole file
    captions, audio_captions, audio_video_captions, fused_captions
                lists of str, cleaned and non-empty: what is seen, heard, both, all in one sentence
    label       int (class number) or str (class name); absent: unknown
    split       str; `val`, `valid`, `dev` and `eval` are read as `validation`
    transcript  str; id: str
    speech      spoken pieces with times, [[start, end, text], ...], or the name of a .srt or .vtt file
    flip        bool: False where mirroring the picture changes the meaning
    seconds     length of the file (a scan writes it)
    error       why a scan found the file unusable
    line        where the row stands in its file, for messages

InternVideo's lists are read too: `video`, `image` or `audio` with `caption`, a text, a list, or an object by kind (A, V, S, AV,
AVS); `video_start_frame` and `video_end_frame` where a column `fps` says how long a frame is.
"""

import json
import math
import os
import pathlib
import re
from typing import Any

from invideo_jax.data.clean import clean_text
from invideo_jax.data.list_files import (
    COLUMNS,
    FIELDS,
    MANIFEST_SUFFIXES,
    VIDEO_SUFFIXES,
    ManifestError,
    media_of,
    raw_rows,
)
from invideo_jax.data.speech import SpeechError, is_plain, is_subtitles, parse_speech

__all__ = [
    "FIELDS",
    "MANIFEST_SUFFIXES",
    "VIDEO_SUFFIXES",
    "ManifestError",
    "list_videos",
    "read_manifest",
    "split_name",
]

_SHOWN_ERRORS = 10
_KINDS = {  # letters of a caption's kind in InternVideo's lists -> field
    "V": "captions",
    "A": "audio_captions",
    "AV": "audio_video_captions",
    "AVS": "fused_captions",
    "S": "transcript",
}
_VALIDATION = ("val", "valid", "dev", "eval")  # other names of the split `validation`


def list_videos(folder: str | os.PathLike, media: str = "video") -> list[str]:
    """Video files below `folder`, found by extension.

    Hidden files and folders are left out; links to folders are followed, each folder once.

    Args:
        media: what to find: 'video', 'image', 'audio'.

    Returns:
        Paths relative to `folder` with '/', sorted by their characters (the same on every host).

    Raises:
        ManifestError: a folder that cannot be read: its videos would be left out without a word.
    """
    folder = os.fspath(folder)
    found, seen = [], set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        status = os.stat(parent)
        place = (status.st_dev, status.st_ino)
        if place in seen:  # a link back to a folder above, or a second link
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            if not name.startswith(".") and media_of(name) == media:
                relative = os.path.relpath(os.path.join(parent, name), folder)
                found.append(relative.replace(os.sep, "/"))
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise ManifestError(
        f"Every folder below a folder of videos must be readable; got {error.filename} "
        f"({error.strerror}). Allow reading it, or move it away."
    ) from error


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
    for line, raw in raw_rows(path, suffix):
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


def split_name(value: Any) -> str:
    """A split as written -> its name here; the usual short names of `validation` are that split."""
    name = clean_text(value)
    return "validation" if name.lower() in _VALIDATION else name


# ---------------------------------------------------------------- raw row to row


def _normalise(raw: dict[str, Any], line: int) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for name, value in _by_kind(raw).items():
        field = COLUMNS.get(str(name).strip().lower())
        if field and value is not None and value != "" and not _is_nan(value):
            aliases = FIELDS[field]
            rank = aliases.index(str(name).strip().lower())
            if field not in given or rank < given[field][0]:
                given[field] = (rank, value)
    if "speech" in given and is_plain(given["speech"][1]):  # words without times
        given.setdefault("transcript", given.pop("speech"))
    row = {field: _PARSE[field](value) for field, (_, value) in given.items()}
    if "path" not in row:
        raise ManifestError("no path in this row")
    row |= _times_of_frames(raw)
    if row.get("end", math.inf) <= row.get("start", 0.0):
        raise ManifestError(
            f"end must be after start; got start={row.get('start', 0.0)}, end={row['end']}"
        )
    row["line"] = line
    return {key: value for key, value in row.items() if value not in ("", [])}


def _by_kind(raw: dict[str, Any]) -> dict[str, Any]:
    """The row with `caption: {"V": ..., "A": ...}` spread over the columns of each kind."""
    name = next((n for n in raw if COLUMNS.get(str(n).strip().lower()) == "captions"), None)
    if name is None or not isinstance(raw[name], dict):
        return raw
    row = {key: value for key, value in raw.items() if key != name}
    for letters, value in raw[name].items():
        field = _KINDS.get(str(letters).upper())
        if field is None:
            raise ManifestError(
                f"captions by kind must be named {', '.join(_KINDS)}; got {letters!r}"
            )
        row.setdefault(
            field, " ".join(map(clean_text, value)) if _is_speech(field, value) else value
        )
    return row


def _is_speech(field: str, value: Any) -> bool:
    return field == "transcript" and isinstance(value, list)


def _times_of_frames(raw: dict[str, Any]) -> dict[str, float]:
    """start and end of a row that gives them in frames."""
    columns = {"start": "video_start_frame", "end": "video_end_frame"}
    frames = {field: raw[c] for field, c in columns.items() if raw.get(c) not in (None, "")}
    if not frames:
        return {}
    fps = raw.get("fps")
    if not fps or _seconds(fps) == 0:
        raise ManifestError(
            "video_start_frame and video_end_frame need a column fps; give start and end in seconds instead"
        )
    return {field: _seconds(number) / _seconds(fps) for field, number in frames.items()}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _path(value: Any) -> str:
    if not isinstance(value, str) or "\x00" in value:
        raise ManifestError(f"path must be text, got {value!r}")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise ManifestError(
            f"path must be a local file; got {value[:200]!r}. Download it, or mount its storage"
        )
    return value


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


def _speech(value: Any) -> list[list[Any]] | str:
    if is_subtitles(value):
        return _path(value)
    try:
        return parse_speech(value)
    except SpeechError as error:
        raise ManifestError(str(error)) from None


_PARSE = {
    "path": _path,
    "start": _seconds,
    "end": _seconds,
    "seconds": _seconds,
    "captions": _captions,
    "audio_captions": _captions,
    "audio_video_captions": _captions,
    "fused_captions": _captions,
    "label": _label,
    "split": split_name,
    "transcript": clean_text,
    "speech": _speech,
    "flip": _flip,
    "id": clean_text,
    "error": clean_text,
}
