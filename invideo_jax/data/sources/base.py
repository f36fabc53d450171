"""What every source gives, and what sources share."""

import abc
import collections
import hashlib
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypedDict

from invideo_jax.data.decode import BadVideo, check_path
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest


class SourceError(UserError):
    """A source that can't be opened or used as asked; the message says what to do."""


class Example(TypedDict):
    """One clip, not decoded.

    Attributes:
        id: names the clip within its source.
        video: absolute path of the file, or its encoded bytes.
        path: for messages: the file, or file#record.
        start, end: seconds into the file; None for its begin and end.
        captions: zero or more texts.
        label: class number, -1 unknown. label_name: '' unknown.
        split, transcript: '' unknown.
        flip: False where mirroring the picture changes the meaning.
    """

    id: str
    video: str | bytes
    path: str
    start: float | None
    end: float | None
    captions: tuple[str, ...]
    label: int
    label_name: str
    split: str
    transcript: str
    flip: bool


class Source(abc.ABC):
    """Random access to examples. Pickles small (paths, not open files) and reads from many threads.

    Attributes:
        name: as given by the user, for messages.
        classes: class names by number; () where labels are plain numbers or absent.
        notes: what was left out while opening, and why: one line each for the start-up log.
    """

    name: str
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

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Hash of the number of examples and their names, the same on every host and day."""

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
    """

    def __init__(self, folder: str | os.PathLike, more: Sequence[str] = ()):
        self.folders = tuple(os.path.abspath(os.fspath(f)) for f in (folder, *more))
        for given in self.folders:
            if not os.path.isdir(given):
                raise SourceError(
                    f"An allowed root must be a folder; got {given}. Correct data.roots."
                )

    def locate(self, path: str) -> tuple[str, str | None]:
        """The absolute path, and the root it is written below (None: below no root)."""
        full = os.path.normpath(os.path.join(self.folders[0], path))
        for root in self.folders:
            if full.startswith(root.rstrip(os.sep) + os.sep):
                return full, root
        return full, None

    def check(self, path: str) -> str:
        """The absolute path of a file that may be opened.

        Raises:
            BadVideo: outside the roots, or no regular, readable file with bytes in it.
        """
        full, root = self.locate(path)
        if root is None:
            raise BadVideo(
                "path_escape", full, f"outside {', '.join(self.folders)}; see data.roots"
            )
        real = os.path.realpath(full)
        # A link into another allowed root is fine.
        others = [r for r in self.folders if _below(real, os.path.realpath(r))]
        check_path(full, others[0] if others else root)
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
            f"Allow their folder: --config.data.roots={_common_folder(bad)}"
            if outside
            else f"Relative paths start at {roots.folders[0]}: move the list there, or correct its paths"
        )
        raise SourceError(
            f"Most files of {name} must be usable; of {size} looked at, {len(bad)} are not ({counted}). "
            f"First: {bad[0].path}. {fix}."
        )


def _common_folder(bad: Sequence[BadVideo]) -> str:
    folders = [os.path.dirname(os.path.realpath(error.path)) for error in bad]
    try:
        return os.path.commonpath(folders)
    except ValueError:
        return folders[0]


def no_such_split(name: str, split: str, known: Iterable[str]) -> SourceError:
    """The error for a split that a source hasn't."""
    return SourceError(f'{name} has no split "{split}".{nearest(split, known)}')


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
    """An example with every key; those not given are unknown."""
    example: dict[str, Any] = dict(
        start=None,
        end=None,
        captions=(),
        label=-1,
        label_name="",
        split="",
        transcript="",
        flip=True,
    )
    if not known.keys() <= Example.__annotations__.keys():
        raise TypeError(f"unknown keys {sorted(known.keys() - Example.__annotations__.keys())}")
    return {**example, **known}  # type: ignore[return-value]
