"""Manifests of every format give the same rows; what is wrong in one is said with its line and the fix."""

import json
import os

import pytest

from invideo_jax.data.clean import clean_text
from invideo_jax.data.manifest import ManifestError, list_videos, read_manifest

ROWS = [
    {"path": "a.mp4", "captions": ["one, two"], "label": 3, "split": "train", "line": 0},
    {"path": "b c.mp4", "start": 0.5, "end": 2.0, "flip": False, "line": 0},
]


def write(folder, name, text, encoding="utf-8"):
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def rows_of(path):
    return [row | {"line": 0} for row in read_manifest(path)]


HEADED = 'path,caption,label,split,start,end,flip\na.mp4,"one, two",3,train,,,\nb c.mp4,,,,0.5,2.0,false\n'
OBJECTS = [
    {"video": "a.mp4", "caption": "one, two", "label": "3", "split": "train"},
    {"file": "b c.mp4", "start": 0.5, "end": "2.0", "flip": False, "caption": None, "extra": [1]},
]


@pytest.mark.parametrize(
    "name,text",
    [
        ("m.csv", HEADED),
        ("m.csv", HEADED.replace("\n", "\r\n")),
        ("m.csv", "\ufeff" + HEADED),
        ("m.tsv", HEADED.replace(",", "\t").replace("one\t two", "one, two")),
        ("m.csv", HEADED.replace(",", ";").replace("one; two", "one, two")),
        ("m.csv", HEADED.replace("path,", "Video,").replace("a.mp4", "\na.mp4")),
        ("m.csv", HEADED.replace("a.mp4,", " a.mp4 ,").replace("b c.mp4,", "b c.mp4  ,")),
        ("m.jsonl", "\n".join(map(json.dumps, OBJECTS)) + "\n\n"),
        ("m.json", json.dumps(OBJECTS)),
        ("m.json", json.dumps({"version": 1, "annotations": OBJECTS})),
    ],
)
def test_formats_give_equal_rows(tmp_path, name, text):
    assert rows_of(write(tmp_path, name, text)) == ROWS


@pytest.mark.parametrize(
    "name,text",
    [
        ("l.csv", "x/a b.mp4 7\nc.mkv 0\n"),
        ("l.txt", "x/a b.mp4\t7\nc.mkv\t0\n"),
        ("l.csv", "x/a b.mp4,7\nc.mkv,0\n"),
        ("l.csv", '"x/a b.mp4",7\n\nc.mkv,0'),
        ("l.csv", ' "x/a b.mp4" , 7\n c.mkv,0 '),
    ],
)
def test_lists_without_header(tmp_path, name, text):
    assert rows_of(write(tmp_path, name, text)) == [
        {"path": "x/a b.mp4", "label": 7, "line": 0},
        {"path": "c.mkv", "label": 0, "line": 0},
    ]


def test_videomae_pretraining_list_has_no_label(tmp_path):
    assert rows_of(write(tmp_path, "l.csv", "k/a.mp4 0 -1\n")) == [{"path": "k/a.mp4", "line": 0}]


def test_a_column_name_within_a_file_name_makes_no_header(tmp_path):
    rows = rows_of(write(tmp_path, "l.txt", "My video 1.mp4 0\nMy video 2.mp4 1\n"))
    assert [(row["path"], row["label"]) for row in rows] == [
        ("My video 1.mp4", 0),
        ("My video 2.mp4", 1),
    ]


@pytest.mark.parametrize("name", ["talk:1.mp4", "C:x.mp4", " a .mp4", "a\nb.mp4", "e\u0301.mp4"])
def test_names_stay_as_they_are_in_json(tmp_path, name):
    assert read_manifest(write(tmp_path, "m.jsonl", json.dumps({"path": name})))[0]["path"] == name


@pytest.mark.parametrize("name", ["val", "valid", "dev", "Eval", "validation"])
def test_names_of_the_validation_split(tmp_path, name):
    row = read_manifest(write(tmp_path, "m.csv", f"path,split\na.mp4,{name}\n"))[0]
    assert row["split"] == "validation"


