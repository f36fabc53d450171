"""Mixup and CutMix: videos and labels of pairs, mixed on the device.

A batch is cut into groups of consecutive rows; one draw serves a group, and row i of n is mixed with
row n - 1 - i. The draw comes from a key of the group, so it depends on no device, host or microbatch.

Source: mixup (arXiv:1710.09412), CutMix (arXiv:1905.04899), in the 'batch' mode of timm that VideoMAE
and InternVideo2 use. There a group is the clips of one GPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mix(NamedTuple):
    """How much of each row stays its own.

    Attributes:
        share: float32 [B], of the label, and with mixup of each pixel.
        box: int32 [B, 4], top, bottom, left, right of what CutMix takes from the partner; with mixup
            it is empty.
    """

    share: jax.Array
    box: jax.Array


def draw(
    keys: jax.Array,
    *,
    size: tuple[int, int],
    mixup: float = 0.8,
    cutmix: float = 1.0,
    probability: float = 1.0,
    switch: float = 0.5,
) -> Mix:
    """One draw for each key.

    Args:
        keys: [G] random keys, one for each group.
        size: (height, width) of the videos in pixels.
        mixup, cutmix: alphas of the Beta(alpha, alpha) that the share comes from; 0 switches one off.
        probability: of mixing at all.
        switch: of CutMix, where both are on.
    """
    if not mixup and not cutmix:
        probability = 0.0
    height, width = size

    def one(key):
        cut, mix, which, happens, y, x = jax.random.split(key, 6)
        beta = lambda key, alpha: jax.random.beta(key, alpha or 1.0, alpha or 1.0)
        chance = switch if mixup and cutmix else float(bool(cutmix))
        is_cut = jax.random.bernoulli(which, chance)
        share = jnp.where(is_cut, beta(cut, cutmix), beta(mix, mixup))
        side = jnp.sqrt(1.0 - share)
        half_height = (height * side).astype(jnp.int32) // 2
        half_width = (width * side).astype(jnp.int32) // 2
        y, x = jax.random.randint(y, (), 0, height), jax.random.randint(x, (), 0, width)
        box = jnp.stack(
            [
                jnp.maximum(y - half_height, 0),
                jnp.minimum(y + half_height, height),
                jnp.maximum(x - half_width, 0),
                jnp.minimum(x + half_width, width),
            ]
        )
        # What the border cuts off is not taken from the partner.
        kept = 1.0 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)
        happens = jax.random.bernoulli(happens, probability)
        share = jnp.where(happens, jnp.where(is_cut, kept, share), 1.0)
        return Mix(share.astype(jnp.float32), jnp.where(happens & is_cut, box, 0))

    return jax.vmap(one)(keys)


def flip(x: jax.Array, group: int) -> jax.Array:
    """The partner of each row, [B, ...]: groups of `group` rows, each in reverse order."""
    return x.reshape(-1, group, *x.shape[1:])[:, ::-1].reshape(x.shape)


def videos(own: jax.Array, other: jax.Array, mix: Mix) -> jax.Array:
    """Mixed videos.

    Args:
        own, other: float [B, T, H, W, C].
        mix: one draw for each row.
    """
    height, width = own.shape[2:4]
    top, bottom, left, right = (mix.box[:, i, None, None] for i in range(4))
    y, x = jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)  # [B, H, W]
    cut = (bottom > top) & (right > left)
    share = jnp.where(cut, 1.0 - inside, mix.share[:, None, None])
    share = share[:, None, :, :, None].astype(own.dtype)
    return own * share + other * (1 - share)


def targets(
    label: jax.Array,
    other: jax.Array | None = None,
    share: jax.Array | None = None,
    *,
    classes: int,
    smoothing: float = 0.0,
) -> jax.Array:
    """Probabilities of each class, float32 [B, classes].

    Args:
        label, other: int [B], classes of the row and of its partner.
        share: float [B], weight of `label`.
        smoothing: share of the target that is spread evenly over all classes.
    """
    own = jax.nn.one_hot(label, classes)
    if other is not None:
        own = own * share[:, None] + jax.nn.one_hot(other, classes) * (1 - share[:, None])
    return own * (1 - smoothing) + smoothing / classes
