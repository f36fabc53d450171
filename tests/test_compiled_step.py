"""The compiled train step does the arithmetic of visible tokens only."""

import math
import re

import jax
import pytest
from conftest import REPOSITORY

from invideo_jax import config as config_lib
from invideo_jax import programs, sharding, train
from invideo_jax.scale import flops

_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = \w+\[([\d,]*)\]")
_DOT = re.compile(r" dot\(([^)]*)\).*lhs_contracting_dims=\{([\d,]*)\}")


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def dot_flops(program: str) -> int:
    """FLOPs of all matrix products in the text of a compiled program whose only loops draw random bits."""
    loops = [line for line in program.splitlines() if " while(" in line]
    assert all("fold_in" in line or "uniform" in line for line in loops)
    shapes = {m[1]: numbers(m[2]) for m in map(_RESULT.match, program.splitlines()) if m}
    total = 0
    for line in program.splitlines():
        if dot := _DOT.search(line):
            out = shapes[_RESULT.match(line)[1]]
            left = re.findall(r"%?([\w.-]+)(?:,|$)", dot[1])[0]
            total += 2 * math.prod(out) * math.prod(shapes[left][i] for i in numbers(dot[2]))
    return total


@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9])
def test_encoder_flops_of_the_compiled_train_step(ratio):
    recipe = f"{REPOSITORY}/configs/quickstart.py:masked"
    options = [f"stages.masked.mask.ratio={ratio}", "stages.masked.optimizer.name=adamw"]
    config = config_lib.load(recipe, [*options, "stages.masked.batch_size=2"]).config
    stage = train.place_stages(config, epoch_examples=100)[0]
    program = programs.program(config, stage)
    state = jax.eval_shape(program.make_state, sharding.unbox(jax.eval_shape(program.init_params)))
    lowered = jax.jit(program.train_step).lower(state, program.abstract_batch())
    counted = dot_flops(lowered.compile().as_text()) / stage.batch_size

    model = program.model
    sizes = dict(
        tokens=model.encoder.tokens,
        pixels=model.encoder.patch_pixels,
        width=model.encoder.width,
        depth=model.encoder.depth,
        mlp=model.encoder.mlp_width,
        decoder_width=model.decoder_width,
        decoder_depth=model.decoder_depth,
        decoder_mlp=model.decoder_mlp_width,
    )
    parts = flops.video_mae_flops(visible=program.visible_tokens, **sizes)
    rest = 3 * (parts["decoder"] + parts["head"] + parts["encoder_to_decoder"])
    encoder = counted - rest - 2 * parts["patch_embed"]
    # Products with weights shrink with the share of visible tokens, attention with its square.
    whole = flops.video_mae_flops(visible=model.encoder.tokens, **sizes)["encoder"]
    attention = model.encoder.depth * 4 * model.encoder.tokens**2 * model.encoder.width
    left = program.visible_tokens / model.encoder.tokens
    theory = 3 * (left * (whole - attention) + left**2 * attention)
    assert encoder == pytest.approx(theory, rel=0.05)
    assert left == 1 - int(ratio * 64) / 64  # whole places of 8 x 8 are hidden
