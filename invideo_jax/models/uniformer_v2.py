"""UniFormerV2: CLIP's image transformer with a class token of the whole video beside its last blocks.

Source: UniFormerV2 (arXiv:2211.09552) 3; InternVideo (arXiv:2212.03191) 3.2, InternVideo1
Pretrain/Multi-Modalities-Pretraining. Only the global blocks: the local ones are not used there.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from invideo_jax.errors import UserError
from invideo_jax.models import clip_vit, pixels
from invideo_jax.models.clip_vit import ClipViT, MultiHead
from invideo_jax.models.layers import LayerNorm, Linear, activation, named, uniform

PyTree = Any


class DepthwiseConv(nn.Module):
    """A 3x3x3 convolution of each channel by itself, with zeros outside the grid."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, t, h, w, D] to the same."""
        width, init = x.shape[-1], uniform(27**-0.5)  # PyTorch's bound for 27 inputs
        axes = (None, None, None, None, "norm")
        kernel = self.param("kernel", named(init, *axes), (3, 3, 3, 1, width))
        bias = self.param("bias", named(nn.initializers.zeros_init(), "norm"), (width,))
        # Tap by tap: on a mesh where devices hold copies of the batch, XLA (jax 0.10.2) multiplies the
        # gradient of a grouped convolution's kernel by their number.
        padded = jnp.pad(x.astype(self.dtype), ((0, 0), (1, 1), (1, 1), (1, 1), (0, 0)))
        t, h, w = x.shape[1:4]
        taps = itertools.product(range(3), repeat=3)
        kernel = kernel.astype(self.dtype)
        y = sum(padded[:, i : i + t, j : j + h, k : k + w] * kernel[i, j, k, 0] for i, j, k in taps)
        return y + bias.astype(self.dtype)


class Extractor(nn.Module):
    """A global block: one token reads all tokens of the video, and is changed; they are not.

    Attributes:
        dropout: rate in the middle of the MLP.
    """

    heads: int
    mlp_width: int
    dropout: float = 0.5
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        token: jax.Array,
        cls: jax.Array,
        grid: jax.Array,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """The token after this block.

        Args:
            token: [B, 1, D].
            cls: class tokens of the frames, [B, t, D].
            grid: patches, [B, t, h, w, D].
            keys: [B] random keys for dropout; None when evaluating.
        """
        norm = lambda name: LayerNorm(self.eps, self.dtype, name=name)
        grid = grid + DepthwiseConv(self.dtype, name="position")(grid)
        seen = jnp.concatenate([cls, grid.reshape(len(grid), -1, grid.shape[-1])], axis=1)
        attention = MultiHead(self.heads, zero_out=True, dtype=self.dtype, name="attention")
        token = token + attention(norm("norm1")(token), norm("norm3")(seen))
        up = Linear(self.mlp_width, ("embed", "mlp"), "mlp", dtype=self.dtype, name="up")
        hidden = activation("gelu_quick")(up(norm("norm2")(token)))
        if keys is not None and self.dropout:
            keep = lambda key: jax.random.bernoulli(key, 1 - self.dropout, hidden.shape[1:])
            hidden = jnp.where(jax.vmap(keep)(keys), hidden / (1 - self.dropout), 0)
        zeros = nn.initializers.zeros_init()
        down = Linear(
            token.shape[-1], ("mlp", "embed"), kernel_init=zeros, dtype=self.dtype, name="down"
        )
        return token + down(hidden)


