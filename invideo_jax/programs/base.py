"""What runs a stage, and what the builders of all kinds of stages share."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from invideo_jax import optim, state
from invideo_jax.data.modalities import Modalities
from invideo_jax.errors import UserError
from invideo_jax.feature_store import Reader
from invideo_jax.registry import Registry
from invideo_jax.scale import flops
from invideo_jax.stages import Stage
from invideo_jax.steps import update
from invideo_jax.towers import Towers

PyTree = Any
Batch = Mapping[str, jax.Array]

# model.name -> the function (size, **attributes) that builds an encoder.
ENCODERS = Registry(
    "model",
    {
        "video_mae": "invideo_jax.models.video_mae:build_encoder",
        "internvideo2": "invideo_jax.models.video_encoder:build",
        "uniformer_v2": "invideo_jax.models.uniformer_v2:build",
        "viclip": "invideo_jax.models.clip_vit:build_joint",
    },
)

SCHEDULES = ("constant", "cosine", "wsd")
EVAL_STREAM = 1  # what the stage's key is folded with, so that evaluation draws masks of its own


@dataclasses.dataclass(frozen=True)
class Frozen:
    """One frozen model.

    Attributes:
        source: where its weights are: what `handover.read` takes, or 'random:SEED'.
        init_params: () -> boxed parameters; gives shapes and logical axes, and with 'random:SEED'
            the weights themselves.
        options: further keyword arguments of `handover.read` (renaming, old frames).
        model: the linen module of the parameters; None where it is a part of the program's.
    """

    source: str
    init_params: Callable[[], PyTree]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: nn.Module | None = None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Frozen models that add to each batch what the loss compares with.

    Their parameters are placed on the devices like those of the student; they are in no checkpoint,
    which only keeps their digest.

    Attributes:
        models: by name.
        apply: ({name: parameters}, batch) -> further entries of the batch, [B, ...] each. It is jitted,
            and runs before the train step; it takes the batch in parts (`steps.update.in_parts`), so that
            what it holds besides these entries is for one microbatch.
    """

    models: Mapping[str, Frozen]
    apply: Callable[[Mapping[str, PyTree], Batch], dict[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a teacher made of each example before, on disk; it stands in for the teacher.

    Attributes:
        folder: opened when first asked, as `feature_store.Reader`.
        facts: () -> what the features must belong to.
    """

    folder: pathlib.Path
    facts: Callable[[], Mapping[str, Any]]

    @functools.cached_property
    def reader(self) -> Reader:
        """The open folder; UserError where there is none, or other features."""
        return Reader(self.folder, self.facts())

    def read(self, info: list[Mapping[str, Any]]) -> dict[str, np.ndarray]:
        """Further host entries of a batch, [B, ...] each, from its `info`."""
        return self.reader.rows([row["id"] or None for row in info])

    def shapes(self, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What `read` gives for so many rows."""
        arrays = self.reader.arrays.items()
        return {k: jax.ShapeDtypeStruct((rows, *s), jnp.dtype(dtype)) for k, (dtype, s) in arrays}

    def check(self, examples: Collection[str], *, spare: float = 0) -> None:
        """Raises UserError where more than `spare` examples, or all, are not there."""
        lost = self.reader.missing(examples)
        if lost and (len(lost) > spare or len(lost) == len(examples)):
            raise UserError(
                f"{self.folder} must hold every example; {len(lost)} of {len(examples)} are not there, the "
                f"first is {lost[0]!r}. Run the command that made it again on the same data: it makes what "
                "is missing."
            )


@dataclasses.dataclass(frozen=True)
class Program:
    """What runs one stage; everything in it is pure.

    Attributes:
        stage: its place in the run.
        model: the linen module that `init_params` belongs to.
        encoder: the encoder in it, which says what videos it takes.
        init_params: () -> boxed parameters; makes its own random key.
        make_state: unboxed parameters -> `TrainState`.
        train_step: (state, batch) -> (state, metrics).
        eval_loss: (params, batch) -> name -> `losses.Mean`.
        optimizer_table: what the optimiser does with each parameter.
        trainable: bool for each parameter.
        visible_tokens: tokens of one clip that enter the encoder.
        flops_per_clip: of forward and backward, visible tokens only; without the teacher.
        encoder_path: where the encoder's parameters are in the tree: 'encoder', or 'a/encoder'.
        frames: of the clips that the stage reads; 0 for those of the encoder.
        reconstruct: (params, batch) -> (original, masked, reconstruction), of models that predict
            pixels; else None.
        predict: (params, batch) -> logits [B, classes] in float32, of classifiers; else None.
        teacher: what adds to each batch first; None for none.
        kept: what stands in for a teacher, from disk; None for none.
        modalities: what the batches hold besides pictures; None for nothing.
        towers: of models of several modalities; else None.
        images: whether its losses take images beside videos (the encoder must, too).
        pool_trained: whether the loss trains the encoder's pool; where not, `encode` gives the mean of the
            patch tokens.
    """

    stage: Stage
    model: nn.Module
    encoder: nn.Module
    init_params: Callable[[], PyTree]
    make_state: Callable[[PyTree], state.TrainState]
    train_step: Callable[[state.TrainState, Any], tuple[state.TrainState, dict[str, Any]]]
    eval_loss: Callable[[PyTree, Any], dict[str, Any]]
    optimizer_table: list[optim.Leaf]
    trainable: PyTree
    visible_tokens: int
    flops_per_clip: int
    encoder_path: str = "encoder"
    frames: int = 0
    reconstruct: Callable[[PyTree, Any], tuple[jax.Array, jax.Array, jax.Array]] | None = None
    predict: Callable[[PyTree, Any], jax.Array] | None = None
    teacher: Teacher | None = None
    kept: Kept | None = None
    modalities: Modalities | None = None
    towers: Towers | None = None
    images: bool = False
    pool_trained: bool = True

    @property
    def clip_frames(self) -> int:
        """T of the clips that the stage reads."""
        return self.frames or self.encoder.frames

    @property
    def media(self) -> tuple[str, ...]:
        """Kinds of media that the stage has a use for; the pictures of a sound are a black image."""
        images = self.clip_frames == 1 or (self.images and self.encoder.takes_images)
        sounds = images and self.modalities is not None and self.modalities.audio is not None
        return ("video", *["image"] * images, *["audio"] * sounds)

    def encode(self, params: PyTree, batch: Batch) -> jax.Array:
        """Features of whole clips from the parameters of the stage: pooled, [B, P].

        Where the stage does not train the pool, it is the mean of the patch tokens, [B, D].
        """
        mean = lambda module, tokens: tokens[:, module.prefix :].mean(axis=1)
        pool = type(self.encoder).pooled if self.pool_trained else mean
        return self._run_encoder(params, batch, pool)

    def encode_tokens(self, params: PyTree, batch: Batch) -> jax.Array:
        """Tokens of whole clips from the parameters of the stage, the class tokens first, [B, N, D]."""
        return self._run_encoder(params, batch, lambda module, tokens: tokens)

    def _run_encoder(self, params: PyTree, batch: Batch, last: Callable) -> jax.Array:
        for name in self.encoder_path.split("/"):
            params = params[name]
        # The clips may hold more frames than this encoder takes, for a teacher that sees them all; images hold one.
        stride = max(1, batch["video"].shape[1] // self.encoder.frames)
        video = batch["video"][:, ::stride]
        run = lambda module: last(module, module(video)[0])
        return nn.apply(run, self.encoder)({"params": params})

    def with_read(
        self, host: dict[str, np.ndarray], info: list[Mapping[str, Any]]
    ) -> dict[str, np.ndarray]:
        """A host batch with what is kept of its examples."""
        return host if self.kept is None else host | self.kept.read(info)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch of the stage, as the train step gets it."""
        batch = self._from_loader()
        if self.kept is not None:
            return batch | self.kept.shapes(self.stage.batch_size)
        if self.teacher is None:
            return batch
        models = self.teacher.models.items()
        params = {name: nn.unbox(jax.eval_shape(frozen.init_params)) for name, frozen in models}
        return batch | jax.eval_shape(self.teacher.apply, params, batch)

    def _from_loader(self) -> dict[str, jax.ShapeDtypeStruct]:
        rows, seen = self.stage.batch_size, self.encoder
        video = (rows, self.clip_frames, seen.image_size, seen.image_size, seen.channels)
        more = self.modalities.shapes.items() if self.modalities else ()
        return {
            "video": jax.ShapeDtypeStruct(video, jnp.uint8),
            "position": jax.ShapeDtypeStruct((rows,), jnp.uint32),
            "label": jax.ShapeDtypeStruct((rows,), jnp.int32),
            "valid": jax.ShapeDtypeStruct((rows,), jnp.bool_),
        } | {name: jax.ShapeDtypeStruct((rows, *shape), kind) for name, (shape, kind) in more}


def compute_dtype(name: str) -> jnp.dtype:
    """'auto' is float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def model_options(
    config: ml_collections.ConfigDict, stage_name: str, *, dtype: jnp.dtype | None = None
) -> tuple[str, str, dict[str, Any]]:
    """Name, size and further attributes of the encoder, with its shapes of this stage.

    Args:
        dtype: what it computes in; by default what the config says, for which a device is looked at.
    """
    stage, options = config.stages[stage_name], config.model.to_dict()
    name, size = options.pop("name"), options.pop("size")
    options |= dict(
        frames=stage.clip.frames,
        image_size=stage.clip.size,
        normalisation=stage.normalisation,
        dtype=dtype or compute_dtype(config.compute_dtype),
    )
    return name, size, options


def encoder(
    config: ml_collections.ConfigDict,
    stage_name: str,
    *,
    dtype: jnp.dtype | None = None,
    **more: Any,
) -> nn.Module:
    """The encoder with its shapes of this stage; makes no parameters.

    Args:
        dtype: as of `model_options`.
        more: attributes that the kind of stage wants otherwise than the config says.
    """
    name, size, options = model_options(config, stage_name, dtype=dtype)
    made = ENCODERS.get(name)(size, **(options | more))
    made.check()
    return made


def stage_key(config: ml_collections.ConfigDict, stage: Stage) -> jax.Array:
    """Every random draw of the stage comes from this key."""
    return jax.random.fold_in(jax.random.key(config.seed), stage.key)


def no_pool(encoder: nn.Module) -> tuple[str, ...]:
    """Patterns that freeze the encoder's pool, where it has one: weight decay would shrink what no loss trains."""
    return ("^encoder/pool/",) if getattr(encoder, "pool_width", 0) else ()


def parts(
    config: ml_collections.ConfigDict,
    stage: Stage,
    init_params: Callable[[], PyTree],
    *,
    freeze: Sequence[str] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Optimiser, state and update of a stage, from its parameters' shapes.

    Args:
        init_params: () -> boxed parameters.
        freeze: patterns of parameters that the optimiser leaves alone, besides those of the config.

    Returns:
        Arguments of `Program` (init_params, make_state, optimizer_table, trainable), and arguments
        of `steps.update.update` (tx, accumulation, clip_norm, schedule, ema_decay, ema_warmup, trainable).
    """
    options, rate = config.stages[stage.name], schedule(config, stage)
    rates = options.optimizer
    freeze = (*rates.freeze, *freeze)
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
        freeze=freeze,
        muon=tuple(rates.muon),
    )
    trainable = optim.trainable_mask(boxed, freeze)
    of_program = dict(
        stage=stage,
        init_params=init_params,
        make_state=functools.partial(state.create, tx=tx, keep_ema=options.ema_decay > 0),
        optimizer_table=table,
        trainable=trainable,
    )
    of_update = dict(
        tx=tx,
        accumulation=options.accumulation,
        clip_norm=rates.clip_norm or None,
        schedule=rate,
        ema_decay=options.ema_decay or None,
        ema_warmup=options.ema_warmup,
        trainable=trainable,
    )
    return of_program, of_update


def traced_flops(
    loss: Callable[..., Any],
    init_params: Callable[[], PyTree],
    batch: Batch,
    *,
    trainable: PyTree | None = None,
) -> int:
    """FLOPs of forward and backward of a loss, for one clip.

    Args:
        loss: (params, batch) -> (`losses.Mean`, ...); traced, not run.
        batch: shapes of a batch of any size.
        trainable: bool for each parameter: the backward pass is counted as far as it is made, for which the
            model must not recompute anything. None: all are, and it counts twice the forward pass.
    """
    params = nn.unbox(jax.eval_shape(init_params))
    rows = next(iter(batch.values())).shape[0]
    if trainable is None:
        return 3 * flops.jaxpr_flops(loss, params, batch) // rows
    step = functools.partial(update.gradients, loss, trainable=trainable)
    return flops.jaxpr_flops(step, params, batch) // rows


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
