"""LLaMA as a text tower: a causal decoder whose last token is the text's feature, with LoRA.

Sources: LLaMA (arXiv:2302.13971); LoRA (arXiv:2106.09685); InternVL (arXiv:2312.14238), whose text
tower InternVideo2-CLIP 1B and 6B have.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from invideo_jax import masking
from invideo_jax.errors import UserError
from invideo_jax.models.attention import attend, drop, fold
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.layers import (
    Initializer,
    Linear,
    RMSNorm,
    Stack,
    activation,
    named,
    uniform,
)
from invideo_jax.models.text_encoder import last_token
from invideo_jax.sharding import constrain

PyTree = Any
_NORMAL = nn.initializers.normal(0.02)
ADAPTED = ("query", "key", "value", "out")  # the attention's layers that LoRA can stand beside


class LoraLinear(nn.Module):
    """x @ kernel, and beside it x @ lora_a @ lora_b * alpha / rank; no biases.

    Attributes:
        features: width of the output.
        axes: logical names of the kernel's two dimensions.
        rank: width between the two factors; 0: they are not there.
        alpha: see above.
        dropout: share of the factors' input that is dropped in training.
    """

    features: int
    axes: tuple[str | None, str | None]
    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    kernel_init: Initializer = _NORMAL
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """[B, L, D] to [B, L, features]; `keys` [B] of the dropout, None for none."""
        width, (into, out) = x.shape[-1], self.axes
        kernel = self.param("kernel", named(self.kernel_init, into, out), (width, self.features))
        x = x.astype(self.dtype)
        y = jnp.matmul(x, kernel.astype(self.dtype))
        if not self.rank:
            return y
        down, zeros = uniform(width**-0.5), nn.initializers.zeros_init()
        a = self.param("lora_a", named(down, into, None), (width, self.rank))
        b = self.param("lora_b", named(zeros, None, out), (self.rank, self.features))
        narrow = jnp.matmul(drop(x, keys, self.dropout), a.astype(self.dtype))
        return y + jnp.matmul(narrow, b.astype(self.dtype)) * (self.alpha / self.rank)


def rotary(x: jax.Array, heads: int, theta: float) -> jax.Array:
    """Turns pairs of channels of each head by angles that grow with the place.

    Channel i is paired with i + head/2, and turned by place * theta^(-2i/head), as transformers has
    it (the first published files pair neighbours, and are permuted when converted to that form).

    Args:
        x: [B, L, heads * head].

    Source: RoPE (arXiv:2104.09864).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    head = x.shape[-1] // heads
    rates = jnp.asarray(theta, wide) ** (-jnp.arange(0, head, 2, dtype=wide) / head)
    angles = jnp.arange(x.shape[1], dtype=wide)[:, None, None] * rates
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    low, high = jnp.split(x.reshape(*x.shape[:2], heads, head), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], -1).reshape(x.shape)


class LlamaBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + down(act(gate(norm(x))) * up(norm(x))).

    Attributes:
        heads, kv_heads: of queries, and of keys and values; each of those serves heads / kv_heads.
        head_width: channels of a head.
        lora: which of `ADAPTED` have LoRA; with `rank`, `alpha`, `dropout` as in `LoraLinear`.
    """

    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    theta: float = 10000.0
    activation: str = "silu"
    eps: float = 1e-6
    lora: Sequence[str] = ()
    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None = None,
        rate: jax.Array | float = 0.0,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`x` [B, L, D]; `keys` [B] of LoRA's dropout; `mask` bool [B, L, L], who may look at whom."""
        norm = functools.partial(RMSNorm, self.eps, self.dtype)
        x = constrain(x, "batch", "tokens", "act_embed")
        attention = LlamaAttention(
            self.heads,
            self.kv_heads,
            self.head_width,
            self.theta,
            self.lora,
            self.rank,
            self.alpha,
            self.dropout,
            self.dtype,
            name="attention",
        )
        x = x + attention(norm(name="norm1")(x), mask, keys)
        y = norm(name="norm2")(x)
        linear = functools.partial(Linear, bias_axis=None, kernel_init=_NORMAL, dtype=self.dtype)
        into = functools.partial(linear, self.mlp_width, ("embed", "mlp"))
        gate = activation(self.activation)(checkpoint_name(into(name="gate")(y), "mlp_hidden"))
        hidden = gate * checkpoint_name(into(name="up")(y), "mlp_hidden")
        hidden = constrain(hidden, "batch", "tokens", "act_mlp")
        x = x + linear(x.shape[-1], ("mlp", "embed"), name="down")(hidden)
        return constrain(x, "batch", "tokens", "act_embed")


