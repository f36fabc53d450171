"""Stages of latent prediction: the targets are features of a slow or frozen copy of the encoder."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections

from invideo_jax.errors import UserError
from invideo_jax.models import predictor
from invideo_jax.programs import base
from invideo_jax.stages import Stage
from invideo_jax.steps import latent
from invideo_jax.steps.update import in_parts, named_averages

Config = ml_collections.ConfigDict


def model(
    config: Config, stage_name: str, *, dtype: jnp.dtype | None = None
) -> predictor.LatentModel:
    """The model with its shapes of this stage; makes no parameters. Arguments as `base.encoder`."""
    stage, encoder = config.stages[stage_name], base.encoder(config, stage_name, dtype=dtype)
    predicts = predictor.Predictor(
        encoder.width,
        encoder.grid,
        **stage.predictor.to_dict(),
        masks=len(stage.views),
        scan=config.model.scan,
        remat=config.model.remat,
        dtype=encoder.dtype,
    )
    made = predictor.LatentModel(encoder, predicts)
    made.check()
    return made


def visible_count(config: Config, stage_name: str) -> int:
    """Tokens of one clip that the encoder sees in all views together; touches no device."""
    grid = model(config, stage_name, dtype=jnp.float32).encoder.grid
    views = config.stages[stage_name].views.to_dict()
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    drawn = jax.eval_shape(lambda keys: latent.draw_views(grid, keys, views), keys)
    return sum(visible.shape[1] for visible, _ in drawn.values())


def check(config: Config, stage_name: str) -> None:
    """Raises ValueError or TypeError for what does not fit together; touches no device."""
    stage, at = config.stages[stage_name], f"stages.{stage_name}"
    if bool(stage.teacher.source) == (stage.ema_decay > 0):
        raise UserError(
            f"The targets must come either from a moving average or from a frozen encoder; got "
            f"{at}.ema_decay={stage.ema_decay}, {at}.teacher.source={stage.teacher.source!r}. Set one."
        )
    if stage.ema_warmup:
        raise UserError(
            f"{at}.ema_warmup must be False: the moving average makes the targets; got True. Use "
            f"{at}.ema_decay and {at}.ema_final."
        )
    if not stage.views:
        raise UserError(f"{at}.views must name at least one mask; got none.")
    for name, mask in stage.views.items():
        if mask.name == "attention":
            raise UserError(
                f"{at}.views.{name}.name must not be 'attention': no teacher gives one."
            )
    latent.momentum(stage.ema_decay, stage.ema_final, 1)
    visible_count(config, stage_name)
    latent.error_named(stage.target.loss)
    latent.normalises(**stage.target.to_dict())


def program(config: Config, stage: Stage) -> base.Program:
    """What runs the stage."""
    options, made = config.stages[stage.name], model(config, stage.name)
    init_params = lambda: predictor.init(made, jax.random.key(config.seed))
    of_program, of_update = base.parts(
        config, stage, init_params, freeze=base.no_pool(made.encoder)
    )
    del of_update["ema_warmup"]
    if options.ema_decay:
        of_update["ema_decay"] = latent.momentum(options.ema_decay, options.ema_final, stage.steps)
    key = base.stage_key(config, stage)
    target = options.target.to_dict()
    loss = dict(model=made, views=options.views.to_dict(), **target)
    built = base.Program(
        **of_program,
        model=made,
        encoder=made.encoder,
        train_step=latent.make_train_step(stage_key=key, **loss, **of_update),
        eval_loss=named_averages(
            latent.make_loss(
                stage_key=jax.random.fold_in(key, base.EVAL_STREAM), train=False, **loss
            )
        ),
        pool_trained=False,
        visible_tokens=visible_count(config, stage.name),
        flops_per_clip=0,
        teacher=_teacher(made, options) if options.teacher.source else None,
    )
    shape = (stage.batch_size, made.encoder.tokens, made.encoder.width)
    batch = built.abstract_batch() | {"latent": jax.ShapeDtypeStruct(shape, made.encoder.dtype)}
    traced = base.traced_flops(latent.make_loss(stage_key=key, **loss), init_params, batch)
    return dataclasses.replace(built, flops_per_clip=traced)


def _teacher(made: predictor.LatentModel, options: Config) -> base.Teacher:
    """The same encoder, frozen."""
    encoder, seed = made.encoder, options.teacher.source.partition(":")[2]
    key = lambda: jax.random.key(int(seed) if seed.isdecimal() else 0)

    def init():
        boxed = predictor.init(made, key())["encoder"]
        return jax.tree.map(lambda x: x.astype(encoder.dtype), boxed)

    plan = dict(rename=tuple(options.teacher.rename), leftover=tuple(options.teacher.leftover))
    plan |= dict(grid=encoder.grid, tubelet=encoder.tubelet)
    if options.teacher.old_frames:
        plan |= dict(old_frames=options.teacher.old_frames)
    features = latent.teach(encoder, normalise=latent.normalises(**options.target.to_dict()))
    features = in_parts(features, options.batch_size // options.accumulation)
    return base.Teacher({"encoder": base.Frozen(options.teacher.source, init, plan)}, features)
