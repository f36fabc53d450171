"""Classification: the train step with mixed clips and smoothed labels, and scores for evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from invideo_jax import losses, mixing
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.models import pixels
from invideo_jax.models.attention import fold
from invideo_jax.models.classifier import Classifier, with_statistics
from invideo_jax.state import TrainState
from invideo_jax.steps.masked import example_keys, host_key
from invideo_jax.steps.update import Batch, LossFn, Metrics, Schedule, update

PyTree = Any

_MIX, _MODEL = 2, 3  # what keys are folded with, for each use
_STATISTICS = "batch_statistics/"


def mixed_batch(batch: Batch, stage_key: jax.Array, *, group: int = 0, **options: Any) -> Batch:
    """The batch with what each row is mixed with; call it with the global batch.

    Every row then knows its partner, so that microbatches can mix without each other.

    Args:
        batch: rows in the order of their positions.
        stage_key: random key of the stage.
        group: consecutive rows that one draw serves, and in which partners are found; 0: all.
        options: further arguments of `mixing.draw`.

    Raises:
        UserError: `group` does not divide the batch.
    """
    rows = batch["video"].shape[0]
    group = group or rows
    if rows % group:
        raise UserError(
            f"mix.group must divide the batch; got group={group}, batch={rows}. Use a divisor, or 0 "
            "for one draw a batch."
        )
    first = batch["position"][::group]
    keys = fold(example_keys(stage_key, first), _MIX)
    drawn = mixing.draw(keys, size=batch["video"].shape[2:4], **options)
    mix = mixing.Mix(*(jnp.repeat(x, group, axis=0) for x in drawn))
    flip = lambda name: mixing.flip(batch[name], group)
    return dict(batch) | {
        "other": flip("video"),
        "other_label": flip("label"),
        "other_valid": flip("valid"),
        "share": mix.share,
        "box": mix.box,
    }


def mixed_video(batch: Batch, model: Classifier) -> jax.Array:
    """Clips for the encoder; of a mixed batch normalised and mixed, [B, T, H, W, C]."""
    if "other" not in batch:
        return batch["video"]
    encoder = model.encoder
    own, other = (
        pixels.normalise(batch[name], encoder.normalisation, encoder.dtype)
        for name in ("video", "other")
    )
    return mixing.videos(own, other, mixing.Mix(batch["share"], batch["box"]))


def _weights(batch: Batch) -> jax.Array:
    """1 for rows whose labels are known, else 0."""
    known = batch["valid"] & (batch["label"] >= 0)
    if "other" in batch:
        known &= (batch["share"] == 1) | (batch["other_valid"] & (batch["other_label"] >= 0))
    return known


def soft_cross_entropy(
    logits: jax.Array, batch: Batch, *, classes: int, smoothing: float = 0.0
) -> Mean:
    """Cross-entropy with the (mixed, smoothed) labels, over rows whose labels are known.

    A label beyond the classes is NaN: no update is made, and the run stops and says so.
    """
    mixed = (batch["other_label"], batch["share"]) if "other" in batch else ()
    target = mixing.targets(batch["label"], *mixed, classes=classes, smoothing=smoothing)
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    each = -(target * jax.nn.log_softmax(logits)).sum(-1)
    return losses.mean(jnp.where(batch["label"] < classes, each, jnp.nan), _weights(batch))


def hits(scores: jax.Array, label: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k highest scores; of equal ones the first classes count.

    Args:
        scores: [B, classes].
        label: int [B].
    """
    own = jnp.take_along_axis(scores, jnp.maximum(label, 0)[:, None], axis=1)
    before = jnp.arange(scores.shape[1])[None] < label[:, None]
    rank = ((scores > own) | ((scores == own) & before)).sum(1)
    return (rank < k) & jnp.isfinite(own[:, 0])


def make_loss(
    *,
    model: Classifier,
    stage_key: jax.Array,
    smoothing: float = 0.0,
    train: bool = True,
) -> LossFn:
    """The loss (params, batch) -> (Mean, averages): `accuracy` where labels are not mixed.

    Args:
        stage_key: random key of the stage; drop path and dropout come from it and `position`.
        smoothing: of the labels.
        train: False switches drop path, dropout and the batch's own statistics off.
    """
    key = host_key(stage_key)

    def loss(params: PyTree, batch: Batch) -> tuple[Mean, dict[str, Mean]]:
        keys = fold(example_keys(key(), batch["position"]), _MODEL) if train else None
        video = mixed_video(batch, model)
        logits, out = model.apply({"params": params}, video, keys=keys, train=train)
        mean = soft_cross_entropy(logits, batch, classes=model.classes, smoothing=smoothing)
        averages = {}
        if "other" not in batch:
            right = hits(logits, batch["label"], 1).astype(jnp.float32)
            averages["accuracy"] = losses.mean(right, _weights(batch))
        one = jnp.ones((), jnp.float32)
        for name, value in out.get("statistics", {}).items():
            averages[_STATISTICS + name] = Mean(value, one)
        return mean, averages

    return loss


def make_train_step(
    *,
    model: Classifier,
    tx: optax.GradientTransformation,
    stage_key: jax.Array,
    mix: Mapping[str, Any] | None = None,
    smoothing: float = 0.0,
    accumulation: int = 1,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    trainable: PyTree | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure train step (state, batch) -> (state, metrics); jit and donation stand beside it.

    Args:
        mix: options of `mixed_batch`; None or alphas of 0 mix nothing.
        trainable: must be False for `classifier.STATISTICS`, which the step itself moves.
        others: as in `make_loss` and `update.update`.

    Raises:
        UserError: a batch norm with `accumulation`, which would see parts of the batch.
    """
    if model.counts_batches and accumulation > 1:
        raise UserError(
            f"merge_norm={model.merge_norm!r} normalises over the whole batch, so accumulation must "
            f"be 1; got accumulation={accumulation}. Use merge_norm='LN', or a smaller batch."
        )
    loss_fn = make_loss(model=model, stage_key=stage_key, smoothing=smoothing)
    key, mix = host_key(stage_key), dict(mix or {})
    mixes = bool(mix.get("mixup", 0) or mix.get("cutmix", 0))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        new, metrics = update(
            state,
            mixed_batch(batch, key(), **mix) if mixes else batch,
            loss_fn=loss_fn,
            tx=tx,
            accumulation=accumulation,
            clip_norm=clip_norm,
            schedule=schedule,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
            trainable=trainable,
        )
        return (_count_batch(new, metrics) if model.counts_batches else new), metrics

    return step


def _count_batch(state: TrainState, metrics: Metrics) -> TrainState:
    """Moves the running statistics, unless the update was skipped; takes them out of the metrics."""
    found = {name: metrics.pop(_STATISTICS + name).value for name in ("mean", "variance")}
    old = state.params["down_norm"]
    ok = metrics["first_nonfinite"] < 0
    moved = with_statistics(state.params, found)["down_norm"]
    kept = jax.tree.map(lambda new, old: jnp.where(ok, new, old), moved, old)
    ema = state.ema | {"down_norm": state.ema["down_norm"] | _buffers(kept)} if state.ema else {}
    return state.replace(params=state.params | {"down_norm": kept}, ema=ema)


def _buffers(norm: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: norm[name] for name in ("mean", "variance", "batches")}


def make_predict(*, model: Classifier) -> Callable[[PyTree, Batch], jax.Array]:
    """(params, batch) -> logits, float32 [B, classes]."""
    return lambda params, batch: model.apply({"params": params}, batch["video"])[0]
