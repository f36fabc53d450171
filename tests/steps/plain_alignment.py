"""A stand-in for `Stage2` whose towers are one layer each: what is left to compile are the losses."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import losses, masking, sharding
from invideo_jax.models.attention import drop
from invideo_jax.models.layers import Linear, named
from tests.steps import small_alignment as small

WIDTH, SHARED = 16, 8


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Of 8 x 8 pixels and two frames, patches of 4."""

    grid: tuple[int, int, int] = (2, 2, 2)
    frames: int = 2
    prefix: int = 0


@dataclasses.dataclass(frozen=True)
class Vision:
    """A vision tower with stage 1's heads."""

    encoder: Encoder = Encoder()
    clip: bool = True
    final: bool = True


@dataclasses.dataclass(frozen=True)
class Text:
    """A text tower with fusion blocks and a head for words."""

    fusion_from: int = 1
    depth: int = 2
    word_head: bool = True
    vocabulary: int = small.WORDS


class Plain(nn.Module):
    """The methods of `Stage2`; tokens are tanh of a linear layer, with dropout."""

    dropout: float = 0.0
    initial_bias: float | None = None
    vision: Vision = Vision()
    text: Text = Text()
    audio: bool = True
    joint: bool = True
    views: tuple[str, ...] = ("video", "audio", "audio_video")
    temperature_range: tuple[float, float] = (0.001, 0.5)

    def setup(self):
        wide = lambda name: Linear(WIDTH, ("embed", "mlp"), dtype=jnp.float64, name=name)
        narrow = lambda n, name: Linear(n, ("mlp", None), dtype=jnp.float64, name=name)
        self.of_pixels, self.of_sound, self.of_words = map(wide, ("pixels", "sound", "words_in"))
        self.projections = [narrow(SHARED, f"projection_{i}") for i in range(6)]
        self.heads = {v: narrow(2, f"{v}_head") for v in self.views}
        self.out = narrow(small.WORDS, "words_out")
        self.temperature_value = self.param("temperature", named(nn.initializers.ones), ())
        if self.initial_bias is not None:
            self.bias_value = self.param("bias", named(nn.initializers.zeros), ())

    def __call__(self, video, ids, audio):
        """All parameters at work."""
        seen, text = self.encode_video(video), self.encode_text(ids, ids > 0)
        heard = self.encode_audio(audio, jnp.full(len(audio), 8))
        self.combine(heard["embedding"], seen["embedding"])
        self.words(ids, ids > 0, seen["tokens"])
        for view in self.views:
            self.match(text["tokens"], ids > 0, seen["tokens"], view=view)

    def _encoded(self, tokens, keys, projection):
        tokens = drop(jnp.tanh(tokens), keys, self.dropout)
        pooled = tokens.mean(1)
        return dict(tokens=tokens, embedding=self.projections[projection](pooled))

    def encode_video(self, video, visible=None, *, keys=None):
        cubes = video.reshape(len(video), 2, 2, 4, 2, 4, 3).transpose(0, 1, 2, 4, 3, 5, 6)
        cubes = cubes.reshape(len(video), 8, 48)
        cubes = cubes if visible is None else masking.gather(cubes, visible)
        made = self._encoded(self.of_pixels(cubes), keys, 0)
        middle = losses.unit(self.projections[4](made["tokens"]))[:, None]
        return made | dict(clip_middle=middle, clip_final=losses.unit(made["embedding"]))

    def _words(self, ids):
        return self.of_words(jax.nn.one_hot(ids, small.WORDS, dtype=jnp.float64))

    def encode_text(self, ids, valid, *, keys=None):
        return self._encoded(self._words(ids) * valid[..., None], keys, 1)

    def encode_audio(self, audio, frames, *, keys=None):
        made = self._encoded(self.of_sound(audio), keys, 2)
        return made | dict(seen=jnp.arange(audio.shape[1]) < frames[:, None])

    def combine(self, audio, video):
        return self.projections[3](jnp.concatenate([audio, video], -1))

    def context(self, video, audio):
        return jnp.concatenate([x for x in (audio, video) if x is not None], 1)

    def _fused(self, text, valid, context, seen):
        seen = jnp.ones(context.shape[:2]) if seen is None else seen
        context = (context * seen[..., None]).sum(1) / jnp.maximum(seen.sum(1), 1)[:, None]
        return jnp.tanh(3 * text * valid[..., None] * context[:, None] + text)

    def match(self, text, valid, context, seen=None, *, view="video", keys=None):
        fused = drop(self._fused(text, valid, context, seen).mean(1), keys, self.dropout)
        return self.heads[view](fused)

    def words(self, ids, valid, context, seen=None, *, keys=None):
        return self.out(
            drop(self._fused(self._words(ids), valid, context, seen), keys, self.dropout)
        )

    def temperature(self):
        return losses.clamped(self.temperature_value, *self.temperature_range)

    def bias(self):
        return self.bias_value


def init(model, key):
    """Fresh parameters in boxes."""
    return model.init(
        key, jnp.zeros((1, 2, 8, 8, 3)), jnp.zeros((1, small.LENGTH), int), jnp.zeros((1, 8, 4))
    )["params"]


def params(model):
    """Random parameters, float64, on the host."""
    abstract = sharding.unbox(jax.eval_shape(lambda: init(model, jax.random.key(0))))
    rng = np.random.default_rng(0)
    made = jax.tree.map(lambda x: 0.5 * rng.normal(size=x.shape), abstract)
    return made | {"temperature": np.asarray(0.2)}


def batch(rows):
    """As `small_alignment.batch`, float64, a teacher without class tokens."""
    made = small.batch(rows, np.float64)
    return made | dict(clip_middle=made["clip_middle"][:, :, 1:])
