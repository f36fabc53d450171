"""An encoder with heads that predict teachers' features of the visible tokens.

Source: InternVideo2 (arXiv:2403.15377) 3.2; OpenGVLab/InternVideo internvideo2_pretrain.py and
internvideo2_distill.py; the stage-2 model's vision encoder.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses
from invideo_jax.errors import UserError
from invideo_jax.models import video_encoder
from invideo_jax.models.layers import LayerNorm, Linear, activation
from invideo_jax.models.video_encoder import NORMAL, VideoEncoder, declare_tables, table_rows
from invideo_jax.models.video_mae import VideoMAEEncoder

PyTree = Any


@dataclasses.dataclass(frozen=True)
class HeadsSpec:
    """Heads on features of several blocks, one each.

    Attributes:
        blocks: of the encoder, ascending; teachers' features are paired with them in this order.
        width: C, of the teacher's features.
        mlp: Linear, GELU, Linear instead of one Linear.
        normalise: whether results have length 1.
    """

    blocks: tuple[int, ...]
    width: int
    mlp: bool = False
    normalise: bool = True


@dataclasses.dataclass(frozen=True)
class FinalSpec:
    """The head on the pooled vector; attributes as in `HeadsSpec`."""

    width: int
    mlp: bool = False
    normalise: bool = True


def last_blocks(depth: int, count: int, interval: float = 1) -> tuple[int, ...]:
    """`count` blocks, ascending: depth - 1 - int(i * interval) for i = count - 1 .. 0.

    Raises:
        UserError: that leaves the encoder, or names a block twice.
    """
    found = tuple(depth - 1 - int(i * interval) for i in reversed(range(count)))
    if not found or found[0] < 0 or len(set(found)) < count:
        raise UserError(
            f"The features must come from different blocks of 0..{depth - 1}; got count={count}, "
            f"interval={interval}. Ask for fewer, or another interval."
        )
    return found


class Head(nn.Module):
    """Linear (or Linear, GELU, Linear), LayerNorm, length 1; the result is at least float32.

    Source: InternVideo2 `Linear_Decoder`, `MLP_Decoder`.
    """

    width: int
    mlp: bool = False
    normalise: bool = True
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., C]."""
        linear = functools.partial(Linear, kernel_init=NORMAL, dtype=self.dtype)
        if self.mlp:
            x = activation("gelu")(linear(x.shape[-1], ("embed", "mlp"), "mlp", name="up")(x))
            x = linear(self.width, ("mlp", "embed"), name="down")(x)
        else:
            x = linear(self.width, ("embed", None), name="out")(x)
        x = LayerNorm(self.eps, jnp.promote_types(self.dtype, jnp.float32), name="norm")(x)
        return losses.unit(x) if self.normalise else x


# The same head for each of several features: parameters [K, ...], [K, B, V, D] to [B, K, V, C].
Heads = nn.vmap(
    Head,
    in_axes=0,
    out_axes=1,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    metadata_params={nn.PARTITION_NAME: "layers"},
)


