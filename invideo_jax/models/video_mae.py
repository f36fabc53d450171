"""VideoMAE: an encoder of visible tokens and a small decoder that predicts hidden pixels.

Source: VideoMAE (arXiv:2203.12602), MCG-NJU/VideoMAE; InternVideo (arXiv:2212.03191) 3.1.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax.models import pixels, positions, sizes
from invideo_jax.models.attention import attend
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.layers import Block, LayerNorm, Linear, Stack, named, uniform
from invideo_jax.sharding import constrain

PyTree = Any


class VideoMAEEncoder(pixels.Geometry, nn.Module):
    """Pre-norm blocks over visible cubes; a fixed sinusoid for positions, no class token.

    Attributes:
        width, depth, heads, mlp_width: D, blocks, K, F.
        frames, image_size: T, and H = W, of the clips.
        tubelet, patch: frames and side of one cube.
        normalisation: constants that uint8 videos are normalised with.
        last_norm: whether it ends in a LayerNorm.
        eps: of all LayerNorms.
        qkv_bias: bias on queries and values.
        layer_scale: initial value of learned branch factors; 0 for none.
        drop_path: rate of the last block.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
        attend: how tokens attend, with the interface of `attention.attend`.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int = 16
    tubelet: int = 2
    frames: int = 16
    image_size: int = 224
    channels: int = 3
    normalisation: str = "imagenet"
    last_norm: bool = True
    eps: float = 1e-6
    qkv_bias: bool = True
    scale: float | None = None
    activation: str = "gelu"
    layer_scale: float = 0.0
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32
    attend: Callable[..., jax.Array] = attend

    @property
    def prefix(self) -> int:
        """Class tokens in front of the cubes' tokens: none."""
        return 0

    def setup(self):
        self.check()
        # The published convolution keeps PyTorch's default init, uniform within 1 / sqrt(inputs).
        init = uniform(self.patch_pixels**-0.5)
        self.patch_embed = Linear(
            self.width, ("patch", "embed"), kernel_init=init, bias_init=init, dtype=self.dtype
        )
        self.stack = Stack(
            _blocks(self, self.heads, self.mlp_width),
            self.depth,
            scan=self.scan,
            remat=self.remat,
            drop_path=self.drop_path,
        )
        if self.last_norm:
            self.norm = LayerNorm(self.eps, self.dtype)

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features of the visible tokens, of all without `visible`.

        Args:
            video: uint8 or normalised float [B, T, H, W, C].
            visible: int32 [B, V], ids of the tokens that the blocks see, ascending.
            keys: [B] random keys for drop path; None when evaluating.
            features: blocks whose outputs are wanted.

        Returns:
            [B, V, D], and {'embedded': [B, V, D] before the first block, 'block<i>': [B, V, D] for
            each block asked for}.
        """
        x = self.embedded(video, visible)
        out = {"embedded": x}
        x, blocks = self.stack(x, keys=keys, features=features)
        return self.finish(x), out | blocks

    def embedded(self, video: jax.Array, visible: jax.Array | None = None) -> jax.Array:
        """What the first block takes, [B, V, D]; arguments as in `__call__`."""
        pixels.check_video(video, self)
        position = jnp.asarray(positions.sinusoid(self.tokens, self.width), self.dtype)
        # The raw cubes are gathered: hidden pixels are not even projected.
        cubes = pixels.visible_cubes(video, visible, self)
        position = position[None] if visible is None else jnp.take(position, visible, axis=0)
        return constrain(self.patch_embed(cubes), "batch", "tokens", "act_embed") + position

    def run(self, x: jax.Array, span: tuple[int, int]) -> jax.Array:
        """Blocks span[0] .. span[1]-1 of what `embedded` gives; nothing is dropped."""
        return self.stack(x, span=span)[0]

    def finish(self, x: jax.Array) -> jax.Array:
        """What the encoder gives for the output of the last block."""
        return self.norm(x) if self.last_norm else x

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """The mean of tokens [B, V, D], as [B, D]."""
        return tokens.mean(axis=1)

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("frames", self.frames, "tubelet", self.tubelet)
        check_multiple("image_size", self.image_size, "patch", self.patch)
        check_multiple("width", self.width, "heads", self.heads)


class VideoMAE(nn.Module):
    """Encoder and decoder.

    Attributes:
        encoder: sees visible tokens only.
        decoder_width, decoder_depth, decoder_heads, decoder_mlp_width: D, blocks, K, F of the decoder;
            its blocks are otherwise made as those of the encoder.
        decoder_eps: of the decoder's last LayerNorm.
    """

    encoder: VideoMAEEncoder
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    decoder_mlp_width: int
    decoder_eps: float = 1e-6

    def setup(self):
        self.check()
        encoder, dtype = self.encoder, self.encoder.dtype
        # As the patch projection this one lies outside the published Xavier initialisation.
        self.encoder_to_decoder = Linear(
            self.decoder_width,
            ("embed", None),
            bias_axis=None,
            kernel_init=uniform(encoder.width**-0.5),
            dtype=dtype,
        )
        # Normal, standard deviation 0.02, cut at one standard deviation.
        token = lambda key, shape: 0.02 * jax.random.truncated_normal(key, -1, 1, shape)
        self.mask_token = self.param("mask_token", named(token, "norm"), (self.decoder_width,))
        self.decoder = Stack(
            _blocks(encoder, self.decoder_heads, self.decoder_mlp_width),
            self.decoder_depth,
            scan=encoder.scan,
            remat=encoder.remat,
        )
        self.decoder_norm = LayerNorm(self.decoder_eps, dtype)
        self.head = Linear(
            encoder.patch_pixels, ("embed", "pixels"), bias_axis="pixels", dtype=dtype
        )

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
            Predictions [B, M, tubelet*patch*patch*C], and what the encoder and `decode` name.
        """
        encoded, out = self.encoder(video, visible, keys=keys, features=features)
        decoded, more = self.decode(encoded, visible, hidden, features=decoder_features)
        return decoded, out | {"encoder": encoded} | more

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
        table = jnp.asarray(positions.sinusoid(self.encoder.tokens, self.decoder_width))
        table = table.astype(self.encoder.dtype)
        place = lambda ids: jnp.take(table, ids, axis=0)
        seen = self.encoder_to_decoder(encoded)
        x = jnp.concatenate(
            [seen + place(visible), self.mask_token.astype(self.encoder.dtype) + place(hidden)],
            axis=1,
        )
        out = {"encoder_to_decoder": seen, "decoder_in": x}
        x, blocks = self.decoder(x, features=features)
        out |= {f"decoder_{name}": value for name, value in blocks.items()}
        return self.head(self.decoder_norm(x[:, visible.shape[1] :])), out

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.encoder.check()
        check_multiple("decoder_width", self.decoder_width, "decoder_heads", self.decoder_heads)


