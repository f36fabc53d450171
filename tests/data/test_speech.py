"""Spoken words with their times: read from lists and subtitle files, and cut to the span of a clip."""

import json
import os
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_videos import write_videos

from invideo_jax.data import synthetic
from invideo_jax.data.decode import BadVideo
from invideo_jax.data.manifest import ManifestError, read_manifest
from invideo_jax.data.sources import open_source
from invideo_jax.data.sources.base import make_example
from invideo_jax.data.speech import SpeechError, parse_speech, read_subtitles, speech_in

PIECES = [[0.5, 1.0, "hey you"], [1.5, 2.25, "look"]]
SRT = """\ufeff1
00:00:00,500 --> 00:00:01,000
hey
<i>you</i>

2
00:00:01,500 --> 00:00:02,250 X1:0 X2:9
{\\an8}look
"""
VTT = """WEBVTT - a title

NOTE
not spoken --

STYLE
::cue { color: red }

first cue
00:00.500 --> 00:01.000 align:start
hey <c.loud>you</c>

00:00:01.500 --> 00:00:02.250
look
"""


@pytest.mark.parametrize(
    "value",
    [
        PIECES,
        PIECES[::-1],
        [tuple(p) for p in PIECES],
        json.dumps(PIECES),
        [{"start": a, "end": str(b), "text": t} for a, b, t in PIECES],
        {"segments": [{"start": a, "end": b, "text": f" {t}\n", "id": 1} for a, b, t in PIECES]},
        {"chunks": [{"timestamp": [a, b], "text": t} for a, b, t in PIECES]},
        {"start": [0.5, 1.5], "end": [1.0, 2.25], "text": ["hey you", "look"]},
        [*PIECES, [3, 4, " \x00"]],
    ],
)
def test_forms_of_speech_give_the_same_pieces(value):
    assert parse_speech(value) == PIECES


def test_words_with_times_stand_for_their_sentence():
    words = [{"word": " hey", "start": 0.5, "end": 0.7}, {"word": " you", "start": 0.8, "end": 1}]
    said = {"start": 0.5, "end": 1.0, "text": "hey you", "words": words}
    assert parse_speech([said]) == [[0.5, 0.7, "hey"], [0.8, 1.0, "you"]]
    del words[1]["end"]  # a recogniser could not place it: the sentence is what is known
    assert parse_speech([said]) == [[0.5, 1.0, "hey you"]]


@pytest.mark.parametrize(
    "value,words",
    [
        (7, "must be pieces with times"),
        ("just words", "belong in `transcript`"),
        ([7], r"must be \[start, end, text\]"),
        ([[0, 1]], r"must be \[start, end, text\]"),
        ([[0, 1, None]], "must have a text"),
        ([{"start": 0, "end": 1}], "must have a text"),
        ([["x", 1, "a"]], "zero or more seconds, got 'x'"),
        ([[-1, 1, "a"]], "zero or more seconds, got -1"),
        ([[0, float("nan"), "a"]], "zero or more seconds, got nan"),
        ([[0, None, "a"]], "zero or more seconds, got None"),
        ([[True, 2, "a"]], "zero or more seconds, got True"),
        ([[2, 1, "a"]], "must end after its start"),
        (["text"], "must be"),
    ],
)
def test_what_is_no_speech_is_said(value, words):
    with pytest.raises(SpeechError, match=words):
        parse_speech(value)


@pytest.mark.parametrize(
    "text,name",
    [
        (SRT, "a.srt"),
        (SRT.replace("\n", "\r\n"), "a.srt"),
        (SRT.replace("\n\n2\n", "\n2\n"), "a.srt"),
        (VTT, "a.vtt"),
    ],
)
def test_subtitle_files(tmp_path, text, name):
    (tmp_path / name).write_bytes(text.encode())
    assert read_subtitles(tmp_path / name) == PIECES
    (tmp_path / name).write_bytes(text.lstrip("\ufeff").encode("utf-16"))
    assert read_subtitles(tmp_path / name) == PIECES


def test_subtitles_of_hours_and_odd_bytes(tmp_path):
    path = tmp_path / "a.srt"
    path.write_bytes(
        b"1\n01:02:03,5 --> 01:02:04,25\ncaf\xe9 \x00\n\n2\n00:00:09,0 --> 00:00:08,0\nback\n"
    )
    assert read_subtitles(path) == [[3723.5, 3724.25, "caf\ufffd"]]
    path.write_text("words\nwithout times\n")
    with pytest.raises(SpeechError, match="must hold cues"):
        read_subtitles(path)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=300).filter(lambda b: b[:2] not in (b"\xff\xfe", b"\xfe\xff")))
