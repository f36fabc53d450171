"""Latent prediction: from visible tokens, what a slow copy of the encoder makes of the hidden ones.

The targets are one more entry of the batch, `latent` [B, N, D], made before the gradient: by the
moving average of the parameters inside the train step, or by a frozen encoder before it.

Source: V-JEPA (arXiv:2404.08471) 3, V-JEPA 2 (arXiv:2506.09985) 2.1; InternVideo-Next
(arXiv:2512.01342), engines/engine_for_stage2.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from invideo_jax import losses, masking
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.models.attention import fold
from invideo_jax.models.predictor import LatentModel
from invideo_jax.registry import nearest
from invideo_jax.state import TrainState
from invideo_jax.steps.masked import DROP_PATH, draw_mask, example_keys, host_key
from invideo_jax.steps.update import Batch, LossFn, Metrics, Schedule, in_parts, update

PyTree = Any
_VIEW = 16  # views fold keys with this and their number


def target_features(
    encoder: nn.Module, params: PyTree, video: jax.Array, *, normalise: bool = True
) -> jax.Array:
    """Features of all patches of whole clips, without gradient, [B, N, D].

    Args:
        normalise: by a LayerNorm with neither scale nor bias, eps 1e-5 (V-JEPA), or as the last block gives
            them (InternVideo-Next).
    """
    tokens, _ = encoder.apply({"params": params}, video)
    x = tokens[:, encoder.prefix :]
    if not normalise:
        return jax.lax.stop_gradient(x)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(-1, keepdims=True)
    wide = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-5)
    return jax.lax.stop_gradient(wide.astype(x.dtype))


def teach(encoder: nn.Module, *, normalise: bool) -> Callable[[PyTree, Batch], dict]:
    """({'encoder': parameters}, batch) -> {'latent': `target_features`}."""

    def made(params: PyTree, batch: Batch) -> dict[str, jax.Array]:
        own = params["encoder"]
        return {"latent": target_features(encoder, own, batch["video"], normalise=normalise)}

    return made


def _absolute(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.abs(prediction - target).mean((1, 2))


def _cosine(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return (2 - 2 * (losses.unit(prediction) * losses.unit(target)).sum(-1)).mean(1)


# (prediction, target), each [B, M, D] -> error of each example, [B].
ERRORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "l1": _absolute,  # V-JEPA
    "cosine": _cosine,  # InternVideo-Next
}


def error_named(name: str) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """The entry of `ERRORS` called `name`; UserError for an unknown one."""
    if name not in ERRORS:
        raise UserError(f"The loss must be known; got loss={name!r}.{nearest(name, ERRORS)}")
    return ERRORS[name]


def normalises(loss: str, normalise: str = "auto") -> bool:
    """Whether targets are layer-normalised before they are compared.

    Args:
        loss: a key of `ERRORS`.
        normalise: 'yes', 'no', or 'auto' as published: with 'l1' (V-JEPA), not with 'cosine' (InternVideo-Next).
    """
    known = {"auto": loss == "l1", "yes": True, "no": False}
    if normalise not in known:
        raise UserError(
            f"normalise must be one of {', '.join(known)}; got normalise={normalise!r}."
        )
    return known[normalise]


def draw_views(
    grid: masking.Grid, keys: jax.Array, views: Mapping[str, Mapping[str, Any]]
) -> dict[str, masking.Ids]:
    """Visible and hidden ids of each view.

    Args:
        grid: (t, h, w).
        keys: [B], from `example_keys`.
        views: name of a view -> name and options of a mask.
    """
    return {
        name: draw_mask(grid, fold(keys, _VIEW + number), views[name])
        for number, name in enumerate(sorted(views))
    }


def spread(features: jax.Array, valid: jax.Array) -> dict[str, jax.Array]:
    """How far features are from being all alike: 0 is collapse, 1 is no common direction.

    One less the squared length of the mean of unit vectors: over the places of a clip
    (`spread/places`), and over the clips of the batch at one place (`spread/clips`).

    Args:
        features: [B, N, D].
        valid: bool [B].
    """
    unit = losses.unit(features)
    weight = valid.astype(unit.dtype)
    rows = jnp.maximum(weight.sum(), 1)
    unit = jnp.where(weight[:, None, None] > 0, unit, 0)
    places = 1 - jnp.square(unit.mean(1)).sum(-1)
    clips = 1 - jnp.square(unit.sum(0) / rows).sum(-1)
    return {"spread/places": (places * weight).sum() / rows, "spread/clips": clips.mean()}


def make_loss(
    *,
    model: LatentModel,
    stage_key: jax.Array,
    views: Mapping[str, Mapping[str, Any]],
    loss: str = "l1",
    normalise: str = "auto",
    train: bool = True,
) -> LossFn:
    """The loss (params, batch) -> (Mean, averages): the mean over views, and `loss/<view>`.

    Args:
        model: encoder and predictor.
        stage_key: random key of the stage; every draw for an example comes from it and `position`.
        views: name of a view -> name and options of a mask; all of one clip, each with its own mask
            token.
        loss: a key of `ERRORS`.
        normalise: of targets that the loss itself makes, see `normalises`.
        train: False switches drop path off.

    The loss needs `latent` in the batch; where it lacks, the parameters' own encoder makes it, so
    that parameters can be evaluated without their moving average.

    Raises:
        UserError: unknown loss or normalise.
    """
    standard = normalises(loss, normalise)
    key, encoder, error_of = host_key(stage_key), model.encoder, error_named(loss)

    def compute(params: PyTree, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        keys = example_keys(key(), batch["position"])
        target = batch.get("latent")
        if target is None:
            target = target_features(encoder, params["encoder"], batch["video"], normalise=standard)
        drop = fold(keys, DROP_PATH) if train and encoder.drop_path else None
        parts, masks = {}, draw_views(encoder.grid, keys, views)
        for number, (name, (visible, hidden)) in enumerate(masks.items()):
            run = {} if drop is None else {"keys": fold(drop, number)}
            found = model.apply({"params": params}, batch["video"], visible, hidden, number, **run)
            wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
            error = error_of(wide(found), wide(masking.gather(target, hidden)))
            parts[f"loss/{name}"] = losses.mean(error, batch["valid"])
        total = sum(part.total for part in parts.values()) / len(parts)
        return Mean(total, next(iter(parts.values())).weight), parts

    return compute


def momentum(start: float, end: float, steps: int) -> Schedule:
    """Decay of the moving average at the n-th update: linear from `start` to `end` after `steps`.

    Source: V-JEPA (arXiv:2404.08471) 3; equal values are V-JEPA 2's fixed momentum.
    """
    for name, value in (("ema_decay", start), ("ema_final", end)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} must be from 0 to 1; got {name}={value}.")
    return lambda n: start + (end - start) * jnp.minimum(n / max(steps, 1), 1.0)


def make_train_step(
    *,
    model: LatentModel,
    tx: optax.GradientTransformation,
    ema_decay: Schedule | None = None,
    accumulation: int = 1,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
    trainable: PyTree | None = None,
    loss: str = "l1",
    normalise: str = "auto",
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure train step (state, batch) -> (state, metrics).

    Where the batch has no `latent`, the moving average's encoder makes it, microbatch by microbatch.
    Metrics have `spread/...` of the targets, `ema_decay` where there is one, and what the loss names.

    Args:
        ema_decay: of the n-th update, see `momentum`; None: the batch has `latent`.
        loss, normalise, options: of `make_loss`. The others as in `update.update`.
    """
    loss_fn = make_loss(model=model, loss=loss, normalise=normalise, **options)
    make_target = teach(model.encoder, normalise=normalises(loss, normalise))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if "latent" not in batch:
            if ema_decay is None:
                raise UserError(
                    "The targets must come with the batch or from a moving average; got neither. Set "
                    "ema_decay, or name a frozen encoder."
                )
            rows = -(-batch["video"].shape[0] // accumulation)
            batch = {**batch} | in_parts(make_target, rows)(state.ema, {"video": batch["video"]})
        decay = None
        if ema_decay is not None:
            decay = ema_decay(state.step - state.counters.skipped)
        new, metrics = update(
            state,
            batch,
            loss_fn=loss_fn,
            tx=tx,
            accumulation=accumulation,
            clip_norm=clip_norm,
            schedule=schedule,
            ema_decay=decay,
            trainable=trainable,
        )
        if decay is not None:
            metrics["ema_decay"] = decay
        return new, metrics | spread(batch["latent"], batch["valid"])

    return step
