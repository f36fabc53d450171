"""Frozen encoders that give the targets of unmasked-token alignment.

A teacher is an encoder, which blocks to return, and a pure function (parameters, video) -> features of the whole clip. Its
parameters are those of the bare encoder, so whatever layout reads an encoder also reads a teacher.
A new teacher is one class and one line of `TEACHERS`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses
from invideo_jax.models import clip_vit, pixels, positions, video_encoder, video_mae
from invideo_jax.models.alignment import last_blocks
from invideo_jax.registry import Registry

PyTree = Any
# 'middle' [B, K, prefix+N, C], ascending in depth, 'final' [B, P] and 'attention' [B, N] where it has them.
Features = dict[str, jax.Array]

TEACHERS = Registry(
    "teacher",
    {
        "clip": "invideo_jax.models.teachers:clip",
        "internvl": "invideo_jax.models.teachers:internvl",
        "internvideo2": "invideo_jax.models.teachers:internvideo2",
        "video_mae": "invideo_jax.models.teachers:video_mae_teacher",
    },
)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """What all teachers have.

    Attributes:
        encoder: linen module with the interface of the encoders in this package.
        layers: blocks whose outputs are returned, ascending.
        normalise: divide every feature by its length.
    """

    encoder: nn.Module
    layers: tuple[int, ...]
    normalise: bool = True

    @property
    def width(self) -> int:
        """C of the middle features."""
        return self.encoder.width

    @property
    def final_width(self) -> int:
        """P of the final feature; 0 for none."""
        return getattr(self.encoder, "pool_width", 0)

    @property
    def prefix(self) -> int:
        """Class tokens before the N others."""
        return self.encoder.prefix

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the features."""
        return self.encoder.grid

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters, each in a box with the logical names of its axes."""
        video, one = pixels.blank_video(self.encoder), jnp.zeros((1, 1), jnp.int32)
        return self.encoder.init(key, video, one, method=_touch_all)["params"]

    def __call__(self, params: PyTree, video: jax.Array) -> Features:
        """Features of whole clips; `video` uint8 or normalised float [B, T, H, W, C]."""
        raise NotImplementedError

    def _unit(self, x: jax.Array) -> jax.Array:
        return losses.unit(x).astype(x.dtype) if self.normalise else x

    def _fit(self, video: jax.Array) -> jax.Array:
        """Frames in the size that the encoder takes: bicubic, without antialiasing, as released.

        Source: InternVideo2 engine_for_pretraining.py, UMT engine_for_pretraining_umt.py.
        """
        size = self.encoder.image_size
        if video.shape[2:4] == (size, size):
            return video
        if video.dtype == jnp.uint8:
            video = pixels.normalise(video, self.encoder.normalisation, self.encoder.dtype)
        rows, columns = (positions.cubic_matrix(old, size) for old in video.shape[2:4])
        wide = jnp.promote_types(video.dtype, jnp.float32)
        once = jnp.einsum("bthwc,vw->bthvc", video.astype(wide), columns)
        return jnp.einsum("bthvc,uh->btuvc", once, rows).astype(video.dtype)


def _touch_all(encoder: nn.Module, video: jax.Array, visible: jax.Array) -> jax.Array:
    """Uses every parameter of an encoder once."""
    return encoder.pooled(encoder(video, visible)[0])


def _forward(encoder: nn.Module, video: jax.Array, layers: Sequence[int]):
    tokens, out = encoder(video, features=layers)
    return tokens, [out[f"block{i}"] for i in layers]


def _forward_with_pool(encoder: nn.Module, video: jax.Array, layers: Sequence[int]):
    tokens, blocks = _forward(encoder, video, layers)
    return blocks, *encoder.pool_attention(tokens)


class VideoTeacher(Teacher):
    """InternVideo2 itself: the teacher of the distilled students (and of continued training).

    Features keep the class token; the attention is that of the pooling layer, mean over its heads.

    Source: InternVideo2 (arXiv:2403.15377) 3.1, internvideo2_teacher.py.
    """

    def __call__(self, params: PyTree, video: jax.Array) -> Features:
        """Features of whole clips, [B, T, H, W, C]."""
        blocks, pooled, attention = self.encoder.apply(
            {"params": params}, self._fit(video), self.layers, method=_forward_with_pool
        )
        middle = self._unit(jnp.stack(blocks, axis=1))
        return {"middle": middle, "final": self._unit(pooled), "attention": attention}


@dataclasses.dataclass(frozen=True)
class ImageTeacher(Teacher):
    """InternVL's vision tower, an encoder of single frames, over the frames of a clip.

    Frames are further examples. The class tokens of a clip are averaged, and so are its pooled features,
    before they are normalised; the attention stays apart for each frame.

    Attributes:
        frames: of a clip; the encoder itself has one.

    Source: InternVideo2 internvl_clip_vision.py.
    """

    frames: int = 8

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the features."""
        return (self.frames, *self.encoder.grid[1:])

    def __call__(self, params: PyTree, video: jax.Array) -> Features:
        """Features of whole clips, [B, T, H, W, C]."""
        batch, frames = video.shape[:2]
        video = self._fit(video)
        blocks, pooled, attention = self.encoder.apply(
            {"params": params},
            video.reshape(-1, 1, *video.shape[2:]),
            self.layers,
            method=_forward_with_pool,
        )
        apart = lambda x: x.reshape(batch, frames, *x.shape[1:])
        return {
            "middle": self._unit(jnp.stack([_join_frames(apart(x)) for x in blocks], axis=1)),
            "final": self._unit(apart(pooled).mean(1)),
            "attention": attention.reshape(batch, -1),
        }


