"""A read that never ends is given up, listed, and replaced as any bad video, however it was read."""

import json
import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from held_file import held
from small_videos import write_videos

from invideo_jax.data import hanging, pipeline
from invideo_jax.data.bad import BadLedger
from invideo_jax.data.hanging import GivenUp, Patience, TooManyHang, call
from invideo_jax.data.pipeline import DataStalled, Loader
from invideo_jax.data.sources import open_source
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.data.workers import Busy

CLIP = ClipSpec(frames=2, size=16, stride=2)


def read(folder, ledger=None, **options):
    options = dict(batch_size=4, seed=4, stage="masked", steps=5, read_seconds=1.0) | options
    with Loader([open_source(str(folder))], clip=CLIP, ledger=ledger, **options) as batches:
        return list(batches)


def same_clips(one, other):
    return all(
        np.array_equal(a[k], b[k]) and [r["id"] for r in i] == [r["id"] for r in j]
        for (a, i), (b, j) in zip(one, other, strict=True)
        for k in a
    )


@pytest.fixture
def folder(tmp_path):
    """Seven videos; the batches without the third, which was bad when they were read."""
    write_videos(tmp_path / "v", 7)
    file = tmp_path / "v" / "clip_002.mp4"
    good = file.read_bytes()
    file.write_bytes(b"")
    without = read(tmp_path / "v")
    file.write_bytes(good)
    return tmp_path / "v", file, without


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(hanging.time, "monotonic", lambda: self.now)


class Entries:
    def __init__(self, *busy):
        self.busy = list(busy)

    def entries(self):
        return self.busy


def test_patience_counts_only_time_that_was_waited(monkeypatch):
    clock, one = Clock(monkeypatch), Busy(1, 10.0, 0, 7, "a")
    board = Entries(one)
    patience = Patience(board, 10.0)
    assert patience.interval == 0.5 and patience.overdue() == []
    clock.now += 3600  # the machine slept, or batches lay ready
    assert patience.overdue() == []
    for _ in range(17):
        clock.now += 0.5
        assert patience.overdue() == []  # 1 + 8.5
    board.busy = [Busy(1, 10.0, 0, 7, "/v/a.mp4"), Busy(1, 101.0, 0, 8, "b")]
    clock.now += 0.5
    assert patience.overdue() == [board.busy[0]]  # another path, the same read
    board.busy = [Busy(1, 150.0, 0, 7, "/v/a.mp4")]  # another read of it
    clock.now += 0.5
    assert patience.overdue() == []


def test_call_returns_raises_and_gives_up():
    assert call(lambda: 3, lambda: False, "p") == 3
    with pytest.raises(ZeroDivisionError):
        call(lambda: 1 / 0, lambda: False, "p")
    release = threading.Event()
    begin = time.monotonic()
    with pytest.raises(GivenUp):
        call(release.wait, lambda: time.monotonic() > begin + 0.3, "p")
    assert time.monotonic() - begin < 2
    release.set()


def test_only_so_many_threads_stay_behind(monkeypatch):
    monkeypatch.setattr(hanging, "MOST_LEFT", 2)
    monkeypatch.setattr(hanging, "_left", [])
    release, back = threading.Event(), threading.Event()
    with pytest.raises(GivenUp):
        call(back.wait, lambda: True, "returns")
    back.set()
    while hanging._left[0][0].is_alive():
        time.sleep(0.01)
    for name in ("a.mp4", "b.mp4"):  # the one that came back does not count
        with pytest.raises(GivenUp):
            call(release.wait, lambda: True, name)
    with pytest.raises(
        TooManyHang, match=r"At most 2 reads may hang.*\n  a.mp4\n(.*\n)*.*data.workers=1"
    ):
        call(release.wait, lambda: True, "c.mp4")
    release.set()


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_hangs_is_as_one_that_is_bad(folder, tmp_path, threads):
    folder, file, without = folder
    ledger = BadLedger(tmp_path / "bad.jsonl", max_share=1.0)
    begin = time.monotonic()
    with held(file):
        found = read(folder, ledger, threads=threads)
        assert time.monotonic() - begin < 5  # once, though it comes in every epoch
        assert same_clips(found, without)
        (row,) = map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
        assert row.pop("example").endswith("#2")
        assert row == dict(
            path=str(file), id="clip_002.mp4", reason="hanging", detail="no end within 1 s"
        )
        assert ledger.counts == {"hanging": 1}

        # An evaluation in the same run has an empty row, and does not wait again.
        begin = time.monotonic()
        shown = read(folder, ledger, train=False, steps=None, read_seconds=60.0)
        assert np.concatenate([a["valid"] for a, _ in shown]).tolist() == [True] * 2 + [False] + [
            True
        ] * 4 + [False]
        assert time.monotonic() - begin < 5

    # The file is well again. A later start leaves it out all the same, also one of another process of the run.
    again = BadLedger(tmp_path / "bad.jsonl", max_share=1.0)
    assert [i for _, i in read(folder, again)] == [i for _, i in found]
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 1
    other = BadLedger(tmp_path / "bad-1.jsonl", max_share=1.0, others=[tmp_path / "bad.jsonl"])
    assert same_clips(read(folder, other), without)
    assert not same_clips(read(folder), without)  # with its line taken out it is tried again


