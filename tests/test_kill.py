"""kill -9 at random moments, the same command again each time: the end is bitwise the end of a run never killed."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from data.video_files import write

from invideo_jax import metrics

STEPS = 60
OPTIONS = [
    f"--config.stages.masked.length={STEPS}",
    "--config.stages.masked.accumulation=2",
    "--config.stages.masked.ema_decay=0.9",
    "--config.stages.masked.clip.crop=random_resized",
    "--config.stages.masked.clip.flip=0.5",
    "--config.model.drop_path=0.2",
    "--config.checkpoint.every=4",
    "--config.evals.reconstruction.every=6",
    "--config.log.every=5",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i in range(20):
        write(str(folder / f"{i:02d}.mp4"), frames=12, size=(64, 48))
    return folder


def command(videos, folder, *more: str) -> list[str]:
    recipe = f"--config={REPOSITORY}/configs/quickstart.py:masked,smoke"
    data = f"--config.data.train={videos}"
    return [sys.executable, "-m", "invideo_jax.train", recipe, data, f"--workdir={folder}", *more]


def environment() -> dict[str, str]:
    return {**os.environ, "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1"}


def run_to_the_end(words: list[str]) -> str:
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=900
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def run_killed(words: list[str], seconds_after_first_line: float, marker: str) -> bool:
    """Starts the run and kills it some time after its first progress; True if it was still running."""
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    for line in process.stdout:
        if line.startswith(marker):
            break
    time.sleep(seconds_after_first_line)
    alive = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    process.wait()
    return alive


def digests(folder: pathlib.Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "invideo_jax.checkpoint", str(folder), "--json"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout)["steps"][-1]
    return {"number": last["step"]} | last["digests"]


def lines(folder: pathlib.Path) -> list[dict]:
    return [metrics.deterministic(r) for r in metrics.read_jsonl(folder / "metrics.jsonl")]


@pytest.mark.parametrize(
    ("kills", "workers"),
    [
        (3, 0),
        pytest.param(20, 0, marks=pytest.mark.slow),
        pytest.param(6, 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_random_moments(videos, tmp_path, kills, workers):
    seed = int(os.environ.get("KILL_SEED", "0"))
    draw = random.Random(seed)
    options = [*OPTIONS, f"--config.data.workers={workers}"]
    run_to_the_end(command(videos, tmp_path / "whole", *options))
    killed = tmp_path / "killed"
    hits = 0
    for number in range(kills):
        # Some kills fall into the start (restoring, compiling), most into steps, saves and evaluations.
        marker = "" if number % 5 == 4 else "masked"
        hits += run_killed(command(videos, killed, *options), draw.uniform(0, 1.0), marker)
    run_to_the_end(command(videos, killed, *options))
    assert hits >= min(kills, 3), f"only {hits} kills met a running process (KILL_SEED={seed})"
    end = digests(tmp_path / "whole")
    assert end["number"] == STEPS and {"params", "opt_state", "ema"} <= end.keys()
    assert digests(killed) == end
    assert lines(killed) == lines(tmp_path / "whole")


def test_finished_run_says_so_and_changes_nothing(videos, tmp_path):
    words = command(videos, tmp_path, "--config.stages.masked.length=4")
    run_to_the_end(words)
    before = digests(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()
    assert "This run is done: all 4 steps." in run_to_the_end(words)
    assert (digests(tmp_path), (tmp_path / "metrics.jsonl").read_bytes()) == before


def test_another_seed_is_another_end(videos, tmp_path):
    """The comparison above can fail."""
    ends = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        short = ["--config.stages.masked.length=4", f"--config.seed={seed}"]
        run_to_the_end(command(videos, folder, *short))
        ends.append(digests(folder))
    assert ends[0]["params"] != ends[1]["params"]
