"""What a user reads after a mistake: one screen with the fix, exit code 2, before any long work."""

import json
import re
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY
from data.video_files import write

from invideo_jax import runtime, train

RECIPE = f"{REPOSITORY}/configs/quickstart.py:masked,smoke"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A folder of twelve small videos."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(12):
        write(str(folder / f"{i:02d}.mp4"), frames=10, size=(64, 48))
    return folder


# What is typed after the recipe, and what must be read. {videos} is a good folder.
MISTAKES = {
    "misspelt key": ("--config.stages.masked.optimizer.learning_rat=1", "Did you mean"),
    "unknown section": ("--config.trainer.lr=1", "Unknown config key trainer.lr"),
    "key of another place": ("--config.batch_size=4", "Did you mean stages.masked.batch_size"),
    "section set as a value": ("--config.mesh=4", "is a section; set one of its keys"),
    "word for a number": ("--config.seed=seven", "seed must be a value of type int"),
    "fraction for a count": ("--config.stages.masked.batch_size=2.5", "of type int"),
    "no equals sign": ("--config.seed", "must look like --config.a.b=value"),
    "not a number": ("--config.stages.masked.optimizer.b1=nan", "must be a finite number"),
    "negative seed": ("--config.seed=-1", "seed must be between 0 and"),
    "unknown flag": ("--worksdir=x", 'Did you mean "--workdir"'),
    "mask ratio of one": ("--config.stages.masked.mask.ratio=1.0", "between 0 and 1"),
    "mask ratio that hides nothing": (
        "--config.stages.masked.mask.ratio=0.01",
        "must hide some and leave some",
    ),
    "unknown mask": ("--config.stages.masked.mask.name=tub", 'Did you mean "tube"'),
    "unknown model": ("--config.model.name=videomae", 'Did you mean "video_mae"'),
    "unknown size": ("--config.model.size=XXL", "size must be a row of the table"),
    "unknown optimizer": ("--config.stages.masked.optimizer.name=adam", 'Did you mean "adamw"'),
    "unknown schedule": ("--config.stages.masked.schedule.name=cosin", 'Did you mean "cosine"'),
    "unknown remat policy": ("--config.model.remat=some", "must be one of"),
    "zero learning rate": ("--config.stages.masked.optimizer.learning_rate=0", "greater than 0"),
    "final rate above the peak": ("--config.stages.masked.schedule.final=1", "must be at most"),
    "odd frames": ("--config.stages.masked.clip.frames=7", "must be a multiple of tubelet"),
    "size that patches do not divide": ("--config.stages.masked.clip.size=50", "multiple of patch"),
    "unknown sampling": ("--config.stages.masked.clip.sampling=sparse", "sampling must be one of"),
    "accumulation": ("--config.stages.masked.accumulation=3", "The nearest that does is"),
    "length without unit": ("--config.stages.masked.length=long", "an amount and a unit"),
    "length of nothing": ("--config.stages.masked.length=0", "must be more than nothing"),
    "share of nothing": ("--config.stages.masked.length=50%", "set total_steps"),
    "unknown stage": ("--config.stage_order=mask", 'Did you mean "masked"'),
    "reads longer than hangs": ("--config.guard.hang_seconds=100", "at most a quarter of guard"),
    "no stage": ("--config.stage_order=", "must name at least one stage"),
    "stage twice": ("--config.stage_order=masked,masked", "name each stage once"),
    "two sizes to fill in": ("--config.mesh.fsdp=-1", "must leave one size to fill in"),
    "mesh larger than the machine": ("--config.mesh.tensor=3", "ivisors"),
    "batch the mesh does not divide": ("--config.stages.masked.batch_size=12", "Nearest"),
    "heads the mesh does not divide": (
        "--config.mesh.tensor=4 --config.mesh.data=2",
        "heads",
    ),
    "pattern that matches nothing": (
        "--config.stages.masked.optimizer.freeze=^encodr/",
        "match",
    ),
    "multiplier without a factor": (
        "--config.stages.masked.optimizer.lr_multipliers=encoder",
        "'pattern=factor'",
    ),
    "broken pattern": ("--config.stages.masked.optimizer.freeze=a(", "regular expressions"),
    "no data": ("--config.data.train=", "data.train must name the training videos"),
    "missing data": ("--config.data.train={videos}x", "must exist"),
    "folder without videos": ("--config.data.train={videos}/empty", "no video|0"),
    "unknown kind of data": ("--config.data.train=tfsd:clips", 'Did you mean "tfds"'),
    "fewer videos than a batch": (
        "--config.stages.masked.batch_size=64 --config.stages.masked.length=2",
        "must hold at least one batch",
    ),
    "manifest without a path": ("--config.data.train={videos}/bad.csv", "path"),
    "broken manifest": ("--config.data.train={videos}/broken.jsonl", "line|:1"),
    "manifest of absent files": ("--config.data.train={videos}/absent.csv", "missing"),
    "warm-up longer than the stage": (
        "--config.stages.masked.schedule.warmup=30 --config.stages.masked.length=20",
        "must fit into the schedule",
    ),
}


