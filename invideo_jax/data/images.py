"""One picture as a clip of one frame, cut and augmented as videos are."""

import io

import av
import numpy as np

from invideo_jax.data.open_video import BadVideo, Limits, check_path
from invideo_jax.data.scaling import Scaler, View, shown_size
from invideo_jax.data.transforms import ClipInfo, ClipSpec, augmented, pick_box

# What FFmpeg recognises by content, whatever the name; playlists and devices are not among them.
FORMATS = "jpeg_pipe,png_pipe,webp_pipe,bmp_pipe"
_MAX_BYTES = 256 << 20


def load_image(
    source: str | bytes,
    spec: ClipSpec,
    rng: np.random.Generator,
    *,
    flip_ok: bool = True,
    limits: Limits | None = None,
) -> tuple[np.ndarray, ClipInfo]:
    """Decodes one picture; of what a clip is made of, all that says something of frames is left aside.

    Args:
        source: a local path, or the encoded bytes: JPEG, PNG, WebP or BMP.
        spec, rng, flip_ok, limits: as of `transforms.load_clip`.

    Returns:
        (uint8 [1, S, S, 3] RGB, how it was made).

    Raises:
        BadVideo: it cannot be used.
    """
    name = source if isinstance(source, str) else ""
    frame = _decode(_read(source, name), limits or Limits(), name)
    width, height = shown_size(frame)
    box = pick_box(spec, width, height, rng)
    image = np.empty((1, spec.size, spec.size, 3), np.uint8)
    view = View(box, (spec.size, spec.size), spec.interpolation)
    Scaler(view, (width, height))(frame, image[0])
    image, flipped = augmented(image, spec, rng, flip_ok=flip_ok)
    info = ClipInfo((0,), (0.0,), box, flipped, padded=0, fallback=False, truncated=False)
    return image, info


def _read(source: str | bytes, name: str) -> bytes:
    if isinstance(source, bytes):
        if not source:
            raise BadVideo("empty", name)
        return source
    check_path(source)
    try:
        with open(source, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise BadVideo("permission", name, error.strerror or "") from None
    if len(data) > _MAX_BYTES:
        raise BadVideo("too_large", name, f"more than {_MAX_BYTES >> 20} MiB")
    return data


def _decode(data: bytes, limits: Limits, name: str) -> av.VideoFrame:
    options = {"max_pixels": str(2 * limits.max_pixels + 65536)}
    try:
        with av.open(
            io.BytesIO(data), options=options, container_options={"format_whitelist": FORMATS}
        ) as container:
            if not container.streams.video:
                raise BadVideo("no_video_stream", name)
            context = container.streams.video[0].codec_context
            if context.width * context.height > limits.max_pixels:
                size = f"{context.width} x {context.height}, limit {limits.max_pixels} pixels"
                raise BadVideo("too_large", name, size)
            context.options, context.thread_count = options, 1
            return _first(container, name)
    except (av.FFmpegError, ValueError, IndexError) as error:
        raise BadVideo("not_video", name, str(getattr(error, "strerror", error))) from None


def _first(container: "av.container.InputContainer", name: str) -> av.VideoFrame:
    try:
        frame = next(container.decode(video=0), None)
    except av.FFmpegError as error:
        raise BadVideo("corrupt_frame", name, str(error.strerror)) from None
    if frame is None:
        raise BadVideo("no_frames", name)
    if frame.is_corrupt:
        raise BadVideo("corrupt_frame", name)
    return frame
