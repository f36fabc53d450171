"""Every kind of source gives the same example; mistakes are said before a run begins."""

import json
import os
import pathlib
import pickle
import subprocess
import sys
import textwrap

import msgpack
import pytest
from small_videos import write_video, write_videos

from invideo_jax.data.decode import BadVideo
from invideo_jax.data.prepare import prepare
from invideo_jax.data.sources import (
    SOURCES,
    Example,
    NoSuchSplit,
    SourceError,
    count_overlap,
    open_source,
    parse_mixture,
)


def write_manifest(folder, rows, name="m.jsonl"):
    path = pathlib.Path(folder) / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def videos(tmp_path):
    return write_videos(tmp_path / "videos", 3)


FULL = {
    "path": "clip_000.mp4",
    "caption": ["a", "b"],
    "audio_caption": "c",
    "audio_video_captions": ["d"],
    "fused_captions": ["e", "f"],
    "speech": [[0.75, 1.0, "you"], {"start": 0.25, "end": 0.5, "text": "hey"}],
    "label": "run",
    "split": "train",
    "start": 0.25,
    "end": 1.0,
    "transcript": "hey",
    "flip": False,
}


def test_manifest_example(videos):
    folder = os.path.dirname(videos[0])
    rows = [
        FULL,
        {"path": "clip_001.mp4", "label": "jump"},
        {"path": "clip_002.mp4", "id": "third"},
    ]
    source = open_source(write_manifest(folder, rows))
    assert source.classes == ("jump", "run") and len(source) == 3 and source.notes == ()
    assert source[0] == Example(
        id="clip_000.mp4#0.25-1.0",
        media="video",
        video=videos[0],
        path=videos[0],
        start=0.25,
        end=1.0,
        captions=("a", "b"),
        audio_captions=("c",),
        audio_video_captions=("d",),
        fused_captions=("e", "f"),
        label=1,
        label_name="run",
        split="train",
        transcript="hey",
        speech=((0.25, 0.5, "hey"), (0.75, 1.0, "you")),
        flip=False,
    )
    assert source[2] == Example(
        id="third",
        media="video",
        video=videos[2],
        path=videos[2],
        start=None,
        end=None,
        captions=(),
        audio_captions=(),
        audio_video_captions=(),
        fused_captions=(),
        label=-1,
        label_name="",
        split="",
        transcript="",
        speech=(),
        flip=True,
    )
    with pytest.raises(IndexError):
        source[3]


@pytest.mark.parametrize(
    "media,names",
    [
        ("video", ["a.mp4", "f"]),
        ("image", ["b.JPG", "c.webp", "d.png"]),
        ("audio", ["e.wav", "f.m4a"]),
    ],
)
def test_images_and_sounds_are_examples_of_their_own_kind(tmp_path, media, names):
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    path = write_manifest(tmp_path, [{"path": name, "caption": name} for name in names])
    prepare(path, tmp_path / "out")
    for source in (open_source(path), open_source(f"arrayrecord:{tmp_path / 'out'}")):
        assert source.media == media
        assert [source[i]["media"] for i in range(len(names))] == [media] * len(names)
        assert [source[i]["captions"] for i in range(len(names))] == [(name,) for name in names]


