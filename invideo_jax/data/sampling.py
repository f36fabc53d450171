"""Which frames make a clip: pure functions on frame numbers.

Every function returns int64 [T] frame numbers in [0, n), not falling except where said. `n` is the
number of frames of the video, `frames` is T. `rng` is a `numpy.random.Generator`; only `integers`
and `permutation` of it are called, and the order of the draws is the one of the published code, so
that its draws can be replayed.

Source: the loaders of VideoMAE (dense, segments), InternVideo2 single_modality (segments_inclusive,
window, tsn_padded) and InternVideo2 multi_modality (rand, middle).
"""

import numpy as np


def _check(n: int, frames: int, **positive: float) -> None:
    for name, value in {"n": n, "frames": frames, **positive}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {name}={value}.")


def dense(n: int, frames: int, stride: int, rng) -> np.ndarray:
    """One window of T frames `stride` apart at a random offset (VideoMAE pretraining).

    A window is T * stride frames long. Of a video too short for it the frames 0, stride, 2 *
    stride, ... are taken, and the last of them is repeated.

    Args:
        n: frames of the video, at least 1.
        frames: T, at least 1.
        stride: distance, at least 1.
        rng: draws the offset, uniform in [0, n - T * stride].
    """
    _check(n, frames, stride=stride)
    free = n - frames * stride + 1
    offset = int(rng.integers(0, free)) if free > 0 else 0
    indices = np.empty(frames, np.int64)
    for i in range(frames):
        indices[i] = offset
        if offset + 1 + stride < n:
            offset += stride
    return indices


def dense_view(n: int, frames: int, stride: int, view: int, views: int) -> np.ndarray:
    """Window `view` of `views` spread evenly over the video (test of models trained on dense clips).

    Window v starts at int(v * (n - T * stride) / (views - 1)), a single one in the middle; where
    frames run out, the last is repeated.
    """
    _check(n, frames, stride=stride, views=views)
    _check_view(view, views)
    free = max(n - frames * stride, 0)
    start = int(view * (free / (views - 1))) if views > 1 else free // 2
    return _pad(np.arange(start, n, stride)[:frames], frames)


def window(n: int, frames: int, stride: int, rng=None) -> np.ndarray:
    """T frames spread over a window of T * stride (dense fine-tuning); the middle window without `rng`.

    The frames are `linspace` over the window, both ends in, rounded down: the distance is a little
    more than `stride`. Of a video not longer than the window, n // stride frames are spread over
    all of it and the last is repeated.
    """
    _check(n, frames, stride=stride)
    length = frames * stride
    if n <= length:
        few = n // stride
        spread = np.concatenate([np.linspace(0, n, num=few), np.full(frames - few, n)])
        return np.clip(spread, 0, n - 1).astype(np.int64)
    # The published validation branch uses (n - length) // 2 as the end, not the start, and gets
    # negative numbers.
    end = int(rng.integers(length, n)) if rng is not None else length + (n - length) // 2
    return np.clip(np.linspace(end - length, end, num=frames), end - length, end - 1).astype(
        np.int64
    )


