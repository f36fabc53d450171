"""A masked stage and a contrastive one behind it, from files to evaluation: hand-over, tokenizer, resume."""

import json
import re
import shutil

import numpy as np
import pytest
from conftest import REPOSITORY
from data.video_files import write

from invideo_jax import evaluate, metrics, runtime, stored, tokenizer, train

RECIPE = '''"""Short stages: masked, then contrastive, with what the second needs handed over by name."""

import ml_collections

from configs import common, quickstart

def get_config(arg=None):
    c = quickstart.get_config("smoke")
    masked = c.stages.masked
    stage = common.contrastive_stage()
    c.stages = ml_collections.ConfigDict(dict(masked=masked, contrastive=stage))
    c.stage_order = ("masked", "contrastive")
    masked.length, masked.schedule.warmup = "3 steps", "1 step"
    common.smoke_contrastive(stage)
    stage.length, stage.schedule.warmup, stage.batch_size = "4 steps", "1 step", 16
    stage.clip = masked.clip.copy_and_resolve_references()
    stage.mask.video = 0.5
    stage.accumulation = 2 if arg == "all" else 1
    if arg != "all":
        stage.losses.vtm = stage.losses.mlm = 0.0
    stage.shared.width = 32
    stage.losses.vsc = 1.0
    stage.text.of.speech = "speech"
    stage.text.length = 16
    stage.init.rename = (r"^encoder/->vision/encoder/",)
    stage.init.fresh = ("^(vision|text)_projection/", "^temperature$", "^text/")
    if arg == "all":
        stage.init.fresh += ("^match_head/",)
    stage.init.leftover = (r"^(?!encoder/)",)
    c.checkpoint.every = "3 steps"
    c.checkpoint.keep_last = 5
    c.checkpoint.best = "retrieval/text_video_r1"
    c.checkpoint.best_mode = "max"
    c.log.every = "1 step"
    reconstruction = dict(every="3 steps", examples=8, pictures=0, stages=("masked",))
    retrieval = dict(every="4 steps", examples=8, stages=("contrastive",))
    retrieval |= dict(rerank=4) if arg == "all" else {}
    c.evals = ml_collections.ConfigDict(dict(reconstruction=reconstruction, retrieval=retrieval))
    return c
'''


