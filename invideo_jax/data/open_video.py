"""Opening one video from a local file or from bytes, and refusing everything that is not one.

What is opened comes from other people: a name that ends in .mp4 may be a pipe, a playlist that
points elsewhere, text, half a file. Each such thing is refused with a short reason code, before or
while opening.
"""

import dataclasses
import errno
import io
import os
import stat
import time

import av

# No lines of FFmpeg's own about damaged files: `BadVideo` says what matters. (PyAV 18 starts so.)
av.logging.set_level(None)

REASONS = {
    "missing": "no such file",
    "empty": "the file has no bytes",
    "permission": "the file may not be read",
    "not_regular": "a folder, pipe, socket or device, not a file",
    "symlink": "a link that leads in a circle or out of the folder of the data",
    "path_escape": "a path that leads out of the folder of the data",
    "not_video": "the bytes are no video container that is read here",
    "cannot_open": "a video container, but its header is damaged or cut off",
    "no_video_stream": "no picture stream",
    "no_frames": "a picture stream without frames, or none in the asked part",
    "corrupt_record": "a damaged record in the file that holds the encoded clips",
    "subtitles": "the file of its spoken words can't be read",
    "corrupt_packet": "damaged data in the container",
    "corrupt_frame": "a decoded picture is damaged",
    "decode_error": "the decoder failed",
    "missing_frames": "fewer pictures could be decoded than the container lists",
    "truncated": "the file ends before its data",
    "too_large": "more pixels in a picture than allowed",
    "too_long": "longer, or more frames, than allowed",
    "timeout": "reading or decoding took more CPU time than allowed",
    "hanging": "reading did not come to an end",
    "bad_sound": "the sound track is damaged, or of a kind that is not read",
    "codec": "no decoder for this codec in the installed PyAV",
}

# What a data set of videos is stored in. Playlists (hls, dash, concat), which FFmpeg recognises by
# content whatever the name, image sequences and devices are not among them.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf,mxf,nut,h264,hevc"
_MAGIC = (b"\x1aE\xdf\xa3", b"RIFF", b"FLV", b"OggS", b"\x00\x00\x01\xba", b"0&\xb2u", b"DKIF")

# Titles in any encoding must not stop a video. PyAV 19 has no such argument; PyAV 18 is the last for Python 3.11.
_ANY_TITLES = {} if int(av.__version__.split(".")[0]) >= 19 else {"metadata_errors": "replace"}


class BadVideo(Exception):
    """A video that cannot be used, and why.

    Args:
        reason: a key of `REASONS`.
        path: the file, or '' for bytes in memory.
        detail: what was found.
    """

    def __init__(self, reason: str, path: str = "", detail: str = ""):
        super().__init__(reason, path, detail)  # all three: the exception must survive pickling
        if reason not in REASONS:
            raise ValueError(f"reason must be one of {', '.join(REASONS)}; got reason={reason}.")
        self.reason, self.path, self.detail = reason, path, detail

    def __str__(self) -> str:
        tail = f" ({self.detail})" if self.detail else ""
        return f"{self.path or 'video in memory'}: {self.reason}: {REASONS[self.reason]}{tail}"


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one video may cost before it counts as bad.

    Args:
        max_pixels: width times height of a picture.
        max_seconds: length of the file.
        max_frames: pictures listed in the part that is read.
        decode_seconds: CPU time of the reading thread for listing the frames, and again for each
            decoding call; looked at between packets. Not wall time: which videos are bad must not
            depend on what else the machine does. A read that never returns is not noticed here;
            the loader's `read_seconds` is for that.
    """

    max_pixels: int = 10_000_000
    max_seconds: float = 6 * 3600.0
    max_frames: int = 1_000_000
    decode_seconds: float = 20.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ValueError(f"{field.name} must be above 0; got {field.name}={value}.")


class Deadline:
    """Raises BadVideo('timeout') when checked after more than `seconds` CPU seconds of the thread that made it."""

    def __init__(self, seconds: float, path: str):
        self.seconds, self.path = seconds, path
        self.end = time.thread_time() + seconds

    def check(self) -> None:
        if time.thread_time() > self.end:
            raise BadVideo("timeout", self.path, f"limit {self.seconds:g} s")


def check_path(path: str) -> None:
    """Raises BadVideo unless `path` is a readable regular file with bytes in it.

    Args:
        path: a local path. It is looked at before it is opened: opening a pipe would wait for ever.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadVideo("symlink", path, "the links lead in a circle") from None
        reason = "permission" if isinstance(error, PermissionError) else "missing"
        raise BadVideo(reason, path, error.strerror or "") from None
    except ValueError as error:  # a zero byte in the name
        raise BadVideo("missing", path, str(error)) from None
    if not stat.S_ISREG(status.st_mode):
        raise BadVideo("not_regular", path)
    if not os.access(path, os.R_OK):
        raise BadVideo("permission", path)
    if status.st_size == 0:
        raise BadVideo("empty", path)


