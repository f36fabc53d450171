"""Pictures of reconstructions: strips of frames, animations, and the letters on them. NumPy and PyAV only."""

import io
from collections.abc import Mapping, Sequence

import av
import av.filter
import numpy as np

from invideo_jax.metrics import png

__all__ = ["PANELS", "animation", "gif", "label", "png", "resize", "stack", "strip"]

PANELS = {
    "original": "original",
    "masked": "masked input",
    "reconstruction": "reconstruction",
}
_GAP = 6  # pixels between panels
_INK = np.array([51, 65, 85], np.float32)

# Letters as strokes: each word of digits is a line through points (x, y); the baseline is y = 2, lower
# case reaches y = 6, tall letters y = 9. Drawn from distances, so smooth at any size.
_STROKES = {
    "a": "46 42,45 36 16 05 03 12 32 43",
    "c": "45 36 16 05 03 12 32 43",
    "d": "49 42,45 36 16 05 03 12 32 43",
    "e": "04 44 45 36 16 05 03 12 32 43",
    "g": "46 41 30 10 01,45 36 16 05 03 12 32 43",
    "i": "02 06,08 08",
    "k": "02 09,46 04,24 42",
    "l": "02 09",
    "m": "02 06,05 16 26 35 32,35 46 56 65 62",
    "n": "02 06,05 16 36 45 42",
    "o": "05 16 36 45 43 32 12 03 05",
    "p": "00 06,05 16 36 45 43 32 12 03",
    "r": "02 06,04 15 26 36",
    "s": "45 36 16 05 14 34 43 32 12 03",
    "t": "18 13 22 32,06 36",
    "u": "06 03 12 32 43,46 42",
    " ": "",
}


def label(text: str, *, unit: float = 1.5) -> np.ndarray:
    """Text as a picture, dark on white.

    Args:
        text: letters of `PANELS`.
        unit: pixels of one grid unit; lower-case letters are four units tall.

    Returns:
        uint8 [H, W, 3], H about 12 units.
    """
    segments, x = [], 1.0
    for letter in text:
        points = [
            np.array([(int(p[0]), int(p[1])) for p in stroke.split()], np.float32)
            for stroke in _STROKES[letter].split(",")
            if stroke
        ]
        width = max((p[:, 0].max() for p in points), default=2.0)
        segments += [(a + (x, 0), b + (x, 0)) for p in points for a, b in zip(p[:-1], p[1:])]
        x += width + 2.0
    height, width = int(round(12 * unit)), int(np.ceil(x * unit))
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + 0.5
    at = np.stack([columns / unit, 10.5 - rows / unit], axis=-1)
    distance = np.full((height, width), np.inf, np.float32)
    for a, b in segments:
        along = b - a
        share = np.clip(((at - a) @ along) / max(float(along @ along), 1e-9), 0, 1)
        nearest_point = a + share[..., None] * along
        distance = np.minimum(distance, np.linalg.norm(at - nearest_point, axis=-1))
    ink = np.clip(0.5 + 0.5 * unit - distance * unit, 0, 1)[..., None]
    return np.rint(255 - ink * (255 - _INK)).astype(np.uint8)


def resize(frames: np.ndarray, target: int) -> np.ndarray:
    """Enlarges or shrinks by a whole factor, so that the height comes near `target` pixels.

    Enlarging repeats pixels (what the model made stays visible as it is), shrinking averages blocks.

    Args:
        frames: uint8 [..., H, W, 3].
    """
    height, width = frames.shape[-3:-1]
    if height < target:
        factor = max(round(target / height), 1)
        return frames.repeat(factor, axis=-3).repeat(factor, axis=-2)
    factor = max(round(height / target), 1)
    h, w = height // factor, width // factor
    blocks = frames[..., : h * factor, : w * factor, :].reshape(
        *frames.shape[:-3], h, factor, w, factor, 3
    )
    return np.rint(blocks.mean(axis=(-4, -2))).astype(np.uint8)


