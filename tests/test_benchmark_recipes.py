"""Protocols of benchmarks: their published values, what they set in the config of a run, and a whole evaluation."""

import inspect
import json
import re
import types

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import pytest
from conftest import REPOSITORY

from configs import common
from invideo_jax import build, checks, digests, evaluate, programs, protocols, run, sharding
from invideo_jax import config as config_lib
from invideo_jax.data.benchmarks import BENCHMARKS
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS
from invideo_jax.models import positions, stage2
from invideo_jax.programs import contrastive

FOLDER = REPOSITORY / "configs" / "benchmarks"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")
WORDS = {"retrieval": "towers", "zero_shot": "head", "multiple_choice": "towers"}


def load(name: str, words: str = "") -> ml_collections.ConfigDict:
    return config_lib.load(f"{FOLDER / name}.py:/data/set" + (f",{words}" if words else "")).config


def kind(name: str) -> str:
    return next(iter(load(name).evals))


def stage_two() -> ml_collections.ConfigDict:
    """The config of a small run of InternVideo2's second stage, as it is kept in a checkpoint."""
    c = common.smoke(common.contrastive())
    c.stages.contrastive.clip.frames = 4
    c.stages.contrastive.text.length = 12
    return config_lib.from_saved(json.loads(config_lib.to_json(c.lock())))


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_protocol_names_a_benchmark_and_options_that_there_are(name):
    for words in ("", WORDS[kind(name)], "frames=3"):
        c = load(name, words)
        assert c.data.eval == f"benchmark:{name}:/data/set"
        assert c.data.eval_split == BENCHMARKS.get(name).split
        for evaluator, options in c.evals.items():
            takes = inspect.signature(EVALUATORS.get(evaluator)).parameters
            assert set(options) - {"every"} <= takes.keys()
            assert options.examples >= 50_000, "the whole set"


def test_every_benchmark_but_the_official_split_of_msrvtt_has_a_protocol():
    assert set(BENCHMARKS) - set(RECIPES) == {"msrvtt_full"}


@pytest.mark.parametrize(
    ("name", "frames", "text"),
    [
        ("msrvtt_1k", 4, 40),
        ("msvd", 4, 64),
        ("vatex", 4, 40),
        ("vatex_zh", 4, 40),
        ("lsmdc", 8, 40),
        ("didemo", 8, 64),
        ("activitynet", 8, 150),
    ],
)
def test_published_values_of_retrieval(name, frames, text):
    c, towers = load(name), load(name, "towers")
    assert c.stage.to_dict() == {
        "clip": dict(frames=frames, sampling="middle", crop="resize", interpolation="bicubic"),
        "text": dict(length=text),
    }
    assert (c.evals.retrieval.rerank, c.evals.retrieval.dual_softmax) == (128, True)
    assert c.training is False
    assert towers.evals.retrieval.rerank == 0 and "text" not in towers.stage
    assert towers.stage.clip.frames == 8 and load(name, "frames=6").stage.clip.frames == 6


