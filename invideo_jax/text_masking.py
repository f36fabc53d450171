"""Masked language modelling: which words are hidden, and what stands in their place."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class WordDraws(NamedTuple):
    """Random draws for every place of a text, each [B, L].

    Attributes:
        chosen: bool, the word is to be predicted (where it may be).
        hidden: bool, a chosen word is replaced by the mask word.
        swapped: bool, a chosen word that is not hidden is replaced by a random one.
        words: int32, the random ones.
    """

    chosen: jax.Array
    hidden: jax.Array
    swapped: jax.Array
    words: jax.Array


def draw_words(
    keys: jax.Array,
    *,
    length: int,
    vocabulary: int,
    ratio: float = 0.5,
    hidden: float = 0.8,
    swapped: float = 0.5,
) -> WordDraws:
    """Independent draws for each place, from one key for each example.

    Args:
        keys: random keys, [B].
        length: L.
        vocabulary: number of words; random ones are drawn from all of them.
        ratio: share of words to predict.
        hidden: share of those that become the mask word.
        swapped: share of the rest that become a random word.

    Source: InternVideo2 multi_modality/models/criterions.py; BERT (arXiv:1810.04805) 3.1 has ratio 0.15.
    """

    def one(key):
        chosen, hide, swap, word = jax.random.split(key, 4)
        flip = lambda k, share: jax.random.bernoulli(k, share, (length,))
        words = jax.random.randint(word, (length,), 0, vocabulary, jnp.int32)
        return WordDraws(flip(chosen, ratio), flip(hide, hidden), flip(swap, swapped), words)

    return jax.vmap(one)(keys)


def mask_words(
    ids: jax.Array, draws: WordDraws, *, pad: int = 0, first: int = 101, mask: int = 103
) -> tuple[jax.Array, jax.Array]:
    """Hides words; padding and the first token ([CLS]) never, the separator like any word.

    Args:
        ids: int [B, L].
        pad, first, mask: ids of padding, [CLS] and [MASK]; the defaults are those of uncased BERT.

    Returns:
        Ids to encode [B, L], and bool [B, L], True where the word is to be predicted.
    """
    chosen = draws.chosen & (ids != pad) & (ids != first)
    hidden = chosen & draws.hidden
    swapped = chosen & draws.swapped & ~hidden
    shown = jnp.where(hidden, mask, jnp.where(swapped, draws.words, ids))
    return shown.astype(ids.dtype), chosen
