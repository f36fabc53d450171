"""When each frame of a file is shown and where its keyframes are, from the packets alone."""

import dataclasses
from collections.abc import Iterable

import av

from invideo_jax.data.open_video import BadVideo


@dataclasses.dataclass
class FrameTable:
    """Frames and keyframes in the order they are shown.

    Attributes:
        pts: time of each frame, in units of the stream's time base.
        positions: its place among the packets, from the start of the table.
        key_pts, key_dts: times of the keyframes: of showing and of decoding.
        exact: times are there and distinct, so that a frame is known by its time.
        partial: does not begin at the start of the file.
        ended: goes to the end of the file.
        shown: numbers of the frames of the asked part; None for all.
        end: where the last frame ends, in time base units.
        end_byte: where the last packet ends in the file.
        largest: bytes of the largest packet.
    """

    pts: list[int]
    positions: list[int]
    key_pts: list[int]
    key_dts: list[int]
    exact: bool = False
    partial: bool = False
    ended: bool = False
    shown: list[int] | None = None
    end: int = 0
    end_byte: int = 0
    largest: int = 0

    def shown_pts(self) -> list[int]:
        """Times of the frames of the asked part."""
        return self.pts if self.shown is None else [self.pts[i] for i in self.shown]


def stores_times(container: "av.container.InputContainer") -> bool:
    """Whether the format itself says when frames are shown; AVI and raw streams leave it to guesses."""
    return any(name in container.format.name for name in ("mp4", "matroska", "mpegts"))


def read_table(
    packets: Iterable["av.Packet"], *, high: float, max_frames: int, guessed: bool, path: str
) -> FrameTable:
    """Lists the frames of `packets`.

    Args:
        packets: of the picture stream, in the order of decoding.
        high: stop at packets that are decoded at or after this time.
        max_frames: more are an error.
        guessed: the stream has B-frames in a format that stores no showing times: only times that
            are seen to go back and forth are from the parser and right.
        path: for messages.

    Raises:
        BadVideo: damaged packets, no frames, too many.
    """
    frames, keys, present = [], [], True
    table = FrameTable([], [], [], [])
    last = end_byte = largest = 0  # plain names and no max(): this loop runs once a packet
    for position, packet in enumerate(packets):
        if packet.is_corrupt:
            raise BadVideo("corrupt_packet", path, f"packet {position}")
        if position >= max_frames:
            raise BadVideo("too_long", path, f"over {max_frames} frames")
        pts, dts = packet.pts, packet.dts
        if dts is not None and dts >= high:
            break
        if pts is None:
            present, pts = False, (position if dts is None else dts)
        if packet.is_keyframe:
            keys.append((pts, pts if dts is None else dts))
        if not packet.is_discard:  # edit lists: decoded, but never shown
            frames.append((pts, position))
            end = pts + (packet.duration or 0)
            if end > last:
                last = end
        size = packet.size
        byte = (packet.pos or 0) + size
        if byte > end_byte:
            end_byte = byte
        if size > largest:
            largest = size
    else:
        table.ended = True
    table.end, table.end_byte, table.largest = last, end_byte, largest
    # Pictures shown before the first keyframe lean on one that is not in the file.
    frames = sorted(frame for frame in frames if not keys or frame[0] >= keys[0][0])
    if not frames:
        raise BadVideo("no_frames", path)
    table.pts, table.positions = [f[0] for f in frames], [f[1] for f in frames]
    table.key_pts, table.key_dts = [k[0] for k in keys], [k[1] for k in keys]
    real = not (guessed and _rising(table.positions))
    table.exact = present and bool(keys) and _rising(table.key_pts) and _rising(table.pts) and real
    return table


def _rising(values: list[int]) -> bool:
    return all(a < b for a, b in zip(values, values[1:]))
