"""Which of three pairs belong together: matching with hard negatives from the whole batch, in parts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from invideo_jax import losses, pairs
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.models.attention import fold
from invideo_jax.sharding import constrain

PyTree = Any


class Negatives(NamedTuple):
    """The row of another clip for each text, of another text for each clip; which of them there are.

    Attributes:
        clips, texts: int32 [B].
        has_clip, has_text: bool [B].
    """

    clips: jax.Array
    texts: jax.Array
    has_clip: jax.Array
    has_text: jax.Array


def draw(keys: jax.Array, clips: jax.Array, texts: jax.Array, **options: Any) -> Negatives:
    """One negative for each text and for each clip, from the whole batch.

    Args:
        keys: [B], one random key for each row.
        clips, texts: embeddings [B, P].
        options: of `pairs.hard_negatives`.
    """
    clip, has_clip = pairs.hard_negatives(fold(keys, 0), texts, clips, **options)
    text, has_text = pairs.hard_negatives(fold(keys, 1), clips, texts, **options)
    return Negatives(clip, text, has_clip, has_text)


def scores(
    match: Callable[..., jax.Array],
    texts: tuple[jax.Array, jax.Array],
    clips: PyTree,
    negatives: Negatives,
    *,
    keys: jax.Array | None,
    parts: int,
    form: str,
) -> jax.Array:
    """Scores of all pairs, of each text with another clip, of each clip with another text.

    Pairs go through the model in 3 * parts pieces, whose activations are not kept for the backward
    pass: memory is for one piece.

    Args:
        match: (tokens of texts, their validity, clips, keys) -> [n, 2].
        texts: tokens [B, L, D] and validity [B, L].
        clips: a tree of what is known of each clip, [B, ...] each.
        keys: [B] random keys of dropout, or None.
        parts: divides B.
        form: of `pairs.take_rows`.

    Returns:
        float [3, B, 2].

    Raises:
        UserError: a batch that cannot be cut so.

    Source: InternVideo2 multi_modality/models/criterions.py (VTM).
    """
    size = len(texts[0])
    if size % parts:
        raise UserError(
            f"The batch must be a multiple of match_parts; got batch={size}, match_parts={parts}. "
            "Change either."
        )
    other = lambda tree, rows: jax.tree.map(lambda x: pairs.take_rows(x, rows, form=form), tree)
    three = lambda *kinds: jax.tree.map(lambda *x: jnp.stack(x), *kinds)
    all_texts = three(texts, texts, other(texts, negatives.texts))
    all_clips = three(clips, other(clips, negatives.clips), clips)
    all_keys = None if keys is None else jnp.stack([fold(keys, kind) for kind in range(3)])

    def cut(x):  # row b of kind k goes to piece (k, b % parts), so that devices keep their rows
        x = x.reshape(3, size // parts, parts, *x.shape[2:]).swapaxes(1, 2)
        return x.reshape(3 * parts, size // parts, *x.shape[3:])

    @jax.checkpoint
    def piece(_, rows):
        (text, valid), clip, keys = rows
        on_rows = lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1))
        return None, match(on_rows(text), on_rows(valid), jax.tree.map(on_rows, clip), keys)

    pieces = jax.tree.map(cut, (all_texts, all_clips, all_keys))
    found = jax.lax.scan(piece, None, pieces)[1]
    found = found.reshape(3, parts, size // parts, 2).swapaxes(1, 2).reshape(3, size, 2)
    return constrain(found, None, "batch", None)


def loss(scores: jax.Array, negatives: Negatives, valid: jax.Array) -> tuple[Mean, Mean]:
    """The loss over pairs that there are, and the share of them that the scores get right.

    Args:
        scores: [3, B, 2], of `scores`.
        valid: bool [B], rows with a clip and a text.
    """
    weights = jnp.stack([valid, valid & negatives.has_clip, valid & negatives.has_text])
    right = (scores[..., 1] > scores[..., 0]) == jnp.array([True, False, False])[:, None]
    share = losses.mean(right.astype(jnp.float32).reshape(-1), weights.reshape(-1))
    return losses.matching(scores.reshape(-1, 2), weights.reshape(-1)), share
