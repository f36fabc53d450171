"""Stages of alignment from their recipes: published sizes, mistakes, what a cache belongs to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.internvideo2 import distill_b, stage1_1b
from configs.internvideo_next import stage2_b
from configs.umt import umt_b
from invideo_jax import digests, feature_store, programs, sharding, teaching
from invideo_jax.errors import UserError
from invideo_jax.interop import folder
from invideo_jax.programs import aligned
from invideo_jax.run import place_stages
from invideo_jax.steps import aligned as steps


def recipe(module, words="smoke"):
    config = module.get_config(words)
    config.data.train = "anything"
    return config


@pytest.mark.parametrize(
    "module, count, visible",
    [
        (stage1_1b, 1_070_042_752, 417),
        (distill_b, 102_252_288, 411),
        (umt_b, 88_005_888, 320),
    ],
)
def test_published_students(module, count, visible):
    config = recipe(module, None)
    made = aligned.model(config, "aligned")
    shapes = jax.eval_shape(lambda: aligned.init_student(made, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    assert aligned.visible_count(config, "aligned") + made.encoder.prefix == visible


def test_the_teacher_is_no_part_of_the_state():
    config = recipe(stage1_1b)
    (stage,) = place_stages(config, 1000)
    made = programs.program(config, stage)
    state = jax.eval_shape(made.make_state, sharding.unbox(jax.eval_shape(made.init_params)))
    assert set(state.params) == {
        "clip_heads", "clip_position_embedding", "encoder", "final_head", "mae_heads",
        "mae_position_embedding",
    }  # fmt: skip
    teachers = jax.eval_shape(made.teacher.models["mae"].init_params)
    shapes = {x.shape for x in jax.tree.leaves(sharding.unbox(teachers)) if x.ndim == 3}
    held = {x.shape for x in digests.named_leaves(state).values() if x.ndim == 3}
    assert shapes and not shapes & held


def test_the_gradient_step_holds_visible_places_only():
    config = recipe(stage1_1b)
    (stage,) = place_stages(config, 1000)
    batch = programs.program(config, stage).abstract_batch()
    assert batch["video"].shape == (8, 8, 32, 32, 3)
    assert batch["clip_middle"].shape == (8, 2, 17, 48) and batch["mae"].shape == (8, 2, 16, 32)
    assert "attention" not in batch


def test_teachers_see_a_microbatch(monkeypatch):
    config, seen = recipe(stage1_1b), []
    config.stages.aligned.accumulation = 4
    plain = steps.Teachers.features

    def noting(self, params, batch):
        seen.append(batch["video"].shape[0])
        return plain(self, params, batch)

    monkeypatch.setattr(steps.Teachers, "features", noting)
    batch = programs.program(config, place_stages(config, 1000)[0]).abstract_batch()
    assert set(seen) == {2} and batch["mae"].shape == (8, 2, 16, 32)


MISTAKES = [
    ({"teachers.stride": 3}, "clip.frames must be a multiple of teachers.stride; got frames=8"),
    ({"teachers.mae.name": ""}, "target.mae needs a teacher"),
    ({"teachers.clip.name": "", "target.clip_middle": 0.0, "target.clip_final": 0.0}, "attention"),
    ({"teachers.stride": 1}, "same grid of tokens"),
    ({"teachers.clip.layers": 9}, "got count=9"),
    ({"mask.ratio": 0.001}, "must hide some"),
    ({"teachers.cache": "x"}, r"clip.sampling='segments'. Use 'middle'"),
    ({"teachers.cache": "x", "clip.sampling": "middle"}, r"clip.crop='multi_scale'. Use 'center'"),
]


@pytest.mark.parametrize("changes, message", MISTAKES)
def test_mistakes_are_named(changes, message):
    config = recipe(stage1_1b)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config.stages.aligned
        for parent in parents:
            node = node[parent]
        node[last] = value
    with pytest.raises((UserError, ValueError), match=message):
        aligned.check(config, "aligned")


def test_a_cache_belongs_to_teachers_and_clips():
    def facts(**changes):
        config = recipe(stage1_1b)
        stage = config.stages.aligned
        for key, value in changes.items():
            node, _, last = key.rpartition("__")
            target = stage
            for part in filter(None, node.split("__")):
                target = target[part]
            target[last] = value
        return aligned.cache_facts(config, "aligned")

    same = facts()
    assert facts(mask__ratio=0.5, optimizer__learning_rate=1.0, student__mlp=True) == same
    for change in (
        dict(teachers__clip__source="random:1"),
        dict(teachers__mae__layers=1),
        dict(teachers__mae__faithful_attention=True),
    ):
        assert facts(**change)["teacher"] != same["teacher"]
    assert facts(clip__crop="center")["clip"] != same["clip"]
    assert facts(teachers__stride=1)["stride"] == 1


def test_a_teacher_needs_a_source():
    with pytest.raises(UserError, match="clip.source must say which teacher"):
        config = recipe(stage1_1b)
        config.stages.aligned.teachers.clip.source = ""
        aligned.cache_facts(config, "aligned")


def cached(folder):
    """A recipe that reads features of `folder`, and the same with teachers that run."""
    config = recipe(stage1_1b)
    stage = config.stages.aligned
    stage.clip.sampling, stage.clip.crop, stage.clip.flip = "middle", "center", 0.0
    (place,) = place_stages(config, 1000)
    live = programs.program(config, place)
    stage.teachers.cache = str(folder)
    return config, live, programs.program(config, place)


def write(folder, config, ids, **more):
    of = aligned.frozen_models(config, "aligned")
    params = jax.eval_shape(lambda: sharding.unbox(of.init(jax.random.key(0))))
    video = jax.ShapeDtypeStruct((1, 8, 32, 32, 3), jnp.uint8)
    shapes = jax.eval_shape(of.features, params, {"video": video})
    facts = aligned.cache_facts(config, "aligned") | more
    with feature_store.Writer(folder, facts) as writer:
        for name in ids:
            writer.add(name, {k: np.zeros(x.shape[1:], x.dtype) for k, x in shapes.items()})
    return shapes


def test_a_cache_is_opened_when_it_is_needed(tmp_path):
    config, live, kept = cached(tmp_path / "features")  # neither here nor for --explain
    assert kept.teacher is None and kept.flops_per_clip == live.flops_per_clip
    with pytest.raises(UserError, match="must have been made before"):
        kept.abstract_batch()
    shapes = write(tmp_path / "features", config, ["a", "b"], weights="0123")
    batch = kept.abstract_batch()
    assert {k: batch[k].shape for k in shapes} == {k: (8, *x.shape[1:]) for k, x in shapes.items()}
    params = jax.eval_shape(lambda: sharding.unbox(kept.init_params()))
    state = jax.eval_shape(kept.make_state, params)
    assert jax.eval_shape(kept.train_step, state, batch)[1]["loss"].total.shape == ()


def test_a_cache_is_looked_at_before_the_run(tmp_path):
    config, _, kept = cached(tmp_path)
    mesh = sharding.make_mesh()
    with pytest.raises(UserError, match="must have been made before"):
        teaching.check(kept, mesh)
    write(tmp_path, config, ["a", "b"], weights="0123")
    teaching.check(kept, mesh, examples=["a", "b"])
    teaching.check(kept, mesh, examples=["a", "b", "bad"], spare=1)
    for ids, spare in ((["a", "c"], 0), (["c", "d"], 20)):
        with pytest.raises(UserError, match="first is 'c'. Run the command"):
            teaching.check(kept, mesh, examples=ids, spare=spare)
    teach, digest = teaching.start(kept, mesh)
    assert digest == "0123" and teach({"x": 1}) == {"x": 1}
    assert teaching.about(kept, digest) == f"Teacher: features of 0123 from {tmp_path}"


def test_teachers_are_looked_at_before_the_run(tmp_path):
    config = recipe(stage1_1b)
    (stage,) = place_stages(config, 1000)
    mesh = sharding.make_mesh()
    teaching.check(programs.program(config, stage), mesh)
    source = config.stages.aligned.teachers.mae
    for where, text in ((str(tmp_path / "no"), "not there"), ("", "got an empty one")):
        source.source = where
        with pytest.raises(UserError, match=rf"teachers.mae.source must .*{text}"):
            teaching.check(programs.program(config, stage), mesh)
    of = aligned.frozen_models(config, "aligned").mae
    params = jax.jit(lambda: sharding.unbox(of.init(jax.random.key(0))))()
    folder.save_params(tmp_path / "w", digests.named_leaves(params), {"layout": "x"})
    source.source = str(tmp_path / "w")
    teaching.check(programs.program(config, stage), mesh)
    config.model.scan = False
    source.layers, source.size = 1, "S"
    with pytest.raises(UserError, match=r"norm/bias: \[384\] from \[32\]"):
        teaching.check(programs.program(config, stage), mesh)


def test_a_pool_that_no_loss_trains_is_left_alone():
    rules = lambda made: {x.rule for x in made.optimizer_table if x.path.startswith("encoder/pool")}
    config = recipe(stage1_1b)
    (stage,) = place_stages(config, 1000)
    made = programs.program(config, stage)
    assert made.pool_trained and rules(made) == {"adamw"}
    config.stages.aligned.target.clip_final = 0.0
    frozen = programs.program(config, stage)
    assert not frozen.pool_trained and rules(frozen) == {"frozen"}
    predicted = recipe(stage2_b)
    of = programs.program(predicted, place_stages(predicted, 1000)[0])
    assert not of.pool_trained and rules(of) == {"frozen"}
    assert programs.program(recipe(umt_b), place_stages(recipe(umt_b), 1000)[0]).pool_trained

    params = jax.jit(lambda: sharding.unbox(frozen.init_params()))()
    video = np.random.default_rng(0).integers(0, 256, (2, 8, 32, 32, 3), np.uint8)
    features = jax.jit(frozen.encode)(params, {"video": video})
    tokens, _ = jax.jit(lambda p, v: frozen.encoder.apply({"params": p}, v))(
        params["encoder"], video[:, ::2]
    )
    np.testing.assert_allclose(features, tokens[:, 1:].mean(1), atol=1e-5)


def test_constants_of_a_teacher_are_a_switch():
    config = recipe(umt_b)
    assert aligned.frozen_models(config, "aligned").clip.encoder.normalisation == "clip"
    config.stages.aligned.teachers.clip.constants = "imagenet"
    assert aligned.frozen_models(config, "aligned").clip.encoder.normalisation == "imagenet"
    config.stages.aligned.teachers.clip.constants = "image"
    with pytest.raises(UserError, match="got normalisation='image'"):
        aligned.check(config, "aligned")