def test_a_list_of_several_kinds_of_files_says_how_to_part_it(tmp_path):
    for name in ("a.mp4", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    path = write_manifest(tmp_path, [{"path": "a.mp4"}, {"path": "b.jpg"}])
    with pytest.raises(SourceError, match=r"of one kind.*image \(b.jpg\), video \(a.mp4\)"):
        open_source(path)


def test_a_folder_gives_images_and_sounds_where_asked(tmp_path):
    for name in ("a.mp4", "b.jpg", "c.wav"):
        (tmp_path / name).write_bytes(b"x")
    sources = [open_source(str(tmp_path), media=m) for m in ("video", "image", "audio")]
    assert [os.path.basename(s[0]["path"]) for s in sources] == ["a.mp4", "b.jpg", "c.wav"]
    assert len(open_source(str(tmp_path))) == 1 and sources[2][0]["media"] == "audio"
    (tmp_path / "c.wav").unlink()
    with pytest.raises(SourceError, match=r"holds 2 files, 0 of them.*\.aac \.flac"):
        open_source(str(tmp_path), media="audio")
    with pytest.raises(SourceError, match='Did you mean "audio"'):
        open_source(str(tmp_path), media="audoi")


def test_any_kind_of_caption_makes_a_row_captioned(videos):
    rows = [
        {"path": "clip_000.mp4", "audio_caption": "a hum"},
        {"path": "clip_001.mp4"},
        {"path": "clip_002.mp4", "fused_caption": "x"},
    ]
    source = open_source(write_manifest(os.path.dirname(videos[0]), rows), captioned=True)
    assert [source.identify(i) for i in range(len(source))] == ["clip_000.mp4", "clip_002.mp4"]


def test_folder_and_relative_spec(videos, monkeypatch):
    folder = os.path.dirname(videos[0])
    monkeypatch.chdir(os.path.dirname(folder))
    source = open_source("videos")
    assert [source[i]["video"] for i in range(3)] == videos
    assert source[1]["id"] == source.identify(1) == "clip_001.mp4"
    assert "all 3 files serve as validation" in open_source("videos", split="validation").notes[0]


def test_fingerprint_is_of_the_content_not_the_place_or_time(videos, tmp_path):
    folder = pathlib.Path(videos[0]).parent
    before = open_source(str(folder)).fingerprint()
    os.utime(videos[0], (0, 0))
    folder = folder.rename(tmp_path / "elsewhere")
    assert open_source(str(folder)).fingerprint() == before
    write_video(folder / "more.mp4")
    assert open_source(str(folder)).fingerprint() != before


@pytest.mark.parametrize(
    "change",
    [
        {"caption": "b"},
        {"label": "jump"},
        {"path": "clip_001.mp4"},
        {"start": 0.5},
        {"end": 0.75},
        {"flip": True},
        {"transcript": "ho"},
        {"audio_caption": "x"},
        {"audio_video_captions": ["x"]},
        {"fused_captions": ["f", "e"]},
        {"speech": [[0.75, 1.0, "you"]]},
    ],
)
def test_fingerprint_sees_every_change_of_a_row(videos, change):
    rows = [FULL | {"id": "x"}, {"path": "clip_002.mp4", "label": "skip"}]
    folder = os.path.dirname(videos[0])
    before = open_source(write_manifest(folder, rows)).fingerprint()
    assert open_source(write_manifest(folder, rows)).fingerprint() == before
    rows[0] |= change
    assert open_source(write_manifest(folder, rows)).fingerprint() != before


def test_pickles_small_and_reads_the_same(videos):
    rows = [{"path": "clip_000.mp4", "caption": str(i)} for i in range(1000)]
    source = open_source(write_manifest(os.path.dirname(videos[0]), rows))
    data = pickle.dumps(source)
    assert len(data) < 100 * 1000
    assert pickle.loads(data)[999] == source[999]
    assert source[999]["captions"] == ("999",)


def test_filters_take_rows_and_say_so(videos):
    rows = [
        {"path": "clip_000.mp4", "split": "train", "label": 4, "seconds": 1.0, "caption": "x"},
        {"path": "clip_001.mp4", "split": "train", "seconds": 9.0, "caption": ""},
        {"path": "clip_002.mp4", "split": "validation", "label": 0, "seconds": 1.5},
        {"path": "gone.mp4", "error": "missing", "split": "train"},
        {"path": "clip_001.mp4", "start": 1, "end": 3, "split": "train", "label": -1},
    ]
    path = write_manifest(os.path.dirname(videos[0]), rows)

    def ids(**options):
        source = open_source(path, **options)
        return [source.identify(i) for i in range(len(source))]

    assert ids() == ["clip_000.mp4", "clip_001.mp4", "clip_002.mp4", "clip_001.mp4#1-3.0"]
    assert ids(split="validation") == ["clip_002.mp4"]
    assert ids(max_seconds=2.0) == ["clip_000.mp4", "clip_002.mp4", "clip_001.mp4#1-3.0"]
    assert ids(min_seconds=1.2, max_seconds=8) == ["clip_002.mp4", "clip_001.mp4#1-3.0"]
    assert ids(labelled=True) == ["clip_000.mp4", "clip_002.mp4"]
    assert ids(captioned=True, split="train") == ["clip_000.mp4"]
    notes = open_source(path, split="train").notes
    assert "1 of 5 rows left out: a scan marked" in notes[0]
    assert "1 of 4 rows left out: split train" in notes[1]


def test_class_numbers_hold_for_every_split_and_list(videos):
    folder = os.path.dirname(videos[0])
    rows = [
        {"path": "clip_000.mp4", "label": "zebra", "split": "train"},
        {"path": "clip_001.mp4", "label": "ant", "split": "test"},
    ]
    path = write_manifest(folder, rows)
    assert open_source(path, split="train")[0]["label"] == 1
    assert open_source(path, split="test")[0]["label"] == 0
    other = write_manifest(folder, rows[:1], "other.jsonl")
    assert open_source(other)[0]["label"] == 0  # alone it can't know
    assert open_source(other, classes=("ant", "zebra"))[0]["label"] == 1
    with pytest.raises(SourceError, match='got "zebra" in line 1.*Did you mean "zebras"'):
        open_source(other, classes=("ant", "zebras"))


def test_records_count_as_the_classes_asked_for(videos, tmp_path):
    rows = [{"path": "clip_000.mp4", "label": "zebra"}, {"path": "clip_001.mp4", "label": "ox"}]
    prepare(write_manifest(os.path.dirname(videos[0]), rows), tmp_path / "out")
    spec, classes = f"arrayrecord:{tmp_path / 'out'}", ("ant", "ox", "yak", "zebra")
    assert [open_source(spec)[i]["label"] for i in range(2)] == [1, 0]
    source = open_source(spec, classes=classes)
    assert source.classes == classes
    assert [(source[i]["label"], source[i]["label_name"]) for i in range(2)] == [
        (3, "zebra"),
        (1, "ox"),
    ]
    with pytest.raises(SourceError, match='"zebra" is not .*Did you mean "zebras"'):
        open_source(spec, classes=("ox", "zebras"))
    assert open_source(os.path.dirname(videos[0]), classes=classes).classes == classes


def test_repeated_ids_are_noted(videos):
    path = write_manifest(os.path.dirname(videos[0]), [{"path": "clip_000.mp4"}] * 2)
    assert (
        "1 ids stand in more than one row (first: clip_000.mp4, 2 times)"
        in open_source(path).notes[0]
    )


def test_overlap_of_training_and_evaluation(videos):
    folder = os.path.dirname(videos[0])
    rows = [
        {"path": "clip_000.mp4"},
        {"path": "clip_001.mp4"},
        {"path": "clip_002.mp4", "start": 1},
    ]
    train = open_source(write_manifest(folder, rows[:2], "a.jsonl"))
    assert count_overlap(train, open_source(write_manifest(folder, rows[1:], "b.jsonl"))) == 1
    assert count_overlap(train, open_source(write_manifest(folder, rows[2:], "c.jsonl"))) == 0


# ---------------------------------------------------------------- which files may be opened


def test_absolute_paths_need_an_allowed_root(videos, tmp_path):
    folder = os.path.dirname(videos[0])
    inside = write_manifest(folder, [{"path": videos[0]}])
    assert open_source(inside)[0]["video"] == videos[0]
    (tmp_path / "lists").mkdir()
    outside = write_manifest(
        tmp_path / "lists", [{"path": videos[0]}, {"path": "../videos/clip_001.mp4"}]
    )
    with pytest.raises(SourceError) as error:
        open_source(outside)
    assert f"2 of 2 rows of {outside} lead outside. First: {videos[0]}." in str(error.value)
    assert f"--config.data.roots={folder}" in str(error.value)
    source = open_source(outside, roots=[folder])
    assert [source[i]["video"] for i in range(2)] == videos[:2]


def test_one_path_outside_is_refused_at_once_without_looking_for_it(videos, tmp_path):
    folder, other = os.path.dirname(videos[0]), str(tmp_path)
    rows = [{"path": f"clip_00{i}.mp4"} for i in range(3)]
    rows += [{"path": "/absent/a/x.mp4"}, {"path": "/absent/b/../y.mp4"}, {"path": "../z.mp4"}]
    path = write_manifest(folder, rows)
    with pytest.raises(SourceError) as error:
        open_source(path, roots=[f"{other}/videos"], roots_option="--roots")
    assert "3 of 6 rows" in str(error.value) and "First: /absent/a/x.mp4" in str(error.value)
    assert str(error.value).endswith(f"--roots={other}/videos,/absent,{other}")


def test_one_realpath_for_each_example(videos, monkeypatch):
    source, asked = open_source(os.path.dirname(videos[0])), []
    real = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: asked.append(path) or real(path))
    source[1]
    assert asked == [videos[1]]


