"""Decoded pieces of sound as one line of samples: one channel, one rate, each piece where its time stamp says."""

import dataclasses

import av
import numpy as np

EDGE_SECONDS = 0.05  # taken on both sides of a part: resampling leans on the samples around
# Time stamps this far from where the last piece ended are a jump; less is jitter of containers (Matroska rounds to 1 ms).
_JUMP_SECONDS = 0.04
_RATES = (1000, 768_000)  # Hz
_CHANNELS = 64
_BASS = "LFE"


@dataclasses.dataclass(frozen=True, eq=False)
class Sound:
    """Samples of one channel.

    Attributes:
        samples: float32 [S] in [-1, 1], up to the last one that the file has; S = 0: the track has none there.
        rate: Hz.
        start: second, on the clock of the pictures, of the first sample.
        real: samples that come from the file. The other S - real are pauses: before a late start, between
            time stamps that jump.
    """

    samples: np.ndarray
    rate: int
    start: float
    real: int

    @property
    def silent(self) -> bool:
        """Digital silence: every sample would be 0 in 16 bits."""
        return not len(self.samples) or float(np.abs(self.samples).max()) < 0.5 / 2**15


class TimeLine:
    """Decoded pieces at one rate, each where its time stamp says."""

    def __init__(self, low: float, high: float, rate: int):
        self.low, self.high, self.rate = low, high, rate
        self._runs: list[_Run] = []
        self._channels: dict[str, list[int]] = {}
        self._next = None  # where the last piece ended, in seconds

    def add(self, frame: av.AudioFrame, second: float | None) -> None:
        """Appends a decoded frame; `second` is its time, None: right behind the last."""
        rate = frame.sample_rate
        if not _RATES[0] <= rate <= _RATES[1]:
            raise ValueError(f"{rate} samples a second, read are {_RATES[0]} to {_RATES[1]}")
        run = self._runs[-1] if self._runs else None
        expected = 0.0 if self._next is None else self._next
        if second is None or (self._next is not None and abs(second - expected) < _JUMP_SECONDS):
            second = expected
        self._next = second + frame.samples / rate
        # Only what is near the part: a hostile frame must not cost memory.
        first = max(0, int((self.low - EDGE_SECONDS - second) * rate))
        last = min(frame.samples, int((self.high + EDGE_SECONDS - second) * rate) + 1)
        if first >= last:
            return
        second += first / rate
        if run is None or run.source != rate or abs(run.end - second) > 1e-6:
            run = _Run(second, rate, self.rate)
            self._runs.append(run)
        run.add(self._mono(frame)[first:last])

    def _mono(self, frame: av.AudioFrame) -> np.ndarray:
        """float32 [n]: the mean of the channels of a frame, without the bass channel."""
        count = frame.layout.nb_channels
        if not 1 <= count <= _CHANNELS:
            raise ValueError(f"{count} channels, read are 1 to {_CHANNELS}")
        if frame.format.is_planar and count > 7:  # PyAV reads behind the list of 8 planes
            packed = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
            (frame,) = packed.resample(frame)
        array = frame.to_ndarray()
        array = array if frame.format.is_planar else array.reshape(-1, count).T
        if count > 1:
            array = array[self._heard(frame.layout)]
        # Not array.mean: this runs once for about 20 ms of sound.
        total = np.add.reduce(array, axis=0, dtype=np.float32)
        if array.dtype == np.uint8:
            return total / np.float32(128 * len(array)) - 1
        full = 1.0 if array.dtype.kind == "f" else -float(np.iinfo(array.dtype).min)
        return total / np.float32(full * len(array))

    def _heard(self, layout) -> list[int] | slice:
        name = layout.name
        if name not in self._channels:
            names = [channel.name for channel in layout.channels]
            kept = [i for i, channel in enumerate(names) if channel != _BASS]
            self._channels[name] = kept if 0 < len(kept) < len(names) else slice(None)
        return self._channels[name]

    def sound(self) -> Sound:
        """All that was added, cut to the part."""
        pieces, last, real = [], 0, 0
        most = round((self.high - self.low) * self.rate)
        for run in self._runs:
            samples = run.samples()
            at = round((run.start - self.low) * self.rate)
            samples = samples[max(0, -at) : max(0, most - at)]
            if len(samples):
                pieces.append((max(0, at), samples))
                last, real = max(last, max(0, at) + len(samples)), real + len(samples)
        whole = np.zeros(last, np.float32)
        for at, samples in pieces:
            whole[at : at + len(samples)] = samples
        return Sound(np.clip(whole, -1, 1, out=whole), self.rate, self.low, min(real, last))


class _Run:
    """Samples that follow each other without a gap, resampled about a second at a time."""

    def __init__(self, start: float, source: int, rate: int):
        self.start, self.source, self.rate = start, source, rate
        self._count = self._waiting = 0
        self._pieces: list[np.ndarray] = []
        self._done: list[np.ndarray] = []
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=rate)

    @property
    def end(self) -> float:
        return self.start + self._count / self.source

    def add(self, mono: np.ndarray) -> None:
        self._pieces.append(mono)
        self._count += len(mono)
        self._waiting += len(mono)
        if self._waiting >= self.source:
            self._resample()

    def _resample(self) -> None:
        mono, self._pieces, self._waiting = np.concatenate(self._pieces), [], 0
        if not np.isfinite(mono).all():
            raise ValueError("samples that are no numbers")
        if self.source == self.rate:
            self._done.append(mono)
            return
        frame = av.AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
        frame.sample_rate = self.source
        self._take(frame)

    def _take(self, frame: av.AudioFrame | None) -> None:
        self._done += [out.to_ndarray()[0] for out in self._resampler.resample(frame)]

    def samples(self) -> np.ndarray:
        """float32 [n] at the wanted rate."""
        if self._pieces:
            self._resample()
        if self.source != self.rate:
            self._take(None)
        wanted = round(self._count * self.rate / self.source)
        return np.concatenate(self._done)[:wanted] if self._done else np.zeros(0, np.float32)
