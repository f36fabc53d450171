"""BEATs, a tower of sounds.

Sources: BEATs (arXiv:2212.09058), microsoft/unilm beats; its gated relative positions are those of
WavLM (arXiv:2110.13900) 3.1; InternVideo2 (arXiv:2403.15377) 3.3 has it in stage 2.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from invideo_jax.errors import UserError
from invideo_jax.models.attention import attend, drop, fold
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.filter_bank import Sound, mean
from invideo_jax.models.layers import LayerNorm, Linear, Stack, activation, named, uniform
from invideo_jax.sharding import constrain

_NORMAL = nn.initializers.normal(0.02)


def buckets_of(tokens: int, *, buckets: int, max_distance: int) -> np.ndarray:
    """The row of the table of relative positions for each query and key, int32 [A, A].

    Half the rows are for keys behind the query; of each half, half are single distances, the other
    half grow with the logarithm up to `max_distance`.
    """
    half = buckets // 2
    exact = half // 2
    offset = np.arange(tokens)[None] - np.arange(tokens)[:, None]
    distance = np.abs(offset)
    # In float32, as published: the whole part of a logarithm must not depend on the last digit.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int64), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


def grouped_convolution(x: jax.Array, kernel: jax.Array, groups: int) -> jax.Array:
    """Convolution over the second axis whose output has its input's length, tap by tap.

    One `conv_general_dilated` is no faster on a CPU (0.49 s, this 0.55 s at the published size), and on a
    mesh where devices hold copies of the batch XLA (jax 0.10.2) multiplies its kernel's gradient by their
    number, where there is more than one group.

    Args:
        x: [B, A, D].
        kernel: [taps, D/groups, D].

    Returns:
        [B, A, D]; where taps are even, the one more is in front.
    """
    taps, inputs, width = kernel.shape
    rows, tokens = x.shape[:2]
    padded = jnp.pad(x, ((0, 0), (taps // 2, (taps - 1) // 2), (0, 0)))
    padded = padded.reshape(rows, -1, groups, inputs)
    kernel = kernel.reshape(taps, inputs, groups, width // groups)

    @jax.checkpoint  # or the backward pass would hold a copy of x for each tap
    def add(total, tap):
        window = jax.lax.dynamic_slice_in_dim(padded, tap, tokens, axis=1)
        return total + jnp.einsum("btgi,igo->btgo", window, kernel[tap]), None

    zeros = jnp.zeros((rows, tokens, groups, width // groups), x.dtype)
    return jax.lax.scan(add, zeros, np.arange(taps))[0].reshape(rows, tokens, width)


class BeatsBlock(nn.Module):
    """Attention with gated relative positions, then MLP; each with its norm.

    Attributes:
        gated: the bias of a query is scaled by a gate that is computed from the query.
        deep: factor on the residual, of DeepNorm; 1 without.
        norm_first: norm, branch, sum; else branch, sum, norm.
        gain: of the initial values of DeepNorm; 0 for normal ones.
        dropout, attention_dropout, hidden_dropout: shares of what a branch gives, of attention
            weights, and of the MLP's hidden units, dropped.
    """

    heads: int
    mlp_width: int
    gated: bool = True
    deep: float = 1.0
    norm_first: bool = False
    gain: float = 0.0
    activation: str = "gelu"
    eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None = None,
        rate: jax.Array | float = 0.0,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`x` [B, A, D]; `keys` [B] of dropout; `bias` [1, K, A, A]; `mask` bool [B, 1, A]."""
        x = constrain(x, "batch", "tokens", "act_embed")
        attention = functools.partial(self._attention, bias=bias, mask=mask, keys=fold(keys, 0))
        x = self._join(x, attention, "norm1", fold(keys, 1))
        mlp = functools.partial(self._mlp, keys=fold(keys, 2))
        x = self._join(x, mlp, "norm2", fold(keys, 3))
        return constrain(x, "batch", "tokens", "act_embed")

    def _join(self, x, branch, name, keys):
        norm = LayerNorm(self.eps, self.dtype, name=name)
        y = drop(branch(norm(x) if self.norm_first else x), keys, self.dropout)
        return x + y if self.norm_first else norm(self.deep * x + y)

    def _attention(self, x, *, bias, mask, keys):
        width = x.shape[-1]
        into = functools.partial(Linear, width, ("embed", "heads"), "heads", dtype=self.dtype)
        query = checkpoint_name(into(name="query", kernel_init=self._kernel(1.0))(x), "query")
        key = checkpoint_name(into(name="key", kernel_init=self._kernel(1.0))(x), "key")
        value = into(name="value", kernel_init=self._kernel(self.gain))(x)
        if bias is not None and self.gated:
            bias = self._gate(query)[..., None] * bias
        mixed = attend(
            query,
            key,
            checkpoint_name(value, "value"),
            heads=self.heads,
            mask=mask,
            bias=bias,
            keys=keys,
            dropout=self.attention_dropout,
        )
        out = self._kernel(self.gain)
        return Linear(width, ("heads", "embed"), kernel_init=out, dtype=self.dtype, name="out")(
            mixed
        )

    def _gate(self, query: jax.Array) -> jax.Array:
        """[B, K, A], of queries that are not scaled. Source: WavLM, equations 5 to 8."""
        split = query.reshape(*query.shape[:2], self.heads, -1).swapaxes(1, 2)
        gate = Linear(8, (None, None), kernel_init=_NORMAL, dtype=self.dtype, name="gate")(split)
        scale = self.param("gate_scale", named(nn.initializers.ones_init(), "norm"), (self.heads,))
        gate = gate.reshape(*gate.shape[:3], 2, 4).astype(
            jnp.promote_types(gate.dtype, jnp.float32)
        )
        update, reset = jnp.moveaxis(jax.nn.sigmoid(gate.sum(-1)), -1, 0)
        return update * (reset * scale[:, None] - 1.0) + 2.0

    def _mlp(self, x, *, keys):
        linear = functools.partial(Linear, kernel_init=self._kernel(self.gain), dtype=self.dtype)
        hidden = linear(self.mlp_width, ("embed", "mlp"), "mlp", name="up")(x)
        hidden = constrain(checkpoint_name(hidden, "mlp_hidden"), "batch", "tokens", "act_mlp")
        hidden = drop(activation(self.activation)(hidden), keys, self.hidden_dropout)
        return linear(x.shape[-1], ("mlp", "embed"), name="down")(hidden)

    def _kernel(self, gain: float):
        """Xavier-normal times a gain in DeepNorm, else BERT's."""
        if not self.gain:
            return _NORMAL
        return nn.initializers.variance_scaling(gain**2, "fan_avg", "normal")


