"""UMT's student: VideoMAE's encoder with linear heads that predict CLIP's features of the visible tokens.

Source: UMT (arXiv:2303.16058) 3.2; OpenGVLab/unmasked_teacher single_modality/models/modeling_pretrain_umt.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses
from invideo_jax.errors import UserError
from invideo_jax.models import pixels, positions
from invideo_jax.models.alignment import last_blocks
from invideo_jax.models.layers import LayerNorm, Linear
from invideo_jax.models.video_mae import VideoMAEEncoder

PyTree = Any


class _Head(nn.Module):
    """Linear, LayerNorm, length 1."""

    width: int
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., C]."""
        x = Linear(self.width, ("embed", None), dtype=self.dtype, name="out")(x)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        return losses.unit(LayerNorm(self.eps, wide, name="norm")(x))


# The same head for each of several features: parameters [K, ...], [K, B, V, D] to [B, K, V, C].
_Heads = nn.vmap(
    _Head,
    in_axes=0,
    out_axes=1,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    metadata_params={nn.PARTITION_NAME: "layers"},
)


class UMTStudent(nn.Module):
    """Predicts the features of several blocks of a teacher, from as many blocks of its own.

    Each block's output passes the encoder's one last norm; the head sees it with its (fixed) position added.

    Attributes:
        encoder: without class token, with a last norm.
        blocks: of the encoder, ascending; teachers' features are paired with them in this order.
        width: C, of the teacher's features.
    """

    encoder: VideoMAEEncoder
    blocks: tuple[int, ...]
    width: int

    def setup(self):
        self.check()
        self.clip_heads = _Heads(self.width, dtype=self.encoder.dtype)

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Arguments as of the encoder; returns 'tokens' [B, V, D] and 'clip_middle' [B, K, V, C]."""
        tokens, out = self.encoder(video, visible, keys=keys, features=self.blocks)
        table = jnp.asarray(positions.sinusoid(self.encoder.tokens, self.encoder.width))
        rows = table[None] if visible is None else jnp.take(table, visible, axis=0)
        x = jnp.stack([self.encoder.norm(out[f"block{i}"]) for i in self.blocks])
        return {"tokens": tokens, "clip_middle": self.clip_heads(x + rows.astype(x.dtype))}

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.encoder.check()
        if not self.encoder.last_norm:
            raise UserError("UMT's heads need the encoder's last norm; got last_norm=False.")


def student(encoder: VideoMAEEncoder, teacher: Any, *, interval: float = 1.0) -> UMTStudent:
    """The student of a `teachers.Teacher` upon this encoder.

    Args:
        interval: distance of the blocks that predict, from the last one backwards.
    """
    if teacher is None:
        raise UserError("UMT needs a clip teacher; got none. Name one in teachers.clip.")
    blocks = last_blocks(encoder.depth, len(teacher.layers), interval)
    return UMTStudent(encoder, blocks, teacher.width)


def init(model: UMTStudent, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    return model.init(key, pixels.blank_video(model.encoder), jnp.zeros((1, 1), jnp.int32))[
        "params"
    ]
