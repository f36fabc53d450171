"""The real training command as several processes: one result, and a resume with another number of them."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from data.video_files import write
from processes import default_signals, free_port

from invideo_jax import metrics, runtime
from invideo_jax.checkpoint import read_params

STEPS = 80


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i in range(16):
        write(str(folder / f"{i:02d}.mp4"), frames=12, size=(64, 48))
    return folder


def start(videos, folder, count: int, *more: str) -> list[subprocess.Popen]:
    """`count` processes of one run, one CPU device each."""
    words = [sys.executable, "-m", "invideo_jax.train"]
    words += [
        f"--config={REPOSITORY}/configs/quickstart.py:masked,smoke",
        f"--config.data.train={videos}",
    ]
    words += [f"--workdir={folder}", f"--config.stages.masked.length={STEPS}"]
    words += ["--config.checkpoint.every=10", "--config.log.every=20", *more]
    words += ["--config.stages.masked.accumulation=2", "--config.evals.reconstruction.every=20"]
    port = free_port()
    several = lambda i: [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--num_processes={count}",
        f"--process_id={i}",
    ]
    return [
        subprocess.Popen(
            words + (several(i) if count > 1 else []),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "XLA_FLAGS": ""},
            preexec_fn=default_signals,
        )
        for i in range(count)
    ]


def finish(processes) -> list[int]:
    """Waits for all; gives their exit codes, and shows what they said when one failed."""
    said = [p.communicate(timeout=400) for p in processes]
    codes = [p.returncode for p in processes]
    assert set(codes) <= {0, runtime.RESTART}, "\n".join(o[-1500:] + e[-3000:] for o, e in said)
    return codes


def losses(folder) -> list[float]:
    lines = metrics.read_jsonl(folder / "metrics.jsonl")
    return [line["masked/loss"] for line in lines if "masked/loss" in line]


def evaluation(folder) -> list[float]:
    lines = metrics.read_jsonl(folder / "metrics.jsonl")
    key = "eval/reconstruction/loss"
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module")
def alone(videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert finish(start(videos, folder, 1)) == [0]
    return folder


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_equal_one(videos, alone, tmp_path, count):
    assert finish(start(videos, tmp_path, count)) == [0] * count
    assert losses(tmp_path)[0] == pytest.approx(losses(alone)[0], rel=1e-5)
    assert losses(tmp_path) == pytest.approx(
        losses(alone), rel=1e-3
    )  # rounding grows over 80 steps
    assert evaluation(tmp_path) == pytest.approx(evaluation(alone), rel=1e-3)
    assert len(losses(tmp_path)) == 4 and len(evaluation(tmp_path)) == 4


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (2, 1),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(4, 2, marks=pytest.mark.slow),
        pytest.param(2, 4, marks=pytest.mark.slow),
    ],
)
def test_preempted_and_resumed_with_another_number(videos, alone, tmp_path, first, second):
    """SIGTERM to one process: all save the same step and ask to be started again; others go on to the same end."""
    processes = start(videos, tmp_path, first)
    while not any(p.name.isdecimal() for p in (tmp_path / "checkpoints").glob("*")):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.05)
    processes[-1].send_signal(signal.SIGTERM)
    assert finish(processes) == [runtime.RESTART] * first
    saved = max(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal())
    assert 0 < saved < STEPS
    assert finish(start(videos, tmp_path, second)) == [0] * second
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-3)
    assert evaluation(tmp_path) == pytest.approx(evaluation(alone), rel=1e-3)
    ends = [read_params(folder)[0] for folder in (tmp_path, alone)]
    for one, other in zip(*(jax.tree.leaves(end) for end in ends), strict=True):
        np.testing.assert_allclose(one, other, atol=5e-3)
