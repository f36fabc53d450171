"""Towers of sounds: BEATs, and a plain vision transformer on the filter bank."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.models import positions, sizes
from invideo_jax.models.beats import Beats
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.filter_bank import Sound, mean
from invideo_jax.models.layers import Block, LayerNorm, Linear, Stack, activation, named
from invideo_jax.registry import nearest
from invideo_jax.sharding import constrain

PyTree = Any
_NORMAL = nn.initializers.normal(0.02)
POSITIONS = ("sincos", "learned")


class AudioViT(Sound, nn.Module):
    """A plain vision transformer whose picture is the filter bank.

    Attributes:
        width, depth, heads, mlp_width: D, blocks, K, F.
        patch, mels: see `Sound`.
        frames: F of the table of positions, where it is learned.
        positions: 'sincos' (fixed, any number of frames) or 'learned' (starts as those).
        class_token: the pooled vector is a class token, which stands in front of the others; else
            the mean of the real tokens.
        mask_padding: frames behind a sound's end count for nothing, as in `Beats`.
        drop_path: rate of the last block.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int = 16
    mels: int = 64
    frames: int = 998
    positions: str = "sincos"
    class_token: bool = False
    mask_padding: bool = True
    activation: str = "gelu"
    eps: float = 1e-6
    drop_path: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        self.check()
        self.patch_embed = Linear(self.width, ("patch", "embed"), dtype=self.dtype)
        if self.positions == "learned":
            start = lambda key, shape: jnp.asarray(self._table(self.frames))
            self.position_embedding = self.param(
                "position_embedding", named(start, None, "embed"), ()
            )
        if self.class_token:
            self.cls_token = self.param("cls_token", named(_NORMAL, "norm"), (self.width,))
        block = functools.partial(
            Block,
            self.heads,
            self.mlp_width,
            activation=self.activation,
            eps=self.eps,
            dtype=self.dtype,
        )
        self.stack = Stack(
            block, self.depth, scan=self.scan, remat=self.remat, drop_path=self.drop_path
        )
        self.norm = LayerNorm(self.eps, self.dtype)

    def _table(self, frames: int) -> np.ndarray:
        return positions.sincos_2d(*self.grid(frames), self.width)

    def __call__(
        self, audio: jax.Array, frames: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Features of a sound; arguments and results as of `Beats`, `keys` for drop path."""
        x = self.patch_embed(self.patches(audio.astype(self.dtype)))
        x = x + self._places(audio.shape[1]).astype(x.dtype)
        real = self.masked(frames, x.shape[1])
        looked_at = real
        if self.class_token:
            cls = jnp.broadcast_to(self.cls_token.astype(x.dtype), (len(x), 1, self.width))
            x = jnp.concatenate([cls, x], axis=1)
            if real is not None:
                looked_at = jnp.pad(real, ((0, 0), (1, 0)), constant_values=True)
        mask = () if looked_at is None else (looked_at[:, None],)
        x, _ = self.stack(constrain(x, "batch", "tokens", "act_embed"), *mask, keys=keys)
        x = self.norm(x)
        if self.class_token:
            return x[:, 1:], x[:, 0]
        return x, mean(x, real)

    def _places(self, frames: int) -> jax.Array:
        if self.positions == "sincos":
            return jnp.asarray(self._table(frames))
        if self.grid(frames) != self.grid(self.frames):
            raise UserError(
                "A model with learned positions takes sounds of one length; got "
                f"{frames} frames, frames={self.frames}. Set the model's frames, or positions='sincos'."
            )
        return self.position_embedding

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("width", self.width, "heads", self.heads)
        check_multiple("mels", self.mels, "patch", self.patch)
        activation(self.activation)
        if self.positions not in POSITIONS:
            raise UserError(
                f"positions must be one of {', '.join(POSITIONS)}; got "
                f"positions={self.positions!r}.{nearest(self.positions, POSITIONS)}"
            )


KINDS = {"beats": (Beats, sizes.BEATS), "audio_vit": (AudioViT, sizes.AUDIO_VIT)}


def build(kind: str, size: str, /, **overrides: Any) -> Beats | AudioViT:
    """The model of a row of `sizes.BEATS` (kind 'beats') or `sizes.AUDIO_VIT` ('audio_vit').

    Args:
        overrides: attributes of the model.

    Raises:
        UserError: unknown kind or size. TypeError: unknown attribute.
    """
    if kind not in KINDS:
        raise UserError(
            f"The audio tower must be of a known kind; got kind={kind!r}.{nearest(kind, KINDS)}"
        )
    model, table = KINDS[kind]
    row = dataclasses.asdict(sizes.row(table, size))
    del row["params"]
    return model(**(row | overrides))


def blank(model: Beats | AudioViT) -> jax.Array:
    """The shortest filter bank of zeros that the model takes, [1, F, mels]."""
    learned = getattr(model, "positions", "") == "learned"
    return jnp.zeros((1, model.frames if learned else model.patch, model.mels))


def init(model: Beats | AudioViT, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    return model.init(key, blank(model))["params"]
