"""The sound of a file on the clock of its pictures, decoding only the part that is needed.

Second 0 is when the first picture is shown, as in `VideoReader.times`; in a file without pictures it is
the beginning of the sound. Every decoded piece is put where its time stamp says: sound that starts
late, pauses, and jumps of the clock leave digital silence between, sound before second 0 is cut, and behind
the last piece nothing is added.

A track with a damaged packet before a sound one is an error, never silence. Packets that do not decode
before the first that does are passed over (a recording cut out of a stream begins so), and so is a single one at the
end of the file (a file cut short). Most sound decoders check little: they turn flipped bits into noise that nothing tells.
"""

import dataclasses

import av
import numpy as np

from invideo_jax.data.frame_table import stores_times
from invideo_jax.data.open_video import (
    FORMATS,
    BadVideo,
    Deadline,
    Limits,
    declared_seconds,
    open_file,
    pick_picture,
)
from invideo_jax.errors import UserError

SOUND_FORMATS = FORMATS + ",wav,w64,flac,mp3,aac,aiff,caf,au"
# Sound decoded and thrown away before a part: decoders lean on the packets before (Opus asks for 80 ms, MP3 for up to
# 9 frames of 26 ms), and resampling on the samples around.
_LEAD_SECONDS, _EDGE_SECONDS = 0.5, 0.05
_SEEK_SECONDS = 2.0  # a part that begins earlier is read from the start
# Time stamps this far from where the last piece ended are a jump; less is jitter of containers (Matroska rounds to 1 ms).
_JUMP_SECONDS = 0.04
_RATES = (1000, 768_000)  # Hz
_CHANNELS = 64
_NO_BASS = "LFE"


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


def read_sound(
    source: str | bytes,
    *,
    start: float | None = None,
    end: float | None = None,
    rate: int = 16000,
    limits: Limits | None = None,
) -> Sound | None:
    """Reads a part of the sound track as one channel, the mean of all but the bass channel.

    Args:
        source: a local path, or the encoded bytes of a file.
        start, end: seconds on the clock of the pictures; None for 0 and the end of the sound.
        rate: Hz of the samples.
        limits: see `Limits`; of CPU time and of the length.

    Returns:
        At most round((end - start) * rate) samples; None where the file has no sound track.

    Raises:
        BadVideo: 'bad_sound' for damage in the track; else about the file.
    """
    with SoundReader(source, limits=limits) as reader:
        return reader.read(start, end, rate) if reader.found else None