def test_a_pipe_in_the_place_of_a_file_is_never_opened(folder):
    folder, file, without = folder
    file.unlink()
    os.mkfifo(file)
    found = read(folder)
    assert same_clips(found, without)
    assert {f["reason"] for _, i in found for r in i for f in r["failed"]} == {"not_regular"}


def test_a_source_that_hangs_before_its_file_is_known(folder, tmp_path, monkeypatch):
    """Here the record itself cannot be read: a pipe without a writer."""
    folder, file, without = folder
    os.mkfifo(tmp_path / "pipe")
    source = open_source(str(folder))
    real = type(source).__getitem__

    def hang(self, index):
        if index == 2:
            open(tmp_path / "pipe").close()
        return real(self, index)

    monkeypatch.setattr(type(source), "__getitem__", hang)
    found = read(folder)
    assert same_clips(found, without)
    failed = [f for _, i in found for r in i for f in r["failed"]]
    assert {(f["path"], f["id"], f["reason"]) for f in failed} == {
        ("clip_002.mp4", "clip_002.mp4", "hanging")
    }
    os.close(os.open(tmp_path / "pipe", os.O_WRONLY))  # lets the thread go


def test_a_batch_that_waits_for_nothing_known_is_still_said(folder, monkeypatch):
    """`hang_seconds` stays the last resort, and a read given up counts as something that happened."""
    folder, file, without = folder
    monkeypatch.setattr(pipeline, "_CLOSE_SECONDS", 0.2)
    with held(file):
        with pytest.raises(DataStalled, match="clip_002.mp4"):
            read(folder, hang_seconds=0.5, read_seconds=60.0)
        assert same_clips(read(folder, hang_seconds=2.2, read_seconds=2.0), without)


WORKERS = """
    import sys, time
    import numpy as np
    from held_file import held
    from test_hanging import BadLedger, read, same_clips

    if __name__ == "__main__":
        folder, file, workers, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
        options = dict(read_seconds=2.0)  # healthy reads of a busy machine take less
        with held(file):
            here = read(folder, BadLedger(folder + "/0.jsonl", max_share=1.0), **options)
            ledger = BadLedger(folder + "/1.jsonl", max_share=1.0)
            there = read(folder, ledger, workers=workers, threads=threads, **options)
        assert ledger.counts == {"hanging": 1}
        assert [i for _, i in here] == [i for _, i in there]
        assert same_clips(here, there)
        assert open(folder + "/0.jsonl").read() == open(folder + "/1.jsonl").read()
        print("GOOD", flush=True)
"""


@pytest.mark.parametrize(
    "workers, threads",
    [
        (2, 2),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.slow),
    ],
)
def test_workers_that_hang_are_ended_and_give_the_same_batches(folder, tmp_path, workers, threads):
    folder, file, without = folder
    program = tmp_path / "program.py"
    program.write_text(textwrap.dedent(WORKERS))
    words = [sys.executable, program, folder, file, str(workers), str(threads)]
    here = os.path.dirname(__file__)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([here, *sys.path])}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=120)
    assert "GOOD" in done.stdout, done.stderr[-3000:]
