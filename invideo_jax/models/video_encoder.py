"""The InternVideo2 video encoder: class token, learned positions, blocks, attention pool.

Source: InternVideo2 (arXiv:2403.15377) 3.1; OpenGVLab/InternVideo internvideo2*.py.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax.errors import UserError
from invideo_jax.models import pixels, positions, sizes
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.layers import Block, Linear, Stack, activation, named, uniform
from invideo_jax.models.pooling import AttentionPool
from invideo_jax.registry import nearest
from invideo_jax.sharding import constrain

PyTree = Any
Tables = Mapping[str, jax.Array]
POSITIONS = ("joint", "separate")
IMAGE_POSITIONS = ("average", "separate")
# timm's truncated normal cuts at +-2, which is a hundred standard deviations: it cuts nothing.
NORMAL = nn.initializers.normal(0.02)


class VideoEncoder(pixels.Geometry, nn.Module):
    """Features of the visible patches of videos and images, with a class token in front.

    An image is a video of one frame given to a model of several.

    Attributes:
        width, depth, heads, mlp_width: D, blocks, K, F.
        patch, tubelet: side and frames of one cube; an image's frame fills a whole cube.
        frames, image_size: T, and H = W, of the clips.
        normalisation: constants that uint8 videos are normalised with.
        pool_heads, pool_width: of the attention pool, P; width 0 for no pool.
        activation: of the blocks; the published weights were trained with 'gelu_tanh'.
        qkv_bias: bias on queries, keys and values.
        qk_norm: RMSNorm of queries and keys.
        layer_scale: initial value of the learned branch factors; 0 for none.
        layer_scale_float32: whether that product is made in float32 whatever `dtype` is.
        positions: 'joint' (one table) or 'separate' (space + time, and the class token's).
        image_positions: 'average' (of the video's table over time; of separate tables the one of
            space alone) or 'separate' (a table of their own).
        drop_path: rate of the last block.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    takes_images = True

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int = 14
    tubelet: int = 1
    frames: int = 8
    image_size: int = 224
    channels: int = 3
    normalisation: str = "imagenet"
    pool_heads: int = 16
    pool_width: int = 768
    activation: str = "gelu_tanh"
    qkv_bias: bool = False
    qk_norm: bool = True
    layer_scale: float = 1e-5
    layer_scale_float32: bool = True
    positions: str = "joint"
    image_positions: str = "average"
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def prefix(self) -> int:
        """Class tokens in front of the patches."""
        return 1

    def setup(self):
        self.check()
        # The published convolution keeps PyTorch's default init, uniform within 1 / sqrt(inputs).
        init = uniform(self.patch_pixels**-0.5)
        self.patch_embed = Linear(
            self.width, ("patch", "embed"), kernel_init=init, bias_init=init, dtype=self.dtype
        )
        self.cls_token = self.param("cls_token", named(NORMAL, "norm"), (self.width,))
        self.tables = declare_tables(self, self)
        self.stack = Stack(
            block_of(self),
            self.depth,
            scan=self.scan,
            remat=self.remat,
            drop_path=self.drop_path,
            shrink=("attention/out/kernel", "mlp/down/kernel"),
        )
        if self.pool_width:
            self.pool = AttentionPool(
                self.pool_heads, self.pool_width, kernel_init=NORMAL, dtype=self.dtype
            )

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Features of the class token and of the visible patches.

        Args:
            video: uint8 or normalised float [B, T, H, W, C]; T is 1 for images.
            visible: int32 [B, V], ids of the patches to see, ascending, of the image's own grid for
                images; None for all.
            keys: [B] random keys for drop path; None when evaluating.
            features: blocks whose outputs are wanted; negative ones count from the end.

        Returns:
            [B, 1+V, D], and {'embedded': before the first block, 'block<i>': after block i}, each
            [B, 1+V, D].
        """
        image = self.is_image(video)
        if video.shape[1] < self.tubelet:
            video = jnp.repeat(video, self.tubelet, axis=1)
        x = self.patch_embed(pixels.visible_cubes(video, visible, self))
        cls = jnp.broadcast_to(self.cls_token.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([cls, x], axis=1)
        x = x + table_rows(self.tables, self, visible, image=image).astype(x.dtype)
        x = constrain(x, "batch", "tokens", "act_embed")
        out = {"embedded": x}
        x, blocks = self.stack(x, keys=keys, features=features)
        return x, out | blocks

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """[B, P] of the tokens [B, 1+V, D] that `__call__` gives."""
        return self.pool_attention(tokens)[0]

    def pool_attention(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`pooled`, and what the pool looks at.

        Returns:
            [B, P], and the mean over heads of the pool's attention to each patch, float32 [B, V];
            the class token's share is cut off, so that a row does not add up to 1.
        """
        if not self.pool_width:
            raise UserError("Pooling needs a pool; got pool_width=0. Build the model with one.")
        pooled, weights = self.pool(tokens)
        return pooled, weights[:, self.prefix :]

    def is_image(self, video: jax.Array) -> bool:
        """Whether a batch holds images; raises UserError where it is neither images nor clips."""
        side, frames = self.image_size, video.shape[1] if video.ndim == 5 else 0
        lengths = {1, self.tubelet, self.frames}
        picture = (side, side, self.channels)
        if video.ndim != 5 or frames not in lengths or video.shape[2:] != picture:
            raise UserError(
                f"A video batch must be [B, T, H, W, C] = [B, {self.frames}, {side}, {side}, "
                f"{self.channels}], with T=1 for images; got shape={list(video.shape)}. Make clips "
                "of that size, or build the model for these."
            )
        return frames != self.frames

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("frames", self.frames, "tubelet", self.tubelet)
        check_multiple("image_size", self.image_size, "patch", self.patch)
        check_multiple("width", self.width, "heads", self.heads)
        if self.pool_width:
            check_multiple("width", self.width, "pool_heads", self.pool_heads)
        for name, options in [("positions", POSITIONS), ("image_positions", IMAGE_POSITIONS)]:
            if getattr(self, name) not in options:
                raise UserError(
                    f"{name} must be one of {', '.join(options)}; got {name}="
                    f"{getattr(self, name)!r}.{nearest(getattr(self, name), options)}"
                )
        activation(self.activation)
        pixels.constants(self.normalisation)


def block_of(model: VideoEncoder) -> functools.partial:
    """Makes one unbound block of the model: `block_of(model)(parent=None)`."""
    return functools.partial(
        Block,
        model.heads,
        model.mlp_width,
        qkv_bias=model.qkv_bias,
        key_bias=model.qkv_bias,
        qk_norm=model.qk_norm,
        activation=model.activation,
        norm="rms",
        layer_scale=model.layer_scale,
        layer_scale_float32=model.layer_scale_float32,
        kernel_init=NORMAL,
        dtype=model.dtype,
    )


def declare_tables(
    module: nn.Module, encoder: VideoEncoder, name: str = "", *, class_token: bool = True
) -> Tables:
    """Makes the position tables of an encoder, or of heads upon it, as parameters of `module`.

    Args:
        name: put in front of the parameters' names.
        class_token: whether there is a row for the class token.
    """
    t, h, w = encoder.grid
    table = lambda rows: named(lambda key, shape: jnp.asarray(rows()), None, "embed")
    wanted = {}
    if encoder.positions == "joint":
        joint = functools.partial(positions.sincos_3d, prefix=int(class_token))
        wanted["position_embedding"] = lambda: joint(encoder.grid, encoder.width)
        if encoder.image_positions == "separate":
            wanted["image_position_embedding"] = lambda: joint((1, h, w), encoder.width)
    else:
        wanted["position_spatial"] = lambda: positions.sincos_2d(h, w, encoder.width)
        wanted["position_temporal"] = lambda: positions.sincos_1d(t, encoder.width)
    found = {key: module.param(name + key, table(rows), ()) for key, rows in wanted.items()}
    if encoder.positions == "separate" and class_token:
        zeros = named(nn.initializers.zeros_init(), "norm")
        found["position_cls"] = module.param(f"{name}position_cls", zeros, (encoder.width,))
    return found


def table_rows(
    tables: Tables, encoder: VideoEncoder, visible: jax.Array | None, *, image: bool
) -> jax.Array:
    """Positions of the class token (where the tables have one) and of the visible patches.

    Args:
        tables: from `declare_tables`.
        visible: int32 [B, V], or None for all.
        image: whether the ids are those of one frame.

    Returns:
        [B or 1, prefix+V, D].
    """
    first, patches = _split_tables(tables, encoder, image)
    if visible is None:
        return jnp.concatenate([first, patches])[None]
    rows = jnp.take(patches, visible, axis=0)
    first = jnp.broadcast_to(first, (len(rows), *first.shape))
    return jnp.concatenate([first, rows], axis=1)


def _split_tables(tables: Tables, encoder: VideoEncoder, image: bool):
    """Rows of the class token [prefix, D], and of the patches [N, D] ([h*w, D] for images)."""
    t, h, w = encoder.grid
    if "position_spatial" in tables:
        space, time = tables["position_spatial"], tables["position_temporal"]
        first = tables["position_cls"][None] if "position_cls" in tables else space[:0]
        if image:
            return first, space
        return first, (time[:, None] + space[None]).reshape(t * h * w, -1)
    if image and "image_position_embedding" in tables:
        table = tables["image_position_embedding"]
        return table[: len(table) - h * w], table[len(table) - h * w :]
    table = tables["position_embedding"]
    first, patches = table[: len(table) - t * h * w], table[len(table) - t * h * w :]
    if image:
        # The mean over time slots; the published stage-2 model divides by frames, which is the same
        # for its tubelet of 1 and gives too few rows for any other.
        patches = patches.reshape(t, h * w, -1).mean(0)
    return first, patches


def build(size: str, /, **overrides: Any) -> VideoEncoder:
    """The model of a row of `sizes.INTERNVIDEO2`; `overrides` are attributes of `VideoEncoder`.

    Raises:
        UserError: unknown size. TypeError: unknown attribute.
    """
    row = dataclasses.asdict(sizes.internvideo2(size))
    del row["params"], row["trunk_params"]
    return VideoEncoder(**(row | overrides))


def init(model: VideoEncoder, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""

    def whole(model, video, visible):
        tokens, _ = model(video, visible)
        return model.pooled(tokens) if model.pool_width else tokens

    video = jnp.zeros((1, model.frames, model.image_size, model.image_size, model.channels))
    ids = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, video, ids, method=whole)["params"]
