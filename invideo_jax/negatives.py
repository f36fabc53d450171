"""Negatives for matching: for each example another one that is like it but not it.

One negative comes from each row of a table of scores [B, B]: rows are examples, columns candidates.
"""

import jax
import jax.numpy as jnp


def candidates(ids: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """bool [B, B], True where a column may be the negative of a row.

    Args:
        ids: [B]; examples with equal ones show the same, and are no negatives of each other.
        valid: bool [B], False for padding, which is nobody's negative.
    """
    allowed = ids[:, None] != ids[None, :]
    return allowed if valid is None else allowed & valid[None, :]


def weights(
    scores: jax.Array, ids: jax.Array, valid: jax.Array | None = None, *, floor: float = 0.0
) -> jax.Array:
    """How likely each column is drawn (not normalised): softmax of the row, 0 where it may not be.

    Args:
        scores: similarities over temperature, [B, B].
        ids, valid: as in `candidates`.
        floor: added to each weight, so that unlike candidates are drawn now and then. InternVideo2
            adds 1e-4 within the softmax, where it changes nothing: that is 0. VideoChat2 has 1e-4.

    Source: InternVideo2 and VideoChat2, multi_modality/models/criterions.py.
    """
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if valid is not None:
        scores = jnp.where(valid[None, :], scores, jnp.finfo(scores.dtype).min)
    return jnp.where(candidates(ids, valid), jax.nn.softmax(scores, axis=1) + floor, 0.0)


def hard(
    keys: jax.Array,
    scores: jax.Array,
    ids: jax.Array,
    valid: jax.Array | None = None,
    *,
    floor: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """One negative for each row, drawn with probability proportional to `weights`.

    Drawn as the highest of log(weight) + Gumbel noise. Without a floor the scores stand for the
    logarithm: weights that vanish in float32 still have their order, and no row runs dry.

    Args:
        keys: one random key for each row, [B].
        scores, ids, valid, floor: as in `weights`.

    Returns:
        Columns, int32 [B]; and bool [B], False for a row that has no candidate.
    """
    scores = jax.lax.stop_gradient(scores)
    score = jnp.log(weights(scores, ids, valid, floor=floor)) if floor else scores
    return highest(score + _gumbel(keys, scores.shape[1]), candidates(ids, valid))


def uniform(
    keys: jax.Array, ids: jax.Array, valid: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One candidate for each row, all equally likely; arguments and result as in `hard`."""
    return highest(_gumbel(keys, len(ids)), candidates(ids, valid))


def highest(score: jax.Array, allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The allowed column of the highest `score` [B, B] in each row; result as in `hard`."""
    best = jnp.argmax(jnp.where(allowed, score, -jnp.inf), axis=1)
    return best.astype(jnp.int32), allowed.any(axis=1)


def _gumbel(keys: jax.Array, size: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.gumbel(key, (size,)))(keys)
