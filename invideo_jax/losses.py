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


def add(a: Mean, b: Mean) -> Mean:
    """The mean over both sets of terms."""
    return Mean(a.total + b.total, a.weight + b.weight)


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
