"""Scaled dot-product attention over whole token sets."""

import jax
import jax.numpy as jnp

from invideo_jax.sharding import constrain


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    heads: int,
    scale: float | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
    keys: jax.Array | None = None,
    dropout: float = 0.0,
) -> jax.Array:
    """Attention; the softmax is in float32 (float64 stays float64).

    Heads are moved in front of tokens before the products: with batched matrices that are
    contiguous, the CPU's matmul is 1.4 to 1.8 times faster than with heads in between.

    Args:
        query: [B, Nq, K*head].
        key, value: [B, Nk, K*head].
        heads: K.
        scale: factor on the scores; default head^-0.5.
        mask: bool [B or 1, Nq or 1, Nk], True = may be looked at; None = all.
        bias: float [B or 1, K, Nq, Nk], added to the scores; None = nothing.
        keys: [B] random keys of the dropout of weights, None for none.
        dropout: share of weights dropped, in [0, 1).

    Returns:
        [B, Nq, K*head] in the dtype of `value`.
    """
    query = constrain(query, "batch", "tokens", "act_heads")
    key = constrain(key, "batch", "kv_tokens", "act_heads")
    value = constrain(value, "batch", "kv_tokens", "act_heads")
    shares = weights(query, key, heads=heads, scale=scale, mask=mask, bias=bias)
    return constrain(mix(drop(shares, keys, dropout), value), "batch", "tokens", "act_heads")


def weights(
    query: jax.Array,
    key: jax.Array,
    *,
    heads: int,
    scale: float | None = None,
    mask: jax.Array | None = None,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Softmax over keys, [B, K, Nq, Nk] in float32 (float64 stays float64); arguments as `attend`."""
    scale = (query.shape[-1] // heads) ** -0.5 if scale is None else scale
    query, key = _split(query * scale, heads), _split(key, heads)
    accumulate = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=accumulate)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores, axis=-1)


def mix(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Sums of `value` [B, Nk, K*head] by `weights` [B, K, Nq, Nk], [B, Nq, K*head]."""
    mixed = jnp.matmul(weights.astype(value.dtype), _split(value, weights.shape[1]))
    return mixed.swapaxes(1, 2).reshape(*mixed.shape[:1], mixed.shape[2], value.shape[-1])


def _split(x: jax.Array, heads: int) -> jax.Array:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)  # [B, K, N, head]


def fold(keys: jax.Array | None, use: int) -> jax.Array | None:
    """One key of each example for one of several uses, [B]; None stays None."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)


def drop(x: jax.Array, keys: jax.Array | None, rate: float) -> jax.Array:
    """Dropout: sets a share `rate` of numbers to 0 and scales up the others.

    Args:
        x: [B, ...].
        keys: one random key for each example, [B]; None drops nothing.
    """
    if keys is None or not rate:
        return x
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)