# The same for stages of other kinds: recipe, what is typed after its stage's name, what must be read.
OTHER_KINDS = {
    "mixup below nothing": ("finetune_b", "mix.mixup=-1", "mix.mixup must not be negative"),
    "share of CutMix": ("finetune_b", "mix.switch=1.5", "mix.switch must be between 0 and 1"),
    "all labels smoothed": ("finetune_b", "smoothing=1.0", "smoothing must be at least 0 and less"),
    "all dropped": ("finetune_b", "head.dropout=1.0", "head.dropout must be at least 0 and less"),
    "no class": ("finetune_b", "head.classes=0", "head.classes must be at least 1"),
    "no clip of a video": ("finetune_b", "clip.repeats=0", "clip.repeats must be at least 1"),
    "unknown head": ("finetune_b", "head.variant=attentiv", 'Did you mean "attentive"'),
    "unknown norm": ("finetune_b", "head.merge_norm=LM", "merge_norm must be one of kaiming_BN"),
    "unknown inflation": ("finetune_b", "init.inflate=center", 'Did you mean "centre"'),
    "group the batch lacks": ("finetune_b", "mix.group=3", "mix.group must divide batch_size"),
    "every zeroth frame": ("distill_b", "teachers.stride=0", "teachers.stride must be at least 1"),
    "blocks on the spot": (
        "distill_b",
        "teachers.clip.interval=0",
        "interval must be greater than",
    ),
    "no block": ("distill_b", "teachers.clip.layers=0", "layers must be at least 1"),
    "unknown teacher": ("distill_b", "teachers.clip.name=internvl2", 'Did you mean "internvl"'),
    "factor below nothing": (
        "distill_b",
        "target.clip_final=-1",
        "clip_final must not be negative",
    ),
    "student on the spot": ("distill_b", "student.interval=0", "interval must be greater than 0"),
    "frames below nothing": ("distill_b", "init.old_frames=-4", "old_frames must not be negative"),
    "view of nothing": ("stage2_b", "views.long.ratio=1.0", "ratio must lie between 0 and 1"),
    "whole rectangles": ("stage2_b", "views.long.share=1.0", "share must lie between 0 and 1"),
    "unknown view": ("stage2_b", "views.long.name=multiblock", 'Did you mean "multi_block"'),
    "unknown distance": ("stage2_b", "target.loss=l3", "target.loss must be one of l1, cosine"),
    "predictor without heads": ("stage2_b", "predictor.heads=0", "heads must be at least 1"),
    "growing average": ("stage2_b", "ema_final=1.5", "ema_final must be between 0 and 1"),
    "no module": ("cma_b", "fusion.modules=0", "fusion.modules must be at least 1"),
    "unknown reading": ("cma_b", "fusion.reading=R3", "fusion.reading must be one of"),
    "unknown tower": ("cma_b", "multimodal.name=clap", 'Did you mean "clip"'),
    "no frame for the tower": ("cma_b", "multimodal.frames=0", "frames must be at least 1"),
    "decoder sees nothing": ("mae_v2_b", "target.decoder_mask.ratio=1.0", "ratio must lie between"),
    "unknown decoder mask": ("mae_v2_b", "target.decoder_mask.name=tub", 'Did you mean "tube"'),
}


@pytest.fixture
def run(videos, tmp_path, monkeypatch, capsys):
    """Runs the training command in this process; gives exit code, message and seconds."""
    (videos / "empty").mkdir(exist_ok=True)
    (videos / "bad.csv").write_text("name,caption\n00.mp4,one\n")
    (videos / "broken.jsonl").write_text('{"path": "00.mp4"\n')
    (videos / "absent.csv").write_text("path\n" + "".join(f"no{i}.mp4\n" for i in range(9)))
    # The only thing left out: joining the processes, which must come before JAX is used at all.
    monkeypatch.setattr(runtime, "start", lambda *_: None)

    def call(words: str, recipe: str = RECIPE):
        typed = [w.format(videos=videos) for w in words.split()]
        good = [f"--config.data.train={videos}", f"--workdir={tmp_path / 'workdir'}"]
        begin = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            train.main([f"--config={recipe}", *good, *typed])
        return ended.value.code, capsys.readouterr().err, time.monotonic() - begin

    return call


@pytest.mark.parametrize("what", MISTAKES)
def test_mistake(run, what, tmp_path):
    words, message = MISTAKES[what]
    code, text, seconds = run(words)
    assert code == 2, text
    assert re.search(message, text), text
    assert text.startswith("error: ") and "Traceback" not in text
    assert len(text.splitlines()) <= 24 and max(map(len, text.splitlines())) < 500
    assert not (tmp_path / "workdir" / "checkpoints").exists()
    assert seconds < 60  # the clock only guards against starting the long work; typical is below 1