class UniFormerV2(nn.Module):
    """The video tower of InternVideo's multimodal branch.

    Tokens are [B, prefix + N, D]: the token of the video, the class tokens of the frames, and the
    patches, t-major. Videos of one frame are taken too: that is what an image is here.

    Attributes:
        backbone: CLIP's transformer, frame by frame.
        extractors: how many of its last blocks have a global block beside them.
        dropout: rate in the MLPs of the global blocks.
    """

    backbone: ClipViT
    extractors: int = 4
    dropout: float = 0.5

    takes_images = True
    frames = property(lambda self: self.backbone.frames)
    image_size = property(lambda self: self.backbone.image_size)
    channels = property(lambda self: self.backbone.channels)
    width = property(lambda self: self.backbone.width)
    depth = property(lambda self: self.backbone.depth)
    heads = property(lambda self: self.backbone.heads)
    mlp_width = property(lambda self: self.backbone.mlp_width)
    patch = property(lambda self: self.backbone.patch)
    tubelet = property(lambda self: self.backbone.tubelet)
    grid = property(lambda self: self.backbone.grid)
    tokens = property(lambda self: self.backbone.tokens)
    patch_pixels = property(lambda self: self.backbone.patch_pixels)
    normalisation = property(lambda self: self.backbone.normalisation)
    drop_path = property(lambda self: self.backbone.drop_path)
    dtype = property(lambda self: self.backbone.dtype)

    @property
    def prefix(self) -> int:
        """Tokens in front of the patches: that of the video, and one a frame."""
        return 1 + self.backbone.prefix

    def setup(self):
        self.check()
        width, zeros = self.width, nn.initializers.zeros_init()
        self.temporal_cls_token = self.param("temporal_cls_token", named(zeros, "norm"), (width,))
        self.global_blocks = [
            Extractor(self.heads, self.mlp_width, self.dropout, self.backbone.eps, self.dtype)
            for _ in range(self.extractors)
        ]
        # The share of the frames' class tokens is its sigmoid: one half at the start.
        self.balance = self.param("balance", named(zeros, "norm"), (width,))

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Tokens after the last block.

        Args:
            video: uint8 or normalised float [B, T, H, W, C], or of one frame.
            visible: must be None: the convolutions need every patch.
            keys: [B] random keys for dropout and drop path; None when evaluating.
            features: blocks whose outputs are wanted; negative ones count from the end.

        Returns:
            [B, prefix+N, D], and {'embedded', 'block<i>'} of the backbone, [B, T+N, D].
        """
        if visible is not None:
            raise UserError(
                "UniFormerV2 needs every patch of a clip; got visible ids. Use mask ratio 0, or ClipViT."
            )
        last = range(self.depth - self.extractors, self.depth)
        wanted = {i % self.depth for i in features} if features else set()
        y, out = self.backbone(video, keys=keys, features=sorted({*last, *wanted}))
        token = self.first_token(len(video))
        for i in last:
            token = self.extract(token, out[f"block{i}"], i, keys)
        kept = {name: x for name, x in out.items() if name == "embedded" or int(name[5:]) in wanted}
        return jnp.concatenate([token, y], axis=1), kept

    def first_token(self, batch: int) -> jax.Array:
        """The token of the video before the first global block, [B, 1, D]."""
        token = self.temporal_cls_token.astype(self.dtype)
        return jnp.broadcast_to(token, (batch, 1, self.width))

    def extract(
        self, token: jax.Array, y: jax.Array, block: int, keys: jax.Array | None = None
    ) -> jax.Array:
        """The token of the video after block number `block`; earlier blocks leave it as it is.

        Args:
            token: [B, 1, D].
            y: output of the block, [B, T+N, D].
        """
        number = block - (self.depth - self.extractors)
        if number < 0:
            return token
        _, h, w = self.grid
        frames = y.shape[1] // (1 + h * w)
        grid = rearrange(y[:, frames:], "b (t h w) d -> b t h w d", h=h, w=w)
        if keys is not None:
            keys = jax.vmap(lambda key: jax.random.fold_in(key, self.depth + number))(keys)
        return self.global_blocks[number](token, y[:, :frames], grid, keys)

    def embedded(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Patches before the first block, as the backbone has them, and the token of the video."""
        return self.backbone.embedded(video), self.first_token(len(video))

    def run(
        self, x: jax.Array, token: jax.Array, span: tuple[int, int], frames: int
    ) -> tuple[jax.Array, jax.Array]:
        """Blocks span[0] .. span[1]-1 of what `embedded` gives; nothing is dropped."""
        first, last = span
        while first < last:
            # As far as the next block that the token reads.
            stop = min(max(first + 1, self.depth - self.extractors + 1), last)
            x = self.backbone.run(x, (first, stop))
            token = self.extract(token, self.backbone.joined(x, frames), stop - 1)
            first = stop
        return x, token

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """The video in the shared space: [B, P] from [B, prefix+N, D]."""
        _, h, w = self.grid
        frames = (tokens.shape[1] - 1) // (1 + h * w)
        share = jax.nn.sigmoid(self.balance).astype(tokens.dtype)
        cls = tokens[:, 1 : 1 + frames].mean(axis=1)
        return self.backbone.project((1 - share) * tokens[:, 0] + share * cls)

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.backbone.check()
        if self.backbone.joint:
            raise UserError("UniFormerV2's backbone must go frame by frame; got joint=True.")
        if not 0 < self.extractors <= self.depth:
            raise UserError(
                f"extractors must be from 1 to the number of blocks; got extractors={self.extractors}, "
                f"depth={self.depth}."
            )


def build(
    size: str, /, *, extractors: int = 4, dropout: float = 0.5, **overrides: Any
) -> UniFormerV2:
    """The tower over CLIP's transformer of `clip_vit.SIZES`; `overrides` are attributes of that.

    Raises:
        UserError: unknown size. TypeError: unknown attribute.
    """
    return UniFormerV2(clip_vit.build(size, **overrides), extractors, dropout)


def init(model: UniFormerV2, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    whole = lambda m, video: m.pooled(m(video)[0])
    return model.init(key, pixels.blank_video(model), method=whole)["params"]
