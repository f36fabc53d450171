"""From a set of tokens to one vector."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax.models import attention
from invideo_jax.models.layers import Initializer, LayerNorm, Linear
from invideo_jax.sharding import constrain


class AttentionPool(nn.Module):
    """Attention of the mean token over all tokens; queries, keys, values have norms of their own.

    Attributes:
        heads: K, which divides the width of the tokens.
        width: P, of the result.
        eps: of the three LayerNorms.

    Source: InternVideo2 `AttentionPoolingBlock` (clip_projector).
    """

    heads: int
    width: int
    eps: float = 1e-5
    kernel_init: Initializer | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`tokens` [B, N, D] to [B, P], and the weights of the tokens, head-mean, float32 [B, N]."""
        linear = functools.partial(Linear, kernel_init=self.kernel_init, dtype=self.dtype)

        def into(name: str, x: jax.Array) -> jax.Array:
            x = LayerNorm(self.eps, self.dtype, name=f"norm_{name[0]}")(x)
            return linear(tokens.shape[-1], ("embed", "heads"), "heads", name=name)(x)

        query = into("query", tokens.mean(1, keepdims=True))
        key = constrain(into("key", tokens), "batch", "tokens", "act_heads")
        value = constrain(into("value", tokens), "batch", "tokens", "act_heads")
        weights = attention.weights(query, key, heads=self.heads)
        mixed = attention.mix(weights, value)[:, 0]
        return linear(self.width, ("heads", None), name="out")(mixed), weights[:, :, 0].mean(1)
