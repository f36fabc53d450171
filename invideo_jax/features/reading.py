"""Decodes the windows of many videos in threads, and gives them in order."""

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator, Sequence

import numpy as np

from invideo_jax.data.decode import BadVideo, Limits, VideoReader
from invideo_jax.data.scaling import View
from invideo_jax.data.sources import Example, Source
from invideo_jax.data.transforms import ClipSpec, pick_box
from invideo_jax.errors import UserError
from invideo_jax.features.windows import Rule, Window, cut

_TOGETHER = 128  # frames decoded in one go: windows of one group of pictures share its decoding
_WAITING = 8  # decoded windows of one video that wait for their turn
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Item:
    """One window, or why it (or, without `window`, a whole video) cannot be read.

    Attributes:
        video: number of the example in the source.
        number: which window of it.
        window: see `Window`; None where the file could not even be opened.
        clip: uint8 [T, S, S, 3], None where it is bad.
        bad: why.
        truncated: the file ends before its declared length.
        path, label: of the example; '' and -1 where it could not be opened.
    """

    video: int
    number: int
    window: Window | None
    clip: np.ndarray | None
    bad: BadVideo | None = None
    truncated: bool = False
    path: str = ""
    label: int = -1


class Reading:
    """The windows of a source, from a place in it on; a context manager to iterate.

    Args:
        source: videos.
        rule, spec: how they are cut, and clips made.
        first: (video, window) to begin with.
        limits: what one video may cost.
        threads: videos decoded at a time.
        ahead: videos that may be begun before their turn.
        hang_seconds: longest wait for one window.
    """

    def __init__(
        self,
        source: Source,
        rule: Rule,
        spec: ClipSpec,
        *,
        first: tuple[int, int] = (0, 0),
        limits: Limits | None = None,
        threads: int = 2,
        ahead: int = 16,
        hang_seconds: float = 600.0,
    ):
        self._source, self._rule, self._spec, self._first = source, rule, spec, first
        self._limits, self._ahead, self._hang_seconds = limits or Limits(), ahead, hang_seconds
        self._turn = threading.Condition()
        self._claimed = self._consumed = first[0]
        self._queues: dict[int, queue.Queue] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"decode-{n}", daemon=True)
            for n in range(max(threads, 1))
        ]

    def __enter__(self) -> "Reading":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._closed = True
            self._turn.notify_all()
        for thread in self._threads:
            thread.join(5.0)

    def __iter__(self) -> Iterator[Item]:
        for video in range(self._first[0], len(self._source)):
            with self._turn:
                self._consumed = video
                waiting = self._queues.setdefault(video, queue.Queue(_WAITING))
                self._turn.notify_all()
            while (item := self._next(waiting, video)) is not None:
                yield item
            del self._queues[video]

    def _next(self, waiting: queue.Queue, video: int) -> Item | None:
        try:
            item = waiting.get(timeout=self._hang_seconds)
        except queue.Empty:
            raise UserError(
                f"A window must be decoded within {self._hang_seconds:g} s; none came of "
                f"{self._source.identify(video)}. Check its storage, or leave the video out."
            ) from None
        if isinstance(item, Exception):
            raise item
        return item

    # ------------------------------------------------------------------------- the decoding threads

    def _work(self) -> None:
        while (video := self._claim()) is not None:
            waiting = self._queues[video]
            try:
                for item in self._windows(video):
                    self._put(waiting, item)
                self._put(waiting, None)
            except _Closed:
                return
            except Exception as error:  # ours, not the video's: told to the one who iterates
                with contextlib.suppress(_Closed):
                    self._put(waiting, error)
                return

    def _claim(self) -> int | None:
        with self._turn:
            while not self._closed and self._claimed >= self._consumed + self._ahead:
                self._turn.wait(_POLL_SECONDS)
            if self._closed or self._claimed >= len(self._source):
                return None
            self._claimed += 1
            self._queues.setdefault(self._claimed - 1, queue.Queue(_WAITING))
            return self._claimed - 1

    def _put(self, waiting: queue.Queue, item) -> None:
        while not self._closed:
            try:
                return waiting.put(item, timeout=_POLL_SECONDS)
            except queue.Full:
                continue
        raise _Closed

    def _windows(self, video: int) -> Iterator[Item]:
        """The items of one video; damage is an item, not an exception."""
        skip = self._first[1] if video == self._first[0] else 0
        try:
            example = self._source[video]
            part = dict(start=example["start"], end=example["end"])
            with VideoReader(example["video"], limits=self._limits, **part) as reader:
                yield from self._decoded(video, skip, example, reader)
        except BadVideo as bad:
            yield Item(video, 0, None, None, bad)

    def _decoded(self, video: int, skip: int, example: Example, reader: VideoReader):
        windows = cut(reader.times(), self._rule, self._spec)
        some = max(_TOGETHER // self._spec.frames, 1)
        for low in range(skip, len(windows), some):
            group = windows[low : low + some]
            try:
                clips: Sequence = self._frames(reader, group)
            except BadVideo:  # each for itself: the others of the group may be whole
                clips = [self._alone(reader, window) for window in group]
            for number, (window, clip) in enumerate(zip(group, clips), low):
                bad = clip if isinstance(clip, BadVideo) else None
                clip = None if bad else clip
                told = dict(path=example["path"], label=example["label"])
                yield Item(video, number, window, clip, bad, reader.truncated, **told)

    def _alone(self, reader: VideoReader, window: Window) -> np.ndarray | BadVideo:
        try:
            return self._frames(reader, [window])[0]
        except BadVideo as bad:
            return bad

    def _frames(self, reader: VideoReader, windows: Sequence[Window]) -> np.ndarray:
        size, kind = (self._spec.size,) * 2, self._spec.interpolation
        rng = np.random.default_rng(0)  # crops of features draw nothing
        view = lambda w, h: View(pick_box(self._spec, w, h, rng), size, kind)
        indices = np.concatenate([window.indices for window in windows])
        frames = reader.frames(indices, view=view)
        return frames.reshape(len(windows), -1, *frames.shape[1:])


class _Closed(Exception):
    """Nobody wants the windows any more."""