class LlamaAttention(nn.Module):
    """Attention with turned queries and keys; attributes as in `LlamaBlock`."""

    heads: int
    kv_heads: int
    head_width: int
    theta: float = 10000.0
    lora: Sequence[str] = ()
    rank: int = 0
    alpha: float = 32.0
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, keys: jax.Array | None = None
    ) -> jax.Array:
        """[B, L, D] to the same."""

        def linear(name: str, y: jax.Array, features: int, axes: tuple[str, str]) -> jax.Array:
            rank = self.rank if name in self.lora else 0
            layer = LoraLinear(
                features, axes, rank, self.alpha, self.dropout, dtype=self.dtype, name=name
            )
            return layer(y, fold(keys, ADAPTED.index(name)))

        def into(name: str, heads: int) -> jax.Array:
            y = linear(name, x, heads * self.head_width, ("embed", "heads"))
            y = checkpoint_name(y, name)
            return y if name == "value" else rotary(y, heads, self.theta)

        query = into("query", self.heads)
        key, value = (
            self._shared(into("key", self.kv_heads)),
            self._shared(into("value", self.kv_heads)),
        )
        mixed = attend(query, key, value, heads=self.heads, mask=mask)
        return linear("out", mixed, x.shape[-1], ("heads", "embed"))

    def _shared(self, x: jax.Array) -> jax.Array:
        """Each head of keys or values as often as queries look at it, [B, L, heads * head]."""
        times = self.heads // self.kv_heads
        if times == 1:
            return x
        x = x.reshape(*x.shape[:2], self.kv_heads, self.head_width)
        return jnp.repeat(x, times, axis=2).reshape(*x.shape[:2], -1)


class LlamaText(nn.Module):
    """LLaMA's decoder with a projection of the last token into the shared space.

    LoRA's factors are parameters of their own: a run that trains them alone has the pattern
    '*/lora_[ab]' as trainable, one that trains the heads beside them also '*/projection/*'.

    Attributes:
        width, depth, heads, mlp_width: D, blocks, K, F.
        output_width: P; 0 for no projection, the embedding is then the last token.
        kv_heads: heads of keys and values; 0: as many as of queries.
        head_width: channels of a head; 0: width / heads.
        vocabulary: rows of the table of words.
        pad: id of padding, where nothing else says what is padding.
        theta: base of the angles of places.
        lora_rank: width between LoRA's factors, 0 for no LoRA; `lora` says where it is,
            `lora_alpha / lora_rank` is its factor.
        dropout: share of the input of LoRA's factors that is dropped in training.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    output_width: int = 768
    kv_heads: int = 0
    head_width: int = 0
    vocabulary: int = 32000
    pad: int = 0
    theta: float = 10000.0
    activation: str = "silu"
    eps: float = 1e-6
    lora_rank: int = 0
    lora_alpha: float = 32.0
    lora: Sequence[str] = ("query", "value")
    dropout: float = 0.1
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        self.check()
        words = named(_NORMAL, "vocabulary", "embed")
        self.word_embedding = self.param("word_embedding", words, (self.vocabulary, self.width))
        block = functools.partial(
            LlamaBlock,
            self.heads,
            self.kv_heads or self.heads,
            self.head_width or self.width // self.heads,
            self.mlp_width,
            self.theta,
            self.activation,
            self.eps,
            tuple(self.lora),
            self.lora_rank,
            self.lora_alpha,
            self.dropout,
            self.dtype,
        )
        draws = bool(self.lora_rank and self.dropout)
        self.stack = Stack(block, self.depth, scan=self.scan, remat=self.remat, draws=draws)
        self.norm = RMSNorm(self.eps, self.dtype)
        if self.output_width:
            narrow = nn.initializers.normal(self.width**-0.5)
            self.projection = Linear(
                self.output_width, ("embed", None), None, kernel_init=narrow, dtype=self.dtype
            )

    def __call__(self, ids: jax.Array, valid: jax.Array | None = None) -> dict[str, jax.Array]:
        """`features` without dropout."""
        return self.features(ids, valid)

    def features(
        self, ids: jax.Array, valid: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Features of texts, each taken at the text's last token.

        Args:
            ids: int [B, L].
            valid: bool [B, L], False = padding, which no token looks at; None: ids that are `pad`.
            keys: [B] random keys of LoRA's dropout; None when evaluating.

        Returns:
            'tokens' [B, L, D] after the last norm, 'pooled' [B, D], 'embedding' [B, P].
        """
        valid = ids != self.pad if valid is None else valid.astype(bool)
        causal = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))
        x = jnp.take(self.word_embedding, ids, axis=0).astype(self.dtype)
        x = self.norm(self.stack(x, causal & valid[:, None, :], keys=keys)[0])
        pooled = masking.gather(x, last_token(valid)[:, None])[:, 0]
        embedding = self.projection(pooled) if self.output_width else pooled
        return dict(tokens=x, pooled=pooled, embedding=embedding)

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        if not self.head_width:
            check_multiple("width", self.width, "heads", self.heads)
        check_multiple("heads", self.heads, "kv_heads", self.kv_heads or self.heads)
        head = self.head_width or self.width // self.heads
        check_multiple("the width of a head", head, "the channels of a turned pair", 2)
        activation(self.activation)
        if not set(self.lora) <= set(ADAPTED):
            raise UserError(
                f"lora must name layers of {', '.join(ADAPTED)}; got lora={tuple(self.lora)}."
            )


def init(model: LlamaText, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes; of a tower that stands alone."""
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
