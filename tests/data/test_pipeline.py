"""Global batches don't depend on processes, workers, threads or where a run starts; bad videos and hangs are handled."""

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import video_files as files
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from small_videos import write_video, write_videos

from invideo_jax.data import pipeline
from invideo_jax.data.bad import BadLedger, NoReplacement, TooManyBad, stand_ins
from invideo_jax.data.decode import BadVideo
from invideo_jax.data.pipeline import DataStalled, Loader
from invideo_jax.data.sources import SourceError, open_source
from invideo_jax.data.sources.base import Source, make_example
from invideo_jax.data.transforms import ClipInfo, ClipSpec

CLIP = ClipSpec(frames=2, size=16, stride=2)
CENTRE = ClipSpec(frames=2, size=16, stride=2, crop="center", flip=0.0, views=1)


class Drawn(Source):
    """`size` clips without files: their label is their number; `bad` ones can't be loaded."""

    def __init__(self, size, bad=(), name="drawn", seconds=0.0):
        self.size, self.bad, self.name, self.seconds = size, frozenset(bad), name, seconds

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        if index in self.bad:
            raise BadVideo("missing", f"{self.name}/{index}.mp4", "gone")
        time.sleep(self.seconds)
        return make_example(
            id=f"{self.name}-{index}", video=b"", path=f"{self.name}/{index}.mp4", label=index
        )

    def identify(self, index):
        return f"{self.name}-{index}"

    def fingerprint(self):
        return f"{self.name}{self.size}"


def paint(video, spec, rng, **options):
    """Stands in for decoding: noise from the example's own generator."""
    made = ClipInfo((), (), (0, 0, 1, 1), False, padded=0, fallback=False, truncated=False)
    return rng.integers(0, 256, (spec.frames, spec.size, spec.size, 3), np.uint8), made


@pytest.fixture
def painted(monkeypatch):
    monkeypatch.setattr(pipeline, "load_clip", paint)


def loader(sources, weights=None, **options):
    options = dict(clip=CLIP, batch_size=6, seed=3, stage="masked", steps=4, threads=0) | options
    return Loader(sources, weights, **options)


def read(sources, weights=None, **options):
    with loader(sources, weights, **options) as batches:
        return list(batches)


def same(one, other):
    """Whether two lists of (arrays, info) are equal, bit for bit."""
    return len(one) == len(other) and all(
        i == j and a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        for (a, i), (b, j) in zip(one, other)
    )


# ---------------------------------------------------------------- the same batches, however read


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8, 16])
def test_processes_assemble_the_same_global_batches(painted, processes):
    sources, options = [Drawn(50), Drawn(9, {2}, "few")], dict(batch_size=48, steps=2)
    whole = read(sources, [0.7, 0.3], **options)
    parts = [
        read(sources, [0.7, 0.3], rows=np.arange(48)[p::processes], **options)
        for p in range(processes)
    ]
    for step, (arrays, info) in enumerate(whole):
        for p in range(processes):
            part, part_info = parts[p][step]
            for name in arrays:
                assert np.array_equal(arrays[name][p::processes], part[name])
            assert info[p::processes] == part_info


