"""Position tables: their values, and tables of other lengths and sizes."""

import functools
import math

import numpy as np

from invideo_jax.errors import UserError

Grid = tuple[int, int, int]


@functools.lru_cache(maxsize=16)
def sinusoid(tokens: int, width: int) -> np.ndarray:
    """The fixed table of VideoMAE: sine on even, cosine on odd channels, over the flattened index.

    Entry (p, j) is the sine or cosine of p / 10000^(2 * floor(j / 2) / width), computed in float64.

    Args:
        tokens: N, of the t-major flattened grid.
        width: D, even or odd.

    Returns:
        float32 [N, D], read-only.

    Source: Attention is all you need (arXiv:1706.03762) 3.5; VideoMAE modeling_finetune.py.
    """
    channel = np.arange(width)
    angle = np.arange(tokens)[:, None] / np.power(10000.0, 2 * (channel // 2) / width)
    table = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
    table.setflags(write=False)
    return table


# ------------------------------------------------------------- initial values of learnable tables


def sincos_1d(length: int, width: int) -> np.ndarray:
    """[sin(p w_k), cos(p w_k)] in halves, w_k = 10000^(-k / (width / 2)), float32 [length, width].

    Source: InternVideo2 pos_embed.py, in float32 as there.
    """
    if width % 2:
        raise UserError(f"The width of a sine-cosine table must be even; got width={width}.")
    order = np.arange(width // 2, dtype=np.float32) / np.float32(width / 2)
    angle = np.arange(length, dtype=np.float32)[:, None] / np.float32(10000) ** order
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_2d(height: int, width: int, channels: int) -> np.ndarray:
    """First half the code of the column, second half that of the row, float32 [h*w, channels]."""
    _check_channels(channels, 4)
    columns, rows = sincos_1d(width, channels // 2), sincos_1d(height, channels // 2)
    pair = np.broadcast_arrays(columns[None, :], rows[:, None])
    return np.concatenate(pair, axis=-1).reshape(-1, channels)


@functools.lru_cache(maxsize=8)
def sincos_3d(grid: Grid, channels: int, *, prefix: int = 1) -> np.ndarray:
    """A quarter of the channels codes time, the rest column and row; `prefix` rows of zeros first.

    Args:
        grid: (t, h, w).
        channels: D, a multiple of 16.

    Returns:
        float32 [prefix + t*h*w, D], read-only.

    Source: InternVideo2 `get_3d_sincos_pos_embed`.
    """
    _check_channels(channels, 16)
    t, h, w = grid
    time, space = sincos_1d(t, channels // 4), sincos_2d(h, w, channels // 4 * 3)
    table = np.concatenate([np.repeat(time, h * w, axis=0), np.tile(space, (t, 1))], axis=1)
    table = np.concatenate([np.zeros((prefix, channels), np.float32), table])
    table.setflags(write=False)
    return table


def _check_channels(channels: int, unit: int) -> None:
    if channels % unit:
        raise UserError(
            f"The width of a sine-cosine table must be a multiple of {unit}; got width={channels}."
        )


# --------------------------------------------------------------- tables of other lengths and sizes


def interpolate(
    table: np.ndarray,
    *,
    old_times: int,
    grid: Grid,
    prefix: int = 1,
    old_space: tuple[int, int] | None = None,
) -> np.ndarray:
    """A learned table for another grid: linear in time, then bicubic in space.

    Args:
        table: [prefix + t'*h'*w', D], t-major.
        old_times: t', frames / tubelet of the model that the table comes from. A table does not
            say it: with a wrong one space and time would be mixed up.
        grid: (t, h, w) wanted.
        prefix: rows (class token) that stay as they are, at the start.
        old_space: (h', w'); default the square that remains.

    Returns:
        [prefix + t*h*w, D] in the dtype of `table`.

    Raises:
        UserError: rows that `old_times` and `old_space` do not explain.

    Source: InternVideo2 `interpolate_pos_embed`; PyTorch `interpolate`, align_corners=False, without
    antialiasing.
    """
    rows = len(table) - prefix
    each = rows // old_times if old_times > 0 and rows % old_times == 0 else 0
    height, width = old_space or (math.isqrt(each),) * 2
    if each < 1 or height * width != each:
        square = [t for t in range(1, 129) if rows % t == 0 and _square(rows // t)]
        raise UserError(
            f"old_times must be the time slots of the model that the table comes from; got "
            f"old_times={old_times}"
            + (f", old_space={old_space}" if old_space else "")
            + f" for {rows} places. Lengths that leave a square: {', '.join(map(str, square))}."
        )
    t, h, w = grid
    x = table[prefix:].reshape(old_times, height, width, -1).astype(np.float64)
    x = _resampled(x, 0, *_linear(old_times, t))
    x = _resampled(x, 2, *_cubic(width, w))
    x = _resampled(x, 1, *_cubic(height, h))
    return np.concatenate([table[:prefix], x.reshape(t * h * w, -1).astype(table.dtype)])


def _square(n: int) -> bool:
    return math.isqrt(n) ** 2 == n


def _resampled(x: np.ndarray, axis: int, weights: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Along an axis the sums of `weights` [new, taps] times the entries at `places` [new, taps]."""
    across = (-1,) + (1,) * (x.ndim - axis - 1)
    taps = range(weights.shape[1])
    parts = (weights[:, i].reshape(across) * np.take(x, places[:, i], axis=axis) for i in taps)
    return functools.reduce(np.add, parts)


def _middles(old: int, new: int) -> np.ndarray:
    """Where the middles of `new` cells lie, counted in `old` cells from the middle of the first.

    Middles and weights are in float32, rounded where PyTorch rounds (it fuses products and sums): so
    tables are within 1e-6 of the published way, with float64 weights within 2e-6.
    """
    scale = np.float32(old) / np.float32(new)
    return (np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)


def cubic_matrix(old: int, new: int) -> np.ndarray:
    """What `new` samples are of `old` ones along one axis, float32 [new, old]; rows add up to 1.

    Source: PyTorch `interpolate`, mode bicubic, align_corners=False, without antialiasing.
    """
    made = np.zeros((new, old), np.float32)
    weights, places = _cubic(old, new)
    np.add.at(made, (np.arange(new)[:, None], places), weights)  # places at a border coincide
    return made


def _linear(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    middle = np.maximum(_middles(old, new), 0)
    low = np.floor(middle).astype(int)
    share = middle - low.astype(np.float32)
    weights = np.stack([1 - share, share], axis=1)
    return weights, np.minimum(np.stack([low, low + 1], axis=1), old - 1)


def _cubic(old: int, new: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys' kernel with a = -0.75; places outside count as the nearest one inside."""
    a = np.float32(-0.75)
    middle = _middles(old, new)
    low = np.floor(middle)
    share = middle - low
    near = lambda d: _fused(_fused(a + 2, d, -(a + 3)) * d, d, 1)
    far = lambda d: _fused(_fused(_fused(a, d, -5 * a), d, 8 * a), d, -4 * a)
    weights = [far(share + 1), near(share), near(1 - share), far(2 - share)]
    places = low.astype(int)[:, None] + np.arange(-1, 3)
    return np.stack(weights, axis=1), np.clip(places, 0, old - 1)


def _fused(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z, rounded to float32 once."""
    return (np.float64(x) * y + z).astype(np.float32)


def inflate(kernel: np.ndarray, tubelet: int, *, centre: bool = False) -> np.ndarray:
    """The patch kernel of frames as one of cubes of `tubelet` frames.

    Args:
        kernel: [rows*columns*C, D], of one frame.
        centre: the middle frame (the second of two) has it all; else every frame an equal part.

    Returns:
        [tubelet*rows*columns*C, D].

    Source: InternVideo2 `inflate_weight` of the patch embedding.
    """
    if centre:
        parts = [kernel if i == tubelet // 2 else np.zeros_like(kernel) for i in range(tubelet)]
    else:
        parts = [kernel / tubelet] * tubelet
    return np.concatenate(parts).astype(kernel.dtype)
