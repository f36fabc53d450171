"""Workdirs of a contrastive stage, videos of plain colours, and towers that know nothing but colours."""

import jax
import jax.numpy as jnp
import numpy as np
from data.video_files import write
from flax.traverse_util import flatten_dict

from invideo_jax import config as config_lib
from invideo_jax import handover
from invideo_jax.checkpoint import Checkpoints
from invideo_jax.interop import folder, models
from invideo_jax.programs import contrastive
from invideo_jax.towers import Towers

COLOURS = dict(r=(230, 20, 20), g=(20, 230, 20), b=(20, 20, 230), y=(180, 180, 20))
FIRST_BYTE = 4  # ids below are special tokens of 'bytes'
RECIPE = "configs/internvideo2/stage2_1b.py:smoke"


def film(path, colours: str, second: float = 1.0) -> str:
    """A video that shows one colour after the other, each for so many seconds."""
    frames = [np.full((48, 64, 3), COLOURS[c], np.uint8) for c in colours]
    images = [x for x in frames for _ in range(round(25 * second))]
    write(str(path), frames=len(images), size=(64, 48), images=images)
    return str(path)


def make_run(place, stored: bool, recipe=RECIPE, seed=0, step=3):
    """A workdir with random parameters; gives the model, the parameters, and what `open_source` would.

    Args:
        stored: write a checkpoint.
    """
    config = config_lib.load(recipe).config
    name = config.stage_order[0]
    model = contrastive.model(config, name)
    rng, shapes = np.random.default_rng(seed), models.abstract(model)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), shapes)
    meta = dict(config=config.to_dict(), stage=name, epoch_examples=100)
    (place / "checkpoints").mkdir(parents=True)
    if stored:
        with Checkpoints(place / "checkpoints") as kept:
            kept.save(step, dict(params=params), meta, wait=True)
    about = dict(name=str(place), weights="params", step=step, digest="0")
    leaves = flatten_dict(params, sep="/")
    return model, params, handover.Source(leaves, leaves.__getitem__, about, meta)


def save_weights(place, overrides=(), recipe=RECIPE, seed=0) -> None:
    """A folder of imported weights of the recipe's model, random."""
    config = config_lib.load(recipe, list(overrides)).config
    model = contrastive.model(config, config.stage_order[0])
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32)
    folder.save_params(place, jax.tree.map(draw, models.abstract(model)), models.describe(model))


def colour_towers(model, tokenize) -> Towers:
    """A clip is its mean colour, a text the colour that its first letter names; in place of `make_towers`.

    `match` prefers dark blue; its other tokens are the mean colour.
    """
    table = np.zeros((300, 3), np.float32)
    for letter, colour in COLOURS.items():
        table[ord(letter) + FIRST_BYTE] = colour
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)

    def video(params, batch):
        mean = batch["video"].astype(jnp.float32).mean((1, 2, 3))
        return {"embedding": unit(mean), "tokens": mean[:, None]}

    def text(params, ids, valid):
        made = jnp.asarray(table)[ids[:, 1]]
        return {"embedding": unit(made), "tokens": made[:, None]}

    def audio(params, batch):
        heard = jnp.exp(batch["audio"].mean((1, 2)))  # the louder, the redder
        level = jnp.stack([heard, jnp.ones_like(heard), jnp.zeros_like(heard)], -1)
        return {"embedding": unit(level), "valid": batch["audio_frames"] > 0}

    return Towers(
        video,
        text,
        tokenize,
        audio=audio if model.audio is not None else None,
        match=lambda params, words, valid, tokens: tokens[:, 0, 2] + 0 * words[:, 0, 0],
        vocabulary=260,
    )
