"""Between videos and patches; normalisation constants."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from invideo_jax import masking
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

# (mean, standard deviation) of each RGB channel, in [0, 1].
NORMALISATION: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def constants(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation called `name`, each float32 [3].

    Raises:
        UserError: unknown name.
    """
    if name not in NORMALISATION:
        raise UserError(
            "The normalisation must be a known pair of constants; "
            f"got normalisation={name!r}.{nearest(name, NORMALISATION)}"
        )
    mean, std = NORMALISATION[name]
    return np.asarray(mean, np.float32), np.asarray(std, np.float32)


def normalise(video: jax.Array, name: str, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """uint8 pixels [..., C] to (x / 255 - mean) / std, in `dtype`, computed in at least float32."""
    mean, std = constants(name)
    return ((zero_to_one(video, dtype) - mean) / std).astype(dtype)


def zero_to_one(video: jax.Array, dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """uint8 pixels as x / 255 in `dtype`, but in no less than float32."""
    return video.astype(jnp.promote_types(dtype, jnp.float32)) / 255.0


def unnormalise(video: jax.Array, name: str) -> jax.Array:
    """The inverse of `normalise`, to float [..., C] in [0, 1]."""
    mean, std = constants(name)
    return video * std + mean


def patchify(video: jax.Array, *, tubelet: int, patch: int) -> jax.Array:
    """Cuts videos into cubes.

    Args:
        video: [B, T, H, W, C]; T, H, W are multiples of the cube.
        tubelet: frames of a cube.
        patch: side of a cube in pixels.

    Returns:
        [B, N, tubelet*patch*patch*C]; tokens t-major, pixels of a cube as (frame, row, column, C).
    """
    return rearrange(
        video,
        "b (t pt) (h ph) (w pw) c -> b (t h w) (pt ph pw c)",
        pt=tubelet,
        ph=patch,
        pw=patch,
    )


def unpatchify(
    patches: jax.Array, *, grid: tuple[int, int, int], tubelet: int, patch: int
) -> jax.Array:
    """The inverse of `patchify`; `grid` is (t, h, w)."""
    t, h, w = grid
    return rearrange(
        patches,
        "b (t h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c",
        t=t,
        h=h,
        w=w,
        pt=tubelet,
        ph=patch,
        pw=patch,
    )


class Geometry:
    """What an encoder says of the videos it takes: a base of all encoders.

    Attributes:
        frames, image_size, channels: T, H = W, and C of the clips.
        tubelet, patch: frames and side of one cube.
        normalisation, dtype: constants that uint8 videos are normalised with, and the result's type.
    """

    frames: int
    image_size: int
    channels: int
    tubelet: int
    patch: int
    normalisation: str
    dtype: jnp.dtype

    takes_images = False  # whether clips of one frame are taken beside those of `frames`

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w): cubes along time, height and width."""
        side = self.image_size // self.patch
        return self.frames // self.tubelet, side, side

    @property
    def tokens(self) -> int:
        """N = t*h*w, without class tokens."""
        t, h, w = self.grid
        return t * h * w

    @property
    def patch_pixels(self) -> int:
        """Numbers in one cube: tubelet*patch*patch*C."""
        return self.tubelet * self.patch**2 * self.channels


def visible_cubes(video: jax.Array, visible: jax.Array | None, model: Geometry) -> jax.Array:
    """Normalised cubes of the visible ids (of all, without), [B, V, tubelet*patch*patch*C].

    Args:
        video: uint8, or already normalised float, [B, T, H, W, C].
        visible: int32 [B, V].
    """
    x = patchify(video, tubelet=model.tubelet, patch=model.patch)
    if visible is not None:
        x = masking.gather(x, visible)
    if x.dtype != jnp.uint8:
        return x
    by_channel = x.reshape(*x.shape[:2], -1, model.channels)
    return normalise(by_channel, model.normalisation, model.dtype).reshape(x.shape)


def blank_video(model: Geometry) -> jax.Array:
    """One video of zeros, float32 [1, T, H, W, C]."""
    return jnp.zeros((1, model.frames, model.image_size, model.image_size, model.channels))


def check_video(video: jax.Array, model: Geometry) -> None:
    """Raises UserError unless videos have the model's shape."""
    want = (model.frames, model.image_size, model.image_size, model.channels)
    if video.ndim != 5 or video.shape[1:] != want:
        raise UserError(
            f"A video batch must be [B, T, H, W, C] = [B, {', '.join(map(str, want))}]; got "
            f"shape={list(video.shape)}. Make clips of that size, or build the model for these."
        )
