"""The scan: one row a clip, the right verdict for each file, exit codes, nothing half written."""

import json
import os
import pathlib
import re
import subprocess
import sys

import av
import pytest

from invideo_jax.data import scan
from invideo_jax.data.manifest import ManifestError, read_manifest
from invideo_jax.data.sources import open_source

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import video_files as files  # noqa: E402

av.logging.set_level(None)
REPOSITORY = str(pathlib.Path(__file__).resolve().parents[2])
ENVIRONMENT = {**os.environ, "PYTHONPATH": REPOSITORY}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two good videos, one cut short, three unusable."""
    folder = tmp_path_factory.mktemp("scan") / "videos"
    (folder / "deep").mkdir(parents=True)
    files.write_kind(folder, "with_sound.mp4")
    files.write_kind(folder / "deep", "turned_90.mp4")
    data = pathlib.Path(files.write_kind(folder.parent, "h264.mkv")).read_bytes()
    (folder / "cut.mkv").write_bytes(data[: int(0.6 * len(data))])
    (folder / "flipped.mkv").write_bytes(files.flip_bits(data, 60, seed=1))
    (folder / "empty.mp4").touch()
    files.write_sound(str(folder / "sound.mp4"))
    (folder / "notes.txt").write_text("not a video")
    return folder


def rows_of(path) -> dict[str, dict]:
    rows = [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
    return {os.path.basename(row["path"]): row for row in rows}


def test_folder(folder, capsys):
    output = folder / "manifest.jsonl"
    assert scan.main([str(folder), f"--output={output}"]) == 0
    rows = rows_of(output)
    assert sorted(rows) == sorted(
        ["with_sound.mp4", "turned_90.mp4", "cut.mkv", "flipped.mkv", "empty.mp4", "sound.mp4"]
    )
    good = rows["with_sound.mp4"]
    assert good == {
        "path": "with_sound.mp4",
        "bytes": (folder / "with_sound.mp4").stat().st_size,
        "frames": 40,
        "seconds": 1.6,
        "fps": 25.0,
        "width": 96,
        "height": 64,
        "rotation": 0,
        "codec": "h264",
        "pix_fmt": "yuv420p",
        "keyframes": 4,
        "has_audio": True,
        "audio_rate": 16000,
        "audio_channels": 1,
    }
    assert rows["turned_90.mp4"]["path"] == "deep/turned_90.mp4"
    assert (rows["turned_90.mp4"]["width"], rows["turned_90.mp4"]["rotation"]) == (64, 90)
    assert rows["cut.mkv"]["truncated"] is True and "error" not in rows["cut.mkv"]
    assert "of the declared 1.6" in rows["cut.mkv"]["note"]
    errors = {name: row["error"].split(":")[0] for name, row in rows.items() if "error" in row}
    assert errors.pop("flipped.mkv")  # where the bits hit differs: x264 does not give equal bytes
    assert errors == {"empty.mp4": "empty", "sound.mp4": "no_video_stream"}
    out, err = capsys.readouterr()
    assert "6 rows: 3 usable, 3 not, 1 cut short" in out and "empty: 1 (first: empty.mp4)" in out
    assert "scan 5/5 files" in err
    # What it wrote is a manifest again, and a second scan of it says the same.
    assert [row["path"] for row in read_manifest(output)] == [row["path"] for row in rows.values()]
    assert scan.main([str(output), f"--output={folder / 'again.jsonl'}"]) == 0
    assert rows_of(folder / "again.jsonl") == rows


def test_manifest_keeps_its_columns(folder, tmp_path):
    manifest = folder / "list.csv"
    manifest.write_text(
        "path,caption,label,start,end,split,flip\n"
        'with_sound.mp4,"a wave, moving",wave,0.2,0.8,train,no\n'
        "with_sound.mp4,the end,wave,1.0,1.4,train,\n"
        "with_sound.mp4,behind the end,wave,5,6,train,\n"
        "absent.mp4,nothing,none,,,train,\n"
        "../h264.mkv,outside,none,,,train,\n"
    )
    rows = scan.scan(str(manifest), str(tmp_path / "out.jsonl"))
    assert len(rows) == 5
    assert rows[0]["captions"] == ["a wave, moving"] and rows[0]["label"] == "wave"
    assert (rows[0]["start"], rows[0]["end"], rows[0]["flip"], rows[0]["split"]) == (
        0.2,
        0.8,
        False,
        "train",
    )
    assert rows[0]["frames"] == 40 and rows[0]["path"] == str(folder / "with_sound.mp4")
    assert [row.get("error", "").split(":")[0] for row in rows] == [
        "",
        "",
        "no_frames",
        "missing",
        "path_escape",
    ]
    allowed = scan.scan(str(manifest), str(tmp_path / "out.jsonl"), roots=[str(folder.parent)])
    assert "error" not in allowed[4] and allowed[4]["codec"] == "h264"


def test_a_list_of_paths_elsewhere_stops_with_the_option(folder, tmp_path, capsys):
    manifest = tmp_path / "list.csv"
    paths = [f"{folder}/with_sound.mp4", f"{folder}/deep/turned_90.mp4", "absent.mp4"]
    manifest.write_text("path\n" + "\n".join(paths))
    output = f"--output={tmp_path / 'm.jsonl'}"
    assert scan.main([str(manifest), output]) == 2
    err = capsys.readouterr().err
    assert "2 of 3 rows" in err and f"First: {paths[0]}" in err
    option = err.strip().split(": ")[-1]
    assert option == f"--roots={folder}" and not (tmp_path / "m.jsonl").exists()
    assert scan.main([str(manifest), output, f"{option},{tmp_path}"]) == 0
    assert f"Allow their folder: --config.data.roots={folder}" in capsys.readouterr().out


def test_odd_names_survive_scan_and_opening(tmp_path, capsys):
    names = ["talk:1", " a ", "q\"uo'te", "caf\u00e9", "e\u0301", "two\nlines", "a, b"]
    names = [f"{name}.mp4" for name in names] + [os.fsdecode(b"\xff.mp4"), "\U0001f3a5.mp4"]
    (tmp_path / "v").mkdir()
    files.write(str(tmp_path / "v" / names[0]), frames=2)
    data = (tmp_path / "v" / names[0]).read_bytes()
    for name in names:
        (tmp_path / "v" / name).write_bytes(data)
    output = tmp_path / "v" / "m.jsonl"
    assert scan.main([str(tmp_path / "v"), f"--output={output}"]) == 0
    source = open_source(str(output))
    assert sorted(source[i]["id"] for i in range(len(source))) == sorted(names)
    assert {source[i]["video"] for i in range(len(source))} == {f"{tmp_path}/v/{n}" for n in names}
    (tmp_path / "v" / names[-2]).write_bytes(b"")
    assert scan.main([str(tmp_path / "v"), f"--output={output}"]) == 0
    assert "empty: 1 (first: \\udcff.mp4)" in capsys.readouterr().out


def test_strict(folder, tmp_path):
    output = f"--output={tmp_path / 'm.jsonl'}"
    assert scan.main([str(folder), output, "--strict"]) == 1
    assert (tmp_path / "m.jsonl").exists()
    assert scan.main([str(folder / "deep"), output, "--strict"]) == 0


def test_limits_from_the_command_line(folder, tmp_path):
    output = tmp_path / "m.jsonl"
    assert scan.main([str(folder / "deep"), f"--output={output}", "--max-seconds=1"]) == 0
    assert rows_of(output)["turned_90.mp4"]["error"].startswith("too_long: 2 s, limit 1 s")


def test_all_frames_are_looked_at_when_asked(tmp_path):
    """Damage in the last frame of a group that no sampled frame needs."""
    path = tmp_path / "v.mkv"
    files.write(str(path), frames=48, gop=12, options={"bf": "0"})
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray(path.read_bytes())
    at, size = packets[23]
    data[at + size // 3 : at + size - 2] = bytes(size - 2 - size // 3)
    path.write_bytes(data)
    assert "error" not in scan.scan_file(str(path), sample=2)
    assert scan.scan_file(str(path), sample=0)["error"].startswith(("corrupt", "decode_error"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/absent", "--output={tmp}/m.jsonl"], "nothing at .*absent"),
        (["{tmp}", "--output={tmp}/m.jsonl"], "at least one video to scan"),
        (["{tmp}/a.mp4", "--output={tmp}/m.jsonl"], "A manifest must end in"),
        (["{tmp}", "--output={tmp}/m.txt"], "--output must end in .jsonl"),
        (["{tmp}/m.jsonl", "--output={tmp}/m.jsonl"], "must be another file than the manifest"),
        (
            ["{tmp}", "--output={tmp}/a.mp4/m.jsonl"],
            "--output must lie in a folder that can be written",
        ),
        (["{tmp}", "--output={tmp}/m.jsonl", "--sample=-1"], "--sample must be 0 or more"),
        (["{tmp}", "--output={tmp}/m.jsonl", "--max-pixels=0"], "max_pixels must be above 0"),
        (
            ["{tmp}", "--output={tmp}/m.jsonl", "--roots=/nowhere/at/all"],
            "allowed root must be a folder",
        ),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    if "absent" not in message and "A manifest" not in message and "at least" not in message:
        files.write(str(tmp_path / "v.mp4"), frames=1)
    if "lie in a folder" in message or "A manifest" in message:
        (tmp_path / "sub").mkdir()
    if "at least" not in message:
        (tmp_path / "a.mp4").touch()
    if "another file" in message:
        (tmp_path / "m.jsonl").write_text('{"path": "v.mp4"}\n')
    assert scan.main([a.format(tmp=tmp_path) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and not out
    assert re.search(message, err)


def test_interrupted_scan_leaves_nothing(folder, tmp_path, monkeypatch):
    output = tmp_path / "m.jsonl"
    output.write_text("the old one\n")
    monkeypatch.setattr(scan.os, "replace", lambda a, b: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        scan.scan(str(folder), str(output))
    assert output.read_text() == "the old one\n" and [p.name for p in tmp_path.iterdir()] == [
        "m.jsonl"
    ]


def test_a_crashing_file_does_not_stop_the_others(folder, tmp_path, monkeypatch):
    """Two workers and one file that kills the process that reads it."""
    paths = [str(folder / n) for n in ("with_sound.mp4", "cut.mkv")]
    script = tmp_path / "crash.py"
    script.write_text(
        "import json, os, sys\n"
        "from invideo_jax.data import scan\n"
        "def task(t):\n"
        "    if t[0].endswith('cut.mkv'):\n"
        "        os._exit(11)\n"
        "    return scan.scan_file(t[0])\n"
        "if __name__ == '__main__':\n"
        "    scan._scan_task = task\n"
        "    found = scan.scan_files(sys.argv[1:], workers=2)\n"
        "    print(json.dumps({os.path.basename(k): v for k, v in found.items()}))\n"
    )
    out = subprocess.run(
        [sys.executable, str(script), *paths],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    found = json.loads(out.stdout)
    assert found["cut.mkv"] == {"error": "decode_error: the decoder crashed"}
    assert found["with_sound.mp4"]["frames"] == 40


def test_workers_give_the_same(folder, tmp_path):
    alone = scan.scan(str(folder), str(tmp_path / "a.jsonl"), workers=0)
    assert scan.scan(str(folder), str(tmp_path / "b.jsonl"), workers=2) == alone


def test_lists_of_images_keep_their_rows_and_subtitles_are_found_from_the_new_list(
    folder, tmp_path
):
    (folder / "a.jpg").write_bytes(b"x")
    (folder / "empty.png").touch()
    (folder / "said.srt").write_text("1\n00:00:00,0 --> 00:00:01,0\nhey\n")
    rows = [{"path": "a.jpg", "caption": "x", "speech": "said.srt"}, {"path": "empty.png"}]
    (folder / "images.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for output in (tmp_path / "m.jsonl", folder / "deep" / "m.jsonl"):
        one, other = scan.scan(str(folder / "images.jsonl"), str(output))
        assert "error" not in one and other["error"] == "empty"
        source = open_source(str(output), roots=[str(folder)])
        assert source[0]["media"] == "image" and source[0]["transcript"] == "hey"


def test_command_line_needs_no_jax(folder, tmp_path):
    code = (
        "import sys; from invideo_jax.data import scan\n"
        f"rc = scan.main([{str(folder / 'deep')!r}, '--output={tmp_path / 'm.jsonl'}'])\n"
        "assert rc == 0 and not {'jax', 'tensorflow', 'torch'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=120, env=ENVIRONMENT
    )


def test_broken_and_real_sets(shared, tmp_path):
    """Every file of the broken set as its list expects; all real clips pass."""
    expected = [
        json.loads(x) for x in (shared / "data/broken/broken.jsonl").read_text().splitlines()
    ]
    scan.scan(str(shared / "data/broken"), str(tmp_path / "broken.jsonl"))
    rows = rows_of(tmp_path / "broken.jsonl")
    assert set(rows) == {e["file"] for e in expected}
    for e in expected:
        row = rows[e["file"]]
        assert ("error" in row) == (e["expect"] == "bad"), row
        assert row.get("truncated", False) == (e["expect"] == "truncated"), row
    real = scan.scan(str(shared / "data/clips/clips.jsonl"), str(tmp_path / "real.jsonl"))
    counted = [json.loads(x) for x in (shared / "data/clips/clips.jsonl").read_text().splitlines()]
    assert len(real) == 35 and not any("error" in row or "truncated" in row for row in real)
    for row, known in zip(real, counted):
        assert row["has_audio"] == known["has_audio"] and row["captions"] == [known["caption"]]
        if (
            known["file"] == "technician_on_lift.mp4"
        ):  # two picture streams: the list counts the small one
            assert (row["width"], row["frames"]) == (480, 390)
        else:
            wanted = (known["frames"], known["width"], known["height"])
            assert (row["frames"], row["width"], row["height"]) == wanted, row
    with pytest.raises(ManifestError, match="nothing at"):
        scan.read_input(str(tmp_path / "absent.jsonl"))
