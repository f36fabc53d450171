"""A stage that starts from the run of another model: which grid its positions were made for."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from configs.internvideo2 import finetune_1b, stage1_1b
from configs.umt import umt_b
from invideo_jax import programs, sharding, stage_start
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.interop import models
from invideo_jax.models import positions
from invideo_jax.run import place_stages


def program_of(module, **changes):
    """Config and program of the one stage of a smoke recipe; `changes` are of the stage."""
    config = module.get_config("smoke")
    config.data.train = "anything"
    (name,) = config.stage_order
    with config.unlocked():
        config.stages[name].update_from_flattened_dict(changes)
    (stage,) = place_stages(config, 1000)
    return config, programs.program(config, stage)


def workdir(place, module, **changes):
    """A run of the recipe with random parameters, and its meta as training writes it."""
    config, made = program_of(module, **changes)
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32)
    params = jax.tree.map(draw, sharding.unbox(jax.eval_shape(made.init_params)))
    meta = dict(
        step=1, stage=made.stage.name, config=config.to_dict(), model=models.text_of(made.model)
    )
    with Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(1, {"params": jax.tree.map(jax.numpy.asarray, params)}, meta, wait=True)
    return made, flatten_dict(params, sep="/")


def test_a_classifier_of_all_frames_starts_from_a_student_of_every_second(tmp_path):
    """The student reads clips of 8 frames and sees 4: its table is stretched to the 8 of the classifier."""
    before, params = workdir(tmp_path, stage1_1b)
    config, after = program_of(
        finetune_1b, **{"clip.frames": 8, "init.source": str(tmp_path), "init.old_frames": 0}
    )
    t, h, w = before.encoder.grid
    assert after.encoder.grid == (2 * t, h, w)
    start = stage_start.plan(config, after, sharding.make_mesh())
    (row,) = [r for r in start.table.rows if r.path == "encoder/position_embedding"]
    assert row.transform == "positions"
    found = start.state().params["encoder"]["position_embedding"]
    old = params["encoder/position_embedding"]
    want = positions.interpolate(old, old_times=t, grid=after.encoder.grid)
    np.testing.assert_allclose(found, want, atol=1e-6)


@pytest.mark.parametrize("module", [stage1_1b, umt_b])
def test_the_grid_is_that_of_the_model_and_not_of_its_clips(module):
    config, made = program_of(module)
    meta = dict(config=config.to_dict(), stage=made.stage.name, model=models.text_of(made.model))
    assert stage_start._grid(meta) == made.encoder.grid
    assert stage_start._grid(meta | {"model": None}) is None