def test_lines_are_those_of_the_file(tmp_path):
    text = 'path,caption\n\na.mp4,"two\nlines"\nb.mp4,x\n'
    assert [row["line"] for row in read_manifest(write(tmp_path, "m.csv", text))] == [3, 5]
    assert read_manifest(write(tmp_path, "m.csv", text))[0]["captions"] == ["two lines"]


def test_captions_are_cleaned(tmp_path):
    texts = ["  a\x00b\u200b\u202e c\n", "", None, 5, float("nan"), "e\u0301", "[x] y"]
    path = write(tmp_path, "m.json", json.dumps([{"path": "a.mp4", "captions": texts}]))
    assert read_manifest(path)[0]["captions"] == ["ab c", "5", "\xe9", "[x] y"]
    assert clean_text("a\udcff") == "a\ufffd"
    assert len(clean_text("x" * 10**6)) == 20_000
    assert (
        "captions"
        not in read_manifest(write(tmp_path, "n.jsonl", '{"path": "a.mp4", "caption": ""}'))[0]
    )


def test_captions_of_every_kind(tmp_path):
    text = 'path,caption,audio_caption,audio_video_captions,fused_caption\na.mp4,s,h,"[""b"", ""c""]",\n'
    wanted = {"captions": ["s"], "audio_captions": ["h"], "audio_video_captions": ["b", "c"]}
    assert rows_of(write(tmp_path, "m.csv", text)) == [{"path": "a.mp4", "line": 0} | wanted]


def test_lists_of_internvideo(tmp_path):
    rows = [
        {"image": "a.jpg", "caption": ["one", "two"]},
        {
            "video": "b.mp4",
            "caption": {"V": "s", "A": ["h", ""], "AV": "b", "AVS": "f", "S": ["x", "y"]},
        },
        {"audio": "c.wav", "caption": "hum", "audio_caption": "a hum"},
        {"video": "d.mp4", "video_start_frame": 50, "video_end_frame": 75, "fps": 25},
        {"video": "e.mp4", "caption": {"s": None, "v": "s"}},
    ]
    assert rows_of(write(tmp_path, "m.json", json.dumps(rows))) == [
        {"path": "a.jpg", "captions": ["one", "two"], "line": 0},
        {
            "path": "b.mp4",
            "captions": ["s"],
            "audio_captions": ["h"],
            "audio_video_captions": ["b"],
            "fused_captions": ["f"],
            "transcript": "x y",
            "line": 0,
        },
        {"path": "c.wav", "captions": ["hum"], "audio_captions": ["a hum"], "line": 0},
        {"path": "d.mp4", "start": 2.0, "end": 3.0, "line": 0},
        {"path": "e.mp4", "captions": ["s"], "line": 0},
    ]


@pytest.mark.parametrize("name", ["x y.jpg", "x.WEBP", "x.flac", "x.m4a", "x.bmp"])
def test_lists_without_header_hold_images_and_sounds_too(tmp_path, name):
    for text in (f"{name} 3\n", f"{name},3\n"):
        assert rows_of(write(tmp_path, "l.csv", text)) == [{"path": name, "label": 3, "line": 0}]


def test_file_names_that_are_not_utf8_stay_openable(tmp_path):
    name = os.fsdecode(b"caf\xe9.mp4")
    (tmp_path / "m.txt").write_bytes(b"caf\xe9.mp4 1\n")
    assert read_manifest(tmp_path / "m.txt")[0]["path"] == name