def open_container(
    source: str | bytes, limits: Limits, name: str
) -> tuple["av.container.InputContainer", "av.video.stream.VideoStream"]:
    """Opens a local file or bytes and picks the picture stream.

    Args:
        source: path, or the encoded bytes.
        limits: see `Limits`.
        name: the path for messages, '' for bytes.

    Returns:
        The open container and its largest picture stream that is not a cover picture, set to decode
        on one thread; packets of all other streams are skipped.

    Raises:
        BadVideo: it cannot be opened, or lies outside the limits.
    """
    container = open_file(source, limits, name)
    try:
        return container, pick_picture(container, limits, name)
    except BaseException:
        container.close()
        raise


def open_file(
    source: str | bytes, limits: Limits, name: str, formats: str = FORMATS
) -> "av.container.InputContainer":
    """Opens a local file or bytes in one of `formats`, whatever streams it holds.

    Raises:
        BadVideo: it cannot be opened.
    """
    if isinstance(source, str):
        check_path(source)
        target, head = "file:" + source, _head(source)
    else:
        if not source:
            raise BadVideo("empty", name)
        target, head = io.BytesIO(source), bytes(source[:12])
    try:
        return av.open(
            target,
            **_ANY_TITLES,
            options={"max_pixels": _decoder_limit(limits)},
            container_options={"protocol_whitelist": "file", "format_whitelist": formats},
        )
    except av.error.PermissionError:
        raise BadVideo("permission", name) from None
    except (av.FFmpegError, ValueError) as error:
        known = head.startswith(_MAGIC) or head[4:8] in (
            b"ftyp",
            b"moov",
            b"mdat",
            b"wide",
            b"free",
        )
        raise BadVideo("cannot_open" if known else "not_video", name, _text(error)) from None


def _head(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read(12)
    except OSError as error:
        raise BadVideo("permission", path, error.strerror or "") from None


def _decoder_limit(limits: Limits) -> str:
    """What FFmpeg refuses before allocating. It counts padding too, so the exact limit is checked apart from it."""
    return str(2 * limits.max_pixels + 65536)


def _text(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def pick_picture(
    container: "av.container.InputContainer", limits: Limits, name: str
) -> "av.video.stream.VideoStream":
    """The picture stream that `open_container` gives, set up as said there.

    Raises:
        BadVideo: there is none that can be decoded, or it lies outside the limits.
    """
    pictures = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    if not pictures:
        raise BadVideo("no_video_stream", name)
    decodable = [s for s in pictures if s.codec_context is not None]
    if not decodable:
        raise BadVideo(
            "codec", name, f"stream tag {pictures[0].metadata.get('encoder', 'unknown')}"
        )
    # The first stream can be a small preview; the largest is the video.
    stream = max(decodable, key=lambda s: s.codec_context.width * s.codec_context.height)
    context = stream.codec_context
    if context.width * context.height > limits.max_pixels:
        raise BadVideo(
            "too_large",
            name,
            f"{context.width} x {context.height}, limit {limits.max_pixels} pixels",
        )
    seconds = declared_seconds(container, stream) or 0.0
    if seconds > limits.max_seconds:
        raise BadVideo("too_long", name, f"{seconds:.0f} s, limit {limits.max_seconds:g} s")
    context.options = {"max_pixels": _decoder_limit(limits)}
    # Slice or frame threads cost 5 to 30 % more CPU, and PyAV's default (all cores) can hang inside
    # workers; the parallelism is in the pipeline's processes.
    context.thread_count = 1
    for other in container.streams:
        if other is not stream:
            other.discard = av.stream.Discard.all
    return stream


def declared_seconds(container, stream) -> float | None:
    """The length that the header claims for `stream`, or None where it claims none of its own."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    tag = stream.metadata.get("DURATION", "")  # Matroska: 00:00:02.966000000
    try:
        hours, minutes, seconds = tag.split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    except ValueError:
        pass
    if len(container.streams) == 1 and container.duration is not None:
        return container.duration / av.time_base
    return None
