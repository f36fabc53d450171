"""VideoMAE: an encoder of visible tokens and a small decoder that predicts hidden pixels.

Source: VideoMAE (arXiv:2203.12602), MCG-NJU/VideoMAE; InternVideo (arXiv:2212.03191) 3.1.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import masking
from invideo_jax.errors import UserError
from invideo_jax.models import pixels, positions, sizes
from invideo_jax.models.layers import Block, LayerNorm, Linear, Stack, named
from invideo_jax.sharding import constrain

PyTree = Any


class VideoMAE(nn.Module):
    """Encoder and decoder; `encode` alone gives features.

    Attributes:
        width, depth, heads, mlp_width: of the encoder (D, blocks, K, F); `decoder_*` of the decoder.
        frames, image_size: T, and H = W, of the clips.
        tubelet, patch: frames and side of one cube.
        normalisation: constants that uint8 videos are normalised with.
        encoder_norm: whether the encoder ends in a LayerNorm.
        eps, decoder_eps: of all LayerNorms, but for the decoder's last one; of that one.
        qkv_bias: bias on queries and values.
        layer_scale: initial value of learned branch factors; 0 for none.
        drop_path: rate of the encoder's last block.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int
    patch: int = 16
    tubelet: int = 2
    frames: int = 16
    image_size: int = 224
    channels: int = 3
    normalisation: str = "imagenet"
    encoder_norm: bool = True
    eps: float = 1e-6
    decoder_eps: float = 1e-6
    qkv_bias: bool = True
    scale: float | None = None
    activation: str = "gelu"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w): tokens along time, height and width."""
        return (
            self.frames // self.tubelet,
            self.image_size // self.patch,
            self.image_size // self.patch,
        )

    @property
    def tokens(self) -> int:
        """N = t*h*w."""
        t, h, w = self.grid
        return t * h * w

    @property
    def patch_pixels(self) -> int:
        """Numbers in one cube: tubelet*patch*patch*C."""
        return self.tubelet * self.patch**2 * self.channels

    def setup(self):
        self.check()
        linear = functools.partial(Linear, dtype=self.dtype)
        block = functools.partial(
            Block,
            qkv_bias=self.qkv_bias,
            scale=self.scale,
            activation=self.activation,
            eps=self.eps,
            layer_scale=self.layer_scale,
            dtype=self.dtype,
        )
        # The published convolution keeps PyTorch's default init, uniform within 1 / sqrt(inputs).
        uniform = lambda bound: (
            lambda key, shape, dtype=jnp.float32: jax.random.uniform(
                key, shape, dtype, -bound, bound
            )
        )
        patch_init = uniform(self.patch_pixels**-0.5)
        self.patch_embed = linear(
            self.width, ("patch", "embed"), kernel_init=patch_init, bias_init=patch_init
        )
        self.encoder = Stack(
            functools.partial(block, self.heads, self.mlp_width),
            self.depth,
            scan=self.scan,
            remat=self.remat,
            drop_path=self.drop_path,
        )
        if self.encoder_norm:
            self.norm = LayerNorm(self.eps, self.dtype)
        # As the patch projection this one lies outside the published Xavier initialisation.
        bridge = uniform(self.width**-0.5)
        self.encoder_to_decoder = linear(
            self.decoder_width, ("embed", None), bias_axis=None, kernel_init=bridge
        )
        # Normal, standard deviation 0.02, cut at one standard deviation.
        token = lambda key, shape: 0.02 * jax.random.truncated_normal(key, -1, 1, shape)
        self.mask_token = self.param("mask_token", named(token, "norm"), (self.decoder_width,))
        self.decoder = Stack(
            functools.partial(block, self.decoder_heads, self.decoder_mlp_width),
            self.decoder_depth,
            scan=self.scan,
            remat=self.remat,
        )
        self.decoder_norm = LayerNorm(self.decoder_eps, self.dtype)
        self.head = linear(self.patch_pixels, ("embed", "pixels"), bias_axis="pixels")

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array,
        hidden: jax.Array,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
        decoder_features: Sequence[int] = (),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Predicts the pixels of hidden cubes.

        Args:
            video: uint8 or normalised float [B, T, H, W, C].
            visible: int32 [B, V], ids of the tokens that the encoder sees, ascending.
            hidden: int32 [B, M], ids to predict, ascending; in VideoMAE all the others.
            keys: [B] random keys for drop path; None when evaluating.
            features, decoder_features: blocks whose outputs are wanted.

        Returns:
            Predictions [B, M, tubelet*patch*patch*C], and what `encode` and `decode` name.
        """
        encoded, out = self.encode(video, visible, keys=keys, features=features)
        decoded, more = self.decode(encoded, visible, hidden, features=decoder_features)
        return decoded, out | more

    def encode(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features of the visible tokens (of all, without `visible`); arguments as in `__call__`.

        Returns:
            [B, V, D], and {'embedded': [B, V, D] before the first block, 'encoder': the result,
            'block<i>': [B, V, D] for each block asked for}.
        """
        self._check_video(video)
        x = pixels.patchify(video, tubelet=self.tubelet, patch=self.patch)
        position = jnp.asarray(positions.sinusoid(self.tokens, self.width))[None]
        if visible is not None:
            # The raw cubes are gathered: hidden pixels are not even projected.
            x = masking.gather(x, visible)
            position = jnp.take(position[0], visible, axis=0)
        if x.dtype == jnp.uint8:
            x = x.reshape(*x.shape[:2], -1, self.channels)
            x = pixels.normalise(x, self.normalisation, self.dtype).reshape(*x.shape[:2], -1)
        x = constrain(self.patch_embed(x), "batch", "tokens", "act_embed")
        out = {"embedded": x + position.astype(self.dtype)}
        x, blocks = self.encoder(out["embedded"], keys=keys, features=features)
        if self.encoder_norm:
            x = self.norm(x)
        return x, out | blocks | {"encoder": x}

    def decode(
        self,
        encoded: jax.Array,
        visible: jax.Array,
        hidden: jax.Array,
        *,
        features: Sequence[int] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Pixels of the hidden tokens, from features of the visible ones.

        Returns:
            [B, M, tubelet*patch*patch*C], and {'encoder_to_decoder': [B, V, Dd], 'decoder_in':
            [B, V+M, Dd], 'decoder_block<i>': [B, V+M, Dd] for each block asked for}.
        """
        table = jnp.asarray(positions.sinusoid(self.tokens, self.decoder_width), self.dtype)
        place = lambda ids: jnp.take(table, ids, axis=0)
        seen = self.encoder_to_decoder(encoded)
        x = jnp.concatenate(
            [seen + place(visible), self.mask_token.astype(self.dtype) + place(hidden)], axis=1
        )
        out = {"encoder_to_decoder": seen, "decoder_in": x}
        x, blocks = self.decoder(x, features=features)
        out |= {f"decoder_{name}": value for name, value in blocks.items()}
        return self.head(self.decoder_norm(x[:, visible.shape[1] :])), out

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        for name, value, unit in [
            ("frames", self.frames, self.tubelet),
            ("image_size", self.image_size, self.patch),
            ("width", self.width, self.heads),
            ("decoder_width", self.decoder_width, self.decoder_heads),
        ]:
            if value % unit or value <= 0:
                what = dict(frames="tubelet", image_size="patch", width="heads").get(
                    name, "decoder_heads"
                )
                raise UserError(
                    f"{name} must be a multiple of {what}; got {name}={value}, {what}={unit}. "
                    f"Use {name}={max(value // unit, 1) * unit}, or change {what}."
                )

    def _check_video(self, video):
        want = (self.frames, self.image_size, self.image_size, self.channels)
        if video.ndim != 5 or video.shape[1:] != want:
            raise UserError(
                f"A video batch must be [B, T, H, W, C] = [B, {', '.join(map(str, want))}]; got "
                f"shape={list(video.shape)}. Make clips of that size, or build the model for these."
            )


def build(size: str, /, **overrides: Any) -> VideoMAE:
    """The model of a row of `sizes.VIDEO_MAE`; `overrides` are attributes of `VideoMAE`.

    Raises:
        UserError: unknown size. TypeError: unknown attribute.
    """
    row = dataclasses.asdict(sizes.video_mae(size))
    del row["params"], row["encoder_params"]
    return VideoMAE(**(row | overrides))


def init(model: VideoMAE, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    video = jnp.zeros((1, model.frames, model.image_size, model.image_size, model.channels))
    ids = jnp.arange(2, dtype=jnp.int32)[None]
    return model.init(key, video, ids[:, :1], ids[:, 1:])["params"]


def encode(
    model: VideoMAE,
    params: PyTree,
    video: jax.Array,
    visible: jax.Array | None = None,
    *,
    features: Sequence[int] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Features of videos, without drop path: see `VideoMAE.encode`."""
    return model.apply({"params": params}, video, visible, features=features, method="encode")
