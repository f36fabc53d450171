"""Decodes single clips again, for judging pairs and for pictures."""

import base64
import dataclasses
import fractions
from collections.abc import Sequence

import av
import numpy as np

from invideo_jax.data.decode import BadVideo, Limits, VideoReader
from invideo_jax.data.scaling import View
from invideo_jax.data.sources import Example
from invideo_jax.data.transforms import ClipSpec, pick_box
from invideo_jax.features.windows import Rule, Window, cut

STRIP_FRAMES = 4
STRIP_HEIGHT = 144  # pixels
_GAP = 4
_WIDEST = 2.4  # width of a picture over its height; panoramas are squeezed
_QUALITY = 4  # of JPEG as FFmpeg counts: 2 is best, 31 worst


@dataclasses.dataclass(frozen=True)
class Cut:
    """One window of a video.

    Attributes:
        window: see `Window`.
        clip: uint8 [T, S, S, 3], as the model sees it; None where only pictures are asked for.
        pictures: uint8 [n, H, W, 3], as people see it; None where only the clip is asked for.
    """

    window: Window
    clip: np.ndarray | None = None
    pictures: np.ndarray | None = None


def read_cut(
    example: Example,
    number: int,
    rule: Rule,
    spec: ClipSpec,
    *,
    pictures: bool = False,
    limits: Limits | None = None,
) -> Cut:
    """Window `number` of a video.

    Args:
        example: names the file, or holds its bytes.
        number: which window.
        rule, spec: as of the index.
        pictures: give some whole frames instead of the clip.

    Raises:
        BadVideo: the file cannot be read, or has no such window any more.
    """
    part = dict(start=example["start"], end=example["end"])
    with VideoReader(example["video"], limits=limits, **part) as reader:
        windows = cut(reader.times(), rule, spec)
        if number >= len(windows):
            raise BadVideo("changed", example["path"], f"has {len(windows)} windows now")
        window = windows[number]
        if pictures:
            return Cut(window, pictures=reader.frames(_spread(window.indices), view=_whole))
        size, rng = (spec.size,) * 2, np.random.default_rng(0)  # the spec draws nothing
        view = lambda w, h: View(pick_box(spec, w, h, rng), size, spec.interpolation)
        return Cut(window, clip=reader.frames(window.indices, view=view))


def _spread(indices: np.ndarray) -> np.ndarray:
    """Up to `STRIP_FRAMES` different ones, evenly spread."""
    indices = np.unique(indices)
    chosen = np.linspace(0, len(indices) - 1, min(STRIP_FRAMES, len(indices)))
    return indices[chosen.round().astype(int)]


def _whole(width: int, height: int) -> View:
    shown = min(max(STRIP_HEIGHT * width / height, 1), _WIDEST * STRIP_HEIGHT)
    return View(None, (2 * round(shown / 2) or 2, STRIP_HEIGHT))


def strip(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one size beside each other, uint8 [H, W', 3]; a gap of middle grey between."""
    gap = np.full((pictures[0].shape[0], _GAP, 3), 128, np.uint8)
    return np.concatenate([x for p in pictures for x in (gap, p)][1:], axis=1)


def jpeg(picture: np.ndarray) -> bytes:
    """A picture uint8 [H, W, 3] as JPEG."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = picture.shape[:2]
    codec.pix_fmt, codec.time_base = "yuvj420p", fractions.Fraction(1, 1)
    codec.options = {"qmin": str(_QUALITY), "qmax": str(_QUALITY)}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    packets = [*codec.encode(frame.reformat(format="yuvj420p")), *codec.encode(None)]
    return b"".join(bytes(packet) for packet in packets)


def data_uri(picture: np.ndarray) -> str:
    """A picture as text that a page can hold."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(picture)).decode()
