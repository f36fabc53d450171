"""What every source gives, and what sources share."""

import abc
import collections
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypedDict

from invideo_jax.data.decode import BadVideo, check_path
from invideo_jax.data.manifest import split_name
from invideo_jax.data.speech import Piece, join_speech
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

TEXTS = (  # keys of an example
    "captions",
    "audio_captions",
    "audio_video_captions",
    "fused_captions",
    "transcript",
)
ROOTS_OPTION = "--config.data.roots"  # as the training command spells it


class SourceError(UserError):
    """A source that can't be opened or used as asked; the message says what to do."""


class NoSuchSplit(SourceError):
    """A source that tells its splits apart, and lacks the one asked for."""


class Example(TypedDict):
    """One clip, not decoded.

    Attributes:
        id: names the clip within its source.
        media: what the file holds: 'video', 'image' or 'audio' (sound alone).
        video: absolute path of the file, or its encoded bytes; also of an image or a sound.
        path: for messages: the file, or file#record.
        start, end: seconds into the file; None for its begin and end.
        captions: what is seen, zero or more texts. audio_captions: what is heard. audio_video_captions: both.
            fused_captions: what is seen, heard and said in one sentence.
        label: class number, -1 unknown. label_name: '' unknown.
        split: '' unknown.
        transcript: what is said; '' unknown. speech: the same in pieces, (start, end, text), seconds into the file.
        flip: False where mirroring the picture changes the meaning.
    """

    id: str
    media: str
    video: str | bytes
    path: str
    start: float | None
    end: float | None
    captions: tuple[str, ...]
    audio_captions: tuple[str, ...]
    audio_video_captions: tuple[str, ...]
    fused_captions: tuple[str, ...]
    label: int
    label_name: str
    split: str
    transcript: str
    speech: tuple[Piece, ...]
    flip: bool


class Source(abc.ABC):
    """Random access to examples. Pickles small (paths, not open files) and reads from many threads.

    Attributes:
        name: as given by the user, for messages.
        media: what all its files hold: 'video', 'image' or 'audio'.
        classes: class names by number; () where labels are plain numbers or absent.
        notes: what was left out while opening, and why: one line each for the start-up log.
    """

    name: str
    media: str = "video"
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Reads one example.

        Raises:
            BadVideo: the path may not be opened, or the record is damaged.
        """

    def texts(self, index: int) -> dict[str, Any]:
        """What is said of an example, under the keys of `TEXTS`; its video is not read where that can be saved.

        Raises:
            BadVideo: as of reading the example, where that is needed.
        """
        example = self[index]
        return {key: example[key] for key in TEXTS}

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hash of all that is known of the examples without reading them, the same on every host and day."""

    def keys(self) -> Iterator[str]:
        """What each example is, comparable between sources: file and seconds, or the record's place."""
        return (self.identify(index) for index in range(len(self)))

    def identify(self, index: int) -> str:
        """A name for example `index` that needs no reading; used when reading fails."""
        return f"{self.name}#{index}"


