"""Stages of classification: fine-tuning of a whole encoder, attentive and linear probes."""

import jax
import jax.numpy as jnp
import ml_collections

from invideo_jax.errors import UserError
from invideo_jax.models import classifier
from invideo_jax.programs import base
from invideo_jax.stages import Stage
from invideo_jax.steps import classify
from invideo_jax.steps.update import named_averages


def model(
    config: ml_collections.ConfigDict, stage_name: str, *, dtype: jnp.dtype | None = None
) -> classifier.Classifier:
    """The model with its shapes of this stage; makes no parameters. Arguments as `base.encoder`."""
    # Fine-tuning replaces VideoMAE's last norm by that of the head.
    more = {"last_norm": False} if config.model.name == "video_mae" else {}
    encoder = base.encoder(config, stage_name, dtype=dtype, **more)
    made = classifier.Classifier(encoder, **config.stages[stage_name].head.to_dict())
    made.check()
    return made


def check(config: ml_collections.ConfigDict, stage_name: str) -> None:
    """Raises ValueError or TypeError for what does not fit together; touches no device."""
    stage, made = config.stages[stage_name], model(config, stage_name, dtype=jnp.float32)
    check_mix(stage)
    if made.counts_batches and stage.accumulation > 1:
        raise UserError(
            f"head.merge_norm={made.merge_norm!r} normalises over the whole batch, so accumulation "
            f"must be 1; got accumulation={stage.accumulation}. Use merge_norm='LN', or a smaller batch."
        )


def check_mix(stage: ml_collections.ConfigDict) -> None:
    """Raises UserError unless batches consist of whole groups of clips that are mixed with each other."""
    group = stage.mix.group
    if group and stage.batch_size % group:
        raise UserError(
            f"mix.group must divide batch_size; got group={group}, batch_size={stage.batch_size}. "
            "Use a divisor, or 0 for one draw a batch."
        )


def program(config: ml_collections.ConfigDict, stage: Stage) -> base.Program:
    """What runs the stage."""
    options, made = config.stages[stage.name], model(config, stage.name)
    init_params = lambda: classifier.init(made, jax.random.key(config.seed))
    moved_by_step = (classifier.STATISTICS,) if made.counts_batches else ()
    of_program, of_update = base.parts(config, stage, init_params, freeze=moved_by_step)
    key = base.stage_key(config, stage)
    predict = classify.make_predict(model=made)
    return base.Program(
        **of_program,
        model=made,
        encoder=made.encoder,
        train_step=classify.make_train_step(
            model=made,
            stage_key=key,
            mix=options.mix.to_dict(),
            smoothing=options.smoothing,
            **of_update,
        ),
        eval_loss=named_averages(
            classify.make_loss(
                model=made, stage_key=jax.random.fold_in(key, base.EVAL_STREAM), train=False
            )
        ),
        predict=predict,
        visible_tokens=made.encoder.tokens,
        flops_per_clip=_flops_per_clip(made, predict, init_params, of_program["trainable"]),
    )


def _flops_per_clip(made, predict, init_params, trainable) -> int:
    """Of forward and backward; a frozen trunk has no backward."""
    frames, size, channels = (
        made.encoder.frames,
        made.encoder.image_size,
        made.encoder.channels,
    )
    video = jax.ShapeDtypeStruct((1, frames, size, size, channels), jnp.uint8)
    whole = base.traced_flops(predict, init_params, {"video": video})
    trunk = trainable["encoder"].get("stack", trainable["encoder"])
    return whole if any(jax.tree.leaves(trunk)) else whole // 3
