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
    one_shape: bool = False,
) -> Ids:
    """Several rectangles that last the whole clip, cut or filled up to an exact count.

    Places are taken from the first rectangle on until int(ratio*h*w) are hidden; where all
    rectangles together cover fewer, random places follow.

    Args:
        keys, grid, ratio: as in `tube`.
        blocks: number of rectangles; they may overlap.
        share: of the frame's area that one rectangle covers.
        aspect: range of height / width, drawn uniformly.
        one_shape: the rectangles of an example have the same height and width.

    Source: multi-block masks of V-JEPA (arXiv:2404.08471) 3; the exact count is ours.
    """
    t, h, w = grid
    count = hidden_count(h * w, ratio)

    def score(key):
        sizes, rows, columns, noise = jax.random.split(key, 4)
        shapes = (1 if one_shape else blocks,)
        ratios = jax.random.uniform(sizes, shapes, minval=aspect[0], maxval=aspect[1])
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


def multi_block(
    keys: jax.Array, *, grid: Grid, context: int = 0, predict_rest: bool = False, **options
) -> Ids:
    """`block` with rectangles of one shape, of whose visible tokens at most `context` are kept.

    They are drawn at random: V-JEPA keeps the first ones in t-major order, those of the early frames.

    Args:
        keys: one random key for each example, [B].
        context: largest number of visible tokens; 0 keeps all.
        predict_rest: the tokens above that number are hidden as well (InternVideo-Next); else they
            are neither seen nor predicted (V-JEPA).
        options: of `block`.

    Source: V-JEPA (arXiv:2404.08471) 3, V-JEPA 2 (arXiv:2506.09985); InternVideo-Next
    (arXiv:2512.01342), engines/jepa_mask.py.
    """
    visible, hidden = block(keys, grid=grid, one_shape=True, **options)
    if not 0 < context < visible.shape[1]:
        return visible, hidden
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
    order = jnp.argsort(_noise(keys, visible.shape[1]), axis=-1)
    kept = jnp.sort(gather(visible, order[:, :context]), axis=-1)
    rest = gather(visible, order[:, context:])
    return kept, jnp.sort(jnp.concatenate([hidden, rest], 1), -1) if predict_rest else hidden


def running_cell(keys: jax.Array, *, grid: Grid, ratio: float) -> Ids:
    """The same pattern in every cell of 2x2 places, moving on by one place at each time.

    The places of a cell are counted row by row. At time s of an example that starts at p (0..3,
    drawn), place j is hidden where (j + p + s + 1) mod 4 < int(4*ratio): over 4 times each place is
    hidden int(4*ratio) times.

    Args:
        keys: one random key for each example, [B].
        grid: (t, h, w), h and w even.
        ratio: int(4*ratio) of the 4 places are hidden; from 0.25 to 0.75.

    Raises:
        UserError: a frame that cells do not fill.

    Source: VideoMAE V2 (arXiv:2303.16727) 3.2, masking_generator.py: its decoder's mask.
    """
    t, h, w = grid
    count = hidden_count(4, ratio)
    if h % 2 or w % 2:
        raise UserError(
            f"A running cell needs an even number of patches along each side; got grid={grid}. "
            "Change image_size or patch, or take another mask."
        )
    place = 2 * (jnp.arange(h)[:, None] % 2) + jnp.arange(w)[None] % 2
    moved = place + jnp.arange(1, t + 1)[:, None, None]  # [t, h, w]
    start = jax.vmap(lambda key: jax.random.randint(key, (), 0, 4))(keys)
    mask = (moved + start[:, None, None, None]) % 4 < count
    return ids_of(mask.reshape(len(keys), -1), t * h * w * count // 4)


def thin(hidden: jax.Array, other: Ids) -> jax.Array:
    """The hidden ids that another mask leaves visible, cut or filled up to that mask's share.

    With a tube and a running cell over a multiple of 4 times nothing is cut or filled. Else the
    lowest ids are cut, and the lowest of the others fill up.

    Args:
        hidden: int32 [B, M], ascending.
        other: ids of a mask over the same N tokens.

    Returns:
        int32 [B, M'], ascending, M' = M * (share that the other mask leaves visible), rounded.
    """
    visible, dropped = other
    tokens = visible.shape[1] + dropped.shape[1]
    count = max(1, round(hidden.shape[1] * visible.shape[1] / tokens))
    wanted = gather(mask_of(visible, tokens), hidden)
    order = jnp.argsort(~wanted, axis=-1, stable=True)[:, :count]
    return jnp.sort(gather(hidden, order), axis=-1)


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
    "multi_block": multi_block,
    "running_cell": running_cell,
    "attention": attention,
}


def get(name: str) -> Callable[..., Ids]:
    """The mask function called `name`; UserError for an unknown one."""
    if name not in MASKS:
        raise UserError(f"The mask must be a known one; got mask={name!r}.{nearest(name, MASKS)}")
    return MASKS[name]
