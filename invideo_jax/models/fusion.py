"""Cross-model attention: two frozen video encoders that exchange features between their blocks.

InternVideo does not publish this code, and its text leaves open which encoder asks which. Both readings are
here: in each module one side's tokens are the queries, and the other's are keys and values.

    'to_masked'       the masked encoder's tokens ask the multimodal encoder's, and are changed
    'to_multimodal'   the other way round

In the last module only one token asks: the class token of the multimodal encoder, or the mean of the
masked encoder's tokens.

Source: InternVideo (arXiv:2212.03191) 3.3. Heads, places and the zeros at the start are this project's.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax.errors import UserError
from invideo_jax.models import pixels
from invideo_jax.models.clip_vit import ClipViT, MultiHead
from invideo_jax.models.layers import LayerNorm, Linear, activation, named
from invideo_jax.models.uniformer_v2 import UniFormerV2
from invideo_jax.models.video_mae import VideoMAEEncoder
from invideo_jax.registry import nearest

PyTree = Any
DIRECTIONS = ("to_masked", "to_multimodal")
# The default: knowledge of text goes into the masked encoder, and at last its own into the class token.
READINGS = {
    "R2": ("to_masked", "to_multimodal"),  # (all but the last, the last)
    "R1": ("to_multimodal", "to_masked"),
}
# What a stage of fusion does not train: both encoders but for the query tokens of the multimodal one.
FROZEN = (r"^masked/", r"^multimodal/(?!(temporal_cls_token|cls_token)$)")


class CrossModelAttention(nn.Module):
    """x + attention(norm(x), norm(context)), then x + mlp(norm(x)); both change nothing at the start."""

    heads: int
    eps: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """`x` [B, Nq, D], `context` [B, Nk, D']; returns [B, Nq, D]."""
        width = x.shape[-1]
        norm = lambda name: LayerNorm(self.eps, self.dtype, name=name)
        attention = MultiHead(self.heads, zero_out=True, dtype=self.dtype, name="attention")
        x = x + attention(norm("norm1")(x), norm("norm_context")(context))
        up = Linear(4 * width, ("embed", "mlp"), "mlp", dtype=self.dtype, name="up")
        down = Linear(
            width,
            ("mlp", "embed"),
            kernel_init=nn.initializers.zeros_init(),
            dtype=self.dtype,
            name="down",
        )
        return x + down(activation("gelu")(up(norm("norm2")(x))))


class BranchHead(nn.Module):
    """LayerNorm and a linear layer in float32, as a `Classifier` has them."""

    classes: int
    eps: float = 1e-6

    @nn.compact
    def __call__(self, pooled: jax.Array) -> jax.Array:
        """`pooled` [B, P]; float32 [B, classes]."""
        x = LayerNorm(self.eps, name="fc_norm")(pooled)
        init = nn.initializers.normal(0.02)
        return Linear(self.classes, ("embed", None), kernel_init=init, name="head")(x)


class FusedClassifier(nn.Module):
    """Two encoders, modules between them, and a learned linear combination of both branches' scores.

    Attributes:
        masked: VideoMAE's encoder.
        multimodal: UniFormerV2 or CLIP's transformer; it sees every so many frames of the clip.
        classes: number of classes.
        modules: number of cross-model attentions: after the last so many blocks of `multimodal`, and
            after as many evenly spaced ones of `masked`.
        reading: a key of `READINGS`; gives each module its direction.
        directions: one of `DIRECTIONS` for each module; () as `reading` says.
        heads: K of each module.
    """

    masked: VideoMAEEncoder
    multimodal: UniFormerV2 | ClipViT
    classes: int
    modules: int = 4
    reading: str = "R2"
    directions: tuple[str, ...] = ()
    heads: int = 16

    counts_batches = False  # no running statistics; see `classifier.Classifier`

    @property
    def encoder(self) -> VideoMAEEncoder:
        """The encoder that says what videos are taken."""
        return self.masked

    @property
    def places(self) -> list[tuple[int, int]]:
        """After which blocks (of masked, of multimodal) each module stands."""
        n, first = self.modules, self.multimodal.depth - self.modules
        return [((i + 1) * self.masked.depth // n - 1, first + i) for i in range(n)]

    @property
    def ways(self) -> tuple[str, ...]:
        """The direction of each module."""
        early, last = READINGS[self.reading]
        return self.directions or (early,) * (self.modules - 1) + (last,)

    @property
    def frame_step(self) -> int:
        """The multimodal encoder sees every so many frames."""
        return self.masked.frames // self.multimodal.frames

    def setup(self):
        self.check()
        self.exchanges = [
            CrossModelAttention(self.heads, dtype=self.masked.dtype) for _ in range(self.modules)
        ]
        self.masked_head = BranchHead(self.classes)
        self.multimodal_head = BranchHead(self.classes)
        half = nn.initializers.constant(0.5)
        self.combination = self.param("combination", named(half, None), (2,))

    def __call__(
        self, video: jax.Array, *, keys: jax.Array | None = None, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Scores of each class.

        Args:
            video: uint8, or float normalised with the masked encoder's constants, [B, T, H, W, C].
            keys, train: as every classifier takes them; frozen encoders drop nothing.

        Returns:
            float32 [B, classes], and {'masked', 'multimodal'}: the scores of either branch.
        """
        del keys, train
        other, frames = self._other_video(video), self.multimodal.frames
        x = self.masked.embedded(video)
        y, token = self._start(other)
        done = (0, 0)
        for number, place in enumerate(self.places[:-1]):
            stop = place[0] + 1, place[1] + 1
            x = self.masked.run(x, (done[0], stop[0]))
            y, token = self._run(y, token, (done[1], stop[1]))
            done, exchange = stop, self.exchanges[number]
            seen = self._backbone.joined(y, frames)
            if self.ways[number] == "to_masked":
                x = exchange(x, seen)
            else:
                y = self._backbone.split(exchange(seen, x), frames)
        x = self.masked.finish(self.masked.run(x, (done[0], self.masked.depth)))
        y, token = self._run(y, token, (done[1], self.multimodal.depth))
        return self._scores(x, self._backbone.joined(y, frames), token)

    def _scores(self, x, y, token):
        pooled, last = self.masked.pooled(x), self.exchanges[-1]
        if self.ways[-1] == "to_masked":
            pooled = last(pooled[:, None], y)[:, 0]
        elif token is None:  # CLIP's class tokens, one a frame
            prefix = self.multimodal.prefix
            y = jnp.concatenate([last(y[:, :prefix], x), y[:, prefix:]], axis=1)
        else:
            token = last(token, x)
        tokens = y if token is None else jnp.concatenate([token, y], axis=1)
        scores = {
            "masked": self.masked_head(pooled),
            "multimodal": self.multimodal_head(self.multimodal.pooled(tokens)),
        }
        share = self.combination
        return share[0] * scores["masked"] + share[1] * scores["multimodal"], scores

    @property
    def _backbone(self) -> ClipViT:
        other = self.multimodal
        return other.backbone if isinstance(other, UniFormerV2) else other

    def _start(self, video):
        if isinstance(self.multimodal, UniFormerV2):
            return self.multimodal.embedded(video)
        return self.multimodal.embedded(video), None

    def _run(self, y, token, span):
        if token is None:
            return self.multimodal.run(y, span), None
        return self.multimodal.run(y, token, span, self.multimodal.frames)

    def _other_video(self, video):
        """The frames that the multimodal encoder sees, with its own normalisation."""
        video = video[:, :: self.frame_step]
        if video.dtype == jnp.uint8:
            return video
        mean, std = pixels.constants(self._backbone.normalisation)
        return (pixels.unnormalise(video, self.masked.normalisation) - mean) / std

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.masked.check()
        self.multimodal.check()
        if not 1 <= self.modules <= min(self.masked.depth, self.multimodal.depth):
            raise UserError(
                f"modules must be from 1 to the blocks of either encoder; got modules={self.modules}, "
                f"blocks={self.masked.depth} and {self.multimodal.depth}."
            )
        if self.reading not in READINGS:
            raise UserError(
                f"reading must be known; got reading={self.reading!r}.{nearest(self.reading, READINGS)}"
            )
        odd = [way for way in self.directions if way not in DIRECTIONS]
        if odd or len(self.directions) not in (0, self.modules):
            raise UserError(
                f"directions must name one of {', '.join(DIRECTIONS)} for each of {self.modules} modules; "
                f"got directions={self.directions}."
            )
        if self.frame_step * self.multimodal.frames != self.masked.frames:
            raise UserError(
                "The masked encoder's frames must be a multiple of the multimodal one's; got "
                f"frames={self.masked.frames} and {self.multimodal.frames}."
            )
        if self.multimodal.image_size != self.masked.image_size:
            raise UserError(
                "Both encoders must take the same image_size; got "
                f"image_size={self.masked.image_size} and {self.multimodal.image_size}."
            )
        for width in {self.masked.width, self.multimodal.width}:
            if width % self.heads:
                raise UserError(
                    f"heads must divide the widths of both encoders; got heads={self.heads}, width={width}."
                )


def init(model: FusedClassifier, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    return model.init(key, pixels.blank_video(model.masked))["params"]
