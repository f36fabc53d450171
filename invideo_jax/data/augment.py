"""RandAugment and random erasing for fine-tuning, in NumPy, the same for all frames of a clip.

Source: Cubuk et al., "RandAugment" (2019), with the operations and ranges of timm's increasing set,
as the fine-tuning recipes of VideoMAE and InternVideo2 use it ('rand-m7-n4-mstd0.5-inc1'); Zhong et
al., "Random Erasing" (2017). Pillow's arithmetic is followed.
"""

import dataclasses
import math
import re

import numpy as np

_FILL = 128  # grey, for places that move into the picture
_TOP = 10.0  # largest magnitude
_APPLY = 0.5  # each drawn operation is carried out with this probability
# Only to give erased pixels the statistics of normalised noise: ImageNet's mean and deviation.
_MEAN, _STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


@dataclasses.dataclass(frozen=True)
class Policy:
    """magnitude 0 to 10, its Gaussian deviation, and how many operations are drawn."""

    magnitude: float
    layers: int
    deviation: float


def parse_policy(text: str) -> Policy:
    """Reads 'rand-m7-n4-mstd0.5-inc1': magnitude 7, 4 operations, deviation 0.5, the increasing set.

    Raises:
        ValueError: another form.
    """
    head, *parts = text.split("-")
    found = [re.fullmatch(r"(mstd|inc|m|n)(\d+(?:\.\d+)?)", part) for part in parts]
    if head != "rand" or not all(found):
        raise ValueError(
            f"randaugment must look like 'rand-m7-n4-mstd0.5-inc1' or be ''; got randaugment={text!r}."
        )
    values = {match[1]: float(match[2]) for match in found}
    policy = Policy(values.get("m", _TOP), int(values.get("n", 2)), values.get("mstd", 0.0))
    if values.get("inc") != 1:
        raise ValueError(
            f"randaugment must end in -inc1 (only the increasing set exists); got {text!r}."
        )
    if policy.magnitude > _TOP or policy.layers < 1:
        raise ValueError(f"randaugment needs m of 0 to 10 and n of at least 1; got {text!r}.")
    return policy


def rand_augment(clip: np.ndarray, policy: Policy, rng: np.random.Generator) -> np.ndarray:
    """Applies `policy.layers` random operations, each with probability 1/2, to all frames alike.

    Args:
        clip: uint8 [T, H, W, 3].
        policy: see `parse_policy`.
        rng: all randomness.

    Returns:
        uint8 [T, H, W, 3].
    """
    for name in rng.choice(list(OPERATIONS), size=policy.layers):
        draws = rng.random(), rng.normal(policy.magnitude, policy.deviation), rng.random()
        if draws[0] < _APPLY:
            level = min(max(draws[1], 0.0), _TOP) / _TOP
            clip = OPERATIONS[name](clip, level, -1.0 if draws[2] < 0.5 else 1.0)
    return clip


def _auto_contrast(clip, level, sign):
    low, high = (
        edge(clip, axis=(1, 2), keepdims=True).astype(np.float32) for edge in (np.min, np.max)
    )
    scale = np.where(high > low, 255.0 / np.maximum(high - low, 1), 1.0)
    low = np.where(high > low, low, 0)
    return np.clip(np.floor((clip - low) * scale + 1e-3), 0, 255).astype(np.uint8)


