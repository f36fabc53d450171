"""What attention over the tokens of a frozen encoder, and a linear classifier on it, find."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.evals import Batch, Given, ranking
from invideo_jax.evals.classification import to_host
from invideo_jax.models.layers import LayerNorm, Linear
from invideo_jax.models.pooling import AttentionPool
from invideo_jax.sharding import constrain

_KEY = 0  # first weights and the order of the clips: the same at each evaluation


class Tokens(NamedTuple):
    """Tokens of clips by batches, spread over the devices along B.

    Attributes:
        tokens: [n, B, N, D].
        labels: int32 [n, B] on the host; -1: a row that does not count.
    """

    tokens: jax.Array
    labels: np.ndarray


class Head(nn.Module):
    """Attention pool, residual MLP where asked for, norm, linear classifier.

    Attributes:
        classes: number of them.
        heads: of the pool.
        width: P, of the pooled vector.
        mlp: whether a norm and an MLP of four times the width are added to it, zero at first.
    """

    classes: int
    heads: int
    width: int
    mlp: bool = False

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """`tokens` [B, N, D] to logits float32 [B, classes]."""
        x = AttentionPool(self.heads, self.width, name="pool")(tokens.astype(jnp.float32))[0]
        if self.mlp:
            inner = LayerNorm(1e-5, jnp.float32, name="mlp_norm")(x)
            inner = Linear(4 * self.width, ("embed", "mlp"), "mlp", name="mlp_in")(inner)
            zeros = nn.initializers.zeros_init()
            out = Linear(self.width, ("mlp", "embed"), kernel_init=zeros, name="mlp_out")
            x += out(nn.gelu(inner, approximate=False))
        x = LayerNorm(1e-5, jnp.float32, name="norm")(x)
        return Linear(self.classes, ("embed", None), None, name="classes")(x)


class Evaluator:
    """Attentive probe of the encoder: the pool and the classifier learn, the encoder does not.

    `run` gives `top1` and `top5` on the held-out clips, `train_top1`, and `majority`, what always saying
    the commonest class of training would get: shares in 0..1. Deterministic. Published runs start from the
    encoder's own pool and augment; here the pool starts fresh, on clips cut as for evaluation, so
    compare with runs of this probe.

    Args:
        examples, train_examples: how many clips are judged, and learned from.
        epochs: passes over the training clips, whose tokens stay on the devices.
        learning_rate: of AdamW, after a warm-up of a tenth, down to 0 along a cosine.
        weight_decay: published: 0.
        heads: of the pool; the width of the tokens must be a multiple.
        width: of the pooled vector; 0: that of the tokens.
        mlp: whether a residual MLP stands before the classifier, as published for SSv2.
        memory_gb: what the tokens of the training clips may take, on all devices together.

    Source: InternVideo2 (arXiv:2403.15377), attentive probing; single_modality/models/internvideo2_ap.py.
    """

    def __init__(
        self,
        given: Given,
        *,
        examples: int,
        train_examples: int,
        epochs: int,
        learning_rate: float,
        weight_decay: float,
        heads: int,
        width: int,
        mlp: bool,
        memory_gb: float,
    ):
        self.given, self.examples, self.train_examples = given, examples, train_examples
        self.head = dict(heads=heads, width=width, mlp=mlp)
        self.rates = dict(epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay)
        self.memory_gb = memory_gb

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        train = collect(self.given, params, self.train_examples, self.memory_gb)
        labels = train.labels[train.labels >= 0]
        classes = max(int(labels.max()) + 1, len(self.given.classes))
        head = make_head(classes, train.tokens.shape[-1], **self.head)
        weights = fit(head, *train, **self.rates)
        tokens = lambda batch: self.given.encode_tokens(params, batch)[None]
        held_out = [
            (to_host(_logits(head, weights, tokens(batch)))[0], known_labels(batch))
            for batch in self.given.batches(self.examples, of="held_out", taught=False)
        ]
        again = zip(to_host(_logits(head, weights, train.tokens)), train.labels)
        right = standing_of(held_out, "held_out")
        yield "top1", float(np.mean(ranking.recall(right, 1)))
        yield "top5", float(np.mean(ranking.recall(right, 5)))
        yield "train_top1", float(np.mean(ranking.recall(standing_of(again, "train"), 1)))
        judged = np.concatenate([own for _, own in held_out])
        yield "majority", float(np.mean(judged[judged >= 0] == np.bincount(labels).argmax()))


def make(
    given: Given,
    *,
    examples: int,
    train_examples: int,
    epochs: int = 20,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    heads: int = 8,
    width: int = 0,
    mlp: bool = False,
    memory_gb: float = 8.0,
) -> Evaluator:
    """The evaluator; arguments as of `Evaluator`."""
    if given.encode_tokens is None:
        raise UserError(
            "The evaluator 'attentive_probe' needs an encoder that gives tokens, which this stage's does not. "
            "Take it out of the recipe's evals; 'probe' and 'knn' judge pooled features."
        )
    if epochs < 1:
        raise UserError(f"The attentive probe learns for at least 1 epoch; got epochs={epochs}.")
    return Evaluator(
        given,
        examples=examples,
        train_examples=train_examples,
        epochs=epochs,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        heads=heads,
        width=width,
        mlp=mlp,
        memory_gb=memory_gb,
    )


def make_head(classes: int, tokens_width: int, *, heads: int, width: int, mlp: bool) -> Head:
    """The head on tokens of this width; UserError where its heads do not divide it."""
    if heads < 1 or tokens_width % heads:
        raise UserError(
            f"heads of the attentive probe must divide the width of the tokens; got heads={heads}, "
            f"width={tokens_width}. Use one of {sharding.divisors(tokens_width)}."
        )
    return Head(classes, heads, width or tokens_width, mlp)


def known_labels(batch: Batch) -> np.ndarray:
    """Labels on the host, [B]; -1 where a row is not valid, is sound only, or has none."""
    shown = to_host(batch["valid"]) & to_host(batch.get("has_video", batch["valid"]))
    return np.where(shown, to_host(batch["label"]), -1).astype(np.int32)


def collect(given: Given, params: Any, examples: int, memory_gb: float) -> Tokens:
    """Tokens of the first training clips, as the encoder gives them.

    Raises:
        UserError: no clip has a label, or more memory than allowed.
    """
    tokens, labels, taken = [], [], 0
    for batch in given.batches(examples, of="train", taught=False):
        found = given.encode_tokens(params, batch)
        if tokens and found.shape != tokens[0].shape:
            continue  # images beside videos: the pool learns from videos
        tokens.append(found)
        labels.append(known_labels(batch))
        taken += tokens[-1].nbytes
        if taken > memory_gb * 1e9:
            raise UserError(
                f"The tokens of {examples} training clips must fit in memory_gb={memory_gb}; "
                f"{sum(map(len, labels))} clips take {taken / 1e9:.2f} GB. Lower train_examples, or raise "
                "memory_gb where the devices together have it."
            )
    if not labels or max(own.max() for own in labels) < 0:
        raise UserError(
            "A probe needs labels; got none among the train videos. Give them in the manifest, or take "
            "attentive_probe out of the recipe's evals."
        )
    return Tokens(jax.jit(lambda *blocks: jnp.stack(blocks))(*tokens), np.stack(labels))


def fit(
    head: nn.Module,
    tokens: jax.Array,
    labels: np.ndarray,
    *,
    epochs: int,
    learning_rate: float,
    weight_decay: float,
) -> Any:
    """Variables of the head after `epochs` passes over the clips.

    In each epoch every place of a batch goes through its own clips in an order of its own, so that clips are
    mixed and none moves to another device.

    Args:
        tokens, labels: as of `Tokens`.
    """
    count, rows = labels.shape
    steps = epochs * count
    draw = np.random.default_rng(_KEY)
    order = np.tile(np.arange(count)[:, None], (epochs, 1, rows))
    order = draw.permuted(order, axis=1).reshape(steps, rows)
    return _fit(head, learning_rate, weight_decay, tokens, labels, order.astype(np.int32))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit(head, learning_rate, weight_decay, tokens, labels, order):
    steps = len(order)
    rate = optax.warmup_cosine_decay_schedule(0, learning_rate, max(steps // 10, 1), steps + 1)
    tx = optax.adamw(rate, weight_decay=weight_decay)

    def loss(weights, clips, own):
        logits, known = head.apply(weights, clips), own >= 0
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(own, 0))
        return jnp.where(known, each, 0).sum() / jnp.maximum(known.sum(), 1)

    def step(carry, which):
        weights, state = carry
        clips = jnp.take_along_axis(tokens, which[None, :, None, None], axis=0)[0]
        clips = constrain(clips, "batch", None, None)
        own = jnp.take_along_axis(labels, which[None], axis=0)[0]
        grads = jax.grad(loss)(weights, clips, own)
        updates, state = tx.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    weights = nn.unbox(head.init(jax.random.key(_KEY), tokens[0]))
    return jax.lax.scan(step, (weights, tx.init(weights)), order)[0][0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(head, weights, tokens):
    """[n, B, N, D] to [n, B, classes], one batch after the other."""
    return jax.lax.map(lambda block: head.apply(weights, block), tokens)


def standing_of(parts: Iterable[tuple[np.ndarray, np.ndarray]], of: str) -> ranking.Standing:
    """Where the labels stand among the classes, of all clips with one.

    Args:
        parts: (logits [B, classes], labels [B]).
    """
    logits, labels = (np.concatenate(x) for x in zip(*parts))
    known = labels >= 0
    if not known.any():
        raise UserError(
            f"A probe needs labels; got none among the {of} videos. Give them in the manifest, or take "
            "attentive_probe out of the recipe's evals."
        )
    return ranking.standings(logits[known], labels[known], np.arange(logits.shape[1]))
