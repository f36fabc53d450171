"""Spoken words with their times: as manifests and subtitle files write them, and those within a span of a clip.

Speech is a sequence of pieces (start, end, text): seconds on the video's own clock, one word or some. Where a list gives the
times of single words (`words` of an object, as speech recognisers write them), the words are the pieces.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from invideo_jax.data.clean import clean_text
from invideo_jax.errors import UserError

Piece = tuple[float, float, str]

SUBTITLES = (".srt", ".vtt")
MAX_BYTES = 16 * 2**20  # of a subtitle file; a day of speech is less
_TEXT = ("text", "word", "words", "sentence", "caption")
_CLOCK = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{1,2}(?:[.,]\d+)?)")
_TIMING = re.compile(rf"\s*({_CLOCK.pattern})\s*-->\s*({_CLOCK.pattern})")
_TAGS = re.compile(r"<[^<>\n]*>|\{\\[^{}\n]*\}")


class SpeechError(UserError):
    """Speech that can't be read as pieces with times."""


def parse_speech(value: Any) -> list[list[Any]]:
    """Pieces of speech as a list or an object holds them.

    Args:
        value: a list of [start, end, text] or of objects with `start`, `end`, `text` and perhaps `words`; an object with one
            such list (`segments`), or with the lists `start`, `end`, `text`; or the JSON of it.

    Returns:
        [[start, end, text], ...] by start, without empty texts.

    Raises:
        SpeechError: anything else, or times that are none.
    """
    if isinstance(value, str | bytes):
        try:
            value = json.loads(value)
        except ValueError:
            value = None  # no JSON: the error below
    if isinstance(value, Mapping):
        columns = [value.get(key) for key in ("start", "end", "text")]
        if all(isinstance(c, list | tuple) and len(c) == len(columns[0]) for c in columns):
            value = list(zip(*columns))
        else:
            value = next((value[k] for k in ("segments", "chunks", "words") if k in value), None)
    if not isinstance(value, list | tuple):
        raise SpeechError(
            "speech must be pieces with times ([[start, end, text], ...] or objects with these keys) or the name of a "
            ".srt or .vtt file; words without times belong in `transcript`"
        )
    return sorted((piece for one in value for piece in _pieces(one)), key=lambda p: (p[0], p[1]))


def _pieces(value: Any) -> Iterable[list[Any]]:
    if isinstance(value, Mapping):
        words = value.get("words")
        if isinstance(words, list | tuple) and words and all(map(_timed, words)):
            for word in words:
                yield from _pieces(word)
            return
        start, end = value.get("start"), value.get("end")
        if "timestamp" in value and isinstance(value["timestamp"], list | tuple):
            start, end = (*value["timestamp"], None, None)[:2]
        text = next((value[key] for key in _TEXT if isinstance(value.get(key), str)), None)
    elif isinstance(value, list | tuple) and len(value) == 3:
        start, end, text = value
    else:
        raise SpeechError(
            f"a piece of speech must be [start, end, text] or an object with these keys, got {value!r:.80}"
        )
    if not isinstance(text, str):
        raise SpeechError(
            f"a piece of speech must have a text, got {value!r:.80}; words without times belong in `transcript`"
        )
    start, end = _seconds(start), _seconds(end)
    if end < start:
        raise SpeechError(f"a piece of speech must end after its start, got {value!r:.80}")
    if cleaned := clean_text(text):
        yield [start, end, cleaned]


def _timed(value: Any) -> bool:
    """Whether it is a word with its times."""
    if isinstance(value, Mapping):
        return value.get("start") is not None and value.get("end") is not None
    return isinstance(value, list | tuple)


def _seconds(value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise SpeechError(
            f"a time of speech must be zero or more seconds, got {value!r:.40}"
        ) from None
    return number


def is_plain(value: Any) -> bool:
    """Whether a value is words without times: a transcript."""
    return (
        isinstance(value, str)
        and not value.lstrip().startswith(("[", "{"))
        and not is_subtitles(value)
    )


def is_subtitles(value: Any) -> bool:
    """Whether a value is the name of a subtitle file."""
    return (
        isinstance(value, str)
        and value.lower().endswith(SUBTITLES)
        and not value.lstrip().startswith(("[", "{"))
    )


def read_subtitles(path: str | os.PathLike) -> list[list[Any]]:
    """Pieces of a .srt or .vtt file; tags, cue names, notes and styles are left out.

    Raises:
        OSError: not readable.
        SpeechError: no cue in it, or larger than a subtitle file can be.
    """
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise SpeechError(f"subtitles must be below {MAX_BYTES >> 20} MiB; got {size:,} bytes")
    with open(path, "rb") as file:
        raw = file.read(MAX_BYTES)
    utf16 = raw[:2] in (b"\xff\xfe", b"\xfe\xff")
    text = raw.decode("utf-16" if utf16 else "utf-8-sig", "replace")
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    pieces: list[list[Any]] = []
    times, words, cues = None, [], 0
    for line in [*lines, ""]:
        timing = _TIMING.match(line)
        if timing is not None:
            if times is not None and words and words[-1].strip().isdigit():
                words.pop()  # the next cue's number, where no empty line stands between
            pieces += _cue(times, words)
            times, words, cues = (_clock(timing[1]), _clock(timing[5])), [], cues + 1
        elif not line.strip():
            pieces += _cue(times, words)
            times, words = None, []
        elif times is not None:
            words.append(line)
    if not cues:
        raise SpeechError("subtitles must hold cues (00:00:01,000 --> 00:00:02,000); got none")
    return sorted(pieces, key=lambda p: (p[0], p[1]))


def _cue(times: tuple[float, float] | None, words: list[str]) -> list[list[Any]]:
    text = clean_text(_TAGS.sub("", " ".join(words)))
    return [[*times, text]] if times is not None and text and times[1] >= times[0] else []


def _clock(text: str) -> float:
    hours, minutes, seconds = _CLOCK.fullmatch(text).groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds.replace(",", "."))


def speech_in(example: Mapping[str, Any], start: float, end: float) -> str:
    """What is spoken within a span of the video's clock.

    A single word counts where its middle lies; a longer piece, whose words have no times of their own, where any of it lies
    within.

    Args:
        example: with `speech` and `transcript`.
        start, end: seconds into the file.

    Returns:
        Words joined by spaces, '' for silence; the whole transcript of an example without times.
    """
    pieces = example.get("speech") or ()
    if not pieces:
        return example.get("transcript") or ""
    return " ".join(text for a, b, text in pieces if _within(a, b, text, start, end))


def _within(a: float, b: float, text: str, start: float, end: float) -> bool:
    if " " not in text or a == b:
        return start <= (a + b) / 2 < end
    return a < end and b > start


def join_speech(pieces: Iterable[Piece]) -> str:
    """All words of some pieces, as a transcript."""
    return clean_text(" ".join(text for _, _, text in pieces))