def test_links_out_of_the_roots_are_refused(videos, tmp_path):
    folder = tmp_path / "linked"
    folder.mkdir()
    for number in range(3):
        write_video(folder / f"own_{number}.mp4", number)
    (folder / "secret.mp4").symlink_to(videos[0])
    (folder / "round.mp4").symlink_to(folder / "round.mp4")
    source = open_source(str(folder))
    reasons = {}
    for number in range(len(source)):
        try:
            source[number]
        except BadVideo as error:
            reasons[source.identify(number)] = error.reason
    assert reasons == {"secret.mp4": "symlink", "round.mp4": "symlink"}
    allowed = open_source(str(folder), roots=[os.path.dirname(videos[0])])
    assert allowed[len(allowed) - 1]["id"] == "secret.mp4"


def test_a_pipe_is_never_opened(tmp_path, videos):
    folder = os.path.dirname(videos[0])
    os.mkfifo(os.path.join(folder, "pipe.mp4"))
    source = open_source(folder)
    with pytest.raises(BadVideo, match="not_regular"):
        source[3]


# ---------------------------------------------------------------- errors at the start


def test_start_errors(videos, tmp_path, monkeypatch):
    folder = os.path.dirname(videos[0])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.md").touch()
    gone = write_manifest(
        folder, [{"path": f"x{i}.mp4"} for i in range(3)] + [{"path": "clip_000.mp4"}], "gone.jsonl"
    )
    cases = {
        "vidoes": [f"working directory {tmp_path}", 'Did you mean "videos/"?'],
        "a/b/c": ['"a" is not in', "working directory"],
        "empty": ["holds 1 files, 0 of them"],
        write_manifest(folder, [], "none.jsonl"): ["at least one row", "holds 0"],
        gone: [
            "of 4 looked at, 3 are not (3 missing)",
            "x0.mp4",
            f"Relative paths start at {folder}",
        ],
        "s3://bucket/videos": ["must be a local path", "gcsfuse"],
        "tdfs:ucf101": ['Unknown kind of data source "tdfs"', 'Did you mean "tfds"?'],
        "tfds:": ["behind the colon"],
        "": ["got nothing"],
        "arrayrecord:empty": ["0 files", "invideo_jax.data.prepare"],
        "synthetic:nowhere": ["python -m invideo_jax.data.synthetic --output=nowhere"],
        "synthetic:empty": ["manifest.jsonl"],
    }
    for spec, words in cases.items():
        with pytest.raises(SourceError) as error:
            open_source(spec)
        for word in words:
            assert word in str(error.value), (spec, str(error.value))


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(split="validaton"), ['no split "validaton"', 'Did you mean "validation"']),
        (dict(min_seconds=1.0), ["column `seconds`", "invideo_jax.data.scan"]),
        (dict(captioned=True), ["'has a caption' left 0 of 2"]),
        (dict(classes=("a", "b")), ["below 2", "label=7 in line 1"]),
        (dict(roots=["/no/such/root"]), ["/no/such/root", "data.roots"]),
    ],
)
def test_option_errors(videos, options, words):
    rows = [
        {"path": "clip_000.mp4", "split": "train", "label": 7},
        {"path": "clip_001.mp4", "split": "validation"},
    ]
    path = write_manifest(os.path.dirname(videos[0]), rows)
    with pytest.raises(SourceError) as error:
        open_source(path, **options)
    for word in words:
        assert word in str(error.value)


