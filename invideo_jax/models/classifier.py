"""Classification of videos: an encoder, what is taken of its tokens, one linear layer.

Source: InternVideo2 (arXiv:2403.15377) appendix; OpenGVLab/InternVideo single_modality/models
internvideo2.py, internvideo2_ap.py, internvideo2_cat.py; MCG-NJU/VideoMAE modeling_finetune.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax.errors import UserError
from invideo_jax.models import pixels, video_mae
from invideo_jax.models.attention import drop, fold
from invideo_jax.models.layers import LayerNorm, Linear, named
from invideo_jax.registry import Registry, nearest

PyTree = Any
ENCODERS = Registry(
    "encoder",
    {
        "internvideo2": "invideo_jax.models.video_encoder:build",
        "video_mae": "invideo_jax.models.classifier:build_mae_encoder",
    },
)
VARIANTS = ("plain", "attentive", "cat")
MERGES = ("proj", "cls_avg1", "cls_avgN", "cls_avg1_proj", "cls_avgN_proj")
NORMS = ("kaiming_BN", "BN", "LN")
MOMENTUM = 0.1  # share of a batch's statistics in the running ones, as PyTorch's default
# Parameters that no gradient moves: `with_statistics` does.
STATISTICS = r"(^|/)down_norm/(mean|variance|batches)$"


class BatchNorm(nn.Module):
    """Normalises channels over the whole batch (training) or by running statistics.

    The running statistics are parameters (`mean`, `variance`, `batches`), which the train step moves
    by `with_statistics`. Under jit the batch is the global one, on any mesh.

    Attributes:
        affine: whether there are a learned scale and bias.
    """

    eps: float = 1e-5
    affine: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`x` [B, L, C]; gives the same shape, and in training the batch's mean and variance [C]."""
        zeros, ones = nn.initializers.zeros_init(), nn.initializers.ones_init()
        width = x.shape[-1:]
        mean = self.param("mean", named(zeros, "norm"), width)
        variance = self.param("variance", named(ones, "norm"), width)
        self.param("batches", named(zeros), ())
        x, statistics = x.astype(jnp.promote_types(x.dtype, jnp.float32)), {}
        if train:
            mean = x.mean((0, 1))
            variance = jnp.square(x - mean).mean((0, 1))
            count = x.shape[0] * x.shape[1]
            # PyTorch normalises by the biased variance and keeps the unbiased one.
            statistics = {"mean": mean, "variance": variance * (count / max(count - 1, 1))}
        y = (x - mean) * jax.lax.rsqrt(variance + self.eps)
        if self.affine:
            y = y * self.param("scale", named(ones, "norm"), width)
            y = y + self.param("bias", named(zeros, "norm"), width)
        return y, jax.lax.stop_gradient(statistics)