@pytest.mark.parametrize(
    "name,text,words",
    [
        ("m.jsonl", '{"path": "a.mp4"}\n{"path": \n', ["1 of 2", "line 2", "not JSON"]),
        ("m.jsonl", '{"path": "a.mp4"}\n[1]\n', ["line 2", "JSON object, got list"]),
        ("m.csv", "path,label\na.mp4,1,2\n", ["line 2", "3 cells for 2 columns", "double quotes"]),
        ("m.csv", 'path,caption\na.mp4,"x\n', ["line 2", "quote"]),
        ("m.csv", "pth,label\na.mp4,1\n", ["columns", "pth, label", 'Did you mean "pth"']),
        ("m.jsonl", '{"vidio": "a.mp4"}\n', ["vidio", 'Did you mean "vidio"']),
        ("m.csv", "path,start\na.mp4,1:30\n", ["line 2", "number of seconds", "1:30"]),
        ("m.csv", "path,start,end\na.mp4,3,2\n", ["end must be after start", "start=3.0, end=2.0"]),
        ("m.csv", "path,end\na.mp4,inf\n", ["zero or more seconds"]),
        ("m.csv", "path,flip\na.mp4,maybe\n", ["true or false", "maybe"]),
        ("m.json", '[{"path": "a.mp4", "label": 0.5}]', ["class number or a name", "0.5"]),
        ("m.json", '[{"path": 3}]', ["path must be text"]),
        ("m.json", '{"path": "a.mp4"}', ["exactly one list"]),
        ("m.json", '{"path": "a.mp4"}\n{"path": "b.mp4"}', ["Extra data", ".jsonl"]),
        ("m.jsonl", '{"path": "https://x.org/a.mp4"}', ["must be a local file", "Download"]),
        ("m.jsonl", '{"path": "s3://x/a.mp4"}', ["must be a local file", "mount"]),
        ("m.json", '[{"path": "a.mp4", "caption": {"X": "a"}}]', ["named V, A, AV, AVS, S", "'X'"]),
        (
            "m.json",
            '[{"path": "a.mp4", "video_end_frame": 9}]',
            ["need a column fps", "in seconds"],
        ),
        ("m.json", '[{"path": "a.mp4", "video_start_frame": 1, "fps": 0}]', ["need a column fps"]),
        ("m.json", '[{"path": "a.mp4", "speech": 5}]', ["pieces with times", "transcript"]),
        ("m.json", '[{"path": "a.mp4", "speech": "http://x/a.srt"}]', ["must be a local file"]),
        ("m.txt", "a.mp4 30 5\n", ["3 cells", "frame folders"]),
        ("m.txt", "a.mp4 1\nnothing\n", ["line 2", "no video file name"]),
        ("m.csv", "p\x00a\x00t\x00h\x00", ["UTF-8"]),
        ("m.parquet", "x", ["must end in one of"]),
    ],
)
def test_errors_name_place_and_fix(tmp_path, name, text, words):
    with pytest.raises(ManifestError) as error:
        read_manifest(write(tmp_path, name, text))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_first_ten_broken_rows_are_named(tmp_path):
    path = write(tmp_path, "m.jsonl", '{"path": "a.mp4"}\n' + "x\n" * 12)
    with pytest.raises(ManifestError, match="12 of 13 rows") as error:
        read_manifest(path)
    assert "line 11:" in str(error.value) and "line 12:" not in str(error.value)
    assert "and 2 more" in str(error.value)


def test_missing_manifest_names_its_neighbour(tmp_path):
    write(tmp_path, "training.csv", "")
    with pytest.raises(ManifestError, match='Did you mean "training.csv"'):
        read_manifest(tmp_path / "trainin.csv")


def test_misspelt_column_is_warned_of(tmp_path, caplog):
    read_manifest(write(tmp_path, "m.csv", "path,lable\na.mp4,1\n"))
    assert 'Column "lable" of a manifest is not used. Did you mean "label"?' in caplog.text


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x.mp4").touch()
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("/b"):  # tests may run as root, whom no mode stops
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ManifestError, match=f"got {tmp_path}/b .Permission denied"):
        list_videos(tmp_path)


def test_list_videos_is_sorted_and_survives_loops(tmp_path):
    for name in [
        "b/z.MP4",
        "b/a.mkv",
        "a.mp4",
        ".hidden.mp4",
        ".git/x.mp4",
        "notes.txt",
        "b-c.mov",
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "b")
    found = list_videos(tmp_path)
    assert found == ["a.mp4", "again/a.mkv", "again/z.MP4", "b-c.mov"]  # each folder once
    assert found == list_videos(str(tmp_path) + "/")
    (tmp_path / "b" / "p.JPG").touch()
    (tmp_path / "s.wav").touch()
    assert list_videos(tmp_path) == found, "images and sounds only where asked for"
    assert list_videos(tmp_path, "image") == ["again/p.JPG"]
    assert list_videos(tmp_path, "audio") == ["s.wav"]
