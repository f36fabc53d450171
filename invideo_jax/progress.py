"""How fast the run goes, and the one line a log window that says so."""

import collections
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TextIO

from invideo_jax.metrics import Value, Window


class Lap(NamedTuple):
    """Wall time since the last lap, pauses left out.

    Attributes:
        seconds: time the train loop had for itself.
        waited: the part of it spent waiting for data.
        paused: time that was left out (evaluation, checkpoints, compilation).
    """

    seconds: float
    waited: float
    paused: float


class Clock:
    """Measures training time; evaluation, checkpoints and compilation are pauses.

    Args:
        now: gives seconds; tests inject their own.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._start, self._waited, self._paused = now(), 0.0, 0.0
        self._pause_began: float | None = None

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time inside is no training time; a pause inside a pause changes nothing."""
        if self._pause_began is not None:
            yield
            return
        self._pause_began = self._now()
        try:
            yield
        finally:
            self._paused += self._now() - self._pause_began
            self._pause_began = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is spent waiting for data.

        It is the host that waits; the device may still have a step or two to do, so this is an upper bound.
        """
        start = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - start

    def lap(self) -> Lap:
        """Ends the lap and starts the next; a pause that is open is cut in two."""
        now = self._now()
        if self._pause_began is not None:
            self._paused += now - self._pause_began
            self._pause_began = now
        lap = Lap(now - self._start - self._paused, self._waited, self._paused)
        self._start, self._waited, self._paused = now, 0.0, 0.0
        return lap


class Progress:
    """Speed figures of each log window, and its line on the screen.

    Args:
        stage: name of the stage, in front of each line.
        total_steps: steps of the stage.
        clips_per_step: global batch size, clips.
        tokens_per_clip: tokens that enter the encoder for one clip (visible ones), if known.
        flops_per_clip: floating-point operations of forward and backward of one clip, counted for
            visible tokens only, if known. Where some batches are of images or sounds, both are means over all
            clips, in which those count as 0: the speeds are of the videos alone, over the time of all steps.
        peak_flops: peak FLOP/s of all devices together, if known; gives MFU.
        stream: where lines go; None prints nothing (all processes but the first).
    """

    def __init__(
        self,
        *,
        stage: str,
        total_steps: int,
        clips_per_step: int,
        tokens_per_clip: float | None = None,
        flops_per_clip: float | None = None,
        peak_flops: float | None = None,
        stream: TextIO | None = sys.stdout,
    ):
        self.stage, self.total_steps, self.clips_per_step = stage, total_steps, clips_per_step
        self.tokens_per_clip, self.flops_per_clip = tokens_per_clip, flops_per_clip
        self.peak_flops, self.stream = peak_flops, stream
        self._pace: collections.deque = collections.deque(maxlen=5)  # (steps, seconds) of windows

    def update(self, window: Window, lap: Lap, *, step: int | None = None) -> dict[str, float]:
        """Prints the line of one window and returns its speed figures, named `perf/...`.

        Args:
            window: from `MetricsBuffer`.
            lap: wall time of the window's fresh steps, from `Clock.lap`.
            step: step inside the stage; by default the window's own.
        """
        step = window.step if step is None else step
        seconds = max(lap.seconds, 1e-9)
        rate = window.fresh * self.clips_per_step / seconds
        perf = {
            "perf/clips": float(window.steps * self.clips_per_step),
            "perf/seconds": lap.seconds,
            "perf/paused_seconds": lap.paused,
            "perf/clips_per_s": rate,
            "perf/data_wait": min(lap.waited / seconds, 1.0),
        }
        if self.tokens_per_clip:
            perf["perf/tokens_per_s"] = rate * self.tokens_per_clip
        if self.flops_per_clip:
            perf["perf/flops_per_s"] = rate * self.flops_per_clip
            if self.peak_flops:
                perf["perf/mfu"] = rate * self.flops_per_clip / self.peak_flops
        self._pace.append((window.fresh, seconds))
        steps, spent = map(sum, zip(*self._pace))
        left = (self.total_steps - step) * spent / max(steps, 1)
        self.say(self.line(step, window.values, perf, left))
        return perf

    def say(self, text: str) -> None:
        """Prints a line where this process prints at all."""
        if self.stream is not None:
            print(text, file=self.stream, flush=True)

    def line(
        self, step: int, values: Mapping[str, Value], perf: Mapping[str, float], left: float
    ) -> str:
        """The progress line, below 120 columns; a figure that is not known is left out.

        Args:
            step: step inside the stage.
            values: metrics by name, with or without a prefix up to the last slash.
            perf: figures that `update` makes.
            left: seconds until the stage's last step.
        """
        by_name = {name.rpartition("/")[2]: value for name, value in values.items()}
        digits = len(str(self.total_steps))
        parts = [f"{self.stage[:12]} {step:>{digits}}/{self.total_steps}"]
        for name, label, form in _FIGURES:
            if isinstance(by_name.get(name), (int, float)):
                parts.append(f"{label} {form(by_name[name])}")
        if by_name.get("skipped"):
            parts.append(f"skipped {by_name['skipped']:.0f}")
        parts.append(f"{quantity(perf['perf/clips_per_s'])}clips/s")
        if "perf/flops_per_s" in perf:
            parts.append(f"{quantity(perf['perf/flops_per_s'])}FLOP/s")
        if "perf/mfu" in perf:
            parts.append(f"MFU {100 * perf['perf/mfu']:.0f}%")
        parts.append(f"data {100 * perf['perf/data_wait']:.1f}%")
        parts.append(f"left {duration(left)}")
        line = "  ".join(parts)
        if len(line) >= _COLUMNS:
            line = " ".join(part for part in parts if not part.endswith("FLOP/s"))
        return line


def _plain(value: float) -> str:
    """Two decimals where they say something, else a power of ten."""
    return f"{value:.2f}" if 0.01 <= abs(value) < 1000 else f"{value:.1e}"


_COLUMNS = 120
_FIGURES = (
    ("loss", "loss", lambda v: f"{v:.4f}" if abs(v) < 1000 else f"{v:.1e}"),
    ("learning_rate", "lr", "{:.1e}".format),
    ("grad_norm", "grad", _plain),
)


def quantity(value: float) -> str:
    """Three digits and a unit prefix with its space: '41.2 ', '5.13 T'."""
    for prefix, scale in (
        ("E", 1e18),
        ("P", 1e15),
        ("T", 1e12),
        ("G", 1e9),
        ("M", 1e6),
        ("k", 1e3),
    ):
        if abs(value) >= 0.9995 * scale:
            return f"{_three_digits(value / scale)} {prefix}"
    return f"{_three_digits(value)} "


def _three_digits(value: float) -> str:
    size = abs(value)
    return f"{value:.{2 if size < 9.995 else 1 if size < 99.95 else 0}f}"


def duration(seconds: float) -> str:
    """Seconds as '45s', '3m 20s', '1h 02m' or '2d 03h'."""
    seconds = max(int(round(seconds)), 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {seconds % 60:02d}s" if minutes else f"{seconds}s"