def _blocks(encoder: VideoMAEEncoder, heads: int, mlp_width: int) -> Callable[..., Block]:
    return functools.partial(
        Block,
        heads,
        mlp_width,
        qkv_bias=encoder.qkv_bias,
        scale=encoder.scale,
        activation=encoder.activation,
        eps=encoder.eps,
        layer_scale=encoder.layer_scale,
        dtype=encoder.dtype,
        attend=encoder.attend,
    )


def make(**attributes: Any) -> VideoMAE:
    """A model from attributes of `VideoMAE` and of its `VideoMAEEncoder`, all given flat."""
    own = {f.name for f in dataclasses.fields(VideoMAE)} - {"encoder"}
    of_encoder = {k: v for k, v in attributes.items() if k not in own}
    decoder = {k: v for k, v in attributes.items() if k in own}
    return VideoMAE(VideoMAEEncoder(**of_encoder), **decoder)


def build(size: str, /, **overrides: Any) -> VideoMAE:
    """The pretraining model of a row of `sizes.VIDEO_MAE`; `overrides` as the arguments of `make`.

    Raises:
        UserError: unknown size. TypeError: unknown attribute.
    """
    row = dataclasses.asdict(sizes.video_mae(size))
    del row["params"], row["encoder_params"]
    return make(**(row | overrides))


def build_encoder(size: str, /, **overrides: Any) -> VideoMAEEncoder:
    """The encoder alone of a row of `sizes.VIDEO_MAE`; `overrides` are attributes of it.

    Raises:
        UserError: unknown size. TypeError: unknown attribute.
    """
    row = dataclasses.asdict(sizes.video_mae(size))
    names = {f.name for f in dataclasses.fields(VideoMAEEncoder)}
    return VideoMAEEncoder(**({k: v for k, v in row.items() if k in names} | overrides))


def init(model: VideoMAE, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    video, ids = pixels.blank_video(model.encoder), jnp.arange(2, dtype=jnp.int32)[None]
    return model.init(key, video, ids[:, :1], ids[:, 1:])["params"]
