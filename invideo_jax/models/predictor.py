"""Prediction of features: an encoder of visible tokens, and a transformer that predicts the others'.

Source: V-JEPA (arXiv:2404.08471) 3, V-JEPA 2 (arXiv:2506.09985) 2.1; InternVideo-Next (arXiv:2512.01342).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax.errors import UserError
from invideo_jax.models import pixels, positions
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.layers import Block, LayerNorm, Linear, Stack, named

PyTree = Any
_NORMAL = nn.initializers.normal(0.02)


class Predictor(nn.Module):
    """Features at hidden places, from those of visible tokens.

    Attributes:
        out_width: D of the features.
        grid: (t, h, w) of all tokens; a fixed sine-cosine table tells places apart.
        width, depth, heads, mlp_width: of the predictor's own blocks; width a multiple of 16.
        masks: number of mask tokens: one for each kind of mask it is used with.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    out_width: int
    grid: tuple[int, int, int]
    width: int = 384
    depth: int = 12
    heads: int = 12
    mlp_width: int = 1536
    masks: int = 2
    eps: float = 1e-6
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, context: jax.Array, visible: jax.Array, hidden: jax.Array, mask: int = 0
    ) -> jax.Array:
        """Predicts.

        Args:
            context: features of the visible tokens, class tokens first, [B, prefix+V, D].
            visible: int32 [B, V], their places.
            hidden: int32 [B, M], places to predict.
            mask: number of the mask token.

        Returns:
            [B, M, D].
        """
        table = jnp.asarray(positions.sincos_3d(self.grid, self.width, prefix=0), self.dtype)
        linear = functools.partial(Linear, kernel_init=_NORMAL, dtype=self.dtype)
        x = linear(self.width, ("embed", None), name="embed")(context)
        prefix = x.shape[1] - visible.shape[1]
        x = x.at[:, prefix:].add(jnp.take(table, visible, axis=0))
        tokens = self.param("mask_tokens", named(_NORMAL, None, "norm"), (self.masks, self.width))
        asked = tokens[mask].astype(self.dtype) + jnp.take(table, hidden, axis=0)
        block = functools.partial(
            Block, self.heads, self.mlp_width, eps=self.eps, kernel_init=_NORMAL, dtype=self.dtype
        )
        stack = Stack(block, self.depth, scan=self.scan, remat=self.remat, name="stack")
        x, _ = stack(jnp.concatenate([x, asked], axis=1))
        x = LayerNorm(self.eps, self.dtype, name="norm")(x[:, -hidden.shape[1] :])
        return linear(self.out_width, ("embed", None), name="out")(x)

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("predictor.width", self.width, "predictor.heads", self.heads)
        check_multiple("predictor.width", self.width, "16 (of the position table)", 16)


class LatentModel(nn.Module):
    """Encoder and predictor.

    Attributes:
        encoder: any encoder of this package that takes visible ids.
        predictor: its `out_width` and `grid` are those of the encoder.
    """

    encoder: nn.Module
    predictor: Predictor

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array,
        hidden: jax.Array,
        mask: int = 0,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Predicted features of the hidden tokens, [B, M, D].

        Args:
            video: uint8 or normalised float [B, T, H, W, C].
            visible, hidden: int32 [B, V] and [B, M].
            mask: number of the mask token.
            keys: [B] random keys for drop path; None when evaluating.
        """
        context, _ = self.encoder(video, visible, keys=keys)
        return self.predictor(context, visible, hidden, mask)

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.encoder.check()
        self.predictor.check()
        if (self.predictor.out_width, self.predictor.grid) != (
            self.encoder.width,
            self.encoder.grid,
        ):
            raise UserError(
                f"The predictor must give what the encoder makes, width={self.encoder.width} on "
                f"grid={self.encoder.grid}; got out_width={self.predictor.out_width}, "
                f"grid={self.predictor.grid}."
            )


def init(model: LatentModel, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    ids = jnp.arange(2, dtype=jnp.int32)[None]
    whole = lambda m, video: (
        m(video, ids[:, :1], ids[:, 1:]),
        m.encoder.pooled(m.encoder(video)[0]),
    )
    return model.init(key, pixels.blank_video(model.encoder), method=whole)["params"]