def test_only_a_source_with_splits_can_lack_one(videos):
    folder = os.path.dirname(videos[0])
    rows = [{"path": "clip_000.mp4", "split": "train"}, {"path": "clip_001.mp4", "split": "dev"}]
    path = write_manifest(folder, rows)
    with pytest.raises(NoSuchSplit, match='no split "test"'):
        open_source(path, split="test")
    for name in ("val", "valid", "dev", "eval", "validation"):
        found = open_source(path, split=name)
        assert [found.identify(i) for i in range(len(found))] == ["clip_001.mp4"]
        assert found[0]["split"] == "validation"
    for spec, options in [
        ("/no/such/folder", {}),
        (path, dict(captioned=True)),
        (write_manifest(folder, [{"path": "gone.mp4", "split": "train"}], "g.jsonl"), {}),
    ]:
        with pytest.raises(SourceError) as error:
            open_source(spec, split="train", **options)
        assert not isinstance(error.value, NoSuchSplit)


def test_misspelt_option_is_an_error(videos):
    with pytest.raises(TypeError, match="min_second"):
        open_source(
            write_manifest(os.path.dirname(videos[0]), [{"path": "clip_000.mp4"}]), min_second=1
        )


def test_manifest_without_splits_serves_whole(videos):
    path = write_manifest(os.path.dirname(videos[0]), [{"path": "clip_000.mp4"}])
    assert open_source(path, split="train").notes == ()
    assert "no column split: all its rows serve as test" in open_source(path, split="test").notes[0]