def segments(n: int, frames: int, rng=None) -> np.ndarray:
    """One random frame inside each of T equal parts; the middle frame of each without `rng`.

    Part k holds the frames of [k * n / T, (k + 1) * n / T). Below T frames a part without a frame
    of its own takes the frame that its middle falls on, so the video is spread over the clip.
    """
    _check(n, frames)
    k = np.arange(frames)
    if rng is None:
        return ((2 * k + 1) * n) // (2 * frames)
    if n < frames:
        return ((2 * k + 1) * n) // (2 * frames)
    low, high = -(-k * n // frames), -(-(k + 1) * n // frames)
    return low + np.asarray(rng.integers(0, high - low), np.int64)


def tsn_segments(n: int, frames: int, rng) -> np.ndarray:
    """As `segments`, with parts of n // T frames each: up to T - 1 frames at the end are never taken.

    The published rule (VideoMAE and TSN on Something-Something): with fewer than T frames the first
    is taken T times.
    """
    _check(n, frames)
    length = n // frames
    if length == 0:
        return np.zeros(frames, np.int64)
    return np.arange(frames) * length + np.asarray(rng.integers(0, length, size=frames), np.int64)


def tsn_middle(n: int, frames: int) -> np.ndarray:
    """The frame in the middle of each of T equal parts: int(n / T * (k + 1/2))."""
    _check(n, frames)
    tick = n / frames
    return np.array([int(tick / 2 + tick * k) for k in range(frames)], np.int64)


def tsn_view(n: int, frames: int, view: int) -> np.ndarray:
    """The two test clips of Something-Something: clip 0 starts its parts at the middle, clip 1 at the edge.

    Both are every second frame of the sorted union of `tsn_middle` and the first frames of the
    parts.
    """
    _check(n, frames)
    _check_view(view, 2)
    tick = n / frames
    both = sorted([*tsn_middle(n, frames), *(int(tick * k) for k in range(frames))])
    return np.array(both[view::2], np.int64)


def tsn_padded(n: int, frames: int, rng) -> np.ndarray:
    """As `tsn_segments`, but with fewer than T frames the first fills the clip up, and then all follow.

    The published rule of InternVideo2 for Something-Something and HMDB51.
    """
    _check(n, frames)
    if n < frames:
        return np.concatenate([np.zeros(frames - n, np.int64), np.arange(n)])
    return tsn_segments(n, frames, rng)


def tsn_padded_view(n: int, frames: int, view: int, views: int) -> np.ndarray:
    """Test clip `view` of `views` for `tsn_padded`: each of T equal parts is cut in `views`, whose starts are taken.

    Frame k is int(view * n / (T * views) + k * n / T).
    """
    _check(n, frames, views=views)
    _check_view(view, views)
    tick = n / frames
    return np.array([int(view * tick / views + tick * k) for k in range(frames)], np.int64)


def segments_inclusive(n: int, frames: int, rng) -> np.ndarray:
    """A random frame in each of T parts whose ends are shared with their neighbours (sparse fine-tuning).

    Part i is [round(i * (n - 1) / T), round((i + 1) * (n - 1) / T)], both ends in.
    """
    _check(n, frames)
    edges = np.round((n - 1) / frames * np.arange(frames + 1)).astype(np.int64)
    picked = [int(rng.integers(a, b + 1)) for a, b in zip(edges[:-1], edges[1:])]
    return np.minimum(picked, n - 1).astype(np.int64)


def segments_inclusive_view(n: int, frames: int, view: int, views: int) -> np.ndarray:
    """Test clip `view` of `views` for `segments_inclusive`: shifted by (view + 1) / (views + 1) of a part."""
    _check(n, frames, views=views)
    _check_view(view, views)
    size = (n - 1) / frames
    shift = int(size / (views + 1) * (view + 1))
    starts = np.round(size * np.arange(frames)).astype(np.int64)
    return np.minimum(starts + shift, n - 1)


def _intervals(n: int, frames: int) -> tuple[np.ndarray, np.ndarray]:
    edges = np.linspace(0, n, num=min(n, frames) + 1).astype(np.int64)
    return edges[:-1], edges[1:]


def _pad(indices: np.ndarray, frames: int) -> np.ndarray:
    return np.pad(indices, (0, frames - len(indices)), mode="edge")


def rand(n: int, frames: int, rng) -> np.ndarray:
    """A random frame of each of T intervals, never the last of an interval (multi-modal training, as published).

    With an interval shorter than 2 frames, T distinct random frames of all, sorted. With fewer than
    T frames all, and the last repeated.
    """
    _check(n, frames)
    low, high = _intervals(n, frames)
    if np.all(high - low >= 2):
        picked = np.array([int(rng.integers(a, b - 1)) for a, b in zip(low, high)], np.int64)
    else:
        picked = np.sort(np.asarray(rng.permutation(n))[: len(low)]).astype(np.int64)
    return _pad(picked, frames)


def middle(n: int, frames: int) -> np.ndarray:
    """The middle of each of T intervals, (first + last) // 2 (multi-modal test); the last repeated where n < T."""
    _check(n, frames)
    low, high = _intervals(n, frames)
    return _pad((low + high - 1) // 2, frames)


def by_time(
    times: np.ndarray, frames: int, fps: float, stride: int, rng=None, *, view=(0, 1)
) -> np.ndarray:
    """T frames at `stride / fps` seconds from each other: right for variable frame rates.

    Each wanted time takes the nearest shown frame (the earlier one of two as near). The window is T
    * stride / fps seconds long, at a random place with `rng`, else at place `view[0]` of `view[1]`
    spread evenly. Times after the end take the last frame.

    Args:
        times: float [n] rising, seconds.
        frames: T.
        fps: rate that the clip is seen at.
        stride: distance in frames of that rate.
        rng: draws one integer, the millisecond the window starts at.
        view: (place, places) without `rng`; a single place is the middle.
    """
    times = np.asarray(times, np.float64)
    _check(len(times), frames, stride=stride)
    if not fps > 0:
        raise ValueError(
            f"fps must be above 0; got fps={fps}. Give the rate that clips are seen at."
        )
    _check_view(*view)
    frame = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    free = max(times[-1] + frame - times[0] - frames * stride / fps, 0.0)
    if rng is not None:
        share = int(rng.integers(0, int(free * 1000) + 1)) / 1000
    else:
        share = free * (view[0] / (view[1] - 1) if view[1] > 1 else 0.5)
    wanted = times[0] + share + np.arange(frames) * (stride / fps)
    right = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    left = right - 1
    if len(times) == 1:
        return np.zeros(frames, np.int64)
    return np.where(wanted - times[left] <= times[right] - wanted, left, right).astype(np.int64)


def _check_view(view: int, views: int) -> None:
    if not 0 <= view < views:
        raise ValueError(f"view must be in [0, {views}); got view={view}.")
