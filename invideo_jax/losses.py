"""Losses on arrays: a loss is a sum and its weight, divided once over the global batch."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mean(NamedTuple):
    """A sum of weighted terms and the sum of their weights, both scalars."""

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """total / weight; 0 where nothing was weighed."""
        return self.total / jnp.maximum(self.weight, jnp.finfo(jnp.float32).tiny)


def mean(values: jax.Array, weights: jax.Array) -> Mean:
    """`values` [B], each weighed by `weights` [B]; a term of weight 0 counts for nothing, even NaN."""
    weights = weights.astype(jnp.promote_types(values.dtype, jnp.float32))
    terms = jnp.where(weights != 0, values, 0) * weights
    return Mean(terms.sum(), weights.sum())


def normalise_cubes(
    cubes: jax.Array, *, channels: int = 3, eps: float = 1e-6
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Standardises each channel of each cube: (x - mean) / (standard deviation + eps).

    Args:
        cubes: float [..., pixels*C], C fastest.
        channels: C.
        eps: added to the standard deviation (not to the variance).

    Returns:
        The same shape; then mean and (unbiased) standard deviation + eps, each [..., 1, C], to undo it.

    Source: VideoMAE engine_for_pretraining.py.
    """
    x = cubes.reshape(*cubes.shape[:-1], -1, channels)
    middle = x.mean(-2, keepdims=True)
    spread = jnp.std(x, axis=-2, keepdims=True, ddof=1) + eps
    return ((x - middle) / spread).reshape(cubes.shape), middle, spread


def squared_error(prediction: jax.Array, target: jax.Array, valid: jax.Array) -> Mean:
    """Mean squared error of each example, weighed by `valid`.

    Args:
        prediction, target: [B, M, pixels].
        valid: bool or weights [B].
    """
    dtype = jnp.promote_types(prediction.dtype, jnp.float32)
    error = jnp.square(prediction.astype(dtype) - target.astype(dtype))
    return mean(error.mean(axis=tuple(range(1, error.ndim))), valid)


def cosine_distance(student: jax.Array, teacher: jax.Array, valid: jax.Array) -> Mean:
    """2 - 2 <student, teacher>, mean over all vectors of an example, weighed by `valid`.

    Args:
        student, teacher: unit vectors [B, ..., C].
        valid: bool or weights [B].

    Returns:
        From 0 (equal) to 4 (opposite): the squared distance of the unit vectors.

    Source: InternVideo2 (arXiv:2403.15377) 3.1, engine_for_pretraining.py.
    """
    wide = jnp.promote_types(student.dtype, jnp.float32)
    apart = 2.0 - 2.0 * (student.astype(wide) * teacher.astype(wide)).sum(-1)
    return mean(apart.reshape(len(apart), -1).mean(-1), valid)


def similarity(
    a: jax.Array, b: jax.Array, temperature: jax.Array | float, *, reduce: str = "mean"
) -> jax.Array:
    """Cosine of every pair over the temperature, float32 [A, B].

    Args:
        a, b: features of any length, [A, P] and [B, P]; several for each example as [A, S, P] give
            the mean or the maximum over all their pairs.
        reduce: 'mean' or 'max'.
    """
    a, b = (x[:, None] if x.ndim == 2 else x for x in (unit(a), unit(b)))
    pairs = jnp.einsum("asp,btp->asbt", a, b) / temperature
    return {"mean": jnp.mean, "max": jnp.max}[reduce](pairs, axis=(1, 3))


def unit(x: jax.Array) -> jax.Array:
    """`x` [..., P] divided by its length, at least in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + 1e-12)


def contrastive(
    scores: jax.Array, ids: jax.Array | None = None, valid: jax.Array | None = None
) -> Mean:
    """Soft-target cross-entropy of each pair against the whole batch, both ways, halved.

    Args:
        scores: similarities over temperature of all pairs of the global batch, [B, B].
        ids: [B]; pairs with equal ones are each other's positives, all with the same weight. None =
            every example is its own only.
        valid: bool [B]; padding is neither scored nor anybody's negative.

    Returns:
        The mean over examples.

    Source: InternVideo2 multi_modality/models/criterions.py (VTC).
    """
    size = len(scores)
    ids = jnp.arange(size) if ids is None else ids
    valid = jnp.ones(size, bool) if valid is None else valid.astype(bool)
    positive = (ids[:, None] == ids[None, :]) & valid[:, None] & valid[None, :]
    target = positive / jnp.maximum(positive.sum(1, keepdims=True), 1)

    def one_way(scores):
        scores = jnp.where(valid[None, :], scores, jnp.finfo(scores.dtype).min)
        return -jnp.where(positive, jax.nn.log_softmax(scores, axis=1) * target, 0).sum(1)

    return mean((one_way(scores) + one_way(scores.T)) / 2, valid)


def sigmoid_contrastive(
    scores: jax.Array, ids: jax.Array | None = None, valid: jax.Array | None = None
) -> Mean:
    """Every pair on its own: -log sigmoid(score) where it belongs together, of -score where not.

    Args:
        scores, ids, valid: as in `contrastive`; scores with the bias in them.

    Returns:
        The sum over pairs of valid rows and columns, per valid row.

    Source: SigLIP, arXiv:2303.15343, algorithm 1.
    """
    size = len(scores)
    ids = jnp.arange(size) if ids is None else ids
    valid = jnp.ones(size, bool) if valid is None else valid.astype(bool)
    terms = jax.nn.softplus(jnp.where(ids[:, None] == ids[None, :], -scores, scores))
    return mean(jnp.where(valid[None, :], terms, 0).sum(1), valid)


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> Mean:
    """Cross-entropy with the labels' classes.

    Args:
        logits: [..., classes].
        labels: int [...]; where the weight is 0 any value will do.
        weights: bool or float [...].
    """
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    labels = jnp.clip(labels, 0, logits.shape[-1] - 1)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return mean(jax.nn.logsumexp(logits, axis=-1) - picked, weights)


def matching(logits: jax.Array, weights: jax.Array) -> Mean:
    """Cross-entropy of "these two belong together" over matching pairs, then those that do not match.

    Args:
        logits: [3B, 2]: B pairs that match (class 1), then 2B that do not (class 0).
        weights: bool or float [3B].

    Source: InternVideo2 multi_modality/models/criterions.py (VTM).
    """
    labels = (jnp.arange(len(logits)) < len(logits) // 3).astype(jnp.int32)
    return cross_entropy(logits, labels, weights)


def clamped(x: jax.Array, low: float, high: float) -> jax.Array:
    """`x` held between two bounds, with the gradient of `x` itself, so that it can come back."""
    return x + jax.lax.stop_gradient(jnp.clip(x, low, high) - x)


def scaled_gradient(x: jax.Array, factor: float) -> jax.Array:
    """`x`, whose gradient is multiplied by `factor`.

    The published contrastive losses of InternVideo2 and InternVideo2-CLIP drop the other processes'
    share of the gradient of features, which is the factor 1 / processes.
    """
    return jax.lax.stop_gradient(x) + factor * (x - jax.lax.stop_gradient(x))