class SoundReader:
    """The sound track of one file. Use as a context manager.

    Of several tracks the first that is marked as the default one is read, else the first.

    Args:
        source, limits: see `read_sound`.

    Attributes:
        found: the file has a sound track; nothing else can be asked without one.

    Raises:
        BadVideo: as `read_sound`.
    """

    def __init__(self, source: str | bytes, *, limits: Limits | None = None):
        self.limits = limits or Limits()
        self.path = source if isinstance(source, str) else ""
        self._source = source
        self._deadline = Deadline(self.limits.decode_seconds, self.path)
        self._open()
        try:
            self.found = self._stream is not None
            self._origin = self._find_origin() if self.found else 0.0
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "SoundReader":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the file and the decoder."""
        self._container.close()

    # Opening --------------------------------------------------------------------------------------

    def _open(self) -> None:
        self._container = open_file(self._source, self.limits, self.path, SOUND_FORMATS)
        self._moved = False
        try:
            self._picture = self._pick_picture()
            self._stream = self._pick_sound()
        except BaseException:
            self.close()
            raise

    def _pick_picture(self):
        try:
            return pick_picture(self._container, self.limits, self.path)
        except BadVideo as error:
            if error.reason != "no_video_stream":
                raise
            return None

    def _pick_sound(self):
        tracks = self._container.streams.audio
        if not tracks:
            return None
        known = [track for track in tracks if track.codec_context is not None]
        if not known:
            raise BadVideo("bad_sound", self.path, "no decoder for its codec")
        marked = [s for s in known if s.disposition & av.stream.Disposition.default]
        stream = (marked or known)[0]
        for other in self._container.streams:
            if other is not self._picture:
                other.discard = av.stream.Discard.all
        stream.discard = av.stream.Discard.default
        stream.codec_context.thread_count = 1
        seconds = declared_seconds(self._container, stream) or 0.0
        if seconds > self.limits.max_seconds:
            detail = f"{seconds:.0f} s of sound, limit {self.limits.max_seconds:g} s"
            raise BadVideo("too_long", self.path, detail)
        return stream

    def _rewind(self) -> None:
        """A container that stands at the beginning, and gives packets of the sound only."""
        if self._moved:
            self._container.close()
            self._open()
        if self._picture is not None:
            self._picture.discard = av.stream.Discard.all

    # The clock ------------------------------------------------------------------------------------

    def _find_origin(self) -> float:
        """Second of the file's own clock at which the first picture is shown, found as `read_table` does."""
        key, shown, first = None, [], None
        if self._picture is not None:
            self._stream.discard = av.stream.Discard.all
            for position, packet in enumerate(self._packets(self._picture)):
                pts, dts = packet.pts, packet.dts
                pts = (position if dts is None else dts) if pts is None else pts
                if packet.is_keyframe and key is None:
                    key = pts
                if not packet.is_discard:
                    shown.append(pts)
                first = min((p for p in shown if key is None or p >= key), default=None)
                if key is not None and first is not None and (dts is None or dts >= first):
                    break
            self._stream.discard = av.stream.Discard.default
        if first is not None:
            return float(first * self._picture.time_base)
        start = self._stream.start_time
        return 0.0 if start is None else float(start * self._stream.time_base)

    def extent(self) -> tuple[float, float]:
        """Seconds at which the track begins and ends, by the header; where that is silent, by the packets."""
        stream, scale = self._stream, float(self._stream.time_base)
        seconds = declared_seconds(self._container, stream)
        if stream.start_time is not None and seconds is not None and self._tells_length():
            begin = stream.start_time * scale - self._origin
            return begin, begin + seconds
        self._rewind()
        times = [
            (packet.pts, packet.pts + (packet.duration or 0))
            for packet in self._packets(self._stream)
            if packet.pts is not None
        ]
        if not times:
            return 0.0, 0.0
        begin, end = min(t[0] for t in times), max(t[1] for t in times)
        return begin * scale - self._origin, end * scale - self._origin

    def _tells_length(self) -> bool:
        """Whether the length comes from an index; others guess it from the bit rate."""
        return stores_times(self._container) and "mpegts" not in self._container.format.name

    # Reading --------------------------------------------------------------------------------------

    def _packets(self, stream):
        """The packets with data of `stream` from where the container stands; watches the clock."""
        self._moved = True
        try:
            for packet in self._container.demux(stream):
                self._deadline.check()
                if packet.size:
                    yield packet
        except av.FFmpegError as error:
            raise BadVideo("bad_sound", self.path, f"reading packets: {error.strerror}") from None
        except IndexError:  # PyAV does not know a stream that damaged data makes appear half-way
            raise BadVideo("bad_sound", self.path, "an undeclared stream") from None

    def read(self, start: float | None, end: float | None, rate: int) -> Sound:
        """See `read_sound`; only where a track was `found`."""
        low = start or 0.0
        if not (np.isfinite(low) and low >= 0 and (end is None or end > low) and rate > 0):
            raise UserError(
                "start must be at least 0, end above it, rate above 0; "
                f"got start={start}, end={end}, rate={rate}."
            )
        self._deadline = Deadline(self.limits.decode_seconds, self.path)
        high = low + self.limits.max_seconds if end is None else end
        high = min(high, low + self.limits.max_seconds)
        line = _TimeLine(low, high, rate)
        try:
            for frame in self._frames(low, high):
                line.add(frame, self._second(frame.pts))
            return line.sound()
        except (av.FFmpegError, ValueError) as error:
            detail = str(getattr(error, "strerror", None) or error)
            raise BadVideo("bad_sound", self.path, detail) from None

    def _second(self, pts: int | None) -> float | None:
        return None if pts is None else float(pts * self._stream.time_base) - self._origin

    def _frames(self, low: float, high: float):
        """Decoded frames from before `low` to behind `high`."""
        context, good, damaged = self._stream.codec_context, False, 0
        for packet in self._packets_of(low, high):
            if packet is not None and packet.is_corrupt:
                frames = None
            else:
                frames = self._decode(context, packet)
            if frames is None or any(frame.is_corrupt for frame in frames):
                behind = packet is not None and (self._end(packet) or low) < low
                damaged += not behind
                continue
            if frames and good and damaged:
                second = self._second(frames[0].pts)
                raise BadVideo("bad_sound", self.path, f"damaged before {second:.2f} s")
            if frames:
                good, damaged = True, 0
            yield from frames
        if damaged > 1 or (damaged and not good):
            raise BadVideo("bad_sound", self.path, f"{damaged} damaged packets")

    def _end(self, packet) -> float | None:
        begin = self._second(packet.pts)
        return None if begin is None else begin + float((packet.duration or 0) * packet.time_base)

    @staticmethod
    def _decode(context, packet) -> list | None:
        """What comes out for one packet (None drains the decoder); None where it is damaged."""
        try:
            return context.decode(packet)
        except EOFError:
            return []
        except av.FFmpegError:
            return None

    def _packets_of(self, low: float, high: float):
        """The packets of the part and of the lead before it, then None."""
        self._seek(low)
        for packet in self._packets(self._stream):
            begin, end = self._second(packet.pts), self._end(packet)
            if begin is not None and begin >= high + _EDGE_SECONDS:
                break
            if end is None or end >= low - _LEAD_SECONDS:
                yield packet
        yield None

    def _seek(self, low: float) -> None:
        """Puts the container before `low`, less the lead; at the beginning where seeking does not do that."""
        if low < _SEEK_SECONDS or not stores_times(self._container):
            self._rewind()
            return
        target = round((low - _LEAD_SECONDS + self._origin) / self._stream.time_base)
        if self._picture is not None:
            self._picture.discard = av.stream.Discard.all
        try:
            self._container.seek(target, stream=self._stream)
            landed = next(self._packets(self._stream), None)
            late = landed is None or landed.pts is None or landed.pts > target
            if not late:
                self._container.seek(target, stream=self._stream)
        except (av.FFmpegError, OverflowError):
            late = True
        self._moved = True
        if late:
            self._rewind()


class _TimeLine:
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
        first = max(0, int((self.low - _EDGE_SECONDS - second) * rate))
        last = min(frame.samples, int((self.high + _EDGE_SECONDS - second) * rate) + 1)
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
        if frame.format.is_planar and count > 8:  # PyAV lists only 8 planes safely
            packed = av.AudioResampler(format="flt", layout=frame.layout, rate=frame.sample_rate)
            (frame,) = packed.resample(frame)
        array = frame.to_ndarray()
        array = array if frame.format.is_planar else array.reshape(-1, count).T
        if count > 1:
            array = array[self._heard(frame.layout)]
        if array.dtype == np.uint8:
            return (array.mean(0, dtype=np.float32) - 128) / 128
        mono = array[0].astype(np.float32) if len(array) == 1 else array.mean(0, dtype=np.float32)
        return mono if array.dtype.kind == "f" else mono / -float(np.iinfo(array.dtype).min)

    def _heard(self, layout) -> list[int] | slice:
        name = layout.name
        if name not in self._channels:
            names = [channel.name for channel in layout.channels]
            kept = [i for i, channel in enumerate(names) if channel != _NO_BASS]
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
