"""From the config of a stage to what runs it: model, optimiser, train step, evaluation functions.

The one place that spells config keys as keyword arguments; a key that nothing takes is a TypeError.
"""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from invideo_jax import masking, optim, sharding, state
from invideo_jax.data.bad import BadLedger
from invideo_jax.data.decode import Limits
from invideo_jax.data.pipeline import Loader
from invideo_jax.data.sources import NoSuchSplit, Source, open_source, parse_mixture
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS
from invideo_jax.models import layers, pixels, video_mae
from invideo_jax.registry import Registry
from invideo_jax.scale import flops
from invideo_jax.stages import Duration, Stage
from invideo_jax.steps import masked

PyTree = Any

MODELS = Registry("model", {"video_mae": "invideo_jax.models.video_mae:build"})
STEPS = Registry("train step", {"masked": "invideo_jax.build:masked_program"})
OBJECTIVES = tuple(masked.OBJECTIVES)
MASKS = tuple(sorted(set(masking.MASKS) - {"attention"}))  # that one needs a teacher's attention
OPTIMIZERS = optim.OPTIMIZERS
SCHEDULES = ("constant", "cosine", "wsd")
NORMALISATIONS = tuple(pixels.NORMALISATION)
REMAT_POLICIES = tuple(layers.REMAT)

_EVAL_STREAM = 1  # what the stage's key is folded with, so that evaluation draws masks of its own


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs one stage; everything in it is pure.

    Attributes:
        stage: its place in the run.
        model: the linen module.
        init_params: () -> boxed parameters; makes its own random key.
        make_state: unboxed parameters -> `TrainState`.
        train_step: (state, batch) -> (state, metrics).
        eval_loss: (params, batch) -> name -> `losses.Mean`.
        reconstruct: (params, batch) -> (original, masked, reconstruction).
        optimizer_table: what the optimiser does with each parameter.
        trainable: bool for each parameter.
        visible_tokens: tokens of one clip that enter the encoder.
        flops_per_clip: of forward and backward, visible tokens only.
    """

    stage: Stage
    model: nn.Module
    init_params: Callable[[], PyTree]
    make_state: Callable[[PyTree], state.TrainState]
    train_step: Callable[[state.TrainState, Any], tuple[state.TrainState, dict[str, Any]]]
    eval_loss: Callable[[PyTree, Any], dict[str, Any]]
    reconstruct: Callable[[PyTree, Any], tuple[jax.Array, jax.Array, jax.Array]]
    optimizer_table: list[optim.Leaf]
    trainable: PyTree
    visible_tokens: int
    flops_per_clip: int

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch of the stage."""
        rows, model = self.stage.batch_size, self.model
        video = (rows, model.frames, model.image_size, model.image_size, model.channels)
        return {
            "video": jax.ShapeDtypeStruct(video, jnp.uint8),
            "position": jax.ShapeDtypeStruct((rows,), jnp.uint32),
            "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "valid": jax.ShapeDtypeStruct((rows,), jnp.bool_),
        }


def program(config: ml_collections.ConfigDict, stage: Stage) -> Program:
    """Builds the stage called `stage.name` of the config.

    Raises:
        ValueError: values that do not go together; the message names them.
    """
    return STEPS.get(config.stages[stage.name].step)(config, stage)