@pytest.mark.parametrize("what", OTHER_KINDS)
def test_mistake_in_another_kind_of_stage(run, what):
    name, typed, message = OTHER_KINDS[what]
    recipe = next(REPOSITORY.glob(f"configs/*/{name}.py"))
    stage = {"finetune": "finetune", "distill": "aligned", "stage2": "latent", "cma": "fused"}
    words = f"--config.stages.{stage.get(name.split('_')[0], 'masked')}.{typed}"
    code, text, _ = run(words, recipe=f"{recipe}:smoke")
    assert code == 2 and re.search(message, text), text
    assert text.startswith("error: ") and "Traceback" not in text


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("evals.multi_view.crops=2", "evals.multi_view.crops must be 1 or 3; got"),
        ("evals.multi_view.clips=0", "evals.multi_view.clips must be at least 1; got"),
    ],
)
def test_mistake_in_an_evaluation(run, typed, message):
    recipe = REPOSITORY / "configs/internvideo2/finetune_b.py:smoke"
    code, text, _ = run(f"--config.{typed}", recipe=recipe)
    assert code == 2 and message in text


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("internvideo_next/stage2_b", "model.size=Nano", "got predictor.heads=3, tensor=2"),
        ("internvideo2/distill_b", "model.size=Nano", "got teachers.clip.heads=3, tensor=2"),
        ("internvideo1/cma_b", "stages.fused.fusion.heads=1", "got heads=1, tensor=2"),
        ("internvideo1/cma_b", "stages.fused.mix.group=3", "mix.group must divide batch_size"),
    ],
)
def test_mistake_in_a_part_of_the_model(run, name, typed, message):
    recipe = REPOSITORY / f"configs/{name}.py:smoke"
    code, text, _ = run(f"--config.{typed} --config.mesh.tensor=2", recipe=recipe)
    assert code == 2 and message in text, text


@pytest.mark.parametrize(
    ("batch", "message"), [(24, "heads=2, tensor=4"), (32, "12 videos with 2")]
)
def test_a_batch_may_hold_every_clip_of_every_video(run, batch, message):
    """12 videos give 24 clips: the first batch is refused for the mesh alone, which is looked at later."""
    words = f"--config.stages.finetune.batch_size={batch} --config.mesh.tensor=4"
    recipe = REPOSITORY / "configs/internvideo2/finetune_b.py:smoke"
    code, text, _ = run(f"--config.model.size=Nano {words}", recipe=recipe)
    assert code == 2 and message in text, text


def test_all_mistakes_of_a_config_are_told_together(run):
    code, text, _ = run("--config.seed=-1 --config.stages.masked.mask.ratio=2 --config.log.every=x")
    assert code == 2 and text.startswith("error: 3 mistakes:")
    assert "seed must be" in text and "mask.ratio must lie" in text and "log.every must be" in text


def test_real_command_says_it_too(videos, tmp_path):
    """The same through the real process, with nothing left out."""
    command = [sys.executable, "-m", "invideo_jax.train", f"--config={RECIPE}"]
    command += [f"--config.data.train={videos}", f"--workdir={tmp_path}", "--config.mesh.tensor=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 2, done.stderr
    assert "tensor" in done.stderr and "Traceback" not in done.stderr


def test_missing_recipe_and_workdir(capsys):
    for words, message in [
        ([f"--config={REPOSITORY}/configs/quickstrat.py", "--workdir=x"], 'Did you mean "quickst'),
        ([f"--config={RECIPE}"], "required: --workdir"),
        (["--workdir=x"], "required: --config"),
        ([f"--config={RECIPE},smok", "--workdir=x"], "does not take"),
    ]:
        with pytest.raises(SystemExit) as ended:
            train.main(words)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_other_config_on_resume_is_refused(run, videos, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "workdir"
    words = [f"--config={RECIPE}", f"--config.data.train={videos}", f"--workdir={folder}"]
    short = ["--config.stages.masked.length=2", "--config.stages.masked.schedule.warmup=1"]
    assert train.main([*words, *short]) == 0
    capsys.readouterr()
    code, text, _ = run(f"{' '.join(short)} --config.seed=5")
    assert code == 2 and "seed: 0 -> 5" in text and "--allow_change=seed" in text
    (videos / "00.mp4").rename(videos / "renamed.mp4")
    try:
        code, text, _ = run(" ".join(short))
        assert code == 2 and "data_found" in text
    finally:
        (videos / "renamed.mp4").rename(videos / "00.mp4")
    assert json.loads((folder / "config.json").read_text())["seed"] == 0
    assert train.main([*words, *short, "--config.log.every=7"]) == 0
