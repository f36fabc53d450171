"""Stages of alignment from their recipes: published sizes, mistakes, what a cache belongs to."""

import jax
import pytest

from configs.internvideo2 import distill_b, stage1_1b
from configs.umt import umt_b
from invideo_jax import digests, programs, sharding
from invideo_jax.errors import UserError
from invideo_jax.programs import aligned
from invideo_jax.run import place_stages


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
