"""Two towers that end in the same space, for the contrastive loss alone.

Sources: InternVideo2-CLIP (arXiv:2403.15377), OpenGVLab/InternVideo internvideo2_clip.py and
internvideo2_clip_small.py; ViCLIP (arXiv:2307.06942); InternVideo's multimodal branch
(arXiv:2212.03191).
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses
from invideo_jax.errors import UserError
from invideo_jax.models import pixels
from invideo_jax.models.alignment import AlignedEncoder, ProjectedEncoder
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.layers import named
from invideo_jax.models.llama import LlamaText
from invideo_jax.models.pooling import AttentionPool
from invideo_jax.models.text_encoder import ClipText

PyTree = Any


class PooledEncoder(nn.Module):
    """A video encoder whose pooled vector is in the shared space already.

    That of InternVideo2-CLIP 1B and 6B ends in its attention pool, that of ViCLIP in the projection
    of the class token, that of InternVideo's multimodal branch in the one of its video token.

    Attributes:
        encoder: `VideoEncoder` with a pool, `ClipViT` or `UniFormerV2`.
    """

    encoder: nn.Module

    @property
    def width(self) -> int:
        """P, of the pooled vector."""
        pool = getattr(self.encoder, "pool_width", 0)
        return pool or getattr(self.encoder, "backbone", self.encoder).embed

    @nn.compact
    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
        features: Sequence[int] = (),
    ) -> dict[str, jax.Array]:
        """'tokens' [B, prefix+V, D], 'pooled' [B, P], and what the encoder names; arguments as its own."""
        tokens, out = self.encoder(video, visible, keys=keys, features=features)
        return {"tokens": tokens, "pooled": self.encoder.pooled(tokens)} | out

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.encoder.check()
        if not getattr(self.encoder, "pool_width", 1):
            raise UserError("The encoder of a CLIP model needs its pool; got pool_width=0.")


class VideoClip(nn.Module):
    """Two towers that end in the same space.

    Published temperatures: InternVideo2-CLIP and ViCLIP start at 0.01, which is also the least, with
    no upper bound; InternVideo's multimodal branch learns the logarithm of 1 / temperature, from 0.07
    within 0.01 .. 1.

    Attributes:
        vision: gives 'projected' or, where that is the shared space, 'pooled'.
        text: the tower of texts.
        initial_temperature: of the contrastive loss.
        temperature_range: what it is held within.
        logarithmic: learn log(1 / temperature), called 'logit_scale', instead of the temperature.
        initial_bias: as of `stage2.Stage2`.
    """

    vision: ProjectedEncoder | PooledEncoder | AlignedEncoder
    text: ClipText | LlamaText
    initial_temperature: float = 0.01
    temperature_range: tuple[float, float] = (0.01, float("inf"))
    logarithmic: bool = False
    initial_bias: float | None = None

    def setup(self):
        self.check()
        name, start = "temperature", self.initial_temperature
        if self.logarithmic:
            name, start = "logit_scale", -math.log(start)
        self.temperature_value = self.param(name, named(nn.initializers.constant(start)), ())
        if self.initial_bias is not None:
            start = named(nn.initializers.constant(self.initial_bias))
            self.bias_value = self.param("bias", start, ())

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None,
        ids: jax.Array,
        valid: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """What `encode_video` gives, and what `encode_text` gives as 'text_...'."""
        text = {f"text_{k}": v for k, v in self.encode_text(ids, valid).items()}
        return self.encode_video(video, visible) | text

    def encode_video(
        self, video: jax.Array, visible: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What `vision` gives, and 'embedding' [B, P] (its length is not 1).

        Args:
            video: uint8 or normalised float [B, T, H, W, C].
            visible: int32 [B, V], ids of patches, ascending; None: all.
            keys: [B] random keys of dropout and drop path; None when evaluating.
        """
        out = self.vision(video, visible, keys=keys)
        return out | {"embedding": out["projected"] if "projected" in out else out["pooled"]}

    def encode_text(
        self, ids: jax.Array, valid: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """'tokens' [B, L, D], 'pooled' [B, D], 'embedding' [B, P] (its length is not 1).

        Args:
            ids: int [B, L].
            valid: bool [B, L], False = padding, behind the text; None: as the tower says.
            keys: [B] random keys of dropout; None when evaluating.
        """
        return self.text.features(ids, valid, keys=keys)

    def temperature(self) -> jax.Array:
        """The temperature within its range, a scalar."""
        low, high = self.temperature_range
        if not self.logarithmic:
            return losses.clamped(self.temperature_value, low, high)
        return jnp.exp(-losses.clamped(self.temperature_value, -math.log(high), -math.log(low)))

    def bias(self) -> jax.Array:
        """What the sigmoid loss adds to scores, a scalar; only with `initial_bias`."""
        return self.bias_value

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        (self.vision if hasattr(self.vision, "check") else self.vision.encoder).check()
        self.text.check()
        shared = _shared_width(self.vision), self.text.output_width or self.text.width
        if shared[0] != shared[1]:
            raise UserError(
                "Both towers must end in one space; got {} channels of videos, {} of texts. Set the text "
                "tower's output_width.".format(*shared)
            )
        low, high = self.temperature_range
        if not 0 < low <= self.initial_temperature <= high:
            raise UserError(
                "The temperature must start within its range, which begins above 0; got "
                f"initial_temperature={self.initial_temperature}, range={low} .. {high}."
            )


def _shared_width(vision: nn.Module) -> int:
    """Channels of what the vision tower ends in."""
    if isinstance(vision, ProjectedEncoder):
        return vision.width
    encoder = getattr(vision.encoder, "backbone", vision.encoder)
    return getattr(encoder, "pool_width", 0) or getattr(encoder, "embed", 0) or encoder.width


class ClipHead(nn.Module):
    """What was trained in InternVideo2-CLIP 1B and 6B, and what their files hold: pool and temperature.

    Attributes:
        width: D, of the encoder that it belongs to.
        pool_heads, pool_width: as of `VideoEncoder`.
    """

    width: int
    pool_heads: int = 16
    pool_width: int = 768

    @nn.compact
    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, P] of `tokens` [B, N, D], and the temperature."""
        start = named(nn.initializers.constant(0.01))
        return AttentionPool(self.pool_heads, self.pool_width, name="pool")(tokens)[0], self.param(
            "temperature", start, ()
        )

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("width", self.width, "pool_heads", self.pool_heads)


def init(model: VideoClip | ClipHead, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    if isinstance(model, ClipHead):
        return model.init(key, jnp.zeros((1, 1, model.width)))["params"]
    ids = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, pixels.blank_video(model.vision.encoder), None, ids)["params"]
