"""What the training loop does about its videos: reads that hang, and the same folder by another name."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import REPOSITORY
from data.held_file import held
from data.video_files import write

from invideo_jax import runtime, stored, train

OPTIONS = [
    "--config.stages.masked.length=4",
    "--config.evals.reconstruction.every=0",
    "--config.data.read_seconds=1",
    "--config.data.bad_share=0.5",
]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Eight videos, and the same eight without a byte in the fourth."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "good").mkdir()
    for i in range(8):
        write(str(folder / "good" / f"{i}.mp4"), frames=12, size=(64, 48))
    shutil.copytree(folder / "good", folder / "bad")
    (folder / "bad" / "3.mp4").write_bytes(b"")
    return folder


def words(data, folder, *more):
    recipe = f"--config={REPOSITORY}/configs/quickstart.py:masked,smoke"
    return [recipe, f"--config.data.train={data}", f"--workdir={folder}", *OPTIONS, *more]


@pytest.fixture
def run(monkeypatch):
    """The training command in this process."""
    monkeypatch.setattr(runtime, "start", lambda *_: None)  # must come before JAX is used at all
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return lambda *given: train.main(words(*given))


def leaves(folder):
    return stored.read_arrays(folder / "checkpoints", 4)


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)


def reasons(folder):
    rows = [json.loads(x) for x in (folder / "bad_examples.jsonl").read_text().splitlines()]
    return [(os.path.basename(row["path"]), row["reason"]) for row in rows]


def test_a_file_that_hangs_is_replaced_as_if_it_were_bad(run, videos, tmp_path, monkeypatch):
    """Stopped after two steps; when the run goes on, the file is well again, and left out all the same."""
    assert run(videos / "bad", tmp_path / "bad") == 0
    polls = iter(range(1, 10**6))
    with monkeypatch.context() as patch, held(videos / "good" / "3.mp4"):
        patch.setattr(runtime, "preempted", lambda: next(polls) >= 3)
        assert run(videos / "good", tmp_path / "cut") == runtime.RESTART
    assert run(videos / "good", tmp_path / "cut") == 0
    assert same(leaves(tmp_path / "cut"), leaves(tmp_path / "bad"))
    assert reasons(tmp_path / "cut") == [("3.mp4", "hanging")]
    assert reasons(tmp_path / "bad") == [("3.mp4", "empty")]


@pytest.mark.slow
def test_workers_that_hang_do_not_change_the_run(videos, tmp_path):
    def command(data, folder, *more):
        done = subprocess.run(
            [sys.executable, "-m", "invideo_jax.train", *words(data, folder, *more)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "XLA_FLAGS": ""},
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    command(videos / "bad", tmp_path / "bad")
    with held(videos / "good" / "3.mp4"):
        command(videos / "good", tmp_path / "hung", "--config.data.workers=1")
    assert reasons(tmp_path / "hung") == [("3.mp4", "hanging")]
    assert same(leaves(tmp_path / "hung"), leaves(tmp_path / "bad"))


def test_a_folder_may_be_spelled_otherwise_but_not_be_another(
    run, videos, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(videos)
    assert run("good", tmp_path / "w") == 0
    assert run(videos / "good", tmp_path / "w") == 0
    assert "This run is done" in capsys.readouterr().out
    (videos / "other").mkdir(exist_ok=True)
    for i in range(9):
        shutil.copy(videos / "good" / "0.mp4", videos / "other" / f"{i}.mp4")
    for other in ("other", f"{videos}/good,0.5;{videos}/good,0.5"):
        with pytest.raises(SystemExit) as ended:
            run(other, tmp_path / "w")
        assert ended.value.code == 2
        assert "data_found.source" in capsys.readouterr().err