SIZE = ["--vocabulary=40"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """16 videos: of each fourth nothing is said, and one has no caption."""
    folder, rows = tmp_path_factory.mktemp("captioned"), []
    colours = ("red", "green", "blue", "grey")
    for i in range(16):
        write(str(folder / f"{i:02d}.mp4"), frames=12, size=(64, 48))
        rows.append({"path": f"{i:02d}.mp4", "captions": [f"a {colours[i % 4]} thing, number {i}"]})
        if i % 4:
            rows[-1]["transcript"] = f"this is number {i}"
    rows[5]["captions"] = []
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "list.jsonl"


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """Runs the training command in this process, on 8 devices; gives its exit code."""
    monkeypatch.setattr(runtime, "start", lambda *_: None)  # must come before JAX is used at all
    recipe = tmp_path / "two_stages.py"
    recipe.write_text(RECIPE)
    monkeypatch.syspath_prepend(str(REPOSITORY))

    def call(folder, *words, arg=""):
        given = [f"--config={recipe}:{arg}", f"--config.data.train={data}", f"--workdir={folder}"]
        return train.main([*given, *words])

    return call


@pytest.fixture
def words(data, tmp_path, capsys):
    """A tokenizer of the captions, and what the config says of it."""
    model = tmp_path / "captions.model"
    kinds = "--kinds=video,speech"
    assert tokenizer.main([f"--data={data}", f"--output={model}", *SIZE, kinds]) == 0
    at = "--config.stages.contrastive.text"
    ids = dict(vocabulary=40, pad=0, first=2, mask=4, tokenizer=model)
    found = tokenizer.open_tokenizer(model)
    ids |= dict(pad=found.pad, first=found.first, mask=found.mask)
    return model, [f"{at}.{name}={value}" for name, value in ids.items()]


def leaves(folder, step):
    return stored.read_arrays(folder / "checkpoints", step)


@pytest.mark.parametrize("arg", ["", pytest.param("all", marks=pytest.mark.slow)])
def test_from_files_to_evaluation(run, data, words, tmp_path, capsys, arg):
    folder, (model, said) = tmp_path / "run", words
    assert run(folder, *said, arg=arg) == 0
    lines = [metrics.deterministic(r) for r in metrics.read_jsonl(folder / "metrics.jsonl")]
    last = lines[-1]
    losses = {k for line in lines for k in line if k.startswith("contrastive/")}
    names = ("vtc", "vsc", "loss", *(("vtm", "mlm") if arg else ()))
    assert {f"contrastive/{name}" for name in names} <= losses
    assert ("contrastive/vtm" in losses) == bool(arg)
    found = {k for line in lines for k in line if k.startswith("eval/")}
    ranked = "eval/retrieval/text_video_r1" + ("_rerank" if arg else "")
    assert {"eval/reconstruction/loss", ranked} <= found
    assert np.isfinite([v for v in last.values() if isinstance(v, float)]).all()

    # What was masked pretraining is where the second stage begins: the table says so, and so do the numbers.
    table = (folder / "handover_contrastive.txt").read_text()
    assert "vision/encoder/patch_embed/kernel" in table and "text/word_embedding" in table
    before, after = leaves(folder, 3), leaves(folder, 6)
    kernel = "encoder/patch_embed/kernel"
    moved = after[f"params/vision/{kernel}"] - before[f"params/{kernel}"]
    assert 0 < np.abs(moved).max() < 0.02 < np.abs(before[f"params/{kernel}"]).max()

    # A start in the middle of the stage gives the same numbers, bit for bit; the run keeps its tokenizer.
    again = tmp_path / "again"
    shutil.copytree(folder, again)
    shutil.rmtree(again / "checkpoints" / "7")
    model.unlink()
    assert run(again, *said, arg=arg) == 0
    assert json.loads((again / "config.json").read_text())["stages"]["contrastive"]["text"][
        "tokenizer"
    ] == str(model)
    one, other = leaves(folder, 7), leaves(again, 7)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name], equal_nan=True) for name in one)

    # Another tokenizer of as many words would give the same numbers another meaning.
    assert tokenizer.main([f"--data={data}", f"--output={model}", *SIZE, "--kinds=video"]) == 0
    shutil.rmtree(again / "checkpoints" / "7")
    with pytest.raises(SystemExit):
        run(again, *said, arg=arg)
    told = capsys.readouterr().err
    assert "must go on with the tokenizer it began with" in told and str(model) in told

    # Evaluations take the one that the run keeps.
    assert evaluate.main([f"--workdir={folder}"]) == 0
    kept = json.loads((folder / "evaluation_00000007.json").read_text())
    assert kept["retrieval/text_video_r1"] == last["eval/retrieval/text_video_r1"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("losses.vtm=-1", "must not be negative"),
        ("text.of.speech=", "The loss vsc needs texts; got .*text.of.speech=''"),
        ("losses.avc=1", "The loss avc needs a model with an audio tower; got none."),
        ("text_tower.name=bart", "must be one of bert, clip, mobileclip, llama; got .*'bart'"),
        ("text.of.video=videos", 'Unknown kind of text "videos"'),
        ("contrast.form=rings", "must be one of dense, chunked, ring"),
        ("objective=towers", "the shared space is as wide as the encoder's pool; got .*width=32"),
        ("text.tokenizer=", "A tokenizer must be a file"),
        ("text.pad=9", "bytes has pad=0, stages.contrastive.text.pad=9"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(run, tmp_path, capsys, word, message):
    with pytest.raises(SystemExit):
        run(tmp_path / "run", f"--config.stages.contrastive.{word}")
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run" / "checkpoints").exists()