def test_parse_mixture():
    assert parse_mixture("a.csv") == [("a.csv", 1.0)]
    assert parse_mixture("a.csv,0.7; tfds:x/y ,0.3") == [("a.csv", 0.7), ("tfds:x/y", 0.3)]
    assert parse_mixture("a,b.csv;c") == [("a,b.csv", 1.0), ("c", 1.0)]
    for wrong, words in {
        "a,1;": "empty part",
        "a,0": "above 0",
        "a,-1;b": "above 0",
        "a,nan": "above 0",
    }.items():
        with pytest.raises(SourceError, match=words):
            parse_mixture(wrong)


def test_registry_lists_every_kind():
    assert set(SOURCES) == {"folder", "manifest", "synthetic", "arrayrecord", "tfds", "benchmark"}
    assert all(callable(SOURCES.get(kind)) for kind in SOURCES)


# ---------------------------------------------------------------- records


def packed(folder, *records):
    from array_record.python.array_record_module import ArrayRecordWriter

    path = str(pathlib.Path(folder) / "r.array_record")
    writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
    for record in records:
        writer.write(record if isinstance(record, bytes) else msgpack.packb(record))
    writer.close()
    return path


def test_foreign_records_and_broken_ones(tmp_path):
    path = packed(
        tmp_path,
        {"video": b"mp4", "caption": "x", "label": 3},
        {"frames": 1},
        b"\xc1",
        {"video": "/etc/passwd"},
    )
    source = open_source("arrayrecord:" + path)
    assert (
        source[0]["video"] == b"mp4" and source[0]["captions"] == ("x",) and source[0]["label"] == 3
    )
    assert source[0]["path"] == f"{path}#0" == source[0]["id"]
    for number, words in {1: "it holds ..frames", 2: "not msgpack", 3: "no bytes under"}.items():
        with pytest.raises(BadVideo, match=words) as error:
            source[number]
        assert error.value.reason == "corrupt_record"


