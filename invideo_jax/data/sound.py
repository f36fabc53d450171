"""The sound of a file on the clock of its pictures, decoding only the part that is needed.

Second 0 is when the first picture is shown, as in `VideoReader.times`; in a file without pictures it is
the beginning of the sound. Every decoded piece is put where its time stamp says: sound that starts
late, pauses, and jumps of the clock leave digital silence between, sound before second 0 is cut, and behind
the last piece nothing is added.

A damaged packet is an error, never silence. Passed over are a single one at the end of the file (a file cut short) and, in
MPEG streams, those before the first that decodes (a recording cut out of a broadcast begins so). Not all decoders can tell:
of 150 tracks of 6 s with 1 to 19 flipped bits all were found in FLAC and AC-3, 131 in AAC, 34 in MP3, none in Opus. A
checksum of the file is the cure.
"""

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
from invideo_jax.data.time_line import EDGE_SECONDS, Sound, TimeLine
from invideo_jax.errors import UserError

__all__ = ["Sound", "SoundReader", "read_sound"]

SOUND_FORMATS = FORMATS + ",wav,w64,flac,mp3,aac,aiff,caf,au"
# Decoded and thrown away before a part: decoders lean on the packets before (Opus asks for 80 ms, MP3 for up to 9
# frames of 26 ms).
_LEAD_SECONDS = 0.5
_SEEK_SECONDS = 2.0  # a part that begins earlier is read from the start


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
            self._scale = float(self._stream.time_base) if self._stream is not None else 1.0
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
        # Checksums: FLAC's decoder looks at its own only so; of other codecs 'explode' refuses harmless streams.
        explode = "+explode" if stream.codec_context.name == "flac" else ""
        stream.codec_context.options = {"err_detect": "crccheck" + explode}
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
        key, first, before = None, None, []
        if self._picture is not None:
            self._stream.discard = av.stream.Discard.all
            for position, packet in enumerate(self._packets(self._picture)):
                pts, dts = packet.pts, packet.dts
                pts = (position if dts is None else dts) if pts is None else pts
                if packet.is_keyframe and key is None:
                    key = pts
                if packet.is_discard:  # edit lists: decoded, but never shown
                    continue
                if key is None:
                    before.append(pts)
                elif pts >= key:
                    first = pts if first is None else min(first, pts)
                if first is not None and (dts is None or dts >= first):
                    break
            self._stream.discard = av.stream.Discard.default
            if first is None:
                first = min((p for p in before if key is None or p >= key), default=None)
        if first is not None:
            return float(first * self._picture.time_base)
        return (self._stream.start_time or 0) * self._scale

    def extent(self) -> tuple[float, float]:
        """Seconds at which the track begins and ends, by the header; where that is silent, by the packets."""
        stream = self._stream
        seconds = declared_seconds(self._container, stream)
        if stream.start_time is not None and seconds is not None and self._tells_length():
            begin = self._second(stream.start_time)
            # Matroska's tag counts from the beginning of the file, not of the track.
            ticks = self._container.duration
            if ticks is None:
                return begin, begin + seconds
            ticks += self._container.start_time or 0
            return begin, min(begin + seconds, ticks / av.time_base - self._origin)
        self._rewind()
        times = [
            (packet.pts, packet.pts + (packet.duration or 0))
            for packet in self._packets(self._stream)
            if packet.pts is not None
        ]
        if not times:
            return 0.0, 0.0
        return self._second(min(t[0] for t in times)), self._second(max(t[1] for t in times))

    def _tells_length(self) -> bool:
        """Whether the header holds the length; other formats guess it from the bit rate."""
        return any(
            name in self._container.format.name for name in ("mp4", "matroska", "wav", "flac")
        )

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
        line = TimeLine(low, high, rate)
        try:
            for frame in self._frames(low, high):
                line.add(frame, self._second(frame.pts))
            return line.sound()
        except (av.FFmpegError, ValueError) as error:
            detail = str(getattr(error, "strerror", None) or error)
            raise BadVideo("bad_sound", self.path, detail) from None

    def _second(self, pts: int | None) -> float | None:
        return None if pts is None else pts * self._scale - self._origin

    def _frames(self, low: float, high: float):
        """Decoded frames from before `low` to behind `high`."""
        context, good, refused, damaged = self._stream.codec_context, False, 0, 0
        streamed = "mpeg" in self._container.format.name
        for packet in self._packets_of(low, high):
            bad = packet is not None and packet.is_corrupt
            frames = None if bad else self._decode(context, packet)
            if frames is None or any(frame.is_corrupt for frame in frames):
                if packet is None or (self._end(packet) or low) >= low:
                    refused, damaged = refused + 1, damaged + (good or not streamed)
                continue
            if frames and damaged:
                second = self._second(frames[0].pts) or 0.0
                raise BadVideo("bad_sound", self.path, f"damaged before {second:.2f} s")
            good = good or bool(frames)
            yield from frames
        if damaged > (1 if self._ended else 0) or (refused and not good):
            raise BadVideo("bad_sound", self.path, f"{refused} damaged packets")

    def _end(self, packet) -> float | None:
        return self._second(None if packet.pts is None else packet.pts + (packet.duration or 0))

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
        self._ended = False
        for packet in self._packets(self._stream):
            begin, end = self._second(packet.pts), self._end(packet)
            if begin is not None and begin >= high + EDGE_SECONDS:
                break
            if end is None or end >= low - _LEAD_SECONDS:
                yield packet
        else:
            self._ended = True  # of the file, not of the part
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