def test_a_cue_is_found_behind_any_bytes(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.srt"
    path.write_bytes(data + b"\n00:00:01,0 --> 00:00:02,0\nend\n")
    assert any(piece[2].endswith("end") for piece in read_subtitles(path))


def test_words_within_a_span():
    words = tuple((i / 2, i / 2 + 0.4, f"w{i}") for i in range(8))
    example = make_example(id="x", speech=words)
    assert speech_in(example, 0.0, 4.0) == " ".join(f"w{i}" for i in range(8))
    assert speech_in(example, 1.0, 2.0) == "w2 w3"
    assert speech_in(example, 1.1, 1.9) == "w2 w3", "the middle of a word lies within"
    assert speech_in(example, 1.25, 1.6) == ""
    assert speech_in(example, 50.0, 60.0) == ""
    split = [speech_in(example, t, t + 0.3) for t in (0.0, 0.3, 0.6, 0.9, 1.2)]
    assert " ".join(split).split() == ["w0", "w1", "w2"], "spans side by side: each word once"


def test_longer_pieces_count_where_they_overlap():
    example = make_example(id="x", speech=((0.0, 2.0, "a b"), (2.0, 4.0, "c d")))
    assert speech_in(example, 0.0, 2.0) == "a b"
    assert speech_in(example, 1.9, 2.1) == "a b c d"
    assert speech_in(example, 4.0, 9.0) == ""


def test_without_times_it_is_the_transcript():
    assert speech_in(make_example(id="x", transcript="hey you"), 3.0, 4.0) == "hey you"
    assert speech_in(make_example(id="x"), 0.0, 1.0) == ""
    assert make_example(id="x", speech=((0, 1, "hey"), (1, 2, "you")))["transcript"] == "hey you"
    assert make_example(id="x", transcript="so", speech=((0, 1, "hey"),))["transcript"] == "so"


# --- in lists ---


@pytest.fixture
def folder(tmp_path):
    write_videos(tmp_path / "v", 2)
    (tmp_path / "v" / "a.srt").write_text(SRT, encoding="utf-8")
    return tmp_path / "v"


def write(folder, rows, name="m.jsonl"):
    path = pathlib.Path(folder) / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_list_names_subtitles_beside_the_video(folder):
    rows = [{"path": "clip_000.mp4", "speech": "a.srt"}, {"path": "clip_001.mp4", "speech": PIECES}]
    source = open_source(write(folder, rows))
    assert (
        source[0]["speech"] == source[1]["speech"] == ((0.5, 1.0, "hey you"), (1.5, 2.25, "look"))
    )
    assert source[0]["transcript"] == source[1]["transcript"] == "hey you look"


def test_words_without_times_in_the_column_speech_are_a_transcript(folder):
    (folder / "m.csv").write_text('path,speech\nclip_000.mp4,"hey, you"\n')
    example = open_source(str(folder / "m.csv"))[0]
    assert (example["transcript"], example["speech"]) == ("hey, you", ())
    (folder / "m.csv").write_text('path,speech\nclip_000.mp4,"[[0, 1, ""hey, you""]]"\n')
    example = open_source(str(folder / "m.csv"))[0]
    assert example["speech"] == ((0.0, 1.0, "hey, you"),)


def test_bad_subtitles_are_a_bad_example_with_their_own_path(folder, tmp_path):
    (tmp_path / "secret.srt").write_text(SRT)
    (folder / "empty.vtt").write_text("WEBVTT\n")
    names = ["gone.srt", "../secret.srt", "empty.vtt", str(tmp_path / "secret.srt")]
    source = open_source(write(folder, [{"path": "clip_000.mp4", "speech": n} for n in names]))
    reasons = []
    for i in range(4):
        with pytest.raises(BadVideo) as error:
            source[i]
        reasons.append(error.value.reason)
        assert os.path.basename(names[i]) in error.value.path
    assert reasons == ["missing", "path_escape", "subtitles", "path_escape"]


def test_wrong_speech_names_its_line(folder):
    rows = [{"path": "clip_000.mp4"}, {"path": "clip_001.mp4", "speech": [[2, 1, "x"]]}]
    with pytest.raises(ManifestError, match="line 2: a piece of speech must end after its start"):
        read_manifest(write(folder, rows))


def test_the_built_in_dataset_has_times_of_every_word():
    row = synthetic.clip_row(synthetic.Settings(), 5)
    example = make_example(id="x", speech=tuple(map(tuple, row["speech"])))
    assert speech_in(example, 0, 2) == row["transcript"] == example["transcript"]
    middle = row["speech"][3]
    assert middle[2] in speech_in(example, middle[0], middle[1])
    first, second = speech_in(example, 0, 1), speech_in(example, 1, 2)
    assert f"{first} {second}" == row["transcript"] and first and second
