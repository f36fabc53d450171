"""The quickstart: its second stage takes the encoder of the first, and nothing else; what comes after it finds it."""

import json

import jax
import pytest
from conftest import REPOSITORY
from flax.traverse_util import flatten_dict

from invideo_jax import checks, handover, metrics, programs, runtime, sharding, stage_start, train
from invideo_jax import config as config_lib
from invideo_jax.data import synthetic

RECIPE = f"{REPOSITORY}/configs/quickstart.py"


def programs_of(words: str) -> tuple[config_lib.Recipe, dict[str, programs.Program]]:
    recipe = config_lib.load(f"{RECIPE}:{words}")
    checks.check(recipe.config)
    plan = train.place_stages(recipe.config, epoch_examples=2400)
    return recipe.config, {stage.name: programs.program(recipe.config, stage) for stage in plan}


@pytest.mark.parametrize("words", ["", "sound"])
def test_the_encoder_is_handed_over_whole(words):
    config, made = programs_of(words)
    assert list(made) == ["masked", "contrastive"]
    before, after = made.values()
    table = stage_start.plan(config, after, sharding.make_mesh(), before=before).table
    kinds = {row.path: row.transform for row in table.rows}
    encoder = {path for path, kind in kinds.items() if kind != "fresh"}
    assert encoder == {path for path in kinds if path.startswith("vision/encoder/")}
    assert all(path.startswith(("decoder", "encoder_to", "mask_", "head")) for path in table.left)
    rates = {leaf.path: leaf.rate for leaf in after.optimizer_table}
    assert [path for path, rate in rates.items() if rate != 1] == ["temperature"]


def test_what_comes_after_takes_either_stage():
    """Fine-tuning and distillation start from a workdir of one stage or of both."""
    config = config_lib.load(f"{REPOSITORY}/configs/quickstart_finetune.py:pretrained").config
    (stage,) = train.place_stages(config, epoch_examples=2400)
    wanted = programs.program(config, stage)
    options = config.stages.finetune.init.to_dict()
    del options["source"], options["ema"]
    teacher = config_lib.load(f"{REPOSITORY}/configs/internvideo2/distill_small.py").config
    teacher = teacher.stages.aligned.teachers.mae
    patterns = dict(rename=teacher.rename, leftover=teacher.leftover)
    build = lambda program: sharding.unbox(jax.eval_shape(program.init_params))
    for program in programs_of("")[1].values():
        shapes = flatten_dict(build(program), sep="/")
        grids = dict(grid=wanted.encoder.grid, tubelet=2, old_grid=program.encoder.grid)
        table = handover.plan(build(wanted), shapes, **grids, **options)
        fresh = {row.path.split("/")[0] for row in table.rows if row.transform == "fresh"}
        assert fresh == {"fc_norm", "head"}
        encoder = build(program)
        for part in program.encoder_path.split("/"):
            encoder = encoder[part]
        table = handover.plan(encoder, shapes, **grids, **patterns)
        assert {row.transform for row in table.rows} == {"copy"}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "synthetic"
    assert synthetic.main([f"--output={folder}", "--clips=60"]) == 0
    return folder


@pytest.mark.slow
def test_smoke(data, tmp_path, monkeypatch):
    """Both stages from files to numbers, without a tokenizer file."""
    monkeypatch.setattr(runtime, "start", lambda *_: None)
    folder = tmp_path / "run"
    words = [f"--config={RECIPE}:smoke", f"--config.data.train=synthetic:{data}"]
    assert train.main([*words, f"--workdir={folder}"]) == 0
    last = metrics.read_jsonl(folder / "metrics.jsonl")[-1]
    assert last["step"] == 40 and 0 <= last["eval/retrieval/text_video_r1"] <= 1
    assert "vision/encoder" in (folder / "handover_contrastive.txt").read_text()
    page = (folder / "report" / "index.html").read_text()
    assert "Retrieval" in page and json.loads((folder / "config.json").read_text())