def _join_frames(x: jax.Array) -> jax.Array:
    """[B, T, 1+L, C] to [B, 1+T*L, C]: the mean class token, then all patches."""
    patches = x[:, :, 1:].reshape(x.shape[0], -1, x.shape[-1])
    return jnp.concatenate([x[:, :, 0].mean(1, keepdims=True), patches], axis=1)


class VideoMAETeacher(Teacher):
    """VideoMAE V2: outputs of the last blocks, of which only the last block's passes the final norm.

    Source: InternVideo2 (arXiv:2403.15377) 3.1, videomae.py; VideoMAE V2 (arXiv:2303.16727).
    """

    @property
    def final_width(self) -> int:
        """It has no pooled feature."""
        return 0

    def __call__(self, params: PyTree, video: jax.Array) -> Features:
        """Features of whole clips, [B, T, H, W, C]."""
        tokens, blocks = self.encoder.apply(
            {"params": params}, self._fit(video), self.layers, method=_forward
        )
        if self.layers[-1] == self.encoder.depth - 1:
            blocks[-1] = tokens
        return {"middle": self._unit(jnp.stack(blocks, axis=1))}


class ClipTeacher(Teacher):
    """CLIP's image encoder over the frames of a clip: UMT's teacher.

    Patches alone, each block's output through CLIP's last norm and projection; the attention is that of the
    last block's class token, mean over heads.

    Source: UMT (arXiv:2303.16058) 3.2.
    """

    @property
    def width(self) -> int:
        """C of the middle features: of the shared space."""
        return self.encoder.embed or self.encoder.width

    @property
    def final_width(self) -> int:
        """Its pooled feature is no target."""
        return 0

    @property
    def prefix(self) -> int:
        """Class tokens are no targets."""
        return 0

    def init(self, key: jax.Array) -> PyTree:
        """Fresh parameters, each in a box with the logical names of its axes."""
        return clip_vit.init(self.encoder, key)

    def __call__(self, params: PyTree, video: jax.Array) -> Features:
        """Features of whole clips, [B, T, H, W, C]."""
        last, skip = self.encoder.depth - 1, self.encoder.prefix

        def run(encoder, video):
            _, out = encoder(video, features=(*self.layers, last - 1))
            blocks = jnp.stack([out[f"block{i}"][:, skip:] for i in self.layers], axis=1)
            return encoder.project(blocks), out[f"block{last - 1}"]

        blocks, before = self.encoder.apply({"params": params}, self._fit(video), method=run)
        attention = clip_vit.class_attention(self.encoder, params, before)
        return {"middle": self._unit(blocks), "attention": attention}


