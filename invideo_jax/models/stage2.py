"""Video and text in one space: InternVideo2's stage 2, and InternVideo2-CLIP with a CLIP text tower.

Source: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo internvideo2_stage2_visual.py and
internvideo2_clip_small.py.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses
from invideo_jax.models.alignment import AlignedEncoder, ProjectedEncoder
from invideo_jax.models.attention import fold
from invideo_jax.models.layers import Linear, named
from invideo_jax.models.text_encoder import Bert, ClipText

PyTree = Any


class Stage2(nn.Module):
    """Vision tower, BERT with fusion blocks, projections into the shared space, matching head.

    Attributes:
        vision, text: the towers.
        width: P, of the shared space.
        initial_temperature: of the contrastive loss.
        temperature_range: what it is held within.
    """

    vision: AlignedEncoder
    text: Bert
    width: int = 512
    initial_temperature: float = 0.07
    temperature_range: tuple[float, float] = (0.001, 0.5)

    def setup(self):
        dtype = self.text.dtype
        self.vision_projection = Linear(self.width, ("embed", None), dtype=dtype)
        self.text_projection = Linear(self.width, ("embed", None), dtype=dtype)
        self.match_head = Linear(2, ("embed", None), dtype=dtype)
        start = named(nn.initializers.constant(self.initial_temperature))
        self.temperature_value = self.param("temperature", start, ())

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None,
        ids: jax.Array,
        valid: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """All that pairs of video and text give, without dropout.

        Returns:
            What `encode_video` gives; what `encode_text` gives, as 'text_...'; 'match' [B, 2], and
            'words' [B, L, vocabulary] where the text tower has a head for them.
        """
        seen = self.encode_video(video, visible)
        text = self.encode_text(ids, valid)
        fused = self.text.fuse(text["tokens"], valid, seen["tokens"])
        out = seen | {f"text_{k}": v for k, v in text.items()}
        out |= {"fused": fused, "match": self.match_head(fused[:, 0])}
        return out | ({"words": self.text.words(fused)} if self.text.word_head else {})

    def encode_video(
        self, video: jax.Array, visible: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What `AlignedEncoder` gives, and 'embedding' [B, P] (its length is not 1); arguments as there."""
        out = self.vision(video, visible, keys=keys)
        return out | {"embedding": self.vision_projection(out["pooled"])}

    def encode_text(
        self, ids: jax.Array, valid: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """'tokens' [B, L, D], 'pooled' [B, D], 'embedding' [B, P]; arguments as in `Bert.encode`."""
        tokens = self.text.encode(ids, valid, keys=keys)
        pooled = tokens[:, 0]
        return dict(tokens=tokens, pooled=pooled, embedding=self.text_projection(pooled))

    def match(
        self,
        text: jax.Array,
        valid: jax.Array | None,
        video: jax.Array,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of "they do not, they do belong together", [B, 2], of tokens of text and video."""
        return self.match_head(self.text.fuse(text, valid, video, keys=keys)[:, 0])

    def match_negatives(
        self,
        text: jax.Array,
        valid: jax.Array,
        video: jax.Array,
        video_negative: jax.Array,
        text_negative: jax.Array,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Scores [3B, 2] of B pairs, of their texts with other videos, of their videos with other texts.

        Args:
            text, valid, video: tokens [B, L, D], their validity [B, L], tokens [B, N, D'].
            video_negative, text_negative: int [B], the row of the other video for each text, and of
                the other text for each video.
            keys: [B] random keys of dropout.
        """
        three = lambda x, y, z: jnp.concatenate([x, y, z])
        if keys is not None:
            keys = three(*(fold(keys, use) for use in range(3)))
        return self.match(
            three(text, text, text[text_negative]),
            three(valid, valid, valid[text_negative]),
            three(video, video[video_negative], video),
            keys=keys,
        )

    def words(
        self,
        ids: jax.Array,
        valid: jax.Array | None,
        video: jax.Array,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of all words at each place of a (masked) text seen with a video, [B, L, vocabulary]."""
        return self.text.words(self.text(ids, valid, video, keys=keys))

    def temperature(self) -> jax.Array:
        """The temperature within its range, a scalar."""
        return losses.clamped(self.temperature_value, *self.temperature_range)


class VideoClip(nn.Module):
    """Two towers that end in the same space, for the contrastive loss alone.

    Attributes as in `Stage2`; the published range has no upper end.
    """

    vision: ProjectedEncoder
    text: ClipText
    initial_temperature: float = 0.01
    temperature_range: tuple[float, float] = (0.01, float("inf"))

    def setup(self):
        start = named(nn.initializers.constant(self.initial_temperature))
        self.temperature_value = self.param("temperature", start, ())

    def __call__(
        self, video: jax.Array, visible: jax.Array | None, ids: jax.Array
    ) -> dict[str, jax.Array]:
        """What `encode_video` gives, and what `encode_text` gives as 'text_...'."""
        text = {f"text_{k}": v for k, v in self.encode_text(ids).items()}
        return self.encode_video(video, visible) | text

    def encode_video(
        self, video: jax.Array, visible: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """What `ProjectedEncoder` gives, and 'embedding' [B, P]; arguments as there."""
        out = self.vision(video, visible, keys=keys)
        return out | {"embedding": out["projected"]}

    def encode_text(self, ids: jax.Array) -> dict[str, jax.Array]:
        """'embedding' [B, P] and 'tokens' [B, L, D]."""
        embedding, tokens = self.text(ids)
        return dict(embedding=embedding, tokens=tokens)

    def temperature(self) -> jax.Array:
        """The temperature within its range, a scalar."""
        return losses.clamped(self.temperature_value, *self.temperature_range)


def init(model: Stage2 | VideoClip, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    m = model.vision.encoder
    video = jnp.zeros((1, m.frames, m.image_size, m.image_size, m.channels))
    one = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, video, one, one)["params"]