@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_rows_start_and_threads(painted, data):
    """Mixing and bad videos on: rows of any process, from any step, are those of the whole stream."""
    draw = data.draw
    sizes = draw(st.lists(st.integers(4, 30), min_size=1, max_size=3))
    weights = [draw(st.sampled_from([0.1, 0.5, 1, 3])) for _ in sizes]
    bad = [draw(st.sets(st.integers(0, n - 1), max_size=n // 3)) for n in sizes]
    sources = [Drawn(n, b, f"s{i}") for i, (n, b) in enumerate(zip(sizes, bad))]
    batch = draw(st.integers(1, 4))
    rows = draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=6))
    start = draw(st.integers(0, 5))
    options = dict(
        batch_size=batch, seed=draw(st.integers(0, 9)), stage=draw(st.sampled_from("ab"))
    )
    whole = read(sources, weights, steps=6, **options)
    part = read(
        sources,
        weights,
        steps=6 - start,
        start_step=start,
        rows=rows,
        threads=draw(st.integers(0, 3)),
        **options,
    )
    assert same(
        part, [({k: a[k][rows] for k in a}, [i[r] for r in rows]) for a, i in whole[start:]]
    )


def keeps(row):
    """What the filters of the next test leave, in plain Python."""
    return row["split"] == "train" and row["seconds"] >= 1 and row.get("label", -1) >= 0


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A function that opens manifests of the rows given, filtered; their files are never decoded."""
    folder = tmp_path_factory.mktemp("lists")
    for number in range(3):
        (folder / f"{number}.mp4").write_bytes(b"x")

    def open_lists(manifests):
        for number, rows in enumerate(manifests):
            text = "\n".join(map(json.dumps, rows))
            (folder / f"{number}.jsonl").write_text(text)
        return [
            open_source(str(folder / f"{n}.jsonl"), split="train", min_seconds=1.0, labelled=True)
            for n in range(len(manifests))
        ]

    return open_lists


@st.composite
def manifests(draw):
    """Rows of one to three manifests, in any order: what the filters take, what they leave, absent files."""
    row = st.fixed_dictionaries(
        dict(
            path=st.sampled_from(["0.mp4", "1.mp4", "2.mp4"]),
            split=st.sampled_from(["train", "validation"]),
            seconds=st.sampled_from([0.5, 1.0, 7.0]),
        ),
        optional=dict(label=st.integers(-1, 3)),
    )
    made = []
    for number in range(draw(st.integers(1, 3))):
        good = [dict(path="0.mp4", split="train", seconds=2.0, label=i) for i in range(8)]
        bad = draw(st.integers(0, 2)) * [good[0] | {"path": "absent.mp4"}]
        rows = draw(st.permutations(good + bad + draw(st.lists(row, max_size=12))))
        made.append([r | {"id": f"{number}/{i}"} for i, r in enumerate(rows)])
    return made


@settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
)
@given(manifests=manifests(), seed=st.integers(0, 9), data=st.data())
def test_mixed_and_filtered_lists_on_any_number_of_processes(painted, lists, manifests, seed, data):
    weights = [data.draw(st.sampled_from([0.1, 0.5, 1, 3])) for _ in manifests]
    kept = [{row["id"] for row in filter(keeps, rows)} for rows in manifests]
    sources = lists(manifests)
    assert [len(source) for source in sources] == list(map(len, kept))
    steps = -(-sum(map(len, kept)) // 8)
    whole = read(sources, weights, batch_size=8, seed=seed, steps=steps)
    rows = [row for _, info in whole for row in info]
    absent = {r["id"] for rows_ in manifests for r in rows_ if r["path"] == "absent.mp4"}
    for row in rows:  # never what was filtered away, also not in the place of a bad one
        assert {row["id"], row["want"]} <= kept[int(row["want"][0])]
        assert (row["bad"] == "missing") == (row["want"] in absent) and row["id"] not in absent
    if len(manifests) == 1:  # one epoch: each once
        assert {row["want"] for row in rows[: len(kept[0])]} == kept[0]
    for processes in (1, 2, 4, 8):
        start = data.draw(st.integers(0, steps - 1))
        parts = [
            read(
                lists(manifests),  # opened by each process for itself
                weights,
                batch_size=8,
                seed=seed,
                steps=steps - start,
                start_step=start,
                rows=np.arange(8)[p::processes],
            )
            for p in range(processes)
        ]
        for p, part in enumerate(parts):
            mine = slice(p, None, processes)
            wanted = [({k: a[k][mine] for k in a}, info[mine]) for a, info in whole[start:]]
            assert same(part, wanted)


def test_filtering_happens_before_the_order(tmp_path, painted):
    write_videos(tmp_path, 4)
    both, only = tmp_path / "both.csv", tmp_path / "only.csv"
    both.write_text("path,split\n" + "".join(f"clip_00{i}.mp4,{'ab'[i % 2]}\n" for i in range(4)))
    only.write_text("path\nclip_001.mp4\nclip_003.mp4\n")
    filtered = read([open_source(str(both), split="b")], batch_size=2)
    alone = read([open_source(str(only))], batch_size=2)
    assert [i["id"] for _, info in filtered for i in info] == [
        i["id"] for _, info in alone for i in info
    ]
    assert same([(a, []) for a, _ in filtered], [(a, []) for a, _ in alone])


def test_what_a_batch_holds(tmp_path):
    paths = write_videos(tmp_path, 5)
    (arrays, info), *_ = read([open_source(str(tmp_path))], batch_size=4, start_step=7, threads=2)
    assert {k: (a.shape, a.dtype.name) for k, a in arrays.items()} == {
        "video": ((4, 2, 16, 16, 3), "uint8"),
        "position": ((4,), "uint32"),
        "label": ((4,), "int32"),
        "valid": ((4,), "bool"),
    }
    assert arrays["position"].tolist() == [28, 29, 30, 31] and arrays["valid"].all()
    assert set(arrays["label"]) == {-1} and arrays["video"].std() > 5
    for row in info:
        assert row["path"] in paths and row["id"] == row["want"] == os.path.basename(row["path"])
        assert row["bad"] is None and row["failed"] == []
        assert (row["truncated"], row["fallback"], row["padded"]) == (False, False, 0)


def test_how_clips_were_made_is_said_and_counted(tmp_path):
    write_videos(tmp_path / "v", 1)
    write_video(tmp_path / "v" / "short.mp4", frames=1)
    files.write(str(tmp_path / "v" / "guessed.avi"), frames=40)  # its times must be counted
    files.write(str(tmp_path / "whole.mkv"), frames=60)
    data = (tmp_path / "whole.mkv").read_bytes()
    (tmp_path / "v" / "cut.mkv").write_bytes(data[: int(0.6 * len(data))])
    ledger = BadLedger(tmp_path / "bad.jsonl", max_share=0.0, min_count=0)
    batches = read([open_source(str(tmp_path / "v"))], batch_size=4, steps=3, ledger=ledger)
    rows = {row["id"]: row for _, info in batches for row in info}
    said = {k: (r["truncated"], r["fallback"], r["padded"]) for k, r in rows.items()}
    assert said == {
        "clip_000.mp4": (False, False, 0),
        "short.mp4": (False, False, 1),
        "guessed.avi": (False, True, 0),
        "cut.mkv": (True, False, 0),
    }
    assert ledger.notes == {"truncated": 1, "padded": 3, "fallback": 3} and ledger.count == 0
    (line,) = (tmp_path / "bad.jsonl").read_text().splitlines()
    path = str(tmp_path / "v" / "cut.mkv")
    listed = dict(path=path, id="cut.mkv", reason="truncated", detail="used up to the cut")
    assert json.loads(line) == listed


def test_randomness_is_of_seed_stage_and_position(painted):
    base = read([Drawn(6)])
    videos = np.concatenate([a["video"] for a, _ in base])
    assert len({v.tobytes() for v in videos}) == 24  # each position its own, also in later epochs
    assert same(base, read([Drawn(6)]))
    for other in (dict(seed=4), dict(stage="other")):  # the pictures, not only which examples
        assert not any(
            (a["video"] == b["video"]).all()
            for (a, _), (b, _) in zip(base, read([Drawn(6)], **other))
        )
    alone = loader([Drawn(6)]).load(17)
    assert np.array_equal(alone["video"], videos[17])


# ---------------------------------------------------------------- bad videos


def test_bad_ones_are_replaced_from_their_own_source(painted):
    sources = [Drawn(12, {3, 4}, "a"), Drawn(12, {5}, "b")]
    batches = read(sources, batch_size=24, steps=3)
    rows = [row | {"label": label} for a, info in batches for row, label in zip(info, a["label"])]
    replaced = [row for row in rows if row["bad"]]
    assert {row["want"] for row in replaced} == {"a-3", "a-4", "b-5"} and len(replaced) == 9
    for row in replaced:
        assert row["bad"] == "missing" and row["id"][0] == row["want"][0] != row["id"]
        assert row["failed"][0] == dict(
            path=f"{row['source']}/{row['want'][2:]}.mp4",
            id=row["want"],
            reason="missing",
            detail="gone",
        )
        bad = sources["ab".index(row["source"])].bad
        expected = next(r for r in stand_ins(3, int(row["want"][2:]), 12) if r not in bad)
        assert row["id"] == f"{row['source']}-{expected}" and row["label"] == expected
    clean = read([Drawn(12, name="a"), Drawn(12, name="b")], batch_size=24, steps=3)
    for (a, info), (b, _) in zip(batches, clean):
        good = [not row["bad"] for row in info]
        assert all(np.array_equal(a[k][good], b[k][good]) for k in a)  # the others are untouched
        assert a["valid"].all()


def test_broken_files_are_counted_by_reason(tmp_path):
    write_videos(tmp_path / "v", 6)
    (tmp_path / "v" / "clip_001.mp4").write_bytes(b"")
    (tmp_path / "v" / "clip_002.mp4").write_text("<html>404</html>")
    data = (tmp_path / "v" / "clip_003.mp4").read_bytes()
    (tmp_path / "v" / "clip_003.mp4").write_bytes(data[: len(data) // 3])
    os.mkfifo(tmp_path / "v" / "pipe.mp4")
    ledger = BadLedger(tmp_path / "bad.jsonl")
    (batch,) = read([open_source(str(tmp_path / "v"))], batch_size=7, steps=1, ledger=ledger)
    assert batch[0]["valid"].all() and ledger.seen == 7
    assert (
        ledger.counts["empty"] == 1
        and ledger.counts["not_video"] == 1
        and ledger.counts["not_regular"] == 1
    )
    assert ledger.count == 4 == len((tmp_path / "bad.jsonl").read_text().splitlines())


def test_budget_stops_the_run(painted):
    ledger = BadLedger(None, max_share=0.1, min_count=2)
    with loader([Drawn(20, {1, 2, 3, 4})], batch_size=20, ledger=ledger) as batches:
        with pytest.raises(TooManyBad, match="4 bad of 20"):
            next(batches)


def test_nothing_good_to_take_instead(painted, monkeypatch):
    with pytest.raises(NoReplacement) as error:
        read([Drawn(6, range(6))])
    assert "all 6 tried of the 6" in str(error.value) and "drawn/" in str(error.value)
    monkeypatch.setattr(pipeline, "_TRIES", 2)
    with pytest.raises(NoReplacement, match="all 3 tried of the 40"):
        read([Drawn(40, range(40))])


def test_other_errors_are_not_taken_for_bad_videos(monkeypatch):
    def broken(*args, **options):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(pipeline, "load_clip", broken)
    with loader([Drawn(6)]) as batches:
        for _ in range(2):  # and it stays an error: no StopIteration that would look like the end
            with pytest.raises(ZeroDivisionError, match="a bug"):
                next(batches)


# ---------------------------------------------------------------- evaluation


def test_evaluation_reads_each_once_and_fills_up(painted):
    sources = [Drawn(5, name="a"), Drawn(3, {1}, "b")]
    ledger = BadLedger(None, max_share=1.0)
    batches = read(sources, train=False, batch_size=3, steps=None, ledger=ledger)
    labels = np.concatenate([a["label"] for a, _ in batches])
    valid = np.concatenate([a["valid"] for a, _ in batches])
    rows = [row for _, info in batches for row in info]
    assert labels.tolist() == [0, 1, 2, 3, 4, 0, -1, 2, -1]
    assert valid.tolist() == [True] * 6 + [False, True, False]
    assert [row["id"] for row in rows[5:]] == ["b-0", "b-1", "b-2", ""]
    assert [row["bad"] for row in rows] == [None] * 6 + ["missing", None, None]
    assert not batches[2][0]["video"][[0, 2]].any() and batches[2][0]["video"][1].any()
    assert ledger.count == 1


@pytest.mark.parametrize("processes", [2, 3])
def test_evaluation_on_several_processes(painted, processes):
    whole = read([Drawn(7)], train=False, batch_size=6, steps=None)
    assert len(whole) == 2
    for p in range(processes):
        part = read(
            [Drawn(7)], train=False, batch_size=6, steps=None, rows=np.arange(6)[p::processes]
        )
        assert same(part, [({k: a[k][p::processes] for k in a}, i[p::processes]) for a, i in whole])


# ---------------------------------------------------------------- waiting, ending, errors


def test_time_waited_is_the_consumers(painted):
    with loader([Drawn(60, seconds=0.02)], batch_size=4, steps=6) as batches:
        next(batches)
        first = batches.wait_seconds
        assert 0.08 <= first < 2
        time.sleep(0.5)  # the next ones come meanwhile
        next(batches)
        assert batches.wait_seconds - first < 0.05


def test_prefetch_bounds_what_is_read_ahead(monkeypatch):
    loaded = []

    def count(video, spec, rng, **options):
        loaded.append(1)
        return paint(video, spec, rng)

    monkeypatch.setattr(pipeline, "load_clip", count)
    with loader([Drawn(60)], batch_size=4, steps=50, threads=2) as batches:
        next(batches)
        time.sleep(0.4)
        # handed out, two ready, one in hand; and four examples in the threads' buffer
        assert len(loaded) <= 4 * 4 + 2 * 2


def test_hang_is_an_error_that_names_the_file(monkeypatch, capfd):
    monkeypatch.setattr(pipeline, "_CLOSE_SECONDS", 0.2)

    def hang(video, spec, rng, **options):
        time.sleep(6)
        return paint(video, spec, rng)

    monkeypatch.setattr(pipeline, "load_clip", hang)
    begin = time.monotonic()
    with pytest.raises(DataStalled) as error:
        with loader([Drawn(6)], hang_seconds=1.0) as batches:
            next(batches)
    assert time.monotonic() - begin < 5
    assert "within 1 s (data.hang_seconds)" in str(error.value) and "on drawn/" in str(error.value)
    assert "in hang" in capfd.readouterr().err  # the stacks


def test_close_is_quick_and_final(painted):
    with loader([Drawn(6)], steps=None) as batches:
        next(batches)
        begin = time.monotonic()
        batches.close()
        batches.close()
        assert time.monotonic() - begin < 1 and not batches._thread.is_alive()
        with pytest.raises(RuntimeError, match="closed"):
            for _ in range(10):
                next(batches)
    with pytest.raises(RuntimeError, match="must be entered"):
        next(loader([Drawn(6)]))


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(batch_size=7), "hold 6 examples, batch_size=7"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(batch_size=2.0), "batch_size=2.0"),
        (dict(rows=[0, 6]), r"rows in \[0, 6\)"),
        (dict(rows=[]), "at least one"),
        (dict(seed=-1), "seed=-1"),
        (dict(workers=-1), "workers=-1"),
        (dict(weights=[0.0]), "above 0"),
        (dict(steps=2**31), "at most 2\\^32 examples"),
    ],
)
def test_errors_before_anything_starts(options, words):
    with pytest.raises(ValueError, match=words):
        loader([Drawn(6)], **options)


def test_shared_memory_is_checked_before_workers_die_of_it(monkeypatch):
    class Full:
        f_bavail, f_frsize = 16, 1 << 20

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    big = ClipSpec(frames=16, size=224)
    with pytest.raises(SourceError, match="55 MiB for data.workers=4; 16 MiB are free.*--shm-size"):
        loader([Drawn(6)], clip=big, workers=4)
    loader([Drawn(6)], clip=big, workers=1)


def test_loading_pickles(tmp_path):
    write_videos(tmp_path, 2)
    load = loader([open_source(str(tmp_path))], batch_size=2).load
    assert np.array_equal(load(5)["video"], pickle.loads(pickle.dumps(load))(5)["video"])


# ---------------------------------------------------------------- worker processes (a start costs seconds each)

WORKERS = """
    import gc, os, sys, time
    import numpy as np
    from absl import flags
    from invideo_jax.data.bad import BadLedger
    from invideo_jax.data.pipeline import Loader
    from invideo_jax.data.sources import open_source
    from invideo_jax.data.transforms import ClipSpec

    def make(folder, workers, **options):
        options = dict(batch_size=4, seed=1, stage="masked", steps=5) | options
        sources = [open_source(folder + "/list.jsonl", split="train", min_seconds=1.0, labelled=True), open_source(folder)]
        return Loader(sources, [0.4, 0.6], clip=ClipSpec(frames=2, size=16, stride=2), workers=workers, **options)

    def equal(folder):
        gc.disable()
        assert not flags.FLAGS.is_parsed()
        results = []
        for workers, threads in ((0, 0), (1, 2), (2, 1)):
            with make(folder, workers, threads=threads) as batches:
                results.append(list(batches))
        for other in results[1:]:
            for (a, i), (b, j) in zip(results[0], other, strict=True):
                assert i == j and all(np.array_equal(a[k], b[k]) for k in a)
        rows = [row for _, info in results[2] for row in info]
        assert any(row["bad"] == "empty" for row in rows)
        listed = [row["id"] for row in rows if row["source"].endswith("list.jsonl")]
        assert len(listed) == 8 and set(listed) == {"clip_000.mp4", "clip_005.mp4"}, listed
        time.sleep(0.5)  # Grain frees in a thread
        memory = [o for o in gc.get_objects() if type(o).__name__ == "SharedMemory" and o.buf is not None]
        assert not memory, memory  # nothing waits for the collector
        with make(folder, 2, train=False, batch_size=3, steps=None) as batches:
            valid = np.concatenate([a["valid"] for a, _ in batches])
        T, F = True, False
        assert valid.tolist() == [T, F, T] + [T, T, F, T, T, T, T] + [F, F], valid

    def killed(folder):
        import multiprocessing, signal
        with make(folder, 1, steps=None) as batches:
            next(batches)
            os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
            try:
                while True:
                    next(batches)
            except Exception as error:
                print("ERROR", type(error).__name__, error)

    def orphans(folder):
        import multiprocessing
        with make(folder, 2, steps=None) as batches:
            next(batches)
            print("PIDS", batches._board._memory.name, *[child.pid for child in multiprocessing.active_children()], flush=True)
            while True:
                next(batches)

    def unclosed(folder):
        batches = make(folder, 1, steps=None).__enter__()
        next(batches)
        print("ENDS", flush=True)

    if __name__ == "__main__":
        globals()[sys.argv[1]](sys.argv[2])
        print("GOOD", flush=True)
"""


@pytest.fixture
def program(tmp_path):
    """Starts the program above with a folder of seven videos of which one is empty, and a list of six of them."""
    write_videos(tmp_path / "videos", 7)
    (tmp_path / "videos" / "clip_002.mp4").write_bytes(b"")
    rows = [dict(path=f"clip_00{i}.mp4", split="train", seconds=1.5, label=i) for i in range(6)]
    rows[1]["split"], rows[3]["seconds"], rows[4]["label"] = "validation", 0.5, -1
    (tmp_path / "videos" / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(WORKERS))
    started = []

    def start(name):
        started.append(
            subprocess.Popen(
                [sys.executable, str(file), name, str(tmp_path / "videos")],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()  # not communicate(): an orphan would hold the pipes open
        process.stderr.close()


def test_workers_give_the_same_batches_without_parsed_flags(program):
    out, err = program("equal").communicate(timeout=120)
    assert "GOOD" in out, err[-3000:]
    assert "leaked" not in err and "Traceback" not in err, err[
        -3000:
    ]  # shared memory is given back


def test_a_killed_worker_is_said(program):
    out, err = program("killed").communicate(timeout=120)
    assert "GOOD" in out, err[-3000:]
    assert (
        "ERROR WorkerDied A data worker must not end by itself; one ended with exit code -9" in out
    )
    assert "out of memory" in out


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_a_killed_parent(program, how):
    process = program("orphans")
    line = process.stdout.readline().split()
    assert line[:1] == ["PIDS"] and len(line) == 4, process.stderr.read()[-3000:]
    memory, pids = "/dev/shm/" + line[1], [int(pid) for pid in line[2:]]
    assert os.path.exists(memory) or sys.platform != "linux"
    process.send_signal(how)
    process.wait(timeout=20)
    limit = time.monotonic() + 10
    while (any(map(running, pids)) or os.path.exists(memory)) and time.monotonic() < limit:
        time.sleep(0.1)
    left = [pid for pid in pids if running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert not os.path.exists(memory)  # the resource tracker freed it, and ended


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_loader_left_open_does_not_keep_the_program(program):
    begin = time.monotonic()
    out, err = program("unclosed").communicate(timeout=120)
    assert "ENDS" in out and time.monotonic() - begin < 60, err[-2000:]
