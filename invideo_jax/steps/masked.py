"""Masked video modelling: the public train step, its losses by name, and reconstruction.

An objective is a function (model, ...options) -> loss function; a new one is one file and one line
of `OBJECTIVES`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invideo_jax import losses, masking
from invideo_jax.losses import Mean
from invideo_jax.models import pixels
from invideo_jax.models.attention import fold
from invideo_jax.models.video_mae import VideoMAE
from invideo_jax.registry import Registry
from invideo_jax.state import TrainState
from invideo_jax.steps.update import Batch, LossFn, Metrics, Schedule, update

PyTree = Any
# (params, batch, keys [B], train) -> (loss, more averages by name)
Objective = Callable[[PyTree, Batch, jax.Array, bool], tuple[Mean, dict[str, Mean]]]

OBJECTIVES = Registry(
    "objective",
    {
        "aligned": "invideo_jax.steps.aligned:align_objective",
        "pixels": "invideo_jax.steps.masked:pixel_objective",
    },
)

MASK, DROP_PATH, DECODER_MASK = 0, 1, 2  # what a key of an example is folded with, for each use


def example_keys(stage_key: np.ndarray | jax.Array, position: jax.Array) -> jax.Array:
    """One random key for each example: a function of the stage's key and of its position only.

    Args:
        stage_key: random key of the stage.
        position: uint32 [B], the example's place in the order of its stage.
    """
    return jax.vmap(lambda p: jax.random.fold_in(stage_key, p))(position)


def draw_mask(
    grid: masking.Grid, keys: jax.Array, mask: Mapping[str, Any], **more: Any
) -> masking.Ids:
    """Visible and hidden ids of examples with these keys.

    Args:
        grid: (t, h, w).
        keys: [B], from `example_keys`.
        mask: name and options of a mask.
        more: arrays that the mask needs, as the `weights` of an attention mask.
    """
    options = dict(mask)
    return masking.get(options.pop("name"))(fold(keys, MASK), grid=grid, **options, **more)


def target_cubes(encoder: pixels.Geometry, video: jax.Array, hidden: jax.Array) -> jax.Array:
    """Pixels of the hidden cubes in 0..1, [B, M, tubelet*patch*patch*C].

    Args:
        encoder: says how the video is cut.
        video: uint8, or float normalised with the model's constants, [B, T, H, W, C].
    """
    cubes = pixels.patchify(video, tubelet=encoder.tubelet, patch=encoder.patch)
    cubes = masking.gather(cubes, hidden)
    if video.dtype == jnp.uint8:
        return pixels.zero_to_one(cubes, encoder.dtype)
    by_channel = cubes.reshape(*cubes.shape[:2], -1, encoder.channels)
    return pixels.unnormalise(by_channel, encoder.normalisation).reshape(cubes.shape)


def decoded_ids(
    grid: masking.Grid, keys: jax.Array, hidden: jax.Array, decoder_mask: Mapping[str, Any] | None
) -> jax.Array:
    """The hidden ids that the decoder predicts: all, or those that a second mask leaves.

    Args as in `draw_mask` and `pixel_objective`.
    """
    options = dict(decoder_mask or {"name": ""})
    if not options["name"]:
        return hidden
    draw = masking.get(options.pop("name"))
    return masking.thin(hidden, draw(fold(keys, DECODER_MASK), grid=grid, **options))


def pixel_objective(
    model: VideoMAE,
    *,
    mask: Mapping[str, Any],
    normalise: bool = True,
    decoder_mask: Mapping[str, Any] | None = None,
) -> Objective:
    """Squared error on the hidden cubes' pixels (VideoMAE, and with two masks VideoMAE V2).

    The released code of V2 gives its decoder a mask token also at the visible places that the second
    mask leaves, and weighs their error by 0; here, as in the paper, the decoder has none there.

    Args:
        mask: name and options of a mask, e.g. dict(name='tube', ratio=0.9).
        decoder_mask: the same of the mask on the decoder, e.g. dict(name='running_cell', ratio=0.5):
            only hidden cubes that it leaves are decoded, and in the loss. None or name='': all.
        normalise: standardise each channel of each target cube by its own mean and deviation; the
            loss of predicting every cube's mean is then (n-1)/n, n = tubelet*patch*patch.

    Source: VideoMAE (arXiv:2203.12602) 3.1, engine_for_pretraining.py; VideoMAE V2
    (arXiv:2303.16727) 3.2.
    """

    encoder = model.encoder

    def loss(params, batch, keys, train):
        visible, hidden = draw_mask(encoder.grid, keys, mask)
        hidden = decoded_ids(encoder.grid, keys, hidden, decoder_mask)
        drop = fold(keys, DROP_PATH) if train and encoder.drop_path else None
        prediction, _ = model.apply({"params": params}, batch["video"], visible, hidden, keys=drop)
        target = target_cubes(encoder, batch["video"], hidden)
        if normalise:
            target, _, _ = losses.normalise_cubes(target, channels=encoder.channels)
        return losses.squared_error(prediction, target, batch["valid"]), {}

    return loss


def host_key(stage_key: jax.Array) -> Callable[[], jax.Array]:
    """Makes the key again inside a traced function, so that no device array is closed over."""
    data, implementation = (
        np.asarray(jax.random.key_data(stage_key)),
        jax.random.key_impl(stage_key),
    )
    return lambda: jax.random.wrap_key_data(data, impl=implementation)


def make_loss(
    *,
    model: VideoMAE,
    stage_key: jax.Array,
    mask: Mapping[str, Any],
    objective: str = "pixels",
    target: Mapping[str, Any] | None = None,
    train: bool = True,
) -> LossFn:
    """The loss (params, batch) -> (Mean, averages) of an objective with everything else filled in.

    Args:
        model: built as the objective wants it.
        stage_key: random key of the stage; every draw for an example comes from it and `position`.
        mask: name and options of a mask.
        objective: name in `OBJECTIVES`.
        target: further options of the objective.
        train: False switches drop path off.

    Raises:
        ValueError: unknown objective. TypeError: an option the objective does not have.
    """
    function = OBJECTIVES.get(objective)(model, mask=mask, **dict(target or {}))
    key = host_key(stage_key)

    def loss(params: PyTree, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        return function(params, batch, example_keys(key(), batch["position"]), train)

    return loss


def make_train_step(
    *,
    model: VideoMAE,
    tx: optax.GradientTransformation,
    stage_key: jax.Array,
    mask: Mapping[str, Any],
    objective: str = "pixels",
    target: Mapping[str, Any] | None = None,
    accumulation: int = 1,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    trainable: PyTree | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure train step (state, batch) -> (state, metrics); jit and donation stand beside it.

    Args as in `make_loss` and `update.update`.
    """
    loss_fn = make_loss(
        model=model, stage_key=stage_key, mask=mask, objective=objective, target=target
    )
    return functools.partial(
        update,
        loss_fn=loss_fn,
        tx=tx,
        accumulation=accumulation,
        clip_norm=clip_norm,
        schedule=schedule,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
        trainable=trainable,
    )


