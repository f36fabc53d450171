"""The built-in dataset: bytes, splits, files, sound, words, and making it again."""

import collections
import dataclasses
import fcntl
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import av
import numpy as np
import pytest

from invideo_jax.data import synthetic
from invideo_jax.data.scenes import pixels, scene, sound, splits, vocabulary, words

CLIPS = 90  # six blocks of 15: train has 3, validation 2, test 1
FRACTIONS = (0.6, 0.2, 0.2)
SMALL = dict(size=32, clips=CLIPS, splits=FRACTIONS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("synthetic") / "set"
    return synthetic.make(folder, **SMALL).parent


@pytest.fixture(scope="module")
def rows(dataset) -> list[dict]:
    return [json.loads(line) for line in (dataset / "manifest.jsonl").open()]


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def scenes_of(motion: str, count: int, seed: int = 0) -> list[scene.Scene]:
    found = (scene.sample(seed, i) for i in range(count * len(vocabulary.LABELS)))
    return [s for s in found if s.motion == motion]


def decode(data) -> tuple[np.ndarray, np.ndarray, list]:
    """Frames uint8 [T, H, W, 3], samples int16 [n], times of the frames in seconds."""
    with av.open(data) as container:
        frames = list(container.decode(video=0))
    if hasattr(data, "seek"):
        data.seek(0)
    with av.open(data) as container:
        assert container.streams.audio[0].rate == 16_000
        assert container.streams.audio[0].channels == 1
        parts = [f.to_ndarray() for f in container.decode(audio=0)]
    video = np.stack([f.to_ndarray(format="rgb24") for f in frames])
    return video, np.concatenate(parts, axis=1)[0], [float(f.pts * f.time_base) for f in frames]


# --- the same bytes ---


def test_two_workers_write_the_bytes_of_one(dataset, tmp_path):
    other = synthetic.make(tmp_path / "set", workers=2, **SMALL).parent
    first, second = contents(dataset), contents(other)
    assert len(first) == CLIPS + 2
    assert first == second


def test_a_clip_depends_on_its_own_index_only(dataset, rows, tmp_path):
    settings = synthetic.Settings(**SMALL)
    for index in (0, 41, 89):
        assert synthetic.clip_video(settings, index) == (dataset / rows[index]["path"]).read_bytes()
    fewer = synthetic.make(tmp_path / "set", **SMALL | {"clips": 20}).parent
    few = [json.loads(line) for line in (fewer / "manifest.jsonl").open()]
    assert few == rows[:20]
    assert (fewer / few[7]["path"]).read_bytes() == (dataset / rows[7]["path"]).read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="MALLOC_PERTURB_ is glibc's")
def test_bytes_do_not_depend_on_what_memory_held_before():
    # glibc fills every new piece of memory with the byte told: an encoder that reads what it never
    # wrote (x264's macroblock tree did) then gives other bytes.
    code = """if True:
        import hashlib
        from invideo_jax.data import synthetic
        digest = hashlib.sha256()
        for size in (32, 64, 112):
            for index in range(8):
                digest.update(synthetic.clip_video(synthetic.Settings(size=size), index))
        print(digest.hexdigest())"""
    root = pathlib.Path(__file__).resolve().parents[2]
    digests = set()
    for byte in ("0", "85", "170"):
        heap = {"MALLOC_PERTURB_": byte, "MALLOC_MMAP_THRESHOLD_": "500000000"}
        run = [sys.executable, "-c", code]
        digests.add(subprocess.check_output(run, cwd=root, env=os.environ | heap, text=True))
    assert len(digests) == 1


def test_another_seed_gives_other_clips():
    one, two = (synthetic.Settings(seed=s) for s in (0, 1))
    assert synthetic.clip_video(one, 3) != synthetic.clip_video(two, 3)
    assert synthetic.clip_row(one, 3) != synthetic.clip_row(two, 3)


# --- splits and labels ---


def combinations(row: dict):
    """Every (shape, colour, texture, action) seen in a clip."""
    a = row["attributes"]
    yield a["shape"], a["colour"], a["texture"], a["motion"]
    if a["partner"]:
        yield (*a["partner"], a["motion"])
    for look in a["bystanders"]:
        yield (*look, vocabulary.STILL)


