"""Which examples of a batch belong together: one class number for each row, equal for positives."""

import jax
import jax.numpy as jnp


def text_ids(ids: jax.Array, valid: jax.Array) -> jax.Array:
    """Class numbers int32 [B], equal for equal texts; a row without a text has a class of its own.

    Texts are compared by 64 bits of each: among a million, two different ones are taken for equal
    with a probability of 3e-8.

    Args:
        ids: int [B, L].
        valid: bool [B, L]; words that are not valid are not compared.
    """
    words = jnp.where(valid, ids, -1).astype(jnp.uint32)
    found = _numbered(*(_hash(words, seed) for seed in (0x9E3779B9, 0x85EBCA6B)))
    return jnp.where(valid.any(1), found, len(ids) + jnp.arange(len(ids), dtype=jnp.int32))


def merged(first: jax.Array, second: jax.Array) -> jax.Array:
    """Class numbers int32 [B] of rows that are linked by equal numbers in either.

    Links go on: rows 1 and 3 are of one class where 2 equals 1 in the first and 3 in the second.

    Args:
        first, second: int [B].
    """
    size = len(first)
    groups = [_numbered(x) for x in (first, second)]

    def spread(labels):
        for group in groups:
            labels = jax.ops.segment_min(labels, group, num_segments=size)[group]
        return labels

    def step(carry):
        labels, _ = carry
        new = spread(labels)
        return new, (new != labels).any()

    start = jnp.arange(size, dtype=jnp.int32), jnp.bool_(True)
    return jax.lax.while_loop(lambda carry: carry[1], step, start)[0]


def _numbered(*columns: jax.Array) -> jax.Array:
    """int32 [B], equal where all columns [B] are equal; from 0 on."""
    *columns, rows = jax.lax.sort((*columns, jnp.arange(len(columns[0]))), num_keys=len(columns))
    new = sum((c[1:] != c[:-1]).astype(jnp.int32) for c in columns) > 0
    number = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])
    return jnp.zeros(len(rows), jnp.int32).at[rows].set(number, unique_indices=True)


def _hash(words: jax.Array, seed: int) -> jax.Array:
    """uint32 [B] of words uint32 [B, L]: each word is mixed into what was there (as in MurmurHash3)."""

    def mix(state, word):
        state = state ^ (word * jnp.uint32(0xCC9E2D51))
        state = (state ^ (state >> 15)) * jnp.uint32(0x2C1B3C6D)
        state = (state ^ (state >> 12)) * jnp.uint32(0x297A2D39)
        return state ^ (state >> 15), None

    start = jnp.full(words.shape[0], seed, jnp.uint32)
    return jax.lax.scan(mix, start, words.T)[0]