def digest(parts: Iterable[str | bytes | int | float]) -> str:
    """Hex hash of a sequence; lengths are hashed too, so that ('ab', 'c') differs from ('a', 'bc')."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.hexdigest()


def count_overlap(one: Source, other: Source) -> int:
    """How many examples of `other` are also in `one`: training clips in an evaluation."""
    known = set(one.keys())
    return sum(key in known for key in other.keys())


class Roots:
    """The folders that videos may lie in; nothing outside is opened, links followed.

    Args:
        folder: where relative paths start.
        more: further allowed folders.
        option: what the user sets them with, for messages.
    """

    def __init__(
        self, folder: str | os.PathLike, more: Sequence[str] = (), option: str = ROOTS_OPTION
    ):
        self.folders = tuple(os.path.abspath(os.fspath(f)) for f in (folder, *more))
        self.option = option
        for given in self.folders:
            if not os.path.isdir(given):
                raise SourceError(
                    f"An allowed root must be a folder; got {given}. Correct {option}."
                )
        self._real = tuple(map(os.path.realpath, self.folders))

    def locate(self, path: str) -> tuple[str, str | None]:
        """The absolute path, and the root it is written below (None: below no root)."""
        full = os.path.normpath(os.path.join(self.folders[0], path))
        for root in self.folders:
            if full.startswith(root.rstrip(os.sep) + os.sep):
                return full, root
        return full, None

    def outside(self, paths: Sequence[str]) -> list[str]:
        """The paths written below no root; no file is looked at."""
        suspects = (p for p in paths if p.startswith(os.sep) or ".." in p)
        return [path for path in suspects if self.locate(path)[1] is None]

    def refusal(self, name: str, outside: Sequence[str], count: int) -> SourceError:
        """The error for a list of `count` rows of which those at `outside` lead below no root."""
        full = [self.locate(path)[0] for path in outside]
        return SourceError(
            f"Every path of a list must lead below its own folder ({self.folders[0]}) or an allowed root; "
            f"{len(outside)} of {count} rows of {name} lead outside. First: {outside[0]}. {self.allow(full)}"
        )

    def allow(self, files: Sequence[str]) -> str:
        """The option that allows the folders of `files`, besides those given already."""
        top: dict[str, list[str]] = {}
        for folder in sorted({os.path.dirname(file) for file in files}):
            top.setdefault("/".join(folder.split(os.sep)[:2]), []).append(folder)
        folders = [*self.folders[1:], *map(os.path.commonpath, top.values())]
        return f"Allow their folder: {self.option}={','.join(folders)}"

    def check(self, path: str) -> str:
        """The absolute path of a file that may be opened.

        Raises:
            BadVideo: outside the roots, or no regular, readable file with bytes in it.
        """
        full, root = self.locate(path)
        if root is None:
            raise BadVideo(
                "path_escape", full, f"outside {', '.join(self.folders)}; see {self.option}"
            )
        check_path(full)
        real = os.path.realpath(full)
        if not any(_below(real, root) for root in self._real):
            raise BadVideo("symlink", full, f"leads to {real}; see {self.option}")
        return full


def _below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def check_sample(name: str, roots: Roots, paths: Sequence[str], count: int = 100) -> None:
    """Stops before a run when most files of a list aren't there: a wrong root, an unmounted disk.

    Args:
        paths: as written; `count` of them, evenly spread, are looked at.

    Raises:
        SourceError: more than half of them can't be opened.
    """
    size = min(len(paths), count)
    sample = [paths[i * len(paths) // size] for i in range(size)]
    bad: list[BadVideo] = []
    for path in sample:
        try:
            roots.check(path)
        except BadVideo as error:
            bad.append(error)
    if 2 * len(bad) > size:
        reasons = collections.Counter(error.reason for error in bad)
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        outside = reasons.keys() & {"path_escape", "symlink"}
        fix = (
            roots.allow([os.path.realpath(e.path) for e in bad if e.reason in outside])
            if outside
            else f"Relative paths start at {roots.folders[0]}: move the list there, or correct its paths"
        )
        raise SourceError(
            f"Most files of {name} must be usable; of {size} looked at, {len(bad)} are not ({counted}). "
            f"First: {bad[0].path}. {fix}."
        )


def find_split(name: str, split: str, known: Iterable[str]) -> str:
    """The one of the `known` splits that `split` means (`val` and its like are `validation`).

    Raises:
        NoSuchSplit: none of them.
    """
    known = list(known)
    for one in known:
        if split_name(one) == split_name(split):
            return one
    raise NoSuchSplit(f'{name} has no split "{split}".{nearest(split, known)}')


def renumber(name: str, own: Sequence[str], classes: Sequence[str]) -> list[int] | None:
    """Numbers in `classes` of a source's own classes; None where its numbers stand as they are.

    Raises:
        SourceError: a class that is not among `classes`.
    """
    if not own or not classes or tuple(own) == tuple(classes):
        return None
    strange = [label for label in own if label not in classes]
    if strange:
        raise SourceError(
            f'Every class of {name} must be one of the {len(classes)} classes asked for; "{strange[0]}" is '
            f"not ({len(strange)} in all).{nearest(strange[0], classes)}"
        )
    return [list(classes).index(label) for label in own]


def existing_folder(path: str, what: str) -> pathlib.Path:
    """`path` as a folder, or an error that names what is nearby."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise SourceError(
            f"{what} must be a folder; got {path} (working directory {os.getcwd()})."
            + (nearest(folder.name, names[:200]) if names else "")
        )
    return folder


def make_example(**known: Any) -> Example:
    """An example with every key; those not given are unknown. Speech without a transcript gives it."""
    example: dict[str, Any] = dict(
        media="video",
        start=None,
        end=None,
        captions=(),
        audio_captions=(),
        audio_video_captions=(),
        fused_captions=(),
        label=-1,
        label_name="",
        split="",
        transcript="",
        speech=(),
        flip=True,
    )
    if not known.keys() <= Example.__annotations__.keys():
        raise TypeError(f"unknown keys {sorted(known.keys() - Example.__annotations__.keys())}")
    example |= known
    example["transcript"] = example["transcript"] or join_speech(example["speech"])
    return example  # type: ignore[return-value]