def test_splits_share_no_combination():
    settings = synthetic.Settings()
    seen = {s: set() for s in synthetic.SPLITS}
    for index in range(3000):
        row = synthetic.clip_row(settings, index)
        seen[row["split"]].update(combinations(row))
    train, validation, test = (seen[s] for s in synthetic.SPLITS)
    assert min(len(validation), len(test)) > 200
    assert not train & validation
    assert not train & test
    assert not validation & test


@pytest.mark.parametrize("fractions", [(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (1, 0, 0)])
def test_split_rule_cuts_all_combinations_and_keeps_colours_even(fractions):
    table = splits.looks(5, splits.check_fractions(fractions))
    everything = collections.Counter(
        (pair, action, colour) for (_, action, colour), pairs in table.items() for pair in pairs
    )
    assert len(everything) == 31 * 16 * 10
    assert set(everything.values()) == {1}
    for split in synthetic.SPLITS:
        sizes = {len(pairs) for (s, _, _), pairs in table.items() if s == split}
        assert len(sizes) == 1, "a colour must not be more frequent for one motion than for another"
    for action in splits.ACTIONS:
        pairs = [p for c in vocabulary.COLOURS for p in table["train", action, c]]
        assert {s for s, _ in pairs} == set(vocabulary.SHAPES)
        assert {t for _, t in pairs} == set(vocabulary.TEXTURES)


def test_every_split_is_balanced_over_labels(rows):
    for split, count in zip(synthetic.SPLITS, (45, 30, 15)):
        labels = collections.Counter(r["label"] for r in rows if r["split"] == split)
        assert len(labels) == 15
        assert set(labels.values()) == {count // 15}
    places = [splits.place(3, i, (0.8, 0.1, 0.1)) for i in range(3000)]
    assert collections.Counter(s for s, _ in places) == dict(train=2400, validation=300, test=300)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (dict(splits=(0.5, 0.5)), "splits must be 3 fractions"),
        (dict(splits=(0.9, 0.2, 0.1)), r"sum to 1; got splits=\(0.9, 0.2, 0.1\)"),
        (dict(splits=(0.98, 0.01, 0.01)), "at least 1/31 = 0.032 of the combinations"),
        (dict(size=33), "size must be even, 16..1024 pixels; got size=33"),
        (dict(frames=4), "frames must be 8..512"),
        (dict(fps=0), "fps must be 1..60"),
        (dict(clips=0), "clips must be at least 1"),
        (dict(seed=-1), "seed must be a whole number"),
        (dict(workers=0), "workers must be at least 1"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, given, text):
    with pytest.raises(ValueError, match=text):
        synthetic.make(tmp_path / "set", **given)
    assert not list(tmp_path.iterdir())


# --- files ---


def test_every_file_has_its_frames_and_its_sound(dataset, rows):
    assert len({r["path"] for r in rows}) == CLIPS
    for row in rows:
        video, samples, times = decode(str(dataset / row["path"]))
        assert video.shape == (16, 32, 32, 3)
        np.testing.assert_allclose(times, np.arange(16) / 8, atol=1e-6)
        assert samples.shape == (32_000,)
        assert np.abs(samples).max() > 30, "a digitally silent track"


@pytest.mark.parametrize(("frames", "fps", "size"), [(24, 8, 64), (9, 5, 48)])
def test_other_lengths_and_sizes(frames, fps, size):
    settings = synthetic.Settings(frames=frames, fps=fps, size=size)
    video, samples, times = decode(io.BytesIO(synthetic.clip_video(settings, 11)))
    assert video.shape == (frames, size, size, 3)
    assert samples.shape == (round(frames / fps * 16_000),)
    np.testing.assert_allclose(times, np.arange(frames) / fps, atol=1e-3)


def test_decoded_pictures_and_sound_are_the_rendered_ones():
    settings = synthetic.Settings()
    for index in range(15):
        s = scene.sample(0, index)
        video, samples, _ = decode(io.BytesIO(synthetic.clip_video(settings, index)))
        wanted = pixels.render(s, size=64, frames=16)
        error = np.abs(video.astype(int) - wanted).mean(axis=(1, 2, 3))
        assert error.max() < 9, f"clip {index}"
        np.testing.assert_array_equal(samples, sound.render(s, seconds=2.0))  # flac loses nothing


def test_rows_carry_what_readers_need(rows):
    wanted = {"id", "path", "captions", "label", "label_name", "split", "transcript", "speech"}
    wanted |= {"audio_captions", "fused_captions"}
    for row in rows:
        assert wanted | {"flip", "attributes"} == set(row)
        assert row["label_name"] == vocabulary.LABELS[row["label"]] == row["attributes"]["motion"]
        assert row["flip"] is False
        assert row["path"] == f"{row['split']}/{row['id']}.mp4"


# --- motion, measured in pixels ---


def mask_of_subject(s: scene.Scene, size: int = 64, frames: int = 16) -> np.ndarray:
    """Where the first actor is drawn: its picture against the bare backdrop."""
    alone = dataclasses.replace(s, actors=s.actors[:1])
    empty = dataclasses.replace(s, actors=())
    a, b = (pixels.render(x, size=size, frames=frames).astype(int) for x in (alone, empty))
    return np.abs(a - b).sum(-1) > 30


def centres(mask: np.ndarray) -> np.ndarray:
    """Mean (x, y) of a mask in each frame, [T, 2], nan where it is empty."""
    ys, xs = np.mgrid[: mask.shape[1], : mask.shape[2]]
    with np.errstate(invalid="ignore"):
        return np.stack([(mask * g).sum((1, 2)) / mask.sum((1, 2)) for g in (xs, ys)], 1)


@pytest.mark.parametrize(
    ("motion", "axis", "sign"),
    [("moves left", 0, -1), ("moves right", 0, 1), ("moves up", 1, -1), ("moves down", 1, 1)],
)
def test_moving_objects_move_the_way_they_are_said_to(motion, axis, sign):
    for s in scenes_of(motion, 12):
        steps = np.diff(centres(mask_of_subject(s)), axis=0)
        assert sign * np.nanmedian(steps[:, axis]) > 0.7
        assert abs(np.nanmedian(steps[:, 1 - axis])) < 0.7


@pytest.mark.parametrize(("sense", "sign"), [("clockwise", 1), ("anticlockwise", -1)])
def test_circling_and_turning_go_the_way_they_are_said_to(sense, sign):
    for s in scenes_of(f"circles {sense}", 10):
        path = centres(mask_of_subject(s))
        steps = np.diff(path, axis=0)
        cross = steps[:-1, 0] * steps[1:, 1] - steps[:-1, 1] * steps[1:, 0]
        assert sign * np.median(cross) > 0, "y points down: a positive cross product is clockwise"
    turned = 0
    for s in scenes_of(f"turns {sense}", 60):
        if s.actors[0].look.shape != "moon":
            continue
        mask = mask_of_subject(s)
        u = np.arange(16) / 16
        at, shaken = scene.track(s.actors[0], u), scene.shake(s, u)
        middle = np.stack([(at[k] + d) * 64 - 0.5 for k, d in zip("xy", shaken)], 1)
        lean = centres(mask) - middle  # a moon's mass lies beside the middle it turns about
        angle = np.unwrap(np.arctan2(lean[:, 1], lean[:, 0]))
        wanted = sign * 2 * np.pi * s.actors[0].path["cycles"] * 15 / 16
        assert angle[-1] - angle[0] == pytest.approx(wanted, abs=0.35)
        turned += 1
    assert turned >= 3


def test_growing_shrinking_appearing_and_disappearing_change_the_area():
    for motion, sign in (("grows", 1), ("shrinks", -1)):
        for s in scenes_of(motion, 10):
            area = mask_of_subject(s).sum((1, 2))
            assert sign * np.median(np.diff(area)) > 0
    for motion, first in (("appears", False), ("disappears", True)):
        for s in scenes_of(motion, 10):
            seen = mask_of_subject(s).any((1, 2))
            assert (seen[0], seen[-1]) == (first, not first)
            change = s.events[0][0] * 16
            assert np.flatnonzero(np.diff(seen.astype(int)))[0] + 1 == int(np.ceil(change))


def test_bouncing_turns_round_at_the_floor_at_the_event():
    for s in scenes_of("bounces", 10):
        fine = np.linspace(0, 1, 2001)
        y = scene.track(s.actors[0], fine)["y"]
        lowest = np.flatnonzero((y[1:-1] > y[:-2]) & (y[1:-1] >= y[2:])) + 1
        np.testing.assert_allclose(fine[lowest], [u for u, _ in s.events], atol=2e-3)
        assert len(s.events) >= 1


def test_pairs_bounce_off_or_pass():
    for motion, sign in (("collides", 1), ("passes", -1)):
        for s in scenes_of(motion, 10):
            u = np.array([0.0, s.events[0][0], 0.999])
            one, two = (scene.track(a, u) for a in s.actors[:2])
            apart = np.stack([one["x"] - two["x"], one["y"] - two["y"]], 1)
            reach = one["radius"][0] + two["radius"][0]
            assert sign * (apart[0] @ apart[2]) > 0, "passing swaps the sides, colliding does not"
            nearest = np.hypot(*apart[1]) / reach
            assert nearest == pytest.approx(0.8) if motion == "collides" else nearest < 1.01


# --- sound ---


def energy(samples: np.ndarray, start: float, seconds: float) -> float:
    a = max(round(start * 16_000), 0)
    part = samples[a : a + round(seconds * 16_000)].astype(np.float64)
    return float((part**2).mean()) if len(part) else 0.0


def test_sound_begins_at_the_events():
    checked = collections.Counter()
    for motion in ("bounces", "appears", "disappears", "collides"):
        for s in scenes_of(motion, 25):
            samples = sound.render(s, seconds=2.0)
            for u, kind in s.events:
                at = u * 2.0
                if not 0.05 < at < 1.95:
                    continue
                ratio = energy(samples, at, 0.04) / energy(samples, at - 0.04, 0.04)
                if s.sound == "none":
                    assert 0.3 < ratio < 3
                else:
                    assert ratio > 5, (motion, s.index, at)
                    checked[kind] += 1
    assert min(checked[k] for k in ("bounce", "appear", "disappear", "collision")) >= 10


def test_a_passing_is_loudest_when_the_two_are_level():
    for s in scenes_of("passes", 12):
        if s.sound == "whoosh":
            samples = sound.render(s, seconds=2.0)
            loudness = [energy(samples, t, 0.1) for t in np.arange(0, 1.9, 0.02)]
            assert 0.02 * np.argmax(loudness) + 0.05 == pytest.approx(s.events[0][0] * 2, abs=0.15)


@pytest.mark.parametrize(
    ("motion", "sign"), [("moves up", 1), ("moves down", -1), ("grows", -1), ("shrinks", 1)]
)
def test_the_pitch_glides_with_the_motion(motion, sign):
    for s in scenes_of(motion, 10):
        if s.sound == "none":
            continue
        samples = sound.render(s, seconds=2.0).astype(np.float64)
        pitch = [
            np.abs(np.fft.rfft(samples[a : a + 4000] * np.hanning(4000)))[20:].argmax() + 20
            for a in (0, 14_000, 28_000)
        ]
        assert sign * pitch[0] < sign * pitch[1] < sign * pitch[2]


def test_opposite_motions_sound_alike_and_a_fifth_is_silent():
    for one, two in (("left", "right"), ("clockwise", "anticlockwise")):
        for verb in ("moves", "turns", "circles"):
            if f"{verb} {one}" in vocabulary.SOUNDS:
                assert vocabulary.SOUNDS[f"{verb} {one}"] == vocabulary.SOUNDS[f"{verb} {two}"]
    silent = np.mean([scene.sample(0, i).sound == "none" for i in range(1500)])
    assert silent == pytest.approx(0.2, abs=0.04)


# --- words ---


def test_captions_name_shape_colour_texture_and_only_the_right_motion():
    settings = synthetic.Settings()
    for index in range(1500):
        row = synthetic.clip_row(settings, index)
        a = row["attributes"]
        assert len(row["captions"]) == 4
        for n, text in enumerate(row["captions"]):
            named = vocabulary.mentions(text)
            assert a["shape"] in named["shape"], text
            assert a["colour"] in named["colour"], text
            assert named["motion"] == {a["motion"]}, text
            if n != 2 and a["texture"] != "plain":
                assert a["texture"] in named["texture"], text
            assert not named["sound"], text
            if a["partner"]:
                assert a["partner"][1] in named["colour"], text


def test_captions_of_sound_name_it_and_nothing_that_only_eyes_can_tell():
    settings, counts = synthetic.Settings(), collections.Counter()
    for index in range(1500):
        row = synthetic.clip_row(settings, index)
        a, heard = row["attributes"], row["audio_captions"]
        silent = a["sound"] == "none"
        counts[len(heard)] += 1
        assert (not heard) == silent and len(set(heard)) == len(heard)
        for text in heard:
            named = vocabulary.mentions(text)
            assert named.pop("sound") == {a["sound"]} and not any(named.values()), text
        assert len(row["fused_captions"]) == 1
        named = vocabulary.mentions(row["fused_captions"][0])
        assert named["sound"] == (set() if silent else {a["sound"]}), row["fused_captions"]
        assert named["motion"] == {a["motion"]} and a["shape"] in named["shape"]
        assert a["colour"] in named["colour"]
    assert counts.keys() == {0, 1, 2} and min(counts.values()) > 200


def test_captions_vary_in_wording():
    texts, frames = [], collections.defaultdict(set)
    for index in range(900):
        s = scene.sample(0, index)
        written = words.captions(s)["video"]
        assert len(set(written)) == 4
        texts += written
        for text in written:
            for word in (*vocabulary.COLOURS, *vocabulary.SHAPES, *vocabulary.TEXTURES):
                text = text.replace(word, "_")
            frames[s.motion].add(text)
    assert len(set(texts)) > 0.8 * len(texts)
    assert min(len(f) for f in frames.values()) > 60


def test_mentions_reads_other_sentences():
    named = vocabulary.mentions("A striped RED disc sinks, and one hears a tone that rises.")
    assert named["motion"] == {"moves down"}
    assert named["sound"] == {"rising tone"}
    assert (named["shape"], named["colour"]) == ({"circle"}, {"red"})
    assert named["texture"] == {"striped"}
    named = vocabulary.mentions("a blue cross crosses paths with a heart, reddish")
    assert (named["motion"], named["shape"]) == ({"passes"}, {"cross", "heart"})
    assert named["colour"] == {"blue"}
    assert not any(vocabulary.mentions("nothing to see").values())


@pytest.mark.parametrize("frames", [8, 16, 40])
def test_spoken_words_have_times_inside_the_clip(frames):
    settings = synthetic.Settings(frames=frames)
    for index in range(150):
        row = synthetic.clip_row(settings, index)
        assert " ".join(word for _, _, word in row["speech"]) == row["transcript"]
        times = np.array([piece[:2] for piece in row["speech"]])
        assert (times[:, 0] < times[:, 1]).all()
        assert (times[1:, 0] > times[:-1, 1]).all()
        assert times[0, 0] >= 0
        assert times[-1, 1] <= settings.seconds
        assert vocabulary.mentions(row["transcript"])["motion"] == {row["label_name"]}


# --- making it again ---


def test_a_finished_dataset_is_left_alone(dataset):
    before = {p: p.stat().st_mtime_ns for p in dataset.rglob("*")}
    calls = []
    path = synthetic.make(dataset, progress=lambda *a: calls.append(a), **SMALL)
    assert path == dataset / "manifest.jsonl"
    assert calls == [(CLIPS, CLIPS)]
    assert {p: p.stat().st_mtime_ns for p in dataset.rglob("*")} == before


def test_other_arguments_for_the_same_folder_are_refused(dataset):
    with pytest.raises(FileExistsError, match=r"seed=0 \(asked: seed=4\)"):
        synthetic.make(dataset, seed=4, **SMALL)
    with pytest.raises(FileExistsError, match=r"clips=90 \(asked: clips=91\)"):
        synthetic.make(dataset, **SMALL | {"clips": 91})


def test_a_folder_with_other_things_is_refused(tmp_path):
    (tmp_path / "holiday.mp4").write_bytes(b"x")
    with pytest.raises(FileExistsError, match="which holds something else"):
        synthetic.make(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.mp4"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "set").mkdir()
    path = synthetic.make(tmp_path / "set", **SMALL | {"clips": 3})
    assert len(path.read_text().splitlines()) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_missing_files_of_a_finished_dataset_are_noticed(tmp_path):
    folder = synthetic.make(tmp_path / "set", **SMALL | {"clips": 16}).parent
    next(folder.glob("train/*.mp4")).unlink()
    with pytest.raises(RuntimeError, match="misses 1 of 16 clips"):
        synthetic.make(folder, **SMALL | {"clips": 16})


def test_a_stopped_run_goes_on_where_it_was(dataset, tmp_path):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.make(tmp_path / "set", progress=stop, **SMALL)
    assert not (tmp_path / "set").exists()
    made = {p.name: p.stat().st_mtime_ns for p in tmp_path.rglob("*.mp4")}
    assert 0 < len(made) < CLIPS
    with pytest.raises(FileExistsError, match=r"size=32 \(asked: size=64\)"):
        synthetic.make(tmp_path / "set", **SMALL | {"size": 64})
    folder = synthetic.make(tmp_path / "set", **SMALL).parent
    kept = {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.mp4") if p.name in made}
    assert kept == made
    assert contents(folder) == contents(dataset)
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_two_processes_do_not_make_the_same_folder(tmp_path):
    (tmp_path / "set.partial").mkdir()
    with open(tmp_path / "set.partial" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RuntimeError, match="another one is at"):
            synthetic.make(tmp_path / "set", **SMALL)


# --- the command ---


def command(*args, **kwargs) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "invideo_jax.data.synthetic", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=pathlib.Path(__file__).resolve().parents[2],
        # Tests that run in the background are given an ignored SIGINT, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **kwargs,
    )


def test_the_command_makes_says_and_repeats(tmp_path):
    args = [f"--output={tmp_path / 'set'}", "--clips=33", "--size=32", "--workers=1"]
    first = command(*args)
    out, err = first.communicate(timeout=60)
    assert first.returncode == 0, err
    assert out.startswith("made: ")
    assert "(18 train, 15 validation, 0 test; " in out
    assert "making clips: 33/33" in err
    again = command(*args)
    assert again.communicate(timeout=60)[0] == "already " + out
    other = command(*args, "--seed=9")
    assert "seed=0 (asked: seed=9)" in other.communicate(timeout=60)[1]
    assert other.returncode == 2


def test_importing_the_dataset_imports_no_jax():
    code = (
        "import sys, invideo_jax.data.synthetic; print({'jax', 'flax', 'grain'} & set(sys.modules))"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    assert subprocess.check_output([sys.executable, "-c", code], cwd=root, text=True) == "set()\n"


def children(pid: int) -> list[int]:
    text = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(c) for c in text.split()]


@pytest.mark.skipif(not pathlib.Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_leaves_no_process_behind(tmp_path, kind):
    args = [f"--output={tmp_path / 'set'}", "--clips=20000", "--size=32", "--workers=2"]
    process = command(*args, start_new_session=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.rglob("*.mp4"))) < 40 and time.monotonic() < deadline:
        time.sleep(0.1)
    workers = children(process.pid)
    assert len(workers) >= 2
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # as Ctrl-C in a terminal does
    else:
        process.kill()
    _, err = process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(pathlib.Path(f"/proc/{w}").exists() for w in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [w for w in workers if pathlib.Path(f"/proc/{w}").exists()]
    assert not (tmp_path / "set").exists()
    if kind == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command goes on from here" in err
        assert "Traceback" not in err
