"""Packing keeps examples, order and pixels; it is atomic, starts anew after a kill, and says what is wrong."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from small_videos import write_videos

from invideo_jax.data import prepare as module
from invideo_jax.data.prepare import main, prepare
from invideo_jax.data.sources import SourceError, open_source
from invideo_jax.data.transforms import ClipSpec, load_clip
from invideo_jax.errors import UserError


@pytest.fixture
def manifest(tmp_path):
    write_videos(tmp_path / "videos", 7)
    rows = [
        {
            "path": "clip_000.mp4",
            "caption": ["a", "\xe9"],
            "audio_captions": ["b"],
            "audio_video_captions": ["c"],
            "fused_captions": ["d", "e"],
            "speech": [[0.25, 0.5, "hey"], [0.5, 0.75, "you"]],
            "label": "run",
            "start": 0.25,
            "end": 1.25,
        },
        {
            "path": "clip_001.mp4",
            "label": "jump",
            "flip": False,
            "transcript": "hey",
            "id": "second",
        },
        *({"path": f"clip_00{i}.mp4"} for i in (4, 3, 2, 5, 6)),
    ]
    path = tmp_path / "videos" / "m.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("shards", [1, 3, 50])
def test_reads_back_the_same(manifest, tmp_path, shards):
    index = prepare(manifest, tmp_path / "out", shards=shards)
    before, after = open_source(manifest), open_source(f"arrayrecord:{tmp_path / 'out'}")
    assert index["count"] == len(after) == len(before) == 7
    assert (
        len(index["shards"])
        == len(list((tmp_path / "out").glob("*.array_record")))
        == min(shards, 7)
    )
    spec = ClipSpec(frames=4, size=32, stride=1)
    for number in range(7):
        one, other = before[number], after[number]
        assert other["video"] == pathlib.Path(one["video"]).read_bytes()
        for key in one.keys() - {"video", "path"}:
            assert one[key] == other[key], key
        clips = [
            load_clip(e["video"], spec, np.random.default_rng(5), start=e["start"], end=e["end"])[0]
            for e in (one, other)
        ]
        assert (clips[0] == clips[1]).all() and clips[0].std() > 1


def test_again_does_nothing_and_another_input_is_refused(manifest, tmp_path):
    out = tmp_path / "out"
    first = prepare(manifest, out)
    times = {p: p.stat().st_mtime_ns for p in out.iterdir()}
    assert prepare(manifest, out) == first
    assert times == {p: p.stat().st_mtime_ns for p in out.iterdir()}
    with pytest.raises(SourceError, match="exists and was not made from these"):
        prepare(os.path.dirname(manifest), out)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").touch()
    with pytest.raises(SourceError, match="must be a new folder"):
        prepare(manifest, tmp_path / "taken")


def test_killed_in_the_middle_leaves_nothing_half_done(manifest, tmp_path):
    """The process is killed while it writes the fifth record; the same command then gives what it would have given."""
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from invideo_jax.data import prepare as m\n"
        "real, count = m.encode, []\n"
        "def encode(example):\n"
        "    count.append(1)\n"
        "    if len(count) == 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(example)\n"
        "m.encode = encode\n"
        "m.prepare(sys.argv[1], sys.argv[2], shards=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program, manifest, str(out)], env=environment, timeout=60
    )
    assert done.returncode == -9
    assert not out.exists() and list((tmp_path / "out.partial").glob("*.array_record"))
    prepare(manifest, out, shards=3)
    assert not (tmp_path / "out.partial").exists()
    assert len(open_source(f"arrayrecord:{out}")) == 7
    assert {p.name for p in out.glob("*.array_record")} == {
        f"clips-0000{i}-of-00003.array_record" for i in range(3)
    }


def test_two_writers_at_once(manifest, tmp_path):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    with module._locked(partial):
        with pytest.raises(SourceError, match="another one is writing"):
            prepare(manifest, tmp_path / "out")


def test_unreadable_files(manifest, tmp_path):
    folder = pathlib.Path(manifest).parent
    (folder / "clip_003.mp4").unlink()
    (folder / "clip_005.mp4").write_bytes(b"")
    with pytest.raises(UserError) as error:
        prepare(manifest, tmp_path / "out")
    assert "2 of 7" in str(error.value) and "clip_003.mp4: missing" in str(error.value)
    assert "--skip_bad" in str(error.value) and not (tmp_path / "out").exists()
    index = prepare(manifest, tmp_path / "out", skip_bad=True)
    assert index["count"] == 5
    assert [(os.path.basename(p), r) for p, r in index["skipped"]] == [
        ("clip_003.mp4", "missing"),
        ("clip_005.mp4", "empty"),
    ]
    assert len(open_source(f"arrayrecord:{tmp_path / 'out'}")) == 5


def test_names_that_are_not_utf8(tmp_path):
    write_videos(tmp_path / "videos", 2)
    name = os.fsdecode(b" caf\xe9.mp4")
    os.rename(tmp_path / "videos" / "clip_000.mp4", tmp_path / "videos" / name)
    prepare(str(tmp_path / "videos"), tmp_path / "out")
    assert open_source(f"arrayrecord:{tmp_path / 'out'}")[0]["id"] == name


def test_an_edited_list_is_another_input(manifest, tmp_path):
    prepare(manifest, tmp_path / "out")
    text = pathlib.Path(manifest).read_text()
    pathlib.Path(manifest).write_text(text.replace('"end": 1.25', '"end": 1.5'))
    with pytest.raises(SourceError, match="was not made from these examples"):
        prepare(manifest, tmp_path / "out")


def test_roots_are_given_by_commas(manifest, tmp_path, capsys):
    rows = [{"path": str(pathlib.Path(manifest).parent / "clip_000.mp4")}]
    (tmp_path / "list").mkdir()
    path = tmp_path / "list" / "m.jsonl"
    path.write_text(json.dumps(rows[0]))
    assert main([str(path), f"--output={tmp_path / 'out'}"]) == 2
    option = f"--roots={pathlib.Path(manifest).parent}"
    assert capsys.readouterr().err.strip().endswith(option)
    assert main([str(path), f"--output={tmp_path / 'out'}", f"{option},{tmp_path}"]) == 0


def test_shards_missing_from_the_index_are_noticed(manifest, tmp_path):
    prepare(manifest, tmp_path / "out", shards=2)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    index["shards"][0]["count"] += 1
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="7 records of 8"):
        open_source(f"arrayrecord:{tmp_path / 'out'}")


def test_command_line(manifest, tmp_path, capsys):
    assert main([manifest, f"--output={tmp_path / 'out'}", "--shards=2"]) == 0
    text = capsys.readouterr().out
    assert "clips-00001-of-00002.array_record: 4 clips" in text
    assert f"7 clips in 2 shards. Train on arrayrecord:{tmp_path / 'out'}" in text
    assert main([manifest + "x", f"--output={tmp_path / 'b'}"]) == 2
    assert "working directory" in capsys.readouterr().err
    assert main([manifest, f"--output={tmp_path / 'b'}", "--shards=0"]) == 2
    assert (
        main([manifest, f"--output={tmp_path / 'b'}", "--split=tset"]) == 0
    )  # has no splits: all of it
    assert main([manifest, "--output=/proc/none/b"]) == 74
    assert "Writing failed" in capsys.readouterr().err
