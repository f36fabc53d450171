"""CLIP's vision transformer, over the frames of a video one by one or jointly.

Source: CLIP (arXiv:2103.00020); joint space-time attention: ViCLIP in InternVid (arXiv:2307.06942).
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from invideo_jax.errors import UserError
from invideo_jax.models import pixels
from invideo_jax.models.attention import attend
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.layers import Block, LayerNorm, Linear, Stack, named, uniform, xavier
from invideo_jax.registry import nearest

PyTree = Any


class MultiHead(nn.Module):
    """Multi-head attention with all biases, of tokens to themselves or to a context.

    Attributes:
        heads: K.
        width: of queries, keys and values together; 0: that of the querying tokens.
        zero_out: start with an output projection of zeros.
    """

    heads: int
    width: int = 0
    zero_out: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
        """`x` [B, Nq, D], `context` [B, Nk, D'] (None: x itself); returns [B, Nq, D]."""
        width = self.width or x.shape[-1]
        context = x if context is None else context
        into = lambda name, y: Linear(
            width,
            ("embed", "heads"),
            "heads",
            kernel_init=xavier(y.shape[-1], 3 * width),  # the bound of the fused published matrix
            dtype=self.dtype,
            name=name,
        )(y)
        mixed = attend(
            into("query", x), into("key", context), into("value", context), heads=self.heads
        )
        init = nn.initializers.zeros_init() if self.zero_out else None
        out = Linear(
            x.shape[-1], ("heads", "embed"), kernel_init=init, dtype=self.dtype, name="out"
        )
        return out(mixed)


class ClipViT(pixels.Geometry, nn.Module):
    """CLIP's image encoder on videos.

    Tokens are [B, prefix + V, D]: class tokens first (one a frame, or one with `joint`), then
    patches, t-major. They are the raw residual stream: `project` gives the shared space.

    Attributes:
        width, depth, heads, mlp_width: D, blocks, K, F.
        embed: width of the shared space, P; 0: `project` ends after its LayerNorm.
        frames, image_size: T, and H = W. Frame by frame, videos of one frame are taken too.
        joint: attend over all frames at once, with a learned table of times; else frame by frame.
        normalisation: constants that uint8 videos are normalised with.
        drop_path: rate of the last block.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    embed: int = 512
    patch: int = 16
    frames: int = 8
    image_size: int = 224
    channels: int = 3
    joint: bool = False
    normalisation: str = "clip"
    activation: str = "gelu_quick"
    eps: float = 1e-5
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def tubelet(self) -> int:
        """Frames of a patch: one."""
        return 1

    @property
    def prefix(self) -> int:
        """Class tokens in front of the patches' tokens."""
        return 1 if self.joint else self.frames

    def setup(self):
        self.check()
        _, h, w = self.grid
        table = nn.initializers.normal(self.width**-0.5)
        init = uniform(self.patch_pixels**-0.5)  # as PyTorch's convolution starts
        self.patch_embed = Linear(
            self.width, ("patch", "embed"), None, kernel_init=init, dtype=self.dtype
        )
        self.cls_token = self.param("cls_token", named(table, "norm"), (self.width,))
        self.position_embedding = self.param(
            "position_embedding", named(table, None, "norm"), (1 + h * w, self.width)
        )
        if self.joint:
            zeros = named(nn.initializers.zeros_init(), None, "norm")
            self.position_temporal = self.param(
                "position_temporal", zeros, (self.frames, self.width)
            )
        self.norm_pre = LayerNorm(self.eps, self.dtype)
        self.stack = Stack(
            functools.partial(
                Block,
                self.heads,
                self.mlp_width,
                key_bias=True,
                activation=self.activation,
                eps=self.eps,
                dtype=self.dtype,
            ),
            self.depth,
            scan=self.scan,
            remat=self.remat,
            drop_path=self.drop_path,
        )
        self.norm_post = LayerNorm(self.eps, self.dtype)
        if self.embed:
            proj = nn.initializers.normal(self.width**-0.5)
            self.projection = Linear(
                self.embed, ("embed", None), None, kernel_init=proj, dtype=self.dtype
            )

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
            video: uint8 or normalised float [B, T, H, W, C].
            visible: int32 [B, V], ids of patches, ascending; None: all. Frame by frame, each
                frame must have V / T of them.
            keys: [B] random keys for drop path; None when evaluating.
            features: blocks whose outputs are wanted; negative ones count from the end.

        Returns:
            [B, prefix+V, D], and {'embedded': before the first block, 'block<i>': after block i},
            of the same shape.
        """
        x = self.embedded(video, visible)
        frames = video.shape[1]
        y, out = self.stack(x, keys=self._row_keys(keys, frames), features=features)
        join = lambda x: self.joined(x, frames)
        return join(y), {name: join(value) for name, value in ({"embedded": x} | out).items()}

    def embedded(self, video: jax.Array, visible: jax.Array | None = None) -> jax.Array:
        """What the first block takes: [B*T, 1+V/T, D], or with `joint` [B, 1+V, D]."""
        t, (_, h, w) = video.shape[1], self.grid
        if t != 1 or self.joint:
            pixels.check_video(video, self)
        cubes = pixels.visible_cubes(video, visible, self)
        ids = jnp.arange(t * h * w)[None] if visible is None else visible
        table = self.position_embedding.astype(self.dtype)
        x = self.patch_embed(cubes) + jnp.take(table[1:], ids % (h * w), axis=0)
        if self.joint:
            x = x + jnp.take(self.position_temporal.astype(self.dtype), ids // (h * w), axis=0)
        else:
            check_multiple("the number of visible tokens", x.shape[1], "frames", t)
            x = rearrange(x, "b (t n) d -> (b t) n d", t=t)
        cls = jnp.broadcast_to(
            self.cls_token.astype(self.dtype) + table[0], (len(x), 1, self.width)
        )
        return self.norm_pre(jnp.concatenate([cls, x], axis=1))

    def run(self, x: jax.Array, span: tuple[int, int]) -> jax.Array:
        """Blocks span[0] .. span[1]-1 of what `embedded` gives; nothing is dropped."""
        return self.stack(x, span=span)[0]

    def joined(self, x: jax.Array, frames: int) -> jax.Array:
        """From the blocks' layout to [B, prefix+V, D], class tokens first."""
        if self.joint:
            return x
        x = rearrange(x, "(b t) n d -> b t n d", t=frames)
        return jnp.concatenate([x[:, :, 0], rearrange(x[:, :, 1:], "b t n d -> b (t n) d")], axis=1)

    def split(self, tokens: jax.Array, frames: int) -> jax.Array:
        """The inverse of `joined`."""
        if self.joint:
            return tokens
        cls, x = tokens[:, :frames, None], tokens[:, frames:]
        x = jnp.concatenate([cls, rearrange(x, "b (t n) d -> b t n d", t=frames)], axis=2)
        return rearrange(x, "b t n d -> (b t) n d")

    def project(self, tokens: jax.Array) -> jax.Array:
        """LayerNorm and projection to the shared space of any tokens [..., D], as [..., P]."""
        x = self.norm_post(tokens)
        return self.projection(x) if self.embed else x

    def pooled(self, tokens: jax.Array) -> jax.Array:
        """Class tokens in the shared space, averaged over T frames: [B, P] from [B, prefix+V, D]."""
        return self.project(tokens[:, : self.prefix]).mean(axis=1)

    def _row_keys(self, keys, frames):
        if keys is None or self.joint:
            return keys
        times = jnp.arange(frames)
        each = jax.vmap(lambda key: jax.vmap(lambda t: jax.random.fold_in(key, t))(times))(keys)
        return each.reshape(-1)

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("image_size", self.image_size, "patch", self.patch)
        check_multiple("width", self.width, "heads", self.heads)
        if self.frames < 1:
            raise UserError(
                f"frames must be at least 1; got frames={self.frames}. Use 1 for images."
            )


def init(model: ClipViT, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    whole = lambda m, video: m.pooled(m(video)[0])
    return model.init(key, pixels.blank_video(model), method=whole)["params"]


def class_attention(model: ClipViT, params: PyTree, tokens: jax.Array) -> jax.Array:
    """How much the last block's class token looks at each patch, averaged over heads.

    Args:
        params: of `model`.
        tokens: [B, prefix+N, D], what the last block takes: the feature of the block before it.

    Returns:
        float32 [B, N]. A frame's (with `joint`, a clip's) attention sums to 1 less what goes to the
        class token itself.

    Source: UMT (arXiv:2303.16058) 3.2, where it decides which tokens stay visible.
    """
    last = jax.tree.map(lambda p: p[-1], params["stack"]["blocks"])
    x = LayerNorm(model.eps, model.dtype).apply(
        {"params": last["norm1"]}, model.split(tokens, model.frames)
    )
    linear = lambda name, y: (
        y @ last["attention"][name]["kernel"].astype(model.dtype)
        + last["attention"][name]["bias"].astype(model.dtype)
    )
    heads = lambda y: rearrange(y, "b n (k d) -> b k n d", k=model.heads)
    query, key = heads(linear("query", x[:, :1])), heads(linear("key", x))
    wide = jnp.promote_types(model.dtype, jnp.float32)
    scores = jnp.matmul(query, key.swapaxes(2, 3), preferred_element_type=wide)
    weights = jax.nn.softmax(scores * (model.width // model.heads) ** -0.5, axis=-1)
    weights = weights.mean(axis=1)[:, 0, 1:]
    return weights.reshape(len(tokens), -1)


# Source: CLIP (arXiv:2103.00020), table 20. Micro is this project's own, for tests.
SIZES: dict[str, dict[str, int]] = {
    "Micro": dict(width=48, depth=4, heads=4, mlp_width=192, patch=8, embed=24),
    "B": dict(width=768, depth=12, heads=12, mlp_width=3072, patch=16, embed=512),
    "L": dict(width=1024, depth=24, heads=16, mlp_width=4096, patch=14, embed=768),
}


def build(size: str, /, **overrides: Any) -> ClipViT:
    """The model of a row of `SIZES`; `overrides` are attributes of `ClipViT`.

    Raises:
        UserError: unknown size. TypeError: unknown attribute.
    """
    if size not in SIZES:
        raise UserError(
            f"The model size must be a row of the table; got size={size!r}.{nearest(size, SIZES)}"
        )
    return ClipViT(**(SIZES[size] | overrides))


def build_joint(size: str, /, **overrides: Any) -> ClipViT:
    """The same, attending over all frames at once: ViCLIP's."""
    return build(size, joint=True, **overrides)
