"""Filter banks of the sound of a clip, aligned in time to its frames.

Source: BEATs (arXiv 2212.09058), as InternVideo2 stage 2 feeds it: Kaldi's filter bank of the samples times 2^15, less
the mean, over twice the deviation, zeros behind the end of the sound.
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from invideo_jax.data.open_video import Limits
from invideo_jax.data.sound import SoundReader
from invideo_jax.errors import UserError

_FULL_SCALE = 2.0**15  # Kaldi's numbers are of 16-bit samples
_LEAST_ENERGY = float(np.finfo(np.float32).eps)
_PRE_EMPHASIS = 0.97
_POVEY_POWER = 0.85
# Frames in a matrix product: OpenBLAS starts threads for larger ones, which wait for each other in a loop (16 ms of CPU
# time for 10 s of sound, not 5.5, where two cores are busy); loaders are parallel already.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class AudioSpec:
    """What the features of a clip's sound are made of.

    Args:
        seconds: longest sound.
        mels: bands; 64 in InternVideo2 stage 2, 128 in BEATs itself.
        rate: Hz that the sound is resampled to.
        window, shift: seconds of a frame, and from one to the next.
        low: Hz where the lowest band begins; the highest ends at half the rate.
        dither: deviation of noise added to the 16-bit samples, where something is drawn; 0 as published (Kaldi's
            own default is 1).
        mean, deviation: features are (x - mean) / (2 * deviation).
        silence: digital silence counts as sound. By default a clip whose samples are all zero has none: a muted
            track says nothing of the clip, and all muted clips would sound alike.
    """

    seconds: float = 10.0
    mels: int = 64
    rate: int = 16000
    window: float = 0.025
    shift: float = 0.010
    low: float = 20.0
    dither: float = 0.0
    mean: float = 15.41663
    deviation: float = 6.55582
    silence: bool = False

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """Raises UserError where no features can be made by these numbers."""
        for name in ("seconds", "mels", "rate", "window", "shift", "deviation"):
            value = getattr(self, name)
            if not (np.isfinite(value) and value > 0):
                raise UserError(f"{name} must be above 0; got {name}={value}.")
        for name in ("mels", "rate"):
            value = getattr(self, name)
            if value != int(value):
                raise UserError(f"{name} must be a whole number; got {name}={value}.")
        if self.dither < 0:
            raise UserError(f"dither must be at least 0; got dither={self.dither}.")
        if not 0 <= self.low < self.rate / 2:
            raise UserError(
                f"low must be from 0 to below half the rate, {self.rate / 2:g} Hz; got low={self.low}."
            )
        if round(self.shift * self.rate) < 1:
            raise UserError(f"shift must be at least one sample; got shift={self.shift}.")
        if self.frames < 1:
            raise UserError(
                f"seconds must be at least one window of {self.window} s; got seconds={self.seconds}."
            )

    @property
    def frames(self) -> int:
        """F: frames of the longest sound, 998 for 10 s."""
        return _frames(round(self.seconds * self.rate), self.rate, self.window, self.shift)

    @property
    def shape(self) -> tuple[int, int]:
        """[F, mels]."""
        return self.frames, self.mels


def load_audio(
    source: str | bytes,
    spec: AudioSpec,
    rng: np.random.Generator | None,
    *,
    start: float | None = None,
    end: float | None = None,
    times: Sequence[float] | np.ndarray | None = None,
    limits: Limits | None = None,
) -> tuple[np.ndarray, int]:
    """The features of the sound of a clip.

    Of a sound longer than `spec.seconds` one window is taken. With `times` it lies over the frames: it holds them
    all where they span less, and lies between the first and the last where they span more.

    Args:
        source: a local path, or the encoded bytes of a file.
        spec: what the features are made of.
        rng: draws the window, and the dither; None takes the middle one of the windows allowed.
        start, end: seconds of the part of the file that the clip is; None for all of it.
        times: seconds at which the frames of the clip are shown.
        limits: see `Limits`.

    Returns:
        float32 [F, mels], zeros behind the end of the sound, and the number of real frames; 0 where the file has no
        sound, or none at that time.

    Raises:
        BadVideo: 'bad_sound' for damage in the track; else about the file.
    """
    features = np.zeros(spec.shape, np.float32)
    with SoundReader(source, limits=limits) as reader:
        if not reader.found:
            return features, 0
        low, high = start or 0.0, reader.extent()[1]
        high = high if end is None else min(high, end)
        begin = place_window(low, high, spec.seconds, times, rng)
        stop = begin + spec.seconds if end is None else min(begin + spec.seconds, end)
        if stop <= begin:
            return features, 0
        sound = reader.read(begin, stop, spec.rate)
    if not sound.real or (sound.silent and not spec.silence):
        return features, 0
    bank = filter_bank(
        sound.samples,
        rate=spec.rate,
        mels=spec.mels,
        window=spec.window,
        shift=spec.shift,
        low=spec.low,
        dither=0.0 if rng is None else spec.dither,
        rng=rng,
    )
    count = min(len(bank), spec.frames)
    features[:count] = (bank[:count] - spec.mean) / (2 * spec.deviation)
    return features, count


def place_window(
    low: float,
    high: float,
    seconds: float,
    times: Sequence[float] | np.ndarray | None,
    rng: np.random.Generator | None,
) -> float:
    """Where a window of `seconds` begins in a sound that lasts from `low` to `high`.

    Args:
        times: seconds of the frames to lie over, None for anywhere.
        rng: one draw, uniform; None for the middle.
    """
    share = 0.5 if rng is None else float(rng.random())
    first, last = low, max(low, high - seconds)
    if times is not None and len(times):
        ends = float(np.min(times)), float(np.max(times)) - seconds
        # Frames go before the sound: of a sound that ends early less is taken, not what is not seen.
        first, last = max(low, min(max(first, min(ends)), max(ends))), min(last, max(ends))
        last = max(first, last)
    return first + share * (last - first)


def filter_bank(
    samples: np.ndarray,
    *,
    rate: int = 16000,
    mels: int = 64,
    window: float = 0.025,
    shift: float = 0.010,
    low: float = 20.0,
    dither: float = 0.0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Kaldi's log mel filter bank, frames only where a whole window fits.

    Args:
        samples: float32 [S] in [-1, 1]; taken times 2^15.
        rate, mels, window, shift, low, dither: see `AudioSpec`.
        rng: draws the dither.

    Returns:
        float32 [frames, mels]: natural logarithm of the energy, not below that of 2^-23.

    Source: Kaldi, feature-fbank and feature-window (povey window, pre-emphasis 0.97, frames less their mean, power
    spectrum, snip-edges, no energy).
    """
    size, step = round(window * rate), round(shift * rate)
    count = _frames(len(samples), rate, window, shift)
    if not count:
        return np.zeros((0, mels), np.float32)
    # float64: float32 rounds quiet bands of loud sounds off by up to 0.12 (so does Kaldi), and is 3 ms faster for 10 s.
    samples = np.asarray(samples, np.float64) * _FULL_SCALE
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::step][:count]
    if dither:
        if rng is None:
            raise UserError(f"dither must be 0 where nothing is drawn; got dither={dither}.")
        frames = frames + dither * rng.standard_normal(frames.shape)
    frames = frames - frames.mean(1, keepdims=True)
    frames[:, 1:] -= _PRE_EMPHASIS * frames[:, :-1]
    frames[:, 0] *= 1 - _PRE_EMPHASIS
    frames *= _povey(size)
    spectrum = np.fft.rfft(frames, _padded(size))
    power = np.zeros((-(-count // _BLOCK), _BLOCK, spectrum.shape[1]))
    flat = power.reshape(-1, spectrum.shape[1])[:count]
    np.square(spectrum.real, out=flat)
    flat += np.square(spectrum.imag)
    energy = (power @ _mel_weights(rate, _padded(size), mels, low)).reshape(-1, mels)[:count]
    return np.log(np.maximum(energy, _LEAST_ENERGY)).astype(np.float32)


def _frames(samples: int, rate: int, window: float, shift: float) -> int:
    size, step = round(window * rate), round(shift * rate)
    return 0 if samples < size else 1 + (samples - size) // step


def _padded(size: int) -> int:
    """The next power of 2."""
    return 1 << (size - 1).bit_length()


@functools.lru_cache(maxsize=8)
def _povey(size: int) -> np.ndarray:
    """float64 [size]: a Hann window to the power of 0.85, zero at both ends."""
    phase = 2 * np.pi * np.arange(size) / (size - 1)
    values = (0.5 - 0.5 * np.cos(phase)) ** _POVEY_POWER
    values.setflags(write=False)
    return values


@functools.lru_cache(maxsize=8)
def _mel_weights(rate: int, padded: int, mels: int, low: float) -> np.ndarray:
    """float64 [padded / 2 + 1, mels]: triangles of equal width on the mel scale.

    One narrower than the distance of two frequencies can lie between them and stay empty: band 3 of 128 at 16 kHz.
    """

    def mel(hertz):
        return 1127.0 * np.log1p(np.asarray(hertz) / 700.0)

    edges = np.linspace(mel(low), mel(rate / 2), mels + 2)
    at = mel(np.arange(padded // 2 + 1) * rate / padded)[:, None]
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    weights = np.maximum(0, np.minimum(rising, falling))
    weights.setflags(write=False)
    return weights
