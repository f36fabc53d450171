"""Tiny mp4 files for the tests of the data folder, each with pictures of its own."""

import pathlib

import av
import numpy as np


def write_video(path, number: int = 0, frames: int = 12, fps: int = 8) -> str:
    """Writes a 64 x 48 h264 file whose brightness and stripes depend on `number`; returns its path."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(number)
    base = rng.integers(0, 200, size=(6, 8, 3))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=fps, options={"preset": "ultrafast", "crf": "20"}
        )
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        for index in range(frames):
            picture = np.kron(np.roll(base, index, axis=1), np.ones((8, 8, 1))).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return str(path)


def write_videos(folder, count: int, start: int = 0) -> list[str]:
    """`count` files clip_000.mp4, ... with different pictures."""
    return [
        write_video(pathlib.Path(folder) / f"clip_{i:03d}.mp4", start + i) for i in range(count)
    ]