class Classifier(nn.Module):
    """Encoder and head; `head` is computed in float32.

    Attributes:
        encoder: a `VideoEncoder` or `VideoMAEEncoder`; sees all tokens.
        classes: number of classes.
        variant: 'plain' (the pooled vector), 'attentive' (a residual MLP on it first) or 'cat' (see
            `merge`, for linear probes).
        merge: of 'cat': 'proj' is 'plain'. 'cls_avg1' puts the class token and the mean of the
            patches side by side, 'cls_avgN' the class token and each frame's mean after a linear
            layer and GELU; '..._proj' adds the pooled vector.
        merge_norm: of 'cat': 'kaiming_BN' (no scale, eps 1e-6), 'BN' or 'LN'. After a batch norm the
            merged features lie channel after channel, after 'LN' token after token.
        dropout: rate before the head.
        init_scale: factor on the head's initial kernel.
        eps: of `fc_norm`.
    """

    encoder: nn.Module
    classes: int
    variant: str = "plain"
    merge: str = "proj"
    merge_norm: str = "kaiming_BN"
    dropout: float = 0.0
    init_scale: float = 0.001
    eps: float = 1e-5

    @property
    def merges(self) -> bool:
        """Whether features of tokens are merged besides the pooled vector."""
        return self.variant == "cat" and self.merge != "proj"

    @property
    def counts_batches(self) -> bool:
        """Whether running statistics of batches are kept."""
        return self.merges and self.merge_norm != "LN"

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        self.encoder.check()
        for name, known in (("variant", VARIANTS), ("merge", MERGES), ("merge_norm", NORMS)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"{name} must be one of {', '.join(known)}; got {name}={value!r}."
                    f"{nearest(value, known)}"
                )
        if self.classes < 1:
            raise UserError(f"classes must be at least 1; got classes={self.classes}.")
        if self.variant != "cat" and self.merge != "proj":
            raise UserError(
                f"merge belongs to variant='cat'; got merge={self.merge!r}, variant={self.variant!r}."
            )
        if self.merges and not self.encoder.prefix:
            raise UserError(
                f"merge={self.merge!r} needs an encoder with a class token; "
                f"{type(self.encoder).__name__} has none. Use variant='plain'."
            )

    def setup(self):
        self.check()
        self.fc_norm = LayerNorm(self.eps)
        if self.variant == "attentive":
            self.extra_mlp = ExtraMlp(self.encoder.dtype)
        if self.merges:
            if "avgN" in self.merge:
                self.down = Linear(
                    self.encoder.pool_width,
                    ("embed", None),
                    kernel_init=_normal(0.02),
                    dtype=self.encoder.dtype,
                )
            if self.merge_norm == "LN":
                self.down_norm = LayerNorm(1e-5)
            else:
                affine = self.merge_norm == "BN"
                self.down_norm = BatchNorm(1e-5 if affine else 1e-6, affine)
        self.head = Linear(
            self.classes, ("embed", None), kernel_init=_normal(0.02 * self.init_scale)
        )

    def __call__(
        self,
        video: jax.Array,
        *,
        keys: jax.Array | None = None,
        train: bool = False,
        features: Sequence[int] = (),
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Scores of each class.

        Args:
            video: uint8 or normalised float [B, T, H, W, C].
            keys: [B] random keys for drop path and dropout; None drops nothing.
            train: whether a batch norm takes the statistics of this batch.
            features: blocks whose outputs are wanted.

        Returns:
            float32 [B, classes], and the encoder's 'embedded' and 'block<i>', 'tokens' [B, N', D],
            'pooled' and 'fc_norm' [B, P], and where the variant has them 'extra_mlp' [B, P], 'down'
            [B, L, C], 'down_norm' [B, C, L] ([B, L, C] with 'LN') and 'statistics' ('mean',
            'variance', each [C], in training).
        """
        tokens, out = self.encoder(video, keys=fold(keys, 0), features=features)
        pooled = self.encoder.pooled(tokens)
        out |= {"tokens": tokens, "pooled": pooled}
        if self.variant == "attentive":
            out["extra_mlp"] = self.extra_mlp(pooled)
            pooled = pooled + out["extra_mlp"]
        # Made in any case, as in the published files: its parameters exist in all variants.
        last = out["fc_norm"] = self.fc_norm(pooled)
        if self.merges:
            merged, more = self._merged(tokens, train)
            out |= more
            last = jnp.concatenate([merged, last], -1) if "proj" in self.merge else merged
        last = drop(last, fold(keys, 1), self.dropout)
        return self.head(last.astype(jnp.promote_types(last.dtype, jnp.float32))), out

    def _merged(self, tokens: jax.Array, train: bool) -> tuple[jax.Array, dict[str, Any]]:
        prefix, (frames, *_) = self.encoder.prefix, self.encoder.grid
        patches = tokens[:, prefix:]
        if "avgN" in self.merge:
            each = patches.reshape(patches.shape[0], frames, -1, patches.shape[-1]).mean(2)
        else:
            each = patches.mean(1, keepdims=True)
        x = jnp.concatenate([tokens[:, :1], each], axis=1)
        if "avgN" in self.merge:
            x = jax.nn.gelu(self.down(x), approximate=False)
        out = {"down": x}
        if self.merge_norm == "LN":
            y = self.down_norm(x)
        else:
            y, statistics = self.down_norm(x, train)
            y = y.swapaxes(1, 2)
            out |= {"statistics": statistics} if statistics else {}
        return y.reshape(y.shape[0], -1), out | {"down_norm": y}


class ExtraMlp(nn.Module):
    """LayerNorm and an MLP four times as wide, whose last kernel starts at zero."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`x` [B, P]; gives the same shape."""
        width = x.shape[-1]
        y = LayerNorm(1e-5, self.dtype, name="norm")(x)
        up = Linear(4 * width, ("embed", "mlp"), "mlp", _normal(0.02), dtype=self.dtype, name="up")
        down = Linear(
            width,
            ("mlp", "embed"),
            kernel_init=nn.initializers.zeros_init(),
            dtype=self.dtype,
            name="down",
        )
        return down(jax.nn.gelu(up(y), approximate=False))


def _normal(deviation: float):
    # timm's truncation is at +-2, a hundred deviations away.
    return nn.initializers.normal(deviation)


def with_statistics(params: PyTree, statistics: Mapping[str, jax.Array]) -> PyTree:
    """`params` with the running statistics moved on by those of one batch.

    Args:
        statistics: 'mean' and (unbiased) 'variance', each [C].
    """
    old = params["down_norm"]
    moved = {
        name: (1 - MOMENTUM) * old[name] + MOMENTUM * statistics[name]
        for name in ("mean", "variance")
    }
    return params | {"down_norm": old | moved | {"batches": old["batches"] + 1}}


def build_mae_encoder(size: str, /, **attributes: Any) -> nn.Module:
    """VideoMAE's encoder without its last norm, which fine-tuning replaces by `fc_norm`."""
    return video_mae.build_encoder(size, **({"last_norm": False} | attributes))


def build(size: str, /, *, encoder: str = "internvideo2", **attributes: Any) -> Classifier:
    """A classifier; attributes are those of `Classifier` and of its encoder.

    Args:
        size: a row of the encoder's table.
        encoder: name in `ENCODERS`.

    Raises:
        UserError: unknown size or encoder. TypeError: unknown attribute.
    """
    own = {f.name for f in dataclasses.fields(Classifier)} - {"encoder", "parent", "name"}
    mine = {k: v for k, v in attributes.items() if k in own}
    rest = {k: v for k, v in attributes.items() if k not in own}
    return Classifier(ENCODERS.get(encoder)(size, **rest), **mine)


def init(model: Classifier, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    return model.init(key, pixels.blank_video(model.encoder))["params"]
