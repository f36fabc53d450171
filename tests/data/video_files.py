"""Writes small test videos of every kind, and decodes them plainly: the oracle of the reader's tests."""

import pathlib
import struct
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

BITS = 8  # of the frame number, as bright and dark blocks along the top


def picture(number: int, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3]: the number in binary along the top half, a moving texture below (so that frames need each other)."""
    x, y = np.arange(width), np.arange(height)[:, None]
    wave = 127 + 60 * np.sin((x + 3 * number) / 7.0) + 60 * np.cos((y - 2 * number) / 5.0)
    image = np.stack([wave, np.roll(wave, 9, 1), 255 - wave], -1).clip(0, 255).astype(np.uint8)
    block = max(width // BITS, 1)
    for bit in range(BITS):
        image[: height // 2, bit * block : (bit + 1) * block] = 230 if number >> bit & 1 else 20
    return image


def number_in(image: np.ndarray) -> int:
    """The frame number that `picture` wrote."""
    height, width = image.shape[:2]
    block = max(width // BITS, 1)
    parts = [
        image[
            height // 8 : 3 * height // 8, bit * block + block // 4 : (bit + 1) * block - block // 4
        ]
        for bit in range(BITS)
    ]
    return sum(1 << bit for bit, part in enumerate(parts) if part.mean() > 125)


KINDS = {  # name -> arguments of `write`: real files of every kind that users have
    "h264.mp4": {},
    "h264.mkv": {},
    "h264.mov": {},
    "h264_in.avi": {},  # B-frames in a format without showing times
    "h264.ts": {},
    "b_pyramid.mp4": {"options": {"bf": "5", "x264-params": "b-pyramid=normal"}},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3"}},
    "intra.mp4": {"gop": 1},
    "one_gop.mp4": {"gop": 250},
    "faststart.mp4": {"container": {"movflags": "faststart"}},
    "fragmented.mp4": {"container": {"movflags": "frag_keyframe+empty_moov"}},
    "hevc.mp4": {"codec": "libx265"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "lag-in-frames": "10"}},
    "av1.mp4": {"codec": "libsvtav1"},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mpeg4_in.avi": {"codec": "mpeg4", "options": {"bf": "2"}},
    "mjpeg_in.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "full_range.mp4": {"pix_fmt": "yuvj420p"},
    "odd_size.mp4": {"pix_fmt": "yuv444p", "size": (97, 63)},
    "gray.mp4": {"pix_fmt": "gray"},
    "alpha.mkv": {"codec": "ffv1", "pix_fmt": "bgra"},
    "one_frame.mp4": {"frames": 1},
    "two_frames.mkv": {"frames": 2},
    "variable_rate.mp4": {"steps": [40, 40, 200, 20, 20, 500]},
    "variable_rate.mkv": {"steps": [40, 40, 200, 20, 20, 500]},
    "late_start.mkv": {"first": 5000},
    "turned_90.mp4": {"rotation": 90},
    "turned_180.mp4": {"rotation": 180},
    "turned_270.mov": {"rotation": -90},
    "with_sound.mp4": {"audio": "last"},
    "sound_first.mkv": {"audio": "first"},
    "small_stream_first.mp4": {"preview": True},
}


def write_kind(folder: pathlib.Path, name: str) -> str:
    """Writes KINDS[name] into `folder`; returns its path."""
    path = str(folder / name)
    write(path, **{"frames": 40, **KINDS[name]})
    return path


def write(
    path: str,
    *,
    frames: int = 40,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    options: dict | None = None,
    container: dict | None = None,
    steps: Sequence[int] = (40,),
    first: int = 0,
    rotation: float = 0,
    audio: str = "",
    preview: bool = False,
    colorspace: int | None = None,
    images: Sequence[np.ndarray] | None = None,
) -> None:
    """Writes one video of numbered pictures.

    Args:
        steps: milliseconds between frames, repeated in turn. first: time of the first.
        rotation: degrees counter-clockwise that a player must turn the picture by.
        audio: '', 'first' or 'last': place of a sound track among the streams.
        preview: put a smaller picture stream of other pictures in front.
        images: uint8 RGB pictures instead of the numbered ones.
    """
    options = {**_QUIET.get(codec, {}), "g": str(gop), **(options or {})}
    with av.open(path, "w", options=container or {}) as out:
        sound = _add_sound(out) if audio == "first" else None
        streams = [_add(out, codec, (48, 32), pix_fmt, options)] if preview else []
        streams.append(_add(out, codec, size, pix_fmt, options))
        if rotation:
            streams[-1].set_display_rotation(rotation)
        if colorspace is not None:
            streams[-1].codec_context.colorspace = colorspace
        sound = _add_sound(out) if audio == "last" else sound
        if sound:
            _mux_sound(out, sound, frames * 0.04)
        time = first
        for number in range(frames):
            for stream in streams:
                shown = number if stream is streams[-1] else 255 - number
                image = images[number] if images else picture(shown, stream.width, stream.height)
                out.mux(stream.encode(_frame(image, time, pix_fmt, colorspace)))
            time += steps[number % len(steps)]
        for stream in streams:
            out.mux(stream.encode(None))


_QUIET = {
    "libx264": {"threads": "1", "preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}


def _add(out, codec, size, pix_fmt, options):
    stream = out.add_stream(codec, rate=25, options=dict(options))
    stream.width, stream.height = size
    stream.pix_fmt = pix_fmt
    # AVI fills the gaps of a fine clock with empty frames.
    stream.codec_context.time_base = Fraction(1, 25 if out.format.name == "avi" else 1000)
    stream.thread_count = 1
    return stream


def _frame(image, milliseconds, pix_fmt, colorspace):
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    if colorspace is not None:
        frame = frame.reformat(format=pix_fmt, dst_colorspace=colorspace, dst_color_range=1)
    frame.pts, frame.time_base = milliseconds, Fraction(1, 1000)
    return frame


def _add_sound(out):
    return out.add_stream("aac", rate=16000, layout="mono")


def _mux_sound(out, stream, seconds: float) -> None:
    wave = (8000 * np.sin(np.arange(int(16000 * seconds)) / 6)).astype(np.int16)
    for at in range(0, len(wave) - 1023, 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, at : at + 1024], format="s16", layout="mono")
        frame.sample_rate, frame.pts = 16000, at
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def write_sound(path: str, *, cover: bool = False) -> None:
    """A file with sound only, and a cover picture if asked."""
    with av.open(path, "w") as out:
        stream = _add_sound(out)
        art = out.add_stream("mjpeg", rate=1) if cover else None
        if art:
            art.width, art.height, art.pix_fmt = 160, 160, "yuvj420p"
            art.disposition = av.stream.Disposition.attached_pic
            out.mux(art.encode(av.VideoFrame.from_ndarray(picture(1, 160, 160), format="rgb24")))
            out.mux(art.encode(None))
        _mux_sound(out, stream, 1.0)


def write_cover_and_video(path: str, frames: int = 20) -> None:
    """An MP4 whose cover picture is larger than its video and stands first."""
    with av.open(path, "w") as out:
        art = out.add_stream("mjpeg", rate=1)
        art.width, art.height, art.pix_fmt = 320, 320, "yuvj420p"
        art.disposition = av.stream.Disposition.attached_pic
        stream = _add(out, "libx264", (96, 64), "yuv420p", _QUIET["libx264"])
        out.mux(art.encode(av.VideoFrame.from_ndarray(picture(1, 320, 320), format="rgb24")))
        out.mux(art.encode(None))
        for number in range(frames):
            out.mux(stream.encode(_frame(picture(number, 96, 64), 40 * number, "yuv420p", None)))
        out.mux(stream.encode(None))


def plain_frames(source, stream: int | None = None) -> list[np.ndarray]:
    """Every frame of the largest picture stream by plain decoding in order, upright, RGB."""
    with av.open(source) as container:
        chosen = (
            container.streams[stream]
            if stream is not None
            else max(container.streams.video, key=lambda s: s.width * s.height)
        )
        chosen.thread_count = 1
        frames = list(container.decode(chosen))
        return [np.rot90(f.to_ndarray(format="rgb24"), round(f.rotation / 90)) for f in frames]


def has_encoder(codec: str) -> bool:
    """Whether the installed PyAV can write this codec."""
    try:
        av.codec.Codec(codec, "w")
    except (av.error.FFmpegError, ValueError):
        return False
    return True


# Damage -------------------------------------------------------------------------------------------


def flip_bits(data: bytes, count: int, seed: int = 0, start: float = 0.25) -> bytes:
    """Flips `count` single bits behind the share `start` of the bytes."""
    out, rng = bytearray(data), np.random.default_rng(seed)
    for place in rng.integers(int(start * len(out)), len(out), size=count):
        out[place] ^= 1 << int(rng.integers(8))
    return bytes(out)


def hole(data: bytes, at: float, size: int) -> bytes:
    """Zeroes `size` bytes at the share `at`."""
    place = int(at * len(data))
    return data[:place] + bytes(size) + data[place + size :]


def shift_edit_list(data: bytes, frames: int) -> bytes:
    """Makes an MP4 start being shown `frames` frames (of 40 ms) later, as an edit list does."""
    box = data.index(b"elst")
    scale_box = data.index(b"mdhd")
    scale = struct.unpack(">I", data[scale_box + 16 : scale_box + 20])[0]
    at = box + 16  # type, version and flags, count, duration of the edit
    begin = struct.unpack(">i", data[at : at + 4])[0] + frames * scale // 25
    return data[:at] + struct.pack(">i", begin) + data[at + 4 :]


def declare_size(data: bytes, width: int, height: int) -> bytes:
    """Writes another picture size into the sample description of an H.264 MP4."""
    at = data.index(b"avc1", data.index(b"stsd")) + 28
    return data[:at] + struct.pack(">HH", width, height) + data[at + 4 :]
