"""Stages of cross-model attention: two frozen encoders, modules between them, action labels."""

import jax
import jax.numpy as jnp
import ml_collections

from invideo_jax.models import fusion
from invideo_jax.programs import base
from invideo_jax.programs.classify import check_mix
from invideo_jax.registry import Registry
from invideo_jax.stages import Stage
from invideo_jax.steps import classify
from invideo_jax.steps.update import named_averages

Config = ml_collections.ConfigDict

MULTIMODAL = Registry(
    "multimodal encoder",
    {
        "uniformer_v2": "invideo_jax.models.uniformer_v2:build",
        "clip": "invideo_jax.models.clip_vit:build",
    },
)


def model(
    config: Config, stage_name: str, *, dtype: jnp.dtype | None = None
) -> fusion.FusedClassifier:
    """The model with its shapes of this stage; makes no parameters. Arguments as `base.encoder`."""
    stage = config.stages[stage_name]
    masked = base.encoder(config, stage_name, dtype=dtype, last_norm=False, drop_path=0.0)
    other, options = stage.multimodal.to_dict(), stage.fusion.to_dict()
    multimodal = MULTIMODAL.get(other.pop("name"))(
        other.pop("size"),
        **other,
        image_size=stage.clip.size,
        scan=config.model.scan,
        remat=config.model.remat,
        dtype=masked.dtype,
    )
    options["directions"] = tuple(options["directions"])
    made = fusion.FusedClassifier(masked, multimodal, stage.classes, **options)
    made.check()
    return made


def check(config: Config, stage_name: str) -> None:
    """Raises ValueError or TypeError for what does not fit together; touches no device."""
    model(config, stage_name, dtype=jnp.float32)
    check_mix(config.stages[stage_name])


def program(config: Config, stage: Stage) -> base.Program:
    """What runs the stage."""
    options, made = config.stages[stage.name], model(config, stage.name)
    init_params = lambda: fusion.init(made, jax.random.key(config.seed))
    of_program, of_update = base.parts(config, stage, init_params, freeze=fusion.FROZEN)
    key, predict = base.stage_key(config, stage), classify.make_predict(model=made)
    seen = made.masked
    shape = (1, seen.frames, seen.image_size, seen.image_size, seen.channels)
    video = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return base.Program(
        **of_program,
        model=made,
        encoder=seen,
        encoder_path="masked",
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
        visible_tokens=seen.tokens,
        flops_per_clip=base.traced_flops(predict, init_params, {"video": video}),
    )
