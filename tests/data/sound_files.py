"""Writes small files with any kind of sound beside a picture: clicks and tones at known seconds."""

from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from data.video_files import picture

Piece = tuple[float, np.ndarray]  # second, float [channels, n]


def clicks(seconds: float, at: Sequence[float], rate: int, channels: int = 1) -> np.ndarray:
    """float64 [channels, n]: a burst of 2 ms of 1 kHz, loudness 0.8, beginning at each second of `at`."""
    wave = np.zeros(round(seconds * rate))
    burst = 0.8 * np.cos(2 * np.pi * 1000 * np.arange(round(0.002 * rate)) / rate)
    for second in at:
        first = round(second * rate)
        wave[first : first + len(burst)] = burst
    return np.tile(wave, (channels, 1))


def tone(seconds: float, hertz: float, rate: int, channels: int = 1, loud: float = 0.5):
    """float64 [channels, n]: a sine."""
    wave = loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.tile(wave, (channels, 1))


def write_sound_file(
    path: str,
    sound: np.ndarray | Sequence[Piece] | None,
    *,
    rate: int = 16000,
    layout: str = "mono",
    codec: str = "pcm_s16le",
    sample_format: str = "s16",
    seconds: float = 2.0,
    picture_from: float = 0.0,
    fps: int = 10,
    options: dict | None = None,
    container: dict | None = None,
    piece: int = 1024,
) -> str:
    """Writes one file; returns its path.

    Args:
        sound: float [channels, n] from second 0 of the file, or pieces with their seconds, or None.
        seconds: length of the picture; 0 for none. picture_from: second of its first frame.
        piece: samples in a packet of PCM.
    """
    if isinstance(sound, np.ndarray):
        sound = [(0.0, sound)]
    packets = []
    with av.open(path, "w", options=container or {}) as out:
        video = audio = None
        if seconds:
            video = out.add_stream("mpeg4", rate=fps)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            video.codec_context.time_base = Fraction(1, fps)
        if sound is not None:
            audio = out.add_stream(codec, rate=rate, layout=layout, options=options or {})
            audio.codec_context.format = sample_format
        if video:
            for number in range(round(seconds * fps)):
                frame = av.VideoFrame.from_ndarray(picture(number, 64, 48), format="rgb24")
                frame.pts = number + round(picture_from * fps)
                frame.time_base = Fraction(1, fps)
                packets += video.encode(frame)
            packets += video.encode(None)
        if audio:
            packets += _encode(audio, sound, rate, layout, sample_format, piece)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            out.mux(packet)
    return path


def _encode(stream, pieces, rate, layout, sample_format, size):
    context, packets = stream.codec_context, []
    context.open(strict=False)
    size = context.frame_size or size
    for second, wave in pieces:
        first = round(second * rate)
        for at in range(0, wave.shape[1], size):
            frame = av.AudioFrame.from_ndarray(
                _as_format(wave[:, at : at + size], sample_format), sample_format, layout
            )
            frame.sample_rate, frame.pts, frame.time_base = rate, first + at, Fraction(1, rate)
            packets += stream.encode(frame)
    return packets + stream.encode(None)


def _as_format(wave: np.ndarray, name: str) -> np.ndarray:
    base = name.rstrip("p")
    if base == "u8":
        array = np.clip(np.round(wave * 128 + 128), 0, 255).astype(np.uint8)
    elif base in ("s16", "s32"):
        bits = int(base[1:]) - 1
        array = np.clip(np.round(wave * 2.0**bits), -(2.0**bits), 2.0**bits - 1)
        array = array.astype(f"i{(bits + 1) // 8}")
    else:
        array = wave.astype({"flt": np.float32, "dbl": np.float64}[base])
    planar = name.endswith("p")
    return np.ascontiguousarray(array if planar else array.T.reshape(1, -1))
