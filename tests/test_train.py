"""The train loop itself: stages one after the other, no recompilation, stop on bad numbers, bad videos."""

import json
import shutil

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from data.video_files import write

from invideo_jax import metrics, runtime, stored, train

RECIPE = '''"""Two short stages of the smoke recipe."""

from configs import quickstart

def get_config(arg=None):
    c = quickstart.get_config("smoke")
    c.stage_order = ("masked", "longer")
    c.stages.masked.length = "6 steps"
    c.stages.masked.schedule.warmup = "2 steps"
    c.stages.longer = c.stages.masked.copy_and_resolve_references()
    c.stages.longer.length = "4 steps"
    c.stages.longer.mask.ratio = 0.75
    c.checkpoint.every = "6 steps"
    c.checkpoint.keep_last = 5
    c.evals.reconstruction.every = "0 steps"
    c.log.every = "1 step"
    return c
'''


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for i in range(16):
        write(str(folder / f"{i:02d}.mp4"), frames=12, size=(64, 48))
    return folder


@pytest.fixture
def run(videos, tmp_path, monkeypatch):
    """Runs the training command in this process, on 8 devices; gives its exit code."""
    monkeypatch.setattr(runtime, "start", lambda *_: None)  # must come before JAX is used at all
    recipe = tmp_path / "two_stages.py"
    recipe.write_text(RECIPE)
    monkeypatch.syspath_prepend(str(REPOSITORY))

    def call(folder, *words, data=videos):
        given = [f"--config={recipe}", f"--config.data.train={data}", f"--workdir={folder}"]
        return train.main([*given, *words])

    return call


def lines(folder):
    return [metrics.deterministic(r) for r in metrics.read_jsonl(folder / "metrics.jsonl")]


def leaves(folder, step):
    return stored.read_arrays(folder / "checkpoints", step)


def test_two_stages_one_after_the_other(run, tmp_path):
    folder = tmp_path / "whole"
    assert run(folder) == 0
    seen = [next(k for k in line if k.endswith("/loss")) for line in lines(folder)]
    assert seen == ["masked/loss"] * 6 + ["longer/loss"] * 4
    assert [line["step"] for line in lines(folder)] == list(range(1, 11))
    # A fresh schedule and optimiser in the second stage: its first rate is the warm-up's first.
    rates = [
        line.get("masked/learning_rate", line.get("longer/learning_rate")) for line in lines(folder)
    ]
    assert rates[0] == rates[6] == 0.0 and rates[5] != rates[6]
    first, second = leaves(folder, 6), leaves(folder, 10)
    assert int(first["step"]) == 6 and int(second["step"]) == 4

    # Killed between "stage finished" and "next one started": the boundary's checkpoint is the last.
    cut = tmp_path / "cut"
    shutil.copytree(folder, cut)
    shutil.rmtree(cut / "checkpoints" / "10")
    assert run(cut) == 0
    again = leaves(cut, 10)
    assert again.keys() == second.keys()
    assert all(np.array_equal(again[k], second[k]) for k in second)
    assert lines(cut) == lines(folder)


def test_nothing_compiles_after_the_first_step(run, tmp_path, monkeypatch):
    compiled, counts = [], []
    listener = lambda event, seconds, **_: compiled.append(event)
    add = metrics.MetricsBuffer.add

    def noting(self, step, values):
        counts.append(sum("backend_compile" in event for event in compiled))
        return add(self, step, values)

    monkeypatch.setattr(metrics.MetricsBuffer, "add", noting)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        assert (
            run(tmp_path / "w", "--config.stage_order=masked", "--config.stages.masked.length=12")
            == 0
        )
    finally:
        jax.monitoring.clear_event_listeners()
    assert counts[0] > 0, "the listener sees compilations"
    # The checkpoint after step 6 compiles its digests; steps themselves compile nothing any more.
    assert counts[0] == counts[5] and counts[6] == counts[11]
    assert len(counts) == 12


def test_stops_when_numbers_stay_bad(run, tmp_path, capsys):
    """An absurd rate makes every update infinite: none is applied, and the run ends with code 65."""
    words = [
        "--config.stages.masked.optimizer.learning_rate=1e38",
        "--config.stages.masked.optimizer.weight_decay=1e38",
        "--config.stages.masked.schedule.warmup=0",
        "--config.stages.masked.length=50",
        "--config.guard.nonfinite_in_a_row=4",
    ]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "w", *words)
    assert ended.value.code == runtime.NUMBERS
    text = capsys.readouterr().err
    assert "4 updates in a row were not finite" in text and "update of " in text


def test_bad_videos_are_replaced_listed_and_bounded(run, videos, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(videos, data)
    for name in ("00.mp4", "01.mp4", "02.mp4"):
        (data / name).write_bytes(b"not a video at all" * 50)
    words = ["--config.stages.masked.length=4", "--config.stage_order=masked"]
    assert run(tmp_path / "w", *words, "--config.data.bad_share=0.5", data=data) == 0
    rows = [json.loads(x) for x in (tmp_path / "w" / "bad_examples.jsonl").read_text().splitlines()]
    assert {row["path"].rsplit("/", 1)[-1] for row in rows} == {"00.mp4", "01.mp4", "02.mp4"}
    assert len(rows) == 3 and all(row["reason"] and row["detail"] for row in rows)

    strict = ["--config.data.bad_share=0.01", "--config.data.bad_count=2"]
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "v", *words, *strict, data=data)
    assert ended.value.code == 2
    assert "may be bad; got 3 bad" in capsys.readouterr().err


def test_explain_names_lines_and_places(run, tmp_path, capsys):
    assert run(tmp_path / "w", "--explain", "--config.seed=3", "--config.mesh.fsdp=2") == 0
    text = capsys.readouterr().out
    assert "command line: --config.seed=3" in text
    assert "two_stages.py:9" in text  # c.stages.masked.length = "6 steps"
    assert "mesh: data=4, fsdp=2, tensor=1, sequence=1 (8 devices)" in text
    assert "encoder/blocks/" in text and "layers, embed, heads" in text
    assert not (tmp_path / "w").exists()