class AlignedEncoder(nn.Module):
    """The student of unmasked-token alignment, and the vision encoder of stage 2.

    Attributes:
        encoder: has the tables' grid; its blocks are named by the heads. `VideoMAEEncoder` without heads
            on blocks will do.
        clip: heads on class token and patches; None for none.
        final: head on the pooled vector; None for none.
        mae: heads on patches alone; None for none.
    """

    encoder: VideoEncoder | VideoMAEEncoder
    clip: HeadsSpec | None = None
    final: FinalSpec | None = None
    mae: HeadsSpec | None = None

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the encoder."""
        return self.encoder.grid

    @property
    def prefix(self) -> int:
        """Class tokens in front of the patches."""
        return self.encoder.prefix

    @property
    def _pools(self) -> bool:
        return bool(getattr(self.encoder, "pool_width", True))  # VideoMAE's encoder gives the mean

    def setup(self):
        self.check()
        heads = lambda make, spec: make(
            spec.width, spec.mlp, spec.normalise, dtype=self.encoder.dtype
        )
        if self.clip:
            self.clip_tables = declare_tables(self, self.encoder, "clip_")
            self.clip_heads = heads(Heads, self.clip)
        if self.final:
            self.final_head = heads(Head, self.final)
        if self.mae:
            self.mae_tables = declare_tables(self, self.encoder, "mae_", class_token=False)
            self.mae_heads = heads(Heads, self.mae)

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
    ) -> dict[str, jax.Array]:
        """Predictions of the teachers' features.

        Args as in `VideoEncoder.__call__`.

        Returns:
            'tokens' [B, 1+V, D]; with a pool 'pooled' [B, P]; with these heads 'clip_middle'
            [B, K, 1+V, C], 'clip_final' [B, C], 'mae' [B, K, V, C]; and what the encoder names.
        """
        wanted = set(features)
        for spec in (self.clip, self.mae):
            wanted.update(spec.blocks if spec else ())
        tokens, out = self.encoder(video, visible, keys=keys, features=sorted(wanted))
        out = {"tokens": tokens} | out
        image = (self.clip or self.mae) and self.encoder.is_image(video)
        if self.clip:
            x = jnp.stack([out[f"block{i}"] for i in self.clip.blocks])
            rows = table_rows(self.clip_tables, self.encoder, visible, image=image)
            out["clip_middle"] = self.clip_heads(x + rows.astype(x.dtype))
        if self.mae:
            x = jnp.stack([out[f"block{i}"] for i in self.mae.blocks])[:, :, self.prefix :]
            rows = table_rows(self.mae_tables, self.encoder, visible, image=image)
            out["mae"] = self.mae_heads(x + rows.astype(x.dtype))
        if self._pools:
            out["pooled"] = self.encoder.pooled(tokens)
        if self.final:
            out["clip_final"] = self.final_head(out["pooled"])
        return out

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.encoder.check()
        for name in ("clip", "mae"):
            spec, depth = getattr(self, name), self.encoder.depth
            blocks = spec.blocks if spec else ()
            if spec and (not blocks or not set(blocks) <= set(range(depth))):
                raise UserError(
                    f"{name}.blocks must name blocks of 0..{depth - 1}; got {name}.blocks={blocks}."
                )
            if any(b <= a for a, b in zip(blocks, blocks[1:])):
                raise UserError(
                    f"{name}.blocks must be ascending, as the teacher's features are; got "
                    f"{name}.blocks={blocks}."
                )
        if (self.clip or self.mae) and not isinstance(self.encoder, VideoEncoder):
            raise UserError(
                "Heads on blocks need the position tables of InternVideo2's encoder; got "
                f"encoder={type(self.encoder).__name__}. Leave clip and mae out."
            )
        if self.final and not self._pools:
            raise UserError("A final head needs the encoder's pool; got pool_width=0.")


class ProjectedEncoder(nn.Module):
    """An encoder whose pooled vector goes into the width shared with text: LayerNorm, Linear.

    Attributes:
        width: P, of the shared vectors.

    Source: InternVideo2-CLIP S, B, L: `vision_align` of internvideo2_clip_small.py.
    """

    encoder: VideoEncoder
    width: int = 512

    @nn.compact
    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
    ) -> dict[str, jax.Array]:
        """'tokens' [B, 1+V, D], 'pooled' [B, P], 'projected' [B, width], and what the encoder names.

        Args as in `VideoEncoder.__call__`.
        """
        tokens, out = self.encoder(video, visible, keys=keys, features=features)
        pooled = self.encoder.pooled(tokens)
        x = LayerNorm(1e-5, self.encoder.dtype, name="align_norm")(pooled)
        linear = Linear(self.width, ("embed", None), dtype=self.encoder.dtype, name="align")
        return {"tokens": tokens, "pooled": pooled, "projected": linear(x)} | out


def build(
    size: str,
    /,
    *,
    clip_width: int = 3200,
    clip_layers: int = 6,
    clip_interval: float = 1,
    final_width: int = 768,
    mae_width: int = 1408,
    mae_layers: int = 4,
    mae_interval: float = 1,
    mlp: bool = False,
    **overrides: Any,
) -> AlignedEncoder:
    """A student of a row of `sizes.INTERNVIDEO2`; the defaults are those of stage 1.

    Args:
        clip_width, clip_layers, clip_interval: width of the first teacher's features, number of
            heads, and distance of the student's blocks from the last one backwards. 0 layers: none.
        final_width: of that teacher's final vector; 0 for no final head.
        mae_width, mae_layers, mae_interval: the same of the second teacher.
        mlp: whether the first teacher's heads are MLPs, as in distillation; the second's always are.
        overrides: attributes of `VideoEncoder`.

    Raises:
        UserError: unknown size. TypeError: unknown attribute.
    """
    encoder = video_encoder.build(size, **overrides)
    blocks = lambda layers, interval: last_blocks(encoder.depth, layers, interval)
    clip = mae = final = None
    if clip_layers:
        clip = HeadsSpec(blocks(clip_layers, clip_interval), clip_width, mlp)
    if mae_layers:
        mae = HeadsSpec(blocks(mae_layers, mae_interval), mae_width, True)
    if final_width:
        final = FinalSpec(final_width, mlp)
    return AlignedEncoder(encoder, clip, final, mae)


def init(model: AlignedEncoder | ProjectedEncoder, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    m = model.encoder
    video = jnp.zeros((1, m.frames, m.image_size, m.image_size, m.channels))
    return model.init(key, video, jnp.zeros((1, 1), jnp.int32))["params"]