def stack(pictures: Sequence[np.ndarray], *, axis: int, gap: int = _GAP) -> np.ndarray:
    """Puts pictures of one size beside (axis=-2) or below (axis=-3) each other, with white between.

    Args:
        pictures: uint8 [..., H, W, 3] each.
    """
    shape = list(pictures[0].shape)
    shape[axis] = gap
    white = np.full(shape, 255, np.uint8)
    parts = [part for picture in pictures for part in (white, picture)][1:]
    return np.concatenate(parts, axis=axis)


def strip(clip: Mapping[str, np.ndarray], *, frames: int = 8, size: int = 112) -> np.ndarray:
    """One clip as rows original, masked input, reconstruction; frames from left to right.

    Args:
        clip: uint8 [T, H, W, 3] for each name of `PANELS`.
        frames: how many frames at most, evenly spread, first and last among them.
        size: wished height of a frame in pixels.

    Returns:
        uint8 [H', W', 3].
    """
    length = len(clip["original"])
    chosen = np.unique(np.linspace(0, length - 1, min(frames, length)).round().astype(int))
    rows = [stack(list(resize(clip[name][chosen], size)), axis=-2, gap=3) for name in PANELS]
    names = [_beside(label(text), len(rows[0])) for text in PANELS.values()]
    names = [_pad_left(name, max(n.shape[1] for n in names)) for name in names]
    return stack([np.concatenate(pair, axis=1) for pair in zip(names, rows)], axis=-3, gap=3)


def _beside(text: np.ndarray, height: int) -> np.ndarray:
    """Centres a label on `height` rows."""
    above = (height - len(text)) // 2
    below = height - len(text) - above
    return np.pad(text, ((above, below), (4, 8), (0, 0)), constant_values=255)


def _pad_left(picture: np.ndarray, width: int) -> np.ndarray:
    return np.pad(picture, ((0, 0), (width - picture.shape[1], 0), (0, 0)), constant_values=255)


def animation(clips: Sequence[Mapping[str, np.ndarray]], *, size: int = 160) -> np.ndarray:
    """Clips as rows; original, masked input and reconstruction side by side; names on top.

    Args:
        clips: uint8 [T, H, W, 3] for each name of `PANELS`, all of one shape.
        size: wished height of a frame in pixels.

    Returns:
        uint8 [T, H', W', 3].
    """
    rows = [stack([resize(clip[name], size) for name in PANELS], axis=-2) for clip in clips]
    body = stack(rows, axis=-3)
    width = resize(clips[0]["original"][:1], size).shape[2]
    heads = [_centred(label(text, unit=min(1.5, width / 90)), width) for text in PANELS.values()]
    head = np.broadcast_to(stack(heads, axis=-2), (len(body), *stack(heads, axis=-2).shape))
    return np.concatenate([head, body], axis=1)


def _centred(text: np.ndarray, width: int) -> np.ndarray:
    text = text[:, :width]
    left = (width - text.shape[1]) // 2
    right = width - text.shape[1] - left
    return np.pad(text, ((2, 4), (left, right), (0, 0)), constant_values=255)


def gif(frames: np.ndarray, *, fps: int = 8) -> bytes:
    """An endless GIF; one palette of 256 colours for the whole clip, ordered dithering.

    Args:
        frames: uint8 [T, H, W, 3].
        fps: pictures a second.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"Frames must be uint8 [T, H, W, 3]; got {frames.dtype} {frames.shape}.")
    height, width = frames.shape[1:3]
    graph = av.filter.Graph()
    source = graph.add_buffer(width=width, height=height, format="rgb24", time_base=f"1/{fps}")
    split, sink = graph.add("split"), graph.add("buffersink")
    palette = graph.add("palettegen", "stats_mode=full:reserve_transparent=0")
    use = graph.add("paletteuse", "dither=bayer:bayer_scale=4:diff_mode=rectangle")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(palette, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for i, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts = i
        source.push(frame)
    source.push(None)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="gif") as file:
        stream = file.add_stream("gif", rate=fps)
        stream.height, stream.width, stream.pix_fmt = height, width, "pal8"
        for _ in frames:
            file.mux(stream.encode(sink.pull()))
        file.mux(stream.encode(None))
    return buffer.getvalue()