def clip(
    size: str,
    /,
    *,
    frames: int,
    image_size: int,
    layers: int = 6,
    interval: float = 1.0,
    **overrides: Any,
) -> ClipTeacher:
    """CLIP over clips of `frames`; `overrides` are attributes of `ClipViT`.

    UMT's engine gives CLIP the student's normalised clip as it is, so with ImageNet's constants: for teachers
    exactly as released say normalisation='imagenet'. The default is CLIP's own, which it was trained with.
    """
    encoder = clip_vit.build(size, frames=frames, image_size=image_size, **overrides)
    return ClipTeacher(encoder, last_blocks(encoder.depth, layers, interval))


def internvl(
    size: str,
    /,
    *,
    frames: int,
    image_size: int,
    layers: int = 6,
    interval: float = 1.0,
    **overrides: Any,
) -> ImageTeacher:
    """InternVL's vision tower over clips of `frames`; `overrides` are attributes of `VideoEncoder`."""
    options = dict(frames=1, image_size=image_size, layer_scale=0.1) | overrides
    encoder = video_encoder.build(size, **options)
    blocks = last_blocks(encoder.depth, layers, interval)
    return ImageTeacher(encoder, blocks, frames=frames)


def internvideo2(
    size: str,
    /,
    *,
    frames: int,
    image_size: int,
    layers: int = 6,
    interval: float = 3.34,
    **overrides: Any,
) -> VideoTeacher:
    """InternVideo2; `overrides` are attributes of `VideoEncoder`."""
    encoder = video_encoder.build(size, frames=frames, image_size=image_size, **overrides)
    return VideoTeacher(encoder, last_blocks(encoder.depth, layers, interval))


def video_mae_teacher(
    size: str,
    /,
    *,
    frames: int,
    image_size: int,
    layers: int = 4,
    interval: float = 1.0,
    faithful_attention: bool = False,
    **overrides: Any,
) -> VideoMAETeacher:
    """VideoMAE V2's encoder; `overrides` are attributes of `VideoMAEEncoder`.

    Args:
        faithful_attention: attend as the released teacher does, over the heads of one token instead
            of over tokens (see `exchanged`). Which of both the published weights were made with is unknown.
    """
    encoder = video_mae.build_encoder(size, frames=frames, image_size=image_size, **overrides)
    if faithful_attention:
        encoder = encoder.clone(attend=exchanged)
    return VideoMAETeacher(encoder, last_blocks(encoder.depth, layers, interval))


def exchanged(
    query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int, scale: float | None = None
) -> jax.Array:
    """Attention with the axes of heads and tokens exchanged, a defect of the released VideoMAE teacher.

    It gives [B, K, N, head] to a function that expects [B, N, K, head], so every token attends over
    its own heads; the result, still [B, K, N, head] in memory, is then read as [B, N, K*head].
    Arguments as in `attention.attend`.
    """
    batch, tokens, width = query.shape
    scale = (width // heads) ** -0.5 if scale is None else scale
    split = lambda x: x.reshape(batch, tokens, heads, -1)
    query, key, value = split(query * scale), split(key), split(value)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("bnkd,bnjd->bnkj", query, key, preferred_element_type=wide)
    mixed = jnp.einsum(
        "bnkj,bnjd->bknd", jax.nn.softmax(scores, axis=-1).astype(value.dtype), value
    )
    return mixed.reshape(batch, tokens, width)
