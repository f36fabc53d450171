"""From a decoded frame to the RGB pixels of a box of it, at the wanted size, with as little work as possible."""

import dataclasses

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

INTERPOLATIONS = {"bilinear": Interpolation.BILINEAR, "bicubic": Interpolation.BICUBIC}


@dataclasses.dataclass(frozen=True)
class View:
    """Which part of a picture is wanted, and how large.

    Args:
        box: (x, y, width, height) in pixels of the picture as shown (after rotation); None for all
            of it.
        size: (width, height) of the result; None for the size of the box.
        interpolation: 'bilinear' (antialiased when shrinking) or 'bicubic'.
    """

    box: tuple[int, int, int, int] | None = None
    size: tuple[int, int] | None = None
    interpolation: str = "bilinear"


def quarter_turns(frame: av.VideoFrame) -> int:
    """How often the picture must be turned by 90 degrees counter-clockwise to be upright: 0 to 3."""
    return round(frame.rotation / 90) % 4


def shown_size(frame: av.VideoFrame) -> tuple[int, int]:
    """(width, height) of the picture as shown."""
    if quarter_turns(frame) % 2:
        return frame.height, frame.width
    return frame.width, frame.height


class Scaler:
    """Makes uint8 RGB arrays of one view of frames of one video.

    Keeps one swscale context: a new one for each frame costs up to three times the scaling itself,
    and its default of one thread per core makes worker processes fight.

    Args:
        view: the part wanted.
        reference: (width, height) as shown that the box of `view` is given in. A frame of another
            size (some streams change it) gives the same part of the picture.
    """

    def __init__(self, view: View, reference: tuple[int, int]):
        self.reference = reference
        self.box = view.box or (0, 0, *reference)
        self.size = view.size or self.box[2:]
        self.flags = INTERPOLATIONS[view.interpolation]
        self._scale, self._rescale = VideoReformatter(), VideoReformatter()

    def _rgb(self, scaler: VideoReformatter, frame: av.VideoFrame, width: int, height: int):
        return scaler.reformat(
            frame, width=width, height=height, format="rgb24", interpolation=self.flags, threads=1
        ).to_ndarray()

    def __call__(self, frame: av.VideoFrame, out: np.ndarray) -> None:
        """Writes the view of `frame` into `out`, uint8 [H, W, 3] of the view's size."""
        turns, (width, height) = quarter_turns(frame), shown_size(frame)
        sx, sy = width / self.reference[0], height / self.reference[1]
        x, y, w, h = self.box[0] * sx, self.box[1] * sy, self.box[2] * sx, self.box[3] * sy
        out_w, out_h = self.size
        zoom_w, zoom_h = round(width * out_w / w), round(height * out_h / h)
        if zoom_w * zoom_h <= width * height:
            # Scale all of the picture so that the box gets the wanted size, then slice: full-size
            # RGB is never made.
            image = self._turned(self._scale, frame, turns, max(zoom_w, out_w), max(zoom_h, out_h))
            left, top = round(x * out_w / w), round(y * out_h / h)
            left, top = min(left, image.shape[1] - out_w), min(top, image.shape[0] - out_h)
            out[:] = image[top : top + out_h, left : left + out_w]
            return
        image = self._turned(self._scale, frame, turns, width, height)
        left, top = min(round(x), width - 1), min(round(y), height - 1)
        part = image[top : top + max(round(h), 1), left : left + max(round(w), 1)]
        if part.shape[:2] != (out_h, out_w):
            cut = av.VideoFrame.from_ndarray(np.ascontiguousarray(part), format="rgb24")
            part = self._rgb(self._rescale, cut, out_w, out_h)
        out[:] = part

    def _turned(self, scaler, frame, turns: int, width: int, height: int) -> np.ndarray:
        if turns % 2:
            width, height = height, width
        image = self._rgb(scaler, frame, width, height)
        return np.rot90(image, turns) if turns else image
