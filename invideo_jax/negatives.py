"""Which columns of a table of scores [B, B] may be the negatives of its rows, and how likely each is.

`pairs.hard_negatives` draws from this, also where no device can hold the table.
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


def highest(score: jax.Array, allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The allowed column of the highest `score` [B, B] in each row, int32 [B]; and whether there is one."""
    best = jnp.argmax(jnp.where(allowed, score, -jnp.inf), axis=1)
    return best.astype(jnp.int32), allowed.any(axis=1)
