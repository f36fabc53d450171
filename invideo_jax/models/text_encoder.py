"""Text towers: BERT with fusion blocks that look at video tokens, and the causal ones of CLIP.

Sources: BERT (arXiv:1810.04805); InternVideo2 multi_modality/models/backbones/bert; MobileCLIP
(arXiv:2311.17049); CLIP (arXiv:2103.00020).
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from invideo_jax import masking
from invideo_jax.errors import UserError
from invideo_jax.models.attention import attend, drop, fold
from invideo_jax.models.checks import check_multiple
from invideo_jax.models.layers import LayerNorm, Linear, Mlp, Stack, activation, named
from invideo_jax.sharding import constrain

PyTree = Any
_NORMAL = nn.initializers.normal(0.02)  # BERT's and CLIP's; CLIP has narrower ones in places


class TextAttention(nn.Module):
    """Attention with biases on queries, keys and values; looks at itself, or at other tokens.

    Attributes:
        heads: K.
        dropout: share of attention weights dropped.
    """

    heads: int
    dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        other: jax.Array | None = None,
        mask: jax.Array | None = None,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """`x` [B, L, D], `other` [B, N, any], `mask` as in `attend`, `keys` [B] for dropout."""
        width = x.shape[-1]
        linear = functools.partial(Linear, kernel_init=_NORMAL, dtype=self.dtype)
        into = functools.partial(linear, width, ("embed", "heads"), "heads")
        source = x if other is None else other
        query = checkpoint_name(into(name="query")(x), "query")
        key = checkpoint_name(into(name="key")(source), "key")
        value = checkpoint_name(into(name="value")(source), "value")
        mixed = attend(
            query, key, value, heads=self.heads, mask=mask, keys=keys, dropout=self.dropout
        )
        return linear(width, ("heads", "embed"), name="out")(mixed)


class BertBlock(nn.Module):
    """Post-norm block: x = norm(x + branch) for self-attention, cross-attention (if any) and MLP.

    Attributes:
        cross: has attention over the tokens of another tower.
        dropout, attention_dropout: shares of what a branch gives, and of attention weights, dropped.
    """

    heads: int
    mlp_width: int
    cross: bool = False
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.0
    attention_dropout: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None = None,
        rate: jax.Array | float = 0.0,
        valid: jax.Array | None = None,
        tokens: jax.Array | None = None,
        seen: jax.Array | None = None,
    ) -> jax.Array:
        """Args:
        x: [B, L, D].
        keys: [B] random keys of dropout; None drops nothing.
        rate: of drop path, which this block has not.
        valid: bool [B, L], True = a real token of the text.
        tokens, seen: [B, N, any] of the other tower, and which of them are real, bool [B, N].
        """
        row = lambda mask: None if mask is None else mask[:, None, :]
        attention = functools.partial(
            TextAttention, self.heads, self.attention_dropout, dtype=self.dtype
        )
        x = constrain(x, "batch", "tokens", "act_embed")
        y = attention(name="attention")(x, mask=row(valid), keys=fold(keys, 0))
        x = self._join(x, y, "norm1", fold(keys, 1))
        if self.cross:
            y = attention(name="cross")(x, tokens, mask=row(seen), keys=fold(keys, 2))
            x = self._join(x, y, "cross_norm", fold(keys, 3))
        mlp = Mlp(self.mlp_width, self.activation, _NORMAL, self.dtype, name="mlp")
        x = self._join(x, mlp(x), "norm2", fold(keys, 4))
        return constrain(x, "batch", "tokens", "act_embed")

    def _join(self, x, branch, name, keys):
        branch = drop(branch, keys, self.dropout)
        return LayerNorm(self.eps, self.dtype, name=name)(x + branch)


class Bert(nn.Module):
    """BERT in two parts: text blocks, and fusion blocks that also look at video tokens.

    Attributes:
        width, depth, heads, mlp_width: D, all blocks, K, F.
        fusion_from: number of the first fusion block; `depth` for none.
        context_width: of the tokens that fusion blocks look at, of a tower that stands alone (as it is
            imported); 0: the tokens tell.
        vocabulary, positions, types: rows of the three embedding tables.
        pad: id of padding, whose row gets no gradient from being looked up (as in PyTorch).
        word_head: whether words can be predicted; its matrix is the table of words.
        eps: of all LayerNorms.
        dropout, attention_dropout: shares dropped in training.
        scan, remat, dtype: how blocks run and what they compute in; they change no parameter.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    fusion_from: int
    context_width: int = 0
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2
    pad: int = 0
    word_head: bool = True
    activation: str = "gelu"
    eps: float = 1e-12
    dropout: float = 0.1
    attention_dropout: float = 0.1
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        self.check()
        norm = functools.partial(LayerNorm, self.eps, self.dtype)
        table = lambda name, rows, axis: self.param(
            name, named(_NORMAL, axis, "embed"), (rows, self.width)
        )
        self.word_embedding = table("word_embedding", self.vocabulary, "vocabulary")
        self.position_embedding = table("position_embedding", self.positions, None)
        self.type_embedding = table("type_embedding", self.types, None)
        self.embedding_norm = norm()
        if self.fusion_from:
            self.text_stack = self._stack(self.fusion_from, cross=False)
        if self.fusion_from < self.depth:
            self.fusion_stack = self._stack(self.depth - self.fusion_from, cross=True)
        if self.word_head:
            dense = functools.partial(Linear, kernel_init=_NORMAL, dtype=self.dtype)
            self.head_dense = dense(self.width, ("embed", None))
            self.head_norm = norm()
            zeros = named(nn.initializers.zeros_init(), "vocabulary")
            self.head_bias = self.param("head_bias", zeros, (self.vocabulary,))

    def _stack(self, depth, *, cross):
        block = functools.partial(
            BertBlock,
            self.heads,
            self.mlp_width,
            cross=cross,
            activation=self.activation,
            eps=self.eps,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            dtype=self.dtype,
        )
        draws = bool(self.dropout or self.attention_dropout)
        return Stack(block, depth, scan=self.scan, remat=self.remat, draws=draws)

    def __call__(
        self,
        ids: jax.Array,
        valid: jax.Array | None,
        tokens: jax.Array,
        seen: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """All blocks: `fuse` of `encode`; [B, L, D]."""
        text = self.encode(ids, valid, keys=fold(keys, 0))
        return self.fuse(text, valid, tokens, seen, keys=fold(keys, 1))

    def encode(
        self, ids: jax.Array, valid: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> jax.Array:
        """Text alone, through the blocks before fusion.

        Args:
            ids: int [B, L], at most `positions` long.
            valid: bool [B, L], False = padding; None = all real.
            keys: [B] random keys of dropout; None when evaluating.

        Returns:
            [B, L, D]; its first row is the text's own feature.
        """
        if ids.shape[1] > self.positions:
            raise UserError(
                f"A text must not be longer than the table of positions; got length={ids.shape[1]}, "
                f"positions={self.positions}. Cut the texts."
            )
        x = jnp.take(self.word_embedding, ids, axis=0)
        x = jnp.where((ids == self.pad)[..., None], jax.lax.stop_gradient(x), x)
        x = x + self.type_embedding[0] + self.position_embedding[: ids.shape[1]]
        x = drop(self.embedding_norm(x), fold(keys, 0), self.dropout)
        if not self.fusion_from:
            return x
        valid = None if valid is None else valid.astype(bool)
        return self.text_stack(x, valid, keys=fold(keys, 1))[0]

    def fuse(
        self,
        text: jax.Array,
        valid: jax.Array | None,
        tokens: jax.Array,
        seen: jax.Array | None = None,
        *,
        keys: jax.Array | None = None,
    ) -> jax.Array:
        """Text that has looked at video.

        Args:
            text: of `encode`, [B, L, D].
            valid: bool [B, L].
            tokens: of a video, [B, N, any].
            seen: bool [B, N], which of those are real; None = all.
            keys: as in `encode`.

        Returns:
            [B, L, D].
        """
        as_bool = lambda mask: None if mask is None else mask.astype(bool)
        context = as_bool(valid), tokens.astype(self.dtype), as_bool(seen)
        return self.fusion_stack(text, *context, keys=keys)[0]

    def words(self, x: jax.Array) -> jax.Array:
        """Scores of all words at each place, [B, L, vocabulary], of `x` [B, L, D]."""
        x = self.head_norm(activation(self.activation)(self.head_dense(x)))
        scores = jnp.matmul(x, self.word_embedding.T.astype(self.dtype))
        scores = scores + self.head_bias.astype(self.dtype)
        return constrain(scores, "batch", "tokens", "act_vocabulary")

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("width", self.width, "heads", self.heads)
        activation(self.activation)
        if not 0 <= self.fusion_from <= self.depth:
            raise UserError(
                f"fusion_from must be a block of 0..{self.depth - 1}, or depth for no fusion; got "
                f"fusion_from={self.fusion_from}, depth={self.depth}."
            )


def last_token(valid: jax.Array) -> jax.Array:
    """Place of the last True of each row, int [B] of bool [B, L]; 0 where there is none."""
    places = jnp.arange(valid.shape[1])
    return jnp.max(jnp.where(valid.astype(bool), places, 0), axis=1)


class CausalBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); sees what `mask` lets it."""

    heads: int
    mlp_width: int
    activation: str = "gelu"
    eps: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        keys: jax.Array | None = None,
        rate: jax.Array | float = 0.0,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`x` [B, L, D]; `mask` bool [1, L, L]; there is nothing random here."""
        norm = functools.partial(LayerNorm, self.eps, self.dtype)
        x = constrain(x, "batch", "tokens", "act_embed")
        attention = TextAttention(self.heads, dtype=self.dtype, name="attention")
        x = x + attention(norm(name="norm1")(x), mask=mask)
        mlp = Mlp(self.mlp_width, self.activation, _NORMAL, self.dtype, name="mlp")
        x = x + mlp(norm(name="norm2")(x))
        return constrain(x, "batch", "tokens", "act_embed")


class ClipText(nn.Module):
    """Text tower of CLIP (activation 'gelu_quick') and of MobileCLIP ('gelu').

    Attributes:
        width, depth, heads, mlp_width: D, blocks, K, F.
        output_width: P; 0 for no projection, the embedding is then the last token.
        causal: each token sees itself and those before it; False: all see all.
        vocabulary, positions: rows of the two tables.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    output_width: int
    vocabulary: int = 49408
    positions: int = 77
    activation: str = "gelu_quick"
    causal: bool = True
    eps: float = 1e-5
    scan: bool = False
    remat: str = "none"
    dtype: Any = jnp.float32

    def setup(self):
        self.check()
        narrow = nn.initializers.normal(self.width**-0.5)
        words = named(_NORMAL, "vocabulary", "embed"), (self.vocabulary, self.width)
        places = named(nn.initializers.normal(0.01), None, "embed"), (self.positions, self.width)
        self.word_embedding = self.param("word_embedding", *words)
        self.position_embedding = self.param("position_embedding", *places)
        block = functools.partial(
            CausalBlock, self.heads, self.mlp_width, self.activation, self.eps, self.dtype
        )
        self.stack = Stack(block, self.depth, scan=self.scan, remat=self.remat)
        self.norm = LayerNorm(self.eps, self.dtype)
        if self.output_width:
            self.projection = Linear(
                self.output_width, ("embed", None), None, kernel_init=narrow, dtype=self.dtype
            )

    def __call__(
        self, ids: jax.Array, valid: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """'embedding' and 'tokens' of `features`."""
        out = self.features(ids, valid)
        return out["embedding"], out["tokens"]

    def features(
        self, ids: jax.Array, valid: jax.Array | None = None, *, keys: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Features of texts, each taken at the text's last token.

        Args:
            ids: int [B, L], at most `positions` long.
            valid: bool [B, L], False = padding, behind the text. None: texts end in the vocabulary's
                highest id, as those of CLIP's tokeniser do. A causal tower's tokens never see what
                is behind them; in another, padding is not looked at.
            keys: not used, there is nothing random here.

        Returns:
            'tokens' [B, L, D] after the last norm, 'pooled' [B, D], 'embedding' [B, P].
        """
        length = ids.shape[1]
        if length > self.positions:
            raise UserError(
                f"A text must not be longer than the table of positions; got length={length}, "
                f"positions={self.positions}. Cut the texts."
            )
        x = jnp.take(self.word_embedding, ids, axis=0) + self.position_embedding[:length]
        if self.causal:
            mask = jnp.tril(jnp.ones((1, length, length), bool))
        else:
            mask = None if valid is None else valid.astype(bool)[:, None, :]
        x = self.norm(self.stack(x.astype(self.dtype), mask)[0])
        last = jnp.argmax(ids, axis=1) if valid is None else last_token(valid)
        pooled = masking.gather(x, last[:, None])[:, 0]
        embedding = self.projection(pooled) if self.output_width else pooled
        return dict(tokens=x, pooled=pooled, embedding=embedding)

    def check(self) -> None:
        """Raises UserError where attributes do not fit together; builds nothing."""
        check_multiple("width", self.width, "heads", self.heads)
        activation(self.activation)


def init(model: Bert | ClipText, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes; of a tower that stands alone."""
    ids = jnp.zeros((1, 1), jnp.int32)
    if isinstance(model, ClipText):
        return model.init(key, ids)["params"]
    if model.fusion_from < model.depth and not model.context_width:
        raise UserError(
            "A BERT that stands alone must have no fusion blocks, or know the width of the tokens that "
            f"they look at; got fusion_from={model.fusion_from}, depth={model.depth}, context_width=0."
        )

    def run(m, ids):
        x = m.encode(ids)
        if m.fusion_from < m.depth:
            x = m.fuse(x, None, jnp.zeros((1, 1, m.context_width)))
        return m.words(x) if m.word_head else x

    return model.init(key, ids, method=run)["params"]