def _equalize(clip, level, sign):
    out = np.empty_like(clip)
    for t, c in np.ndindex(len(clip), 3):
        counts = np.bincount(clip[t, :, :, c].ravel(), minlength=256)
        used = counts[counts > 0]
        step = (used.sum() - used[-1]) // 255
        if len(used) <= 1 or step == 0:
            out[t, :, :, c] = clip[t, :, :, c]
            continue
        below = np.concatenate([[0], np.cumsum(counts)[:-1]])
        table = np.minimum((step // 2 + below) // step, 255).astype(np.uint8)
        out[t, :, :, c] = table[clip[t, :, :, c]]
    return out


def _posterize(clip, level, sign):
    bits = 4 - int(level * 4)
    return clip & np.uint8(256 - 2 ** (8 - bits) if bits else 0)


def _solarize(clip, level, sign):
    return np.where(clip < 256 - int(level * 256), clip, 255 - clip)


def _solarize_add(clip, level, sign):
    brighter = np.minimum(clip.astype(np.int16) + int(level * 110), 255).astype(np.uint8)
    return np.where(clip < 128, brighter, clip)


def _blend(base, clip, level, sign):
    """Away from (sign +) or towards (sign -) `base` by 0.9 * level."""
    factor = np.float32(max(0.1, 1.0 + sign * 0.9 * level))
    base = np.asarray(base, np.float32)
    return np.clip(base + factor * (clip - base), 0, 255).astype(np.uint8)


def _grey(clip):
    weights = np.array([19595, 38470, 7471], np.uint32)
    return ((clip.astype(np.uint32) @ weights + 0x8000) >> 16)[..., None]


def _color(clip, level, sign):
    return _blend(_grey(clip), clip, level, sign)


def _contrast(clip, level, sign):
    mean = np.floor(_grey(clip).mean(axis=(1, 2, 3), keepdims=True) + 0.5)
    return _blend(mean, clip, level, sign)


def _brightness(clip, level, sign):
    return _blend(0, clip, level, sign)


def _sharpness(clip, level, sign):
    smooth = clip.astype(np.float32)
    if min(clip.shape[1:3]) > 2:
        total = (
            4 * smooth[:, 1:-1, 1:-1]
        )  # kernel: 5 in the middle, 1 around, by 13; the edge is left as it is
        height, width = clip.shape[1:3]
        for dy, dx in np.ndindex(3, 3):
            total = total + clip[:, dy : height - 2 + dy, dx : width - 2 + dx]
        smooth[:, 1:-1, 1:-1] = np.floor(total / 13 + 0.5)
    return _blend(smooth, clip, level, sign)


def warp(clip: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """Moves pixels: the output at (x, y) is the input at (a x + b y + c, d x + e y + f), bilinear, grey outside.

    Args:
        clip: uint8 [T, H, W, 3].
        matrix: (a, b, c, d, e, f), for pixel centres at half integers.
    """
    height, width = clip.shape[1:3]
    a, b, c, d, e, f = matrix
    x, y = np.arange(width) + 0.5, (np.arange(height) + 0.5)[:, None]
    sx, sy = a * x + b * y + c, d * x + e * y + f
    inside = (sx >= 0) & (sx < width) & (sy >= 0) & (sy < height)
    sx, sy = np.clip(sx - 0.5, 0, width - 1), np.clip(sy - 0.5, 0, height - 1)
    x0, y0 = sx.astype(np.int32), sy.astype(np.int32)
    x1, y1 = np.minimum(x0 + 1, width - 1), np.minimum(y0 + 1, height - 1)
    wx, wy = (
        ((sx - x0) * 256).astype(np.int32)[..., None],
        ((sy - y0) * 256).astype(np.int32)[..., None],
    )
    out = np.full_like(clip, _FILL)
    for t, frame in enumerate(clip):
        frame = frame.astype(np.int32)
        top = frame[y0, x0] * (256 - wx) + frame[y0, x1] * wx
        low = frame[y1, x0] * (256 - wx) + frame[y1, x1] * wx
        moved = (top * (256 - wy) + low * wy + 32768) >> 16
        out[t][inside] = moved[inside]
    return out


def _rotate(clip, level, sign):
    angle = math.radians(sign * level * 30)  # counter-clockwise
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = clip.shape[2] / 2, clip.shape[1] / 2
    return warp(clip, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _shear_x(clip, level, sign):
    return warp(clip, (1, sign * level * 0.3, 0, 0, 1, 0))


def _shear_y(clip, level, sign):
    return warp(clip, (1, 0, 0, sign * level * 0.3, 1, 0))


def _translate_x(clip, level, sign):
    return warp(clip, (1, 0, sign * level * 0.45 * clip.shape[2], 0, 1, 0))


def _translate_y(clip, level, sign):
    return warp(clip, (1, 0, 0, 0, 1, sign * level * 0.45 * clip.shape[1]))


# name -> (clip, level in [0, 1], sign) -> clip
OPERATIONS = {
    "auto_contrast": _auto_contrast,
    "equalize": _equalize,
    "invert": lambda clip, level, sign: 255 - clip,
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": _brightness,
    "sharpness": _sharpness,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}


def random_erase(clip: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """With `probability`, replaces one box, the same in all frames, by noise.

    The box covers 2 to 33 % of the picture with a side ratio of 0.3 to 3.3.

    Args:
        clip: uint8 [T, H, W, 3].
        probability: 0 to 1.
        rng: all randomness.
    """
    if rng.random() >= probability:
        return clip
    frames, height, width = clip.shape[:3]
    for _ in range(100):
        area = rng.uniform(0.02, 1 / 3) * height * width
        ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < h < height and 0 < w < width:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            noise = rng.standard_normal((frames, h, w, 3)) * _STD + _MEAN
            clip = clip.copy()
            clip[:, top : top + h, left : left + w] = np.clip(np.rint(noise), 0, 255)
            return clip
    return clip