def test_published_values_of_recognition():
    assert load("k400").evals.zero_shot.to_dict() == dict(
        every="0 steps", examples=1_000_000, templates="actions", mean="cosine"
    )
    assert load("k700").stage.clip.frames == 8
    assert load("ssv2").evals.zero_shot.templates == "none", "SSv2-MC: the labels as they are"
    views = lambda name: load(name, "head").evals.multi_view
    assert (views("k600").clips, views("k600").crops) == (4, 3)
    assert (views("ssv2").clips, views("ssv2").crops) == (2, 3)
    head = load("k400", "head")
    assert head.training and head.stage.to_dict() == {}, "clips stay as the classifier was trained"
    assert load("msrvtt_mc").evals.multiple_choice.match is True
    assert load("msrvtt_mc", "towers").evals.multiple_choice.match is False


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "msrvtt_1k.py",
            "needs the folder of the benchmark: --config=configs/benchmarks/msrvtt_1k.py:FOLDER",
        ),
        ("k400.py:/data,haed", 'does not take "haed"'),
        ("k400.py:/data,frames=many", "invalid literal for int"),
    ],
)
def test_mistakes_after_the_colon(spec, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config_lib.load(f"{FOLDER}/{spec}")


# Over the config of a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_every_protocol_fits_a_run_of_the_second_stage(name):
    for words in ("", "frames=16"):
        config = stage_two()
        assert protocols.apply(config, "contrastive", load(name, words)) is False
        checks.check(config)
    assert config.is_locked


def test_a_protocol_sets_what_it_names_and_nothing_else():
    config, before = stage_two(), stage_two()
    protocols.apply(config, "contrastive", load("activitynet"))
    changed = config_lib.differences(before.to_dict(), config.to_dict())
    stage = {k: new for k, (_, new) in changed.items() if k.startswith("stages.")}
    assert stage == {
        "stages.contrastive.clip.frames": 8,
        "stages.contrastive.clip.sampling": "middle",
        "stages.contrastive.clip.crop": "resize",
        "stages.contrastive.text.length": 150,
    }
    rest = {k for k in changed if k not in stage and not k.startswith("evals.")}
    assert rest == {"data.eval", "checkpoint.keep_best"}, "its split is 'validation' already"
    spec = build.clip_spec(config, "contrastive", train=False)
    assert (spec.frames, spec.sampling, spec.crop, spec.flip) == (8, "middle", "resize", 0.0)
    assert (spec.interpolation, spec.views) == ("bicubic", 1)


def test_evaluators_of_the_run_are_replaced():
    config = stage_two()
    with config.unlocked():
        config.evals.knn = ml_collections.ConfigDict(dict(every="1 epochs", examples=1))
    protocols.apply(config, "contrastive", load("k400"))
    assert list(config.evals) == ["zero_shot"]


def test_what_the_run_does_not_have_is_an_error():
    classes = common.classifier("internvideo2").lock()
    with pytest.raises(UserError) as error:
        protocols.apply(classes, "finetune", load("msrvtt_1k"))
    assert "sets stages.finetune.text.length, which this run does not have" in str(error.value)
    assert "no section stages.finetune.text: the stage is of another kind" in str(error.value)
    assert protocols.apply(classes, "finetune", load("k400", "head")) is True

    for clip, said in [
        ({"framse": 8}, 'clip.framse, which .*Did you mean "stages.finetune.clip.frames"'),
        ({"frames": "many"}, "must set stages.finetune.clip.frames to a int; got 'many'"),
    ]:
        wrong = ml_collections.ConfigDict(dict(stage=dict(clip=clip), evals={}, training=True))
        with pytest.raises(UserError, match=said):
            protocols.apply(classes, "finetune", wrong)
    with pytest.raises(UserError, match="opens no training videos must set data.eval"):
        protocols.apply(stage_two(), "contrastive", ml_collections.ConfigDict(dict(evals={})))


def test_a_recipe_of_a_run_is_no_protocol():
    recipe = config_lib.load(f"{REPOSITORY}/configs/quickstart.py").config
    with pytest.raises(UserError, match="sections data, stage, evals, training and no others"):
        protocols.apply(stage_two(), "contrastive", recipe)


def test_texts_that_are_asked_for_are_written_as_in_training():
    config = stage_two()
    config.stages.contrastive.text.normalise = ""
    plain = contrastive.modalities(config, "contrastive").text.asked
    config.stages.contrastive.text.normalise = "internvideo2"
    asked = contrastive.modalities(config, "contrastive").text.asked
    for one, other in zip(asked(["A (Dog)!", "x-y"]), plain(["a dog", "x y"])):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(plain(["A (Dog)!"])[0], plain(["a dog"])[0])


# Clips of another size ------------------------------------------------------------------------------------------------


TABLE = "vision/encoder/position_embedding"


def towers(frames: int):
    """As much of a program as `fit` looks at."""
    config = stage_two()
    config.stages.contrastive.clip.frames = frames
    model = contrastive.model(config, "contrastive")
    init = lambda: stage2.init(model, jax.random.key(0))
    stage = types.SimpleNamespace(name="contrastive")
    return types.SimpleNamespace(
        init_params=init, encoder=model.vision.encoder, encoder_path="vision/encoder", stage=stage
    )


def drawn(init) -> dict:
    """Parameters of the shapes that `init` would give."""
    rng = np.random.default_rng(0)
    draw = lambda x: np.asarray(0.02 * rng.normal(size=x.shape) if x.ndim else 0.07, x.dtype)
    return jax.tree.map(draw, nn.unbox(jax.eval_shape(init)))


def test_positions_are_interpolated_and_the_rest_is_copied():
    old, new = towers(4), towers(8)
    params, mesh = drawn(old.init_params), sharding.make_mesh(data=-1)
    was = digests.named_leaves(params)
    now = digests.named_leaves(protocols.fit(params, new, old, mesh))
    wanted = positions.interpolate(
        was[TABLE],
        old_times=4,
        old_space=old.encoder.grid[1:],
        grid=new.encoder.grid,
        prefix=1,
    )
    assert now.keys() == was.keys() and len(wanted) == 1 + 2 * (len(was[TABLE]) - 1)
    np.testing.assert_array_equal(now[TABLE], wanted)
    for name in was.keys() - {TABLE}:
        np.testing.assert_array_equal(now[name], was[name], err_msg=name)
    same = digests.named_leaves(protocols.fit(params, old, old, mesh))
    np.testing.assert_array_equal(same[TABLE], was[TABLE])


# Whole evaluations ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_run(monkeypatch, tmp_path):
    """A run of which nothing but fresh parameters is there; its training videos are gone."""
    config = stage_two()
    config.data.train = "/gone"
    stage = run.place_stages(config, 8)[0]
    params = drawn(programs.program(config, stage).init_params)
    meta = dict(
        config=json.loads(config_lib.to_json(config)),
        stage="contrastive",
        epoch_examples=8,
        step=0,
        teacher="",
    )
    monkeypatch.setattr(evaluate, "_parameters", lambda *_: (params, meta, "params"))
    return tmp_path


def test_evaluate_by_a_protocol(fresh_run, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "data"))
    import small_videos

    small_videos.write_videos(fresh_run / "set/videos", 6)
    rows = [{"video": f"clip_{i:03d}.mp4", "caption": f"number {i}"} for i in range(6)]
    (fresh_run / "set/msrvtt_test_1k.json").write_text(json.dumps(rows))
    (fresh_run / "set/videos/clip_005.mp4").unlink()
    protocol = f"--config={FOLDER}/msrvtt_1k.py:{fresh_run}/set,frames=8"
    more = ["--config.evals.retrieval.rerank=3", "--config.compute_dtype=float32"]
    assert evaluate.main([f"--workdir={fresh_run}", protocol, *more]) == 0
    found = json.loads((fresh_run / "evaluation_00000000_msrvtt_1k.json").read_text())
    assert found["retrieval/examples"] == found["retrieval/texts"] == 5
    assert found["retrieval/chance_r1"] == pytest.approx(0.2)
    assert {"retrieval/text_video_r1_dsl", "retrieval/video_text_r10_rerank"} <= found.keys()
    said = capsys.readouterr().out
    assert (
        "note: benchmark:msrvtt_1k: 1 of 6 videos of msrvtt_test_1k.json are not there: clip_005.mp4."
        in said
    )
    assert "note: clips are of another size than in the run; interpolated: " + TABLE in said