def test_a_flipped_byte_is_one_bad_record(tmp_path):
    path = packed(tmp_path, *({"video": bytes([65 + i]) * 3000} for i in range(5)))
    data = bytearray(pathlib.Path(path).read_bytes())
    where = data.index(b"CCCC")
    data[where + 1000] ^= 1
    pathlib.Path(path).write_bytes(data)
    source, bad = open_source("arrayrecord:" + path), []
    for number in range(5):
        try:
            assert source[number]["video"] == bytes([65 + number]) * 3000
        except BadVideo as error:
            bad.append((number, error.reason))
    assert bad == [(2, "corrupt_record")]


def test_truncated_shard_stops_at_the_start(tmp_path):
    path = packed(tmp_path, *({"video": os.urandom(90_000)} for _ in range(5)))
    os.truncate(path, os.path.getsize(path) // 2)
    with pytest.raises(SourceError, match="whole ArrayRecord file"):
        open_source("arrayrecord:" + path)


def test_prepared_shards_are_picked_by_split(videos, tmp_path):
    rows = [
        {"path": f"clip_00{i}.mp4", "split": s, "label": s}
        for i, s in enumerate(["train", "test", "train"])
    ]
    prepare(write_manifest(os.path.dirname(videos[0]), rows), tmp_path / "out")
    spec = f"arrayrecord:{tmp_path / 'out'}"
    train = open_source(spec, split="train")
    assert [train[i]["id"] for i in range(2)] == ["clip_000.mp4", "clip_002.mp4"]
    assert train[0]["label_name"] == "train" and train.classes == ("test", "train")
    assert len(open_source(spec)) == 3
    assert open_source(spec, split="test").fingerprint() != train.fingerprint()
    with pytest.raises(NoSuchSplit, match='no split "val"'):
        open_source(spec, split="val")
    prepare(os.path.dirname(videos[0]), tmp_path / "plain")  # no splits: the same examples for any
    prints = {
        open_source(f"arrayrecord:{tmp_path / 'plain'}", split=s).fingerprint()
        for s in ("train", "val")
    }
    assert len(prints) == 1
    next((tmp_path / "out").glob("test-*")).unlink()
    with pytest.raises(SourceError, match="1 are missing"):
        open_source(spec, split="train")


TFDS = """
    import importlib.abc, importlib.machinery, os, sys, urllib.parse

    class Refuse(importlib.abc.Loader):
        def create_module(self, spec):
            raise ImportError("a test blocks " + spec.name)
        def exec_module(self, module):
            pass

    class Blocker(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("tensorflow", "torch"):
                return importlib.machinery.ModuleSpec(name, Refuse())

    sys.meta_path.insert(0, Blocker())
    import numpy as np
    import tensorflow_datasets as tfds
    folder, file = sys.argv[1:]
    video = open(file, "rb").read()

    class TinyClips(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
                "clip": tfds.features.Tensor(shape=(), dtype=np.bytes_),
                "caption": tfds.features.Text(),
                "audio_caption": tfds.features.Sequence(tfds.features.Text()),
                "speech": tfds.features.Sequence(
                    {"start": np.float32, "end": np.float32, "text": tfds.features.Text()}),
                "label": tfds.features.ClassLabel(names=["jump", "run"]),
            }))
        def _split_generators(self, manager):
            return {"train": self._generate_examples(4), "validation": self._generate_examples(2)}
        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"clip": video, "caption": f"caf\u00e9 {i}", "label": i % 2,
                    "audio_caption": ["a hum", "humming"][:i],
                    "speech": {"start": [1.0, 0.5], "end": [1.5, 1.0], "text": ["you", "hey"]}}

    TinyClips(data_dir=folder, file_format="array_record").download_and_prepare()

    from invideo_jax.data.sources import NoSuchSplit, SourceError, open_source
    from invideo_jax.data.transforms import ClipSpec, load_clip
    where = "?dir=" + urllib.parse.quote(folder, safe="")
    source = open_source("tfds:tiny_clips" + where)
    assert len(source) == 4 and source.classes == ("jump", "run"), (len(source), source.classes)
    seen = sorted((e["captions"], e["label"], e["label_name"]) for e in map(source.__getitem__, range(4)))
    assert seen[3] == (("caf\u00e9 3",), 1, "run"), seen
    heard = {e["captions"][0][-1]: e["audio_captions"] for e in map(source.__getitem__, range(4))}
    assert heard == {"0": (), "1": ("a hum",), "2": ("a hum", "humming"), "3": ("a hum", "humming")}
    assert source[0]["speech"] == ((0.5, 1.0, "hey"), (1.0, 1.5, "you")), source[0]["speech"]
    assert source[0]["transcript"] == "hey you"
    example = source[0]
    assert example["video"] == video and example["path"].endswith("/train#0"), example["path"]
    clip, _ = load_clip(video, ClipSpec(frames=2, size=16), np.random.default_rng(0))
    assert clip.shape == (2, 16, 16, 3) and clip.any()
    import pickle
    assert pickle.loads(pickle.dumps(source))[2] == source[2]
    other = open_source("tfds:tiny_clips/validation" + where, split="val")
    assert len(other) == 2 and other.fingerprint() != source.fingerprint()
    assert len(open_source("tfds:tiny_clips" + where, split="val")) == 2
    named = open_source("tfds:tiny_clips" + where + "&video=clip&speech=caption", split="validation")
    assert named[0]["transcript"].startswith("caf") and named.fingerprint() != other.fingerprint()
    wide = open_source("tfds:tiny_clips" + where, classes=("hop", "run", "jump"))
    assert sorted((e["label"], e["label_name"]) for e in map(wide.__getitem__, range(4))) == [
        (1, "run"), (1, "run"), (2, "jump"), (2, "jump")]
    for spec, options, kind, words in [
        ("tfds:tiny_clips" + where, dict(split="test"), NoSuchSplit, 'no split "test"'),
        ("tfds:tiny_clips/train" + where, dict(split="validation"), NoSuchSplit, 'is the split "train"'),
        ("tfds:tiny_clip" + where, {}, SourceError, "tiny_clip"),
        ("tfds:tiny_clips" + where + "&video=clips", {}, SourceError, 'Did you mean "clip"'),
        ("tfds:tiny_clips" + where + "&captoin=clip", {}, SourceError, 'Did you mean "caption"'),
        ("tfds:tiny_clips?dir", {}, SourceError, "KEY=VALUE"),
    ]:
        try:
            open_source(spec, **options)
        except kind as error:
            assert words in str(error), str(error)
        else:
            raise AssertionError(spec)
    assert not {"tensorflow", "torch"} & {m.split(".")[0] for m in sys.modules}
    print("ALL GOOD")
"""


def test_tfds_without_tensorflow(tmp_path, videos):
    pytest.importorskip("tensorflow_datasets")
    program = tmp_path / "program" / "run.py"
    program.parent.mkdir()
    program.write_text(textwrap.dedent(TFDS))
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path / "tfds"), videos[0]],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert "ALL GOOD" in done.stdout, done.stderr[-3000:]


def test_real_clips_list_opens(shared):
    source = open_source(str(shared / "data" / "clips" / "clips.jsonl"))
    assert len(source) == 35 and source[1]["label_name"] == "asl_bird"
    assert source[1]["captions"][0].startswith("a man in a grey t-shirt")
    assert os.path.isfile(source[1]["video"])
