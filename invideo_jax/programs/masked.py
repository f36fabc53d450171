"""Stages of masked video modelling on pixels: VideoMAE and VideoMAE V2."""

import jax
import jax.numpy as jnp
import ml_collections

from invideo_jax.errors import UserError
from invideo_jax.models import video_mae
from invideo_jax.programs import base
from invideo_jax.scale import flops
from invideo_jax.stages import Stage
from invideo_jax.steps import masked
from invideo_jax.steps.update import named_averages


def model(
    config: ml_collections.ConfigDict, stage_name: str, *, dtype: jnp.dtype | None = None
) -> video_mae.VideoMAE:
    """The model with its shapes of this stage; makes no parameters. Arguments as `base.encoder`."""
    name, size, options = base.model_options(config, stage_name, dtype=dtype)
    if name != "video_mae":
        raise UserError(
            f"stages.{stage_name}.objective='pixels' needs a model that predicts pixels; got "
            f"model.name={name!r}. Use model.name='video_mae', or another objective."
        )
    made = video_mae.build(size, **options)
    made.check()
    return made


def mask_sizes(config: ml_collections.ConfigDict, stage_name: str) -> tuple[int, int]:
    """Tokens of one clip that the encoder sees, and that the decoder predicts; touches no device."""
    grid = model(config, stage_name, dtype=jnp.float32).encoder.grid
    options = config.stages[stage_name]

    def draw(keys):
        visible, hidden = masked.draw_mask(grid, keys, options.mask.to_dict())
        return visible, masked.decoded_ids(
            grid, keys, hidden, options.target.decoder_mask.to_dict()
        )

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    visible, hidden = jax.eval_shape(draw, keys)
    return visible.shape[1], hidden.shape[1]


def check(config: ml_collections.ConfigDict, stage_name: str) -> None:
    """Raises ValueError or TypeError for what does not fit together; touches no device."""
    if config.stages[stage_name].mask.name == "attention":
        raise UserError(
            "mask.name='attention' needs a teacher's attention, which objective='pixels' has not. "
            "Use mask.name='tube'."
        )
    mask_sizes(config, stage_name)


def program(config: ml_collections.ConfigDict, stage: Stage) -> base.Program:
    """What runs the stage."""
    options, made = config.stages[stage.name], model(config, stage.name)
    init_params = lambda: video_mae.init(made, jax.random.key(config.seed))
    of_program, of_update = base.parts(config, stage, init_params)
    key, mask = base.stage_key(config, stage), options.mask.to_dict()
    loss = dict(objective=options.objective, mask=mask, target=options.target.to_dict())
    held_out = dict(model=made, stage_key=jax.random.fold_in(key, base.EVAL_STREAM))
    visible, hidden = mask_sizes(config, stage.name)
    return base.Program(
        **of_program,
        model=made,
        encoder=made.encoder,
        train_step=masked.make_train_step(model=made, stage_key=key, **loss, **of_update),
        eval_loss=named_averages(masked.make_loss(train=False, **held_out, **loss)),
        reconstruct=masked.make_reconstruct(
            **held_out, mask=mask, normalise=options.target.normalise
        ),
        visible_tokens=visible,
        flops_per_clip=_flops_per_clip(made, visible, hidden),
    )


def _flops_per_clip(made: video_mae.VideoMAE, visible: int, hidden: int) -> int:
    encoder = made.encoder
    return flops.training_flops(
        flops.video_mae_flops(
            tokens=visible + hidden,
            visible=visible,
            pixels=encoder.patch_pixels,
            width=encoder.width,
            depth=encoder.depth,
            mlp=encoder.mlp_width,
            decoder_width=made.decoder_width,
            decoder_depth=made.decoder_depth,
            decoder_mlp=made.decoder_mlp_width,
        )
    )