def make_reconstruct(
    *, model: VideoMAE, stage_key: jax.Array, mask: Mapping[str, Any], normalise: bool = True
) -> Callable[[PyTree, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """(params, batch) -> (original, masked, reconstruction), float32 [B, T, H, W, C] in 0..1.

    A model of normalised cubes does not predict a cube's mean and deviation: as in VideoMAE's own
    pictures the true ones are put back, and visible cubes are shown as they are. `masked` is grey
    where cubes are hidden. The masks are those that `make_loss` draws.
    """
    key, encoder = host_key(stage_key), model.encoder
    cut = functools.partial(pixels.patchify, tubelet=encoder.tubelet, patch=encoder.patch)
    join = functools.partial(
        pixels.unpatchify, grid=encoder.grid, tubelet=encoder.tubelet, patch=encoder.patch
    )

    def reconstruct(params: PyTree, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        video = batch["video"]
        visible, hidden = draw_mask(encoder.grid, example_keys(key(), batch["position"]), mask)
        cubes, _ = model.apply({"params": params}, video, visible, hidden)
        if normalise:
            _, middle, spread = losses.normalise_cubes(
                target_cubes(encoder, video, hidden), channels=encoder.channels
            )
            by_channel = cubes.astype(jnp.float32).reshape(*cubes.shape[:2], -1, encoder.channels)
            cubes = (by_channel * spread + middle).reshape(cubes.shape)
        whole = cut(pixels.zero_to_one(video))
        grey = jnp.full_like(cubes, 0.5)
        filled = [masking.scatter(whole, x, hidden) for x in (grey, jnp.clip(cubes, 0, 1))]
        return join(whole), join(filled[0]), join(filled[1])

    return reconstruct
