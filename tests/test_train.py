"""The train loop itself: stages one after the other, no recompilation, stop on bad numbers, bad videos."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
from conftest import REPOSITORY
from data.video_files import write

from invideo_jax import checkpoint, evaluate, metrics, runtime, stored, train

RECIPE = '''"""Two short stages of the smoke recipe."""

from configs import quickstart

def get_config(arg=None):
    c = quickstart.get_config("masked,smoke")
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
    assert "encoder/stack/blocks/" in text and "layers, embed, heads" in text
    decayed = re.search(
        r"encoder/stack/blocks/attention/query/kernel +(\w+) +([0-9.]+) +([0-9.]+)", text
    )
    assert decayed.groups() == ("muon", "0.05", "1")
    spared = re.search(r"encoder/stack/blocks/norm1/scale +(\w+) +([0-9.]+) +([0-9.]+)", text)
    assert spared.groups() == ("adamw", "0", "1")
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def evaluated():
    """Options that make the two stages evaluate often, in two batches, and where to keep the whole run."""
    return [
        "--config.evals.reconstruction.every=3",
        "--config.evals.reconstruction.examples=13",
        "--config.stages.masked.length=6",
        "--config.checkpoint.every=4",
    ]


# Polls in order: before each step's evaluations, before each evaluation batch. Step 3 has polls 3 to 5, step
# 6 (the stage's last) 8 to 10, the second stage's step 3 (of 4) 13 to 15.
POLLS = [4, 8, 10, 11, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 5, 9, 14, 16))]


@pytest.mark.parametrize("poll", POLLS)
def test_stopped_at_any_poll_ends_the_same(run, evaluated, tmp_path, monkeypatch, poll):
    """A preemption notice anywhere, in evaluations and at the stage boundary too: bitwise the same end."""
    assert run(tmp_path / "whole", *evaluated) == 0
    polls = iter(range(1, 10**6))
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "preempted", lambda: next(polls) >= poll)
        assert run(tmp_path / "cut", *evaluated) == runtime.RESTART
    assert run(tmp_path / "cut", *evaluated) == 0
    one, other = leaves(tmp_path / "whole", 10), leaves(tmp_path / "cut", 10)
    assert all(np.array_equal(one[k], other[k]) for k in one)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_a_failed_save_is_tried_again(run, tmp_path, monkeypatch, capsys):
    """A full disk at one save costs nothing: an alarm, and the run goes on to its end."""
    real, failures = checkpoint.ocp.save_checkpointables_async, iter([OSError(28, "No space left")])

    def failing(*args, **kwargs):
        for error in failures:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", failing)
    monkeypatch.setattr(checkpoint.Checkpoints, "retry_due", lambda self: self._failure is not None)
    assert run(tmp_path / "w", "--config.checkpoint.every=4") == 0
    assert "ALARM: step 4 could not be saved" in capsys.readouterr().out
    assert {5, 6, 10} <= set(checkpoint.Checkpoints(tmp_path / "w" / "checkpoints").steps())


def test_damaged_meta_of_the_newest_step_falls_back(run, tmp_path, capsys):
    """The older step belongs to the stage before: its own state is built for it."""
    folder = tmp_path / "w"
    assert run(folder) == 0
    end = leaves(folder, 10)
    file = folder / "checkpoints" / "10" / "meta" / "data.json"
    file.write_bytes(file.read_bytes()[:-20])
    assert run(folder) == 0
    assert "step 10 is damaged" in capsys.readouterr().out
    assert (folder / "checkpoints" / "10.corrupt").is_dir()
    assert all(np.array_equal(end[k], x) for k, x in leaves(folder, 10).items())


def test_best_checkpoint_is_saved_when_it_is_rated(run, evaluated, tmp_path):
    words = ["--config.checkpoint.keep_last=1", "--config.checkpoint.keep_best=2"]
    assert run(tmp_path / "w", *evaluated, *words, "--config.stage_order=masked") == 0
    kept = checkpoint.Checkpoints(tmp_path / "w" / "checkpoints", trainer=False)
    rated = {
        r["step"]: r["eval/reconstruction/loss"]
        for r in lines(tmp_path / "w")
        if "eval/reconstruction/loss" in r
    }
    assert set(rated) == {3, 6} == set(kept.steps())
    assert {s: kept.meta(s)["checkpoint"]["metric"] for s in rated} == rated


@pytest.mark.slow
def test_held_out_clips_do_not_depend_on_batch_or_mesh(run, videos, tmp_path):
    """13 of 16 clips, in batches of 8 and of 16, on 8 devices and on 2 x 4."""
    found = []
    for number, words in enumerate(
        ([], ["--config.stages.masked.batch_size=16"], ["--config.mesh.tensor=2"])
    ):
        words = [*words, "--config.stage_order=masked", "--config.evals.reconstruction.examples=13"]
        words += ["--config.stages.masked.length=1", "--config.stages.masked.schedule.warmup=0"]
        words += [
            "--config.evals.reconstruction.every=1",
            "--config.stages.masked.optimizer.learning_rate=1e-30",
        ]
        words += ["--config.stages.masked.schedule.final=0"]
        assert run(tmp_path / str(number), *words) == 0
        found.append([r for r in lines(tmp_path / str(number)) if "eval/reconstruction/loss" in r])
    key = "eval/reconstruction/loss"
    assert [f[0][key] for f in found] == pytest.approx([found[0][0][key]] * 3, rel=1e-4)


def test_evaluate_gives_the_last_evaluation_of_the_run(run, evaluated, tmp_path, capsys, videos):
    folder = tmp_path / "w"
    assert run(folder, *evaluated, "--config.stage_order=masked") == 0
    last = [r for r in lines(folder) if "eval/reconstruction/loss" in r][-1]
    before = sorted((folder / "reconstructions").iterdir())
    assert evaluate.main([f"--workdir={folder}", "--config.evals.reconstruction.every=0"]) == 0
    said = json.loads((folder / "evaluation_00000006.json").read_text())
    assert said["reconstruction/loss"] == pytest.approx(last["eval/reconstruction/loss"], rel=1e-6)
    assert sorted((folder / "reconstructions").iterdir()) == before

    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(videos / "03.mp4", other / "a.mp4")
    assert evaluate.main([f"--workdir={folder}", f"--config.data.eval={other}"]) == 0
    alone = json.loads((folder / "evaluation_00000006.json").read_text())
    assert alone["reconstruction/loss"] != said["reconstruction/loss"]
    for words, message in [
        ([f"--workdir={tmp_path}/none"], "there is no"),
        ([f"--workdir={folder}", "--step=5"], "no such step|missing"),
        ([f"--workdir={folder}", "--weights=ema"], "ema"),
    ]:
        with pytest.raises(SystemExit) as ended:
            evaluate.main(words)
        assert ended.value.code in (2, 74)
        assert re.search(message, capsys.readouterr().err)
