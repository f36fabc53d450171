"""Video, text and sound in one space, with texts that look at video and sound: InternVideo2's stage 2.

Source: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo internvideo2_stage2_visual.py (1B) and
internvideo2_stage2_audiovisual.py (6B).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses
from invideo_jax.errors import UserError
from invideo_jax.models import audio_encoder, pixels
from invideo_jax.models.alignment import AlignedEncoder
from invideo_jax.models.attention import fold
from invideo_jax.models.audio_encoder import AudioViT, Beats
from invideo_jax.models.layers import LayerNorm, Linear, named
from invideo_jax.models.text_encoder import Bert
from invideo_jax.registry import nearest

PyTree = Any
# What a text is matched with -> the name of the head's parameters.
VIEWS = {"video": "match_head", "audio": "audio_match_head", "audio_video": "av_match_head"}


class TokenProjection(nn.Module):
    """Linear and LayerNorm: tokens of a tower in the width that fusion blocks look at."""

    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, N, D] to [B, N, width]."""
        x = Linear(self.width, ("embed", None), dtype=self.dtype, name="linear")(x)
        return LayerNorm(1e-5, self.dtype, name="norm")(x)


class Stage2(nn.Module):
    """Towers, BERT with fusion blocks, projections into the shared space, matching heads.

    Attributes:
        vision, text: the towers.
        width: P, of the shared space.
        initial_temperature: of the contrastive loss.
        temperature_range: what it is held within.
        audio: the tower of sounds; None for none.
        fusion_width: of the tokens that fusion blocks look at, after a projection of each tower's;
            0 for the vision tower's own tokens, which only a model without sound can have.
        views: those of `VIEWS` that have a matching head.
        joint: where there is sound, whether video and sound together have an embedding.
        initial_bias: of the scores of the sigmoid loss (SigLIP: -10, at temperature 0.1); None: the
            model has no bias.
    """

    vision: AlignedEncoder
    text: Bert
    width: int = 512
    initial_temperature: float = 0.07
    temperature_range: tuple[float, float] = (0.001, 0.5)
    audio: Beats | AudioViT | None = None
    fusion_width: int = 0
    views: tuple[str, ...] = ("video",)
    joint: bool = True
    initial_bias: float | None = None

    def setup(self):
        self.check()
        dtype = self.text.dtype
        linear = lambda width: Linear(width, ("embed", None), dtype=dtype)
        self.vision_projection, self.text_projection = linear(self.width), linear(self.width)
        if self.fusion_width:
            self.vision_tokens = TokenProjection(self.fusion_width, dtype)
        if self.audio is not None:
            self.audio_projection = linear(self.width)
            self.audio_tokens = TokenProjection(self.fusion_width, dtype)
            if self.joint:
                self.av_fusion = linear(self.width)
        for view in self.views:
            setattr(self, VIEWS[view], linear(2))
        start = named(nn.initializers.constant(self.initial_temperature))
        self.temperature_value = self.param("temperature", start, ())
        if self.initial_bias is not None:
            start = named(nn.initializers.constant(self.initial_bias))
            self.bias_value = self.param("bias", start, ())

    def __call__(
        self,
        video: jax.Array,
        visible: jax.Array | None,
        ids: jax.Array,
        valid: jax.Array | None = None,
        audio: jax.Array | None = None,
        frames: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """All that pairs of video and text give, without dropout.

        Args:
            audio, frames: as in `encode_audio`; None for a model without sound.

        Returns:
            What `encode_video` gives; what `encode_text` gives, as 'text_...'; 'fused' [B, L, D];
            'match' [B, 2], and 'words' [B, L, vocabulary] where the text tower has a head for them.
            With sound 'audio_...' likewise, 'audio_video_embedding' [B, P], and the other views'
            'audio_match', 'audio_video_match'.
        """
        out = self.encode_video(video, visible)
        text = self.encode_text(ids, valid)
        out |= {f"text_{k}": v for k, v in text.items()}
        contexts = {"video": self.context(out["tokens"], None)}
        if audio is not None:
            heard = self.encode_audio(audio, frames)
            out |= {f"audio_{k}": v for k, v in heard.items()}
            contexts["audio"] = self.context(None, heard["tokens"])
            contexts["audio_video"] = self.context(out["tokens"], heard["tokens"])
            if self.joint:
                both = self.combine(heard["embedding"], out["embedding"])
                out["audio_video_embedding"] = both
        fused = {v: self.text.fuse(text["tokens"], valid, c) for v, c in contexts.items()}
        for view in (v for v in self.views if v in contexts):
            name = "match" if view == "video" else f"{view}_match"
            out[name] = getattr(self, VIEWS[view])(fused[view][:, 0])
        out["fused"] = fused["video"]
        return out | ({"words": self.text.words(fused["video"])} if self.text.word_head else {})

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

    def encode_audio(
        self, audio: jax.Array, frames: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Features of sounds.

        Args:
            audio: normalised filter bank [B, F, mels].
            frames: int [B], real frames of each, 0 for no sound; None: all real.
            keys: [B] random keys of dropout; None when evaluating.

        Returns:
            'tokens' [B, A, Da]; 'pooled' [B, Da], their mean; 'embedding' [B, P]; 'seen' bool [B, A],
            the tokens that texts may look at: none of an example without sound, and of a tower that
            masks padding only those that hold real frames.
        """
        self._need_audio()
        if frames is None:
            frames = jnp.full(audio.shape[0], audio.shape[1], jnp.int32)
        tokens, pooled = self.audio(audio, frames, keys=keys)
        seen = self.audio.seen(frames, tokens.shape[1])
        embedding = self.audio_projection(pooled)
        return dict(tokens=tokens, pooled=pooled, embedding=embedding, seen=seen)

    def combine(self, audio: jax.Array, video: jax.Array) -> jax.Array:
        """The embedding [B, P] of sound and video together, of their embeddings [B, P] each."""
        self._need_audio()
        if not self.joint:
            raise UserError(
                "Sound and video together have an embedding only with joint=True; got joint=False."
            )
        return self.av_fusion(jnp.concatenate([audio, video], axis=-1))

    def context(self, video: jax.Array | None, audio: jax.Array | None) -> jax.Array:
        """The tokens that fusion blocks look at.

        Args:
            video, audio: tokens of the towers, [B, N, D] and [B, A, Da]; either may be None.

        Returns:
            [B, A+N, fusion_width], sound first; without a fusion width, the video's own tokens.
        """
        parts = []
        if audio is not None:
            self._need_audio()
            parts.append(self.audio_tokens(audio))
        if video is not None:
            parts.append(self.vision_tokens(video) if self.fusion_width else video)
        return jnp.concatenate(parts, axis=1)

    def match(
        self,
        text: jax.Array,
        valid: jax.Array | None,
        context: jax.Array,
        seen: jax.Array | None = None,
        *,
        view: str = "video",
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of "they do not, they do belong together".

        Args:
            text, valid: tokens of `encode_text` [B, L, D], bool [B, L].
            context, seen: of `context`, [B, N, any]; which of them are real, bool [B, N], None = all.
            view: whose head, of `views`.
            keys: [B] random keys of dropout.

        Returns:
            [B, 2].
        """
        if view not in self.views:
            raise UserError(
                f"A view that is matched must have a head; got view={view!r}, "
                f"views={self.views}.{nearest(view, VIEWS)}"
            )
        fused = self.text.fuse(text, valid, context, seen, keys=keys)
        return getattr(self, VIEWS[view])(fused[:, 0])

    def match_negatives(
        self,
        text: jax.Array,
        valid: jax.Array,
        context: jax.Array,
        context_negative: jax.Array,
        text_negative: jax.Array,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Scores [3B, 2] of B pairs, of their texts with other videos, of their videos with other texts.

        Args:
            text, valid, context: tokens [B, L, D], their validity [B, L], tokens [B, N, D'].
            context_negative, text_negative: int [B], the row of the other video for each text, and of
                the other text for each video.
            keys: [B] random keys of dropout.
        """
        three = lambda x, y, z: jnp.concatenate([x, y, z])
        if keys is not None:
            keys = three(*(fold(keys, use) for use in range(3)))
        return self.match(
            three(text, text, text[text_negative]),
            three(valid, valid, valid[text_negative]),
            three(context, context[context_negative], context),
            keys=keys,
        )

    def words(
        self,
        ids: jax.Array,
        valid: jax.Array | None,
        context: jax.Array,
        seen: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Scores of all words at each place of a (masked) text that looks at `context`, [B, L, vocabulary].

        Args as in `match`, `ids` int [B, L] in place of tokens.
        """
        return self.text.words(self.text(ids, valid, context, seen, keys=keys))

    def temperature(self) -> jax.Array:
        """The temperature within its range, a scalar."""
        return losses.clamped(self.temperature_value, *self.temperature_range)

    def bias(self) -> jax.Array:
        """What the sigmoid loss adds to scores, a scalar; only with `initial_bias`."""
        return self.bias_value

    def _need_audio(self):
        if self.audio is None:
            raise UserError("A model without a tower of sounds takes none; got audio=None.")

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        for tower in (self.vision, self.text, self.audio):
            if tower is not None:
                tower.check()
        odd = [view for view in self.views if view not in VIEWS]
        if odd:
            raise UserError(f"views must be known; got view={odd[0]!r}.{nearest(odd[0], VIEWS)}")
        if self.audio is None and set(self.views) - {"video"}:
            raise UserError(f"Views with sound need a tower of sounds; got views={self.views}.")
        if self.audio is not None and self.fusion_width < 1:
            raise UserError(
                "Tokens of video and sound must have one width for texts to look at both; got "
                f"fusion_width={self.fusion_width}. Set it (published: 768)."
            )


def init(model: Stage2, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    one = jnp.zeros((1, 1), jnp.int32)
    audio = None if model.audio is None else audio_encoder.blank(model.audio)
    video = pixels.blank_video(model.vision.encoder)
    return model.init(key, video, one, one, None, audio)["params"]
