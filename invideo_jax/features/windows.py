"""Which frames of a video make one row of features, and from when to when the row is."""

import dataclasses
import math

import numpy as np

from invideo_jax.data.transforms import ClipSpec, pick_frames
from invideo_jax.errors import UserError

_SAME = 1e-7  # seconds; far below the distance of two frames, far above rounding


@dataclasses.dataclass(frozen=True)
class Rule:
    """How videos are cut; one of the two lengths, or neither for whole videos.

    Attributes:
        seconds, stride_seconds: length and distance of windows in time.
        frames, stride_frames: the same in frames as stored.
    """

    seconds: float = 0.0
    stride_seconds: float = 0.0
    frames: int = 0
    stride_frames: int = 0

    def __post_init__(self):
        if self.seconds and self.frames:
            raise UserError(
                f"Windows are counted in seconds or in frames; got window_seconds={self.seconds:g} and "
                f"window_frames={self.frames}. Give one of them."
            )
        for unit, window, stride in (
            ("seconds", self.seconds, self.stride_seconds),
            ("frames", self.frames, self.stride_frames),
        ):
            if not (math.isfinite(window) and math.isfinite(stride)) or min(window, stride) < 0:
                raise UserError(
                    f"window_{unit} and stride_{unit} must not be negative; got {window:g} and {stride:g}."
                )
            if stride and not window:
                raise UserError(
                    f"stride_{unit} needs window_{unit}; got stride_{unit}={stride:g} alone."
                )


@dataclasses.dataclass(frozen=True)
class Window:
    """One row to be.

    Attributes:
        start, end: seconds from the beginning of the file.
        indices: int64 [T], frame numbers.
        times: float64 [T], when these frames are shown.
        padded: how many of them repeat another because there are too few.
    """

    start: float
    end: float
    indices: np.ndarray
    times: np.ndarray
    padded: int


def cut(times: np.ndarray, rule: Rule, spec: ClipSpec) -> list[Window]:
    """The windows of a video, in order.

    They begin at the first frame, a stride apart, until one reaches the end; that last one may be
    shorter. A window of a pause without frames shows the frame before it.

    Args:
        times: float64 [n] rising, seconds at which the frames are shown.
        rule: lengths; a stride of 0 is the window's length.
        spec: takes T frames of each window; must draw nothing.
    """
    step = float(np.median(np.diff(times))) if len(times) > 1 else 1 / 25
    end = float(times[-1]) + step
    if rule.frames:
        spans = _by_frames(len(times), rule.frames, rule.stride_frames or rule.frames)
    elif rule.seconds:
        return _by_seconds(times, end, rule, spec)
    else:
        spans = [(0, len(times))]
    until = lambda high: float(times[high]) if high < len(times) else end
    return [_window(times, low, high, times[low], until(high), spec) for low, high in spans]


def _by_frames(count: int, length: int, stride: int) -> list[tuple[int, int]]:
    number = 1 + max(0, -(-(count - length) // stride))
    firsts = [i * stride for i in range(number) if i * stride < count]
    return [(low, min(low + length, count)) for low in firsts]


def _by_seconds(times: np.ndarray, end: float, rule: Rule, spec: ClipSpec) -> list[Window]:
    stride, begin, windows = rule.stride_seconds or rule.seconds, float(times[0]), []
    for number in range(len(times) + int((end - begin) / stride) + 2):
        start = begin + number * stride
        stop = start + rule.seconds
        low, high = np.searchsorted(times, [start - _SAME, stop - _SAME])
        if low >= len(times):
            break
        if low == high:
            low = max(low - 1, 0)
            high = low + 1
        windows.append(_window(times, int(low), int(high), start, min(stop, end), spec))
        if stop > end - _SAME:
            break
    return windows


def _window(times, low: int, high: int, start, end, spec: ClipSpec) -> Window:
    # The generator is never drawn from: a spec of fixed places.
    indices = low + pick_frames(spec, times[low:high], np.random.default_rng(0))
    padded = len(indices) - len(np.unique(indices))
    return Window(float(start), float(end), indices, times[indices], padded)