def compute_dtype(name: str) -> jnp.dtype:
    """'auto' is float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def clip_spec(
    config: ml_collections.ConfigDict, stage_name: str, *, train: bool = True
) -> ClipSpec:
    """How a clip is cut from a video; evaluation takes the middle, in time and space, unflipped."""
    clip = config.stages[stage_name].clip
    fixed = {} if train else dict(crop="center", flip=0.0, randaugment="", erase=0.0, views=1)
    if not train and clip.sampling == "rand":
        fixed["sampling"] = "middle"  # its fixed counterpart
    return ClipSpec(**{**clip.to_dict(), **fixed})


def train_sources(config: ml_collections.ConfigDict) -> tuple[list[Source], list[float]]:
    """The training sources and their weights.

    Raises:
        ValueError: nothing there, or not what the spec says.
    """
    parts, data = parse_mixture(config.data.train), config.data
    opened = [_open(spec, data, data.train_split) for spec, _ in parts]
    return opened, [weight for _, weight in parts]


def _open(
    spec: str, data: ml_collections.ConfigDict, split: str, classes: Sequence[str] = ()
) -> Source:
    filters = dict(min_seconds=data.min_seconds, max_seconds=data.max_seconds)
    filters = {name: value for name, value in filters.items() if value}
    try:
        return open_source(spec, split=split, roots=data.roots, classes=classes, **filters)
    except TypeError as error:
        if not filters:
            raise
        raise UserError(
            f"data.{min(filters)} needs a manifest that says how long its videos are; {spec} does not. Make "
            f"one: python -m invideo_jax.data.scan {spec} --output=manifest.jsonl"
        ) from error


def held_out_sources(config: ml_collections.ConfigDict, train: Sequence[Source]) -> list[Source]:
    """The evaluation sources: those of `data.eval`, else the held-out rows of the training sources.

    Empty where `data.eval` is empty and no training source has rows of the split `data.eval_split`.

    Args:
        train: the training sources, as opened.
    """
    data = config.data
    parts = parse_mixture(data.eval or data.train)
    lists = {source.classes for source in train if source.classes}
    # A list of its own must count its named labels as the training data does.
    classes = lists.pop() if data.eval and len(lists) == 1 else ()
    opened = []
    for (spec, _), source in zip(parts, [None] * len(parts) if data.eval else train):
        try:
            found = _open(spec, data, data.eval_split, classes)
        except NoSuchSplit:
            if data.eval:
                raise
            continue  # training rows only
        if source is None or found.fingerprint() != source.fingerprint():  # equal: it has no splits
            opened.append(found)
    return opened


def loader(
    config: ml_collections.ConfigDict, stage: Stage, sources: Sequence[Source], **options: Any
) -> Loader:
    """Batches of a stage; `options` are further arguments of `Loader`."""
    train, data = options.get("train", True), config.data
    return Loader(
        sources,
        clip=clip_spec(config, stage.name, train=train),
        seed=config.seed,
        stage=stage.name,
        workers=data.workers if train else 0,
        threads=data.threads,
        hang_seconds=config.guard.hang_seconds / 2,  # sooner than the watchdog: this names the file
        limits=Limits(
            max_pixels=int(data.max_megapixels * 1e6),
            max_seconds=data.max_hours * 3600,
            decode_seconds=data.decode_seconds,
        ),
        **options,
    )


def model(
    config: ml_collections.ConfigDict, stage_name: str, *, dtype: jnp.dtype | None = None
) -> nn.Module:
    """The model with its shapes of this stage; makes no parameters.

    Args:
        dtype: what it computes in; by default what the config says, for which a device is looked at.
    """
    stage, options = config.stages[stage_name], config.model.to_dict()
    made = MODELS.get(options.pop("name"))(
        options.pop("size"),
        **options,
        frames=stage.clip.frames,
        image_size=stage.clip.size,
        normalisation=stage.normalisation,
        dtype=dtype or compute_dtype(config.compute_dtype),
    )
    made.check()
    return made


def mask_sizes(config: ml_collections.ConfigDict, stage_name: str) -> tuple[int, int]:
    """Visible and hidden tokens of one clip; touches no device."""
    made = model(config, stage_name, dtype=jnp.float32)
    draw = functools.partial(masked.draw_mask, made, mask=config.stages[stage_name].mask.to_dict())
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    visible, hidden = jax.eval_shape(draw, keys)
    return visible.shape[1], hidden.shape[1]


def rate_multipliers(texts: Sequence[str]) -> list[tuple[str, float]]:
    """('pattern=factor', ...) as pairs.

    Raises:
        UserError: not of that form, or a negative factor.
    """
    pairs = []
    for text in texts:
        pattern, _, factor = text.rpartition("=")
        if not pattern or not re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", factor):
            raise UserError(
                f"lr_multipliers must hold 'pattern=factor' with a factor of at least 0; got {text!r}."
            )
        pairs.append((pattern, float(factor)))
    return pairs


def schedule(config: ml_collections.ConfigDict, stage: Stage) -> optim.Schedule:
    """Learning rate by the number of updates made in the stage."""
    rates, shape = config.stages[stage.name].optimizer, config.stages[stage.name].schedule
    scaled = lambda rate: optim.batch_scaled(rate, stage.batch_size, rates.scale_by_batch)
    at = f"stages.{stage.name}.schedule"
    decay = dict(
        decay_steps=stage.to_steps(shape.decay, name=f"{at}.decay"), decay_shape=shape.decay_shape
    )
    return optim.make_schedule(
        shape.name,
        peak=scaled(rates.learning_rate),
        end=scaled(shape.final),
        steps=stage.steps,
        warmup_steps=stage.to_steps(shape.warmup, name=f"{at}.warmup"),
        warmup_start=scaled(shape.warmup_start),
        **(decay if shape.name == "wsd" else {}),
    )


def masked_program(config: ml_collections.ConfigDict, stage: Stage) -> Program:
    """A stage of masked video modelling."""
    options, rates = config.stages[stage.name], config.stages[stage.name].optimizer
    made, rate = model(config, stage.name), schedule(config, stage)
    init_params = lambda: video_mae.init(made, jax.random.key(config.seed))
    boxed = jax.eval_shape(init_params)
    tx, table = optim.make_optimizer(
        rates.name,
        schedule=rate,
        params=boxed,
        weight_decay=rates.weight_decay,
        betas=(rates.b1, rates.b2),
        eps=rates.eps,
        momentum=rates.momentum,
        no_decay=tuple(rates.no_decay),
        lr_multipliers=rate_multipliers(rates.lr_multipliers),
        layer_decay=rates.layer_decay if rates.layer_decay < 1 else None,
        freeze=tuple(rates.freeze),
        muon=tuple(rates.muon),
    )
    trainable = optim.trainable_mask(boxed, tuple(rates.freeze))
    key = jax.random.fold_in(jax.random.key(config.seed), stage.key)
    mask = options.mask.to_dict()
    loss = dict(objective=options.objective, mask=mask, target=options.target.to_dict())
    held_out = dict(model=made, stage_key=jax.random.fold_in(key, _EVAL_STREAM))
    visible, hidden = mask_sizes(config, stage.name)
    return Program(
        stage=stage,
        model=made,
        init_params=init_params,
        make_state=functools.partial(state.create, tx=tx, keep_ema=options.ema_decay > 0),
        train_step=masked.make_train_step(
            model=made,
            tx=tx,
            stage_key=key,
            accumulation=options.accumulation,
            clip_norm=options.optimizer.clip_norm or None,
            schedule=rate,
            ema_decay=options.ema_decay or None,
            ema_warmup=options.ema_warmup,
            trainable=trainable,
            **loss,
        ),
        eval_loss=masked.make_eval_loss(**held_out, **loss),
        reconstruct=masked.make_reconstruct(
            **held_out, mask=mask, normalise=options.target.normalise
        ),
        optimizer_table=table,
        trainable=trainable,
        visible_tokens=visible,
        flops_per_clip=_flops_per_clip(made, visible, hidden),
    )


def _flops_per_clip(made: video_mae.VideoMAE, visible: int, hidden: int) -> int:
    return flops.training_flops(
        flops.video_mae_flops(
            tokens=visible + hidden,
            visible=visible,
            pixels=made.patch_pixels,
            width=made.width,
            depth=made.depth,
            mlp=made.mlp_width,
            decoder_width=made.decoder_width,
            decoder_depth=made.decoder_depth,
            decoder_mlp=made.decoder_mlp_width,
        )
    )


def evaluators(
    config: ml_collections.ConfigDict,
    made: Program,
    *,
    mesh: jax.sharding.Mesh,
    sources: Sequence[Source],
    folder: pathlib.Path,
    ledger: BadLedger | None = None,
    on_batch: Callable[[], None] = lambda: None,
    only_due: bool = True,
) -> dict[str, Any]:
    """The evaluators of a stage by name; see `invideo_jax.evals` for what they do.

    Args:
        sources: held-out examples.
        folder: where pictures go.
        ledger: lists videos that cannot be read.
        on_batch: called before each batch (the watchdog is told that the run lives).
        only_due: leave out those that the config never runs during training.
    """
    ready = {}
    for name, options in config.evals.items():
        if Duration.parse(options.every).amount or not only_due:
            batches = functools.partial(
                held_out_batches,
                config,
                made.stage,
                mesh=mesh,
                sources=sources,
                examples=options.examples,
                ledger=ledger,
                on_batch=on_batch,
            )
            ready[name] = EVALUATORS.get(name)(
                batches=batches,
                eval_loss=jax.jit(made.eval_loss),
                reconstruct=jax.jit(made.reconstruct),
                workdir=folder,
                pictures=options.pictures,
            )
    return ready


def held_out_batches(
    config: ml_collections.ConfigDict,
    stage: Stage,
    *,
    mesh: jax.sharding.Mesh,
    sources: Sequence[Source],
    examples: int,
    ledger: BadLedger | None = None,
    on_batch: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, jax.Array]]:
    """Device batches of the first `examples` held-out clips; rows beyond them are not valid.

    The clips are the same for every mesh and batch size. One process of each run decodes in threads:
    starting workers would take longer than most evaluations.
    """
    unit = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = min(stage.batch_size, -(-min(examples, sum(map(len, sources))) // unit) * unit)
    options = dict(batch_size=rows, rows=sharding.rows_of_process(mesh, rows), train=False)
    steps = -(-examples // rows)
    with loader(config, stage, sources, **options, steps=steps, ledger=ledger) as batches:
        for host, _ in batches:
            on_batch()
            host["valid"] &= host["position"] < examples
            yield sharding.global_batch(host, mesh)
