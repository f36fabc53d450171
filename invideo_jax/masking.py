"""Which tokens are hidden: pure functions of one random key for each example.

Each maker of `MASKS` gives exactly as many hidden tokens as published, int(ratio * n), for every
example, and returns ids, ascending: visible int32 [B, V] and hidden int32 [B, M].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

Grid = tuple[int, int, int]
Ids = tuple[jax.Array, jax.Array]


def hidden_count(places: int, ratio: float) -> int:
    """int(ratio * places), as published.

    Raises:
        UserError: nothing would be hidden, or nothing visible.
    """
    count = int(ratio * places)
    if not 0 < count < places:
        raise UserError(
            f"The mask ratio must hide some and leave some of {places} places; got ratio={ratio}, "
            f"which hides {count}. Use a ratio from {1 / places:.4f} to {1 - 1 / places:.4f}."
        )
    return count


def ids_of(mask: jax.Array, hidden: int) -> Ids:
    """Ids of visible and hidden tokens, ascending.

    Args:
        mask: bool [B, N], True = hidden, with exactly `hidden` True in each row.
    """
    order = jnp.argsort(mask, axis=-1, stable=True).astype(jnp.int32)
    visible = mask.shape[-1] - hidden
    return order[:, :visible], order[:, visible:]


def mask_of(hidden: jax.Array, tokens: int) -> jax.Array:
    """bool [B, N], True at the ids `hidden` [B, M]."""
    rows = jnp.arange(hidden.shape[0])[:, None]
    return jnp.zeros((hidden.shape[0], tokens), bool).at[rows, hidden].set(True)


def gather(tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows `ids` [B, M] of `tokens` [B, N, ...], as [B, M, ...]."""
    return jax.vmap(lambda row, i: jnp.take(row, i, axis=0, mode="clip"))(tokens, ids)


def scatter(base: jax.Array, tokens: jax.Array, ids: jax.Array) -> jax.Array:
    """`base` [B, N, ...] with rows `ids` [B, M] replaced by `tokens` [B, M, ...]."""
    put = lambda row, new, i: row.at[i].set(new.astype(row.dtype), unique_indices=True)
    return jax.vmap(put)(base, tokens, ids)


def _highest(score: jax.Array, count: int) -> jax.Array:
    """bool like `score` [B, N], True at the `count` highest of each row; ties: the lower id."""
    order = jnp.argsort(-score, axis=-1, stable=True)[:, :count]
    return mask_of(order, score.shape[-1])


def _noise(keys: jax.Array, size: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.uniform(key, (size,)))(keys)


def tube(keys: jax.Array, *, grid: Grid, ratio: float) -> Ids:
    """One random spatial pattern, repeated over all times.

    Args:
        keys: one random key for each example, [B].
        grid: (t, h, w).
        ratio: int(ratio*h*w) places are hidden.

    Source: VideoMAE masking_generator.py.
    """
    t, h, w = grid
    count = hidden_count(h * w, ratio)
    mask = _highest(_noise(keys, h * w), count)
    return ids_of(jnp.tile(mask, (1, t)), count * t)


def random(keys: jax.Array, *, grid: Grid, ratio: float) -> Ids:
    """int(ratio*t*h*w) tokens anywhere in the clip; arguments as in `tube`."""
    count = hidden_count(int(np.prod(grid)), ratio)
    return ids_of(_highest(_noise(keys, int(np.prod(grid))), count), count)


def block(
    keys: jax.Array,
    *,
    grid: Grid,
    ratio: float,
    blocks: int = 8,
    share: float = 0.15,
    aspect: tuple[float, float] = (0.75, 1.5),
) -> Ids:
    """Several rectangles that last the whole clip, cut or filled up to an exact count.

    Places are taken from the first rectangle on until int(ratio*h*w) are hidden; where all
    rectangles together cover fewer, random places follow.

    Args:
        keys, grid, ratio: as in `tube`.
        blocks: number of rectangles; they may overlap.
        share: of the frame's area that one rectangle covers.
        aspect: range of height / width, drawn uniformly.

    Source: multi-block masks of V-JEPA (arXiv:2404.08471) 3; the exact count is ours.
    """
    t, h, w = grid
    count = hidden_count(h * w, ratio)

    def score(key):
        sizes, rows, columns, noise = jax.random.split(key, 4)
        ratios = jax.random.uniform(sizes, (blocks,), minval=aspect[0], maxval=aspect[1])
        area = share * h * w
        tall = jnp.clip(jnp.round(jnp.sqrt(area * ratios)), 1, h)
        wide = jnp.clip(jnp.round(jnp.sqrt(area / ratios)), 1, w)
        top = jnp.floor(jax.random.uniform(rows, (blocks,)) * (h - tall + 1))
        left = jnp.floor(jax.random.uniform(columns, (blocks,)) * (w - wide + 1))
        y, x = jnp.arange(h)[:, None, None], jnp.arange(w)[None, :, None]
        inside = (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)  # [h, w, blocks]
        rank = jnp.where(inside, blocks - jnp.arange(blocks), 0).max(-1)
        return rank.reshape(-1) + jax.random.uniform(noise, (h * w,))

    mask = _highest(jax.vmap(score)(keys), count)
    return ids_of(jnp.tile(mask, (1, t)), count * t)


def attention(
    keys: jax.Array, *, grid: Grid, ratio: float, weights: jax.Array, per_frame: bool = True
) -> Ids:
    """Keeps tokens drawn without replacement, with probability proportional to `weights`.

    Drawn as the highest of log(weight) + Gumbel noise, which has the same distribution.

    Args:
        keys, grid, ratio: as in `tube`.
        weights: attention of a teacher, [B, N], not negative.
        per_frame: each time keeps the same number, else the draw is over the clip.

    Source: UMT (arXiv:2303.16058) 3.2; InternVideo2 (arXiv:2403.15377) stage 1.
    """
    t, h, w = grid
    rows, places = (t, h * w) if per_frame else (1, t * h * w)
    count = hidden_count(places, ratio)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (rows, places)))(keys)
    tiny = jnp.finfo(jnp.float32).tiny
    score = jnp.log(jnp.maximum(weights.reshape(-1, rows, places), tiny)) + noise
    kept = _highest(score.reshape(-1, places), places - count)
    return ids_of(~kept.reshape(weights.shape), count * rows)


MASKS: dict[str, Callable[..., Ids]] = {
    "tube": tube,
    "random": random,
    "block": block,
    "attention": attention,
}


def get(name: str) -> Callable[..., Ids]:
    """The mask function called `name`; UserError for an unknown one."""
    if name not in MASKS:
        raise UserError(f"The mask must be a known one; got mask={name!r}.{nearest(name, MASKS)}")
    return MASKS[name]