class Beats(Sound, nn.Module):
    """BEATs: patches, a convolution for positions, post-norm blocks with relative positions.

    Attributes:
        width, depth, heads, mlp_width: D, blocks, K, F.
        patch, mels: see `Sound`; the weights were trained on 128 bins and InternVideo2 gives them 64.
        embed: width of the patches' projection, before that to D (none where equal).
        conv_positions, conv_groups: length and groups of the convolution.
        buckets, max_distance: of relative positions; 0 buckets for none.
        gated, deep_norm, layer_norm_first: see `BeatsBlock`; not both of the last.
        dropout, attention_dropout, hidden_dropout, input_dropout: see `BeatsBlock`; the last of
            what the first block takes.
        mask_padding: frames behind a sound's end count for nothing: their tokens are zeroed, nobody looks
            at them, the mean leaves them out. Published (InternVideo2): no mask, they are zeros.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    patch: int = 16
    mels: int = 64
    embed: int = 512
    conv_positions: int = 128
    conv_groups: int = 16
    buckets: int = 320
    max_distance: int = 800
    gated: bool = True
    deep_norm: bool = True
    layer_norm_first: bool = False
    patch_bias: bool = False
    activation: str = "gelu"
    eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    input_dropout: float = 0.0
    mask_padding: bool = False
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        self.check()
        # What lies outside the encoder keeps PyTorch's own start.
        start = uniform(1 / self.patch)
        linear = functools.partial(Linear, dtype=self.dtype)
        self.patch_embed = linear(
            self.embed,
            ("patch", None),
            "norm" if self.patch_bias else None,
            kernel_init=start,
            bias_init=start,
        )
        self.patch_norm = LayerNorm(self.eps, self.dtype)
        if self.embed != self.width:
            start = uniform(self.embed**-0.5)
            self.project = linear(self.width, (None, "embed"), kernel_init=start, bias_init=start)
        self._declare_positions()
        self.norm = LayerNorm(self.eps, self.dtype)
        block = functools.partial(
            BeatsBlock,
            self.heads,
            self.mlp_width,
            gated=self.gated and bool(self.buckets),
            deep=(2 * self.depth) ** 0.25 if self.deep_norm else 1.0,
            norm_first=self.layer_norm_first,
            gain=(8 * self.depth) ** -0.25 if self.deep_norm else 0.0,
            activation=self.activation,
            eps=self.eps,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            hidden_dropout=self.hidden_dropout,
            dtype=self.dtype,
        )
        draws = bool(self.dropout or self.attention_dropout or self.hidden_dropout)
        self.stack = Stack(block, self.depth, scan=self.scan, remat=self.remat, draws=draws)

    def _declare_positions(self):
        """The convolution's kernel as direction and length (weight norm), and the table of all blocks."""
        inputs = self.width // self.conv_groups
        deviation = (4 / (self.conv_positions * self.width)) ** 0.5
        shape = (self.conv_positions, inputs, self.width)
        kernel = named(nn.initializers.normal(deviation), None, None, "embed")
        self.position_kernel = self.param("position_kernel", kernel, shape)
        length = lambda key, shape: jnp.sqrt(jnp.square(self.position_kernel).sum((1, 2)))
        self.position_scale = self.param(
            "position_scale", named(length, "norm"), (self.conv_positions,)
        )
        zeros = named(nn.initializers.zeros_init(), "norm")
        self.position_bias = self.param("position_bias", zeros, (self.width,))
        if self.buckets:
            table = named(_NORMAL, None, None)
            self.relative_bias = self.param("relative_bias", table, (self.buckets, self.heads))

    def __call__(
        self, audio: jax.Array, frames: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Features of a sound.

        Args:
            audio: normalised filter bank [B, F, mels].
            frames: int [B], real frames; looked at where `mask_padding` says so.
            keys: [B] random keys of dropout; None when evaluating.

        Returns:
            Tokens [B, A, D], by time and then by frequency, and their mean [B, D].
        """
        x = self.patch_norm(self.patch_embed(self.patches(audio.astype(self.dtype))))
        x = self.project(x) if self.embed != self.width else x
        x = drop(x, fold(keys, 0), self.input_dropout)
        real = self.masked(frames, x.shape[1])
        if real is not None:
            x = jnp.where(real[..., None], x, 0)
        x = x + self._positions(x)
        x = x if self.layer_norm_first else self.norm(x)
        x = drop(x, fold(keys, 1), self.dropout)
        bias, mask = self._bias(x.shape[1]), None if real is None else real[:, None]
        x, _ = self.stack(x, bias, mask, keys=fold(keys, 2))
        x = self.norm(x) if self.layer_norm_first else x
        return x, mean(x, real)

    def _positions(self, x: jax.Array) -> jax.Array:
        """The convolution over the row of tokens, [B, A, D]; of an even kernel the last is cut off."""
        v = self.position_kernel
        unit = v * jax.lax.rsqrt(jnp.square(v).sum((1, 2), keepdims=True))
        kernel = (unit * self.position_scale[:, None, None]).astype(x.dtype)
        out = grouped_convolution(x, kernel, self.conv_groups)
        return activation("gelu")(out + self.position_bias.astype(x.dtype))

    def _bias(self, tokens: int) -> jax.Array | None:
        """What relative positions add to the scores of each head, [1, K, A, A]."""
        if not self.buckets:
            return None
        rows = buckets_of(tokens, buckets=self.buckets, max_distance=self.max_distance)
        return jnp.moveaxis(jnp.take(self.relative_bias, rows, axis=0), -1, 0)[None]

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("width", self.width, "heads", self.heads)
        check_multiple("width", self.width, "conv_groups", self.conv_groups)
        check_multiple("mels", self.mels, "patch", self.patch)
        activation(self.activation)
        if self.deep_norm and self.layer_norm_first:
            raise UserError(
                "DeepNorm is a form of post-norm; got deep_norm=True and layer_norm_first=True. "
                "Set one of them to False."
            )
        if self.buckets and (self.buckets % 4 or self.max_distance <= self.buckets // 4):
            raise UserError(
                "buckets must be a multiple of 4, and max_distance more than a quarter of it; got "
                f"buckets={self.buckets}, max_distance={self.max_distance}."
            )
