"""What the readers of benchmarks share: finding annotation files and videos, and making a source of them."""

import collections
import dataclasses
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from invideo_jax.data.benchmarks.reading import AnnotationError
from invideo_jax.data.clean import clean_text
from invideo_jax.data.list_files import VIDEO_SUFFIXES
from invideo_jax.data.manifest import list_videos, split_name
from invideo_jax.data.sources.base import NoSuchSplit, Roots, SourceError, check_sample
from invideo_jax.data.sources.listed import ManifestSource
from invideo_jax.registry import nearest

_DEPTH = 3  # folders below the given one in which annotation files are looked for
_SHOWN = 5  # names of absent videos in a message


@dataclasses.dataclass(frozen=True)
class Entry:
    """One annotated video.

    Args:
        names: what its file may be called, best first; folders and endings in a name help to choose between
            files of one name, and need not be there.
        captions: all of them, in their order.
        label: class name, or class number where the file has numbers.
        start, end: seconds into the file; None: its begin and end.
        flip: False where left and right are in the label.
    """

    names: tuple[str, ...]
    captions: tuple[str, ...] = ()
    label: str | int | None = None
    start: float | None = None
    end: float | None = None
    flip: bool = True


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What an annotation file says.

    Args:
        entries: each video once.
        classes: names by number; () where there are none.
        notes: what a user should know, one line each.
    """

    entries: Sequence[Entry]
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Format:
    """One published form of the annotations.

    Args:
        files: split -> names of the file that holds it; the first that is there is read.
        read: (file, the folder's `Files`, split) -> what it says.
    """

    files: Mapping[str, tuple[str, ...]]
    read: Callable[[pathlib.Path, "Files", str], Annotations]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Args:
        split: the one that its protocol uses.
        formats: the first whose file is there is read.
        origin: where the annotation files come from, for messages.
    """

    split: str
    formats: tuple[Format, ...]
    origin: str

    def splits(self) -> list[str]:
        """All that some format has."""
        return sorted({split for form in self.formats for split in form.files})

    def file_names(self, split: str) -> list[str]:
        """All names of the file of a split."""
        return [name for form in self.formats for name in form.files.get(split, ())]


class Files:
    """The annotation files in a folder, found by name."""

    def __init__(self, folder: str):
        self.folder = folder
        self._by_name: dict[str, list[str]] = collections.defaultdict(list)
        for parent, folders, names in os.walk(folder, followlinks=True):
            relative = os.path.relpath(parent, folder)
            deep = 0 if relative == os.curdir else relative.count(os.sep) + 1
            folders[:] = (
                sorted(f for f in folders if not f.startswith(".")) if deep < _DEPTH else []
            )
            for name in names:
                if os.path.splitext(name)[1].lower() not in VIDEO_SUFFIXES:
                    self._by_name[name].append(os.path.join(parent, name))

    def find(self, names: Sequence[str]) -> pathlib.Path | None:
        """The first of these names that is there, the one least deep.

        Raises:
            SourceError: two files of that name at the same depth, that differ.
        """
        for name in names:
            found = sorted(self._by_name.get(name, ()), key=lambda p: (p.count(os.sep), p))
            same = [p for p in found if p.count(os.sep) == found[0].count(os.sep)]
            if len({pathlib.Path(p).read_bytes() for p in same}) > 1:
                raise SourceError(
                    f"An annotation file must be there once; got {' and '.join(same)}, which differ. "
                    "Take one of them away."
                )
            if found:
                return pathlib.Path(found[0])
        return None

    def named(self, fits: Callable[[str], bool]) -> list[pathlib.Path]:
        """Those whose name fits, in the order of their names."""
        names = sorted(name for name in self._by_name if fits(name))
        return [path for name in names if (path := self.find([name])) is not None]


class Videos:
    """The videos below some folders, found by name without ending."""

    def __init__(self, folders: Sequence[str]):
        self._by_stem: dict[str, list[str]] = collections.defaultdict(list)
        self.folder, self.count = folders[0], 0
        for number, folder in enumerate(folders):
            for path in list_videos(folder):
                self.count += 1
                # Paths of the first folder stay relative: the source is then the same wherever it lies.
                full = path if number == 0 else os.path.join(os.path.abspath(folder), path)
                self._by_stem[stem(path)].append(full)
        self.repeated: list[str] = []  # names that several files have, of which one was taken

    def find(self, names: Sequence[str]) -> str | None:
        """The file of the first of these names that is there."""
        for name in names:
            found = self._by_stem.get(stem(name), ())
            if not found:
                continue
            like = {path: _shared_folders(name, path) for path in found}
            best = [path for path in found if like[path] == max(like.values())]
            if len({os.path.realpath(os.path.join(self.folder, path)) for path in best}) > 1:
                self.repeated.append(name)
            return min(best, key=lambda p: (p.count("/"), p))
        return None


def stem(name: str) -> str:
    """The last part of a path without the endings of videos: 'a/b.avi.mp4' -> 'b'.

    Other dots belong to the name: LSMDC's clips are called 'MOVIE_00.03.07.170-00.03.09.675'.
    """
    base = name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1].strip()
    while True:
        head, ending = os.path.splitext(base.rstrip("."))
        if not head or ending.lower() not in VIDEO_SUFFIXES:
            return base.rstrip(".")  # some names of DiDeMo end in a dot
        base = head


def _shared_folders(name: str, path: str) -> int:
    """How many folders the two have in common, from the file upwards."""
    pairs = zip(reversed(name.replace("\\", "/").split("/")[:-1]), reversed(path.split("/")[:-1]))
    count = 0
    for one, other in pairs:
        if one != other:
            break
        count += 1
    return count


def open_benchmark(
    name: str,
    benchmark: Benchmark,
    folder: str,
    *,
    split: str | None,
    roots: Sequence[str],
    roots_option: str,
    classes: tuple[str, ...],
) -> ManifestSource:
    """A source of the annotated videos that are there; arguments as of `open_source` of the package."""
    title, split = f"benchmark:{name}", _split(name, benchmark, split)
    files = Files(folder)
    found, form = _annotation_file(title, benchmark, files, split)
    try:
        annotations = form.read(found, files, split)
    except AnnotationError as error:
        raise SourceError(
            f"{found} must be {title}'s annotation of the split {split}, and can't be read as that: {error}. "
            f"Take it as published: {benchmark.origin}."
        ) from error
    videos = Videos([folder, *roots])
    present, absent = _match(annotations.entries, videos)
    _check_present(title, folder, found, present, absent, videos, roots_option)
    names, number = _numbering(title, annotations.classes, classes)
    rows = [_row(entry, path, split, number) for entry, path in present]
    located = Roots(folder, roots, roots_option)
    check_sample(title, located, [row["path"] for row in rows])
    source = ManifestSource(f"{title}:{folder}", rows, located, names)
    source.notes = (*annotations.notes, *_notes(title, found, present, absent, videos))
    return source


def _split(name: str, benchmark: Benchmark, split: str | None) -> str:
    if split is None:
        return benchmark.split
    known = benchmark.splits()
    for one in known:
        if split_name(one) == split_name(split):
            return one
    hint = nearest(split, known)
    raise NoSuchSplit(
        f'benchmark:{name} has no split "{split}".{hint} Its protocol uses data.eval_split={benchmark.split}.'
    )


def _annotation_file(
    title: str, benchmark: Benchmark, files: Files, split: str
) -> tuple[pathlib.Path, Format]:
    for form in benchmark.formats:
        found = files.find(form.files.get(split, ()))
        if found is not None:
            return found, form
    names = benchmark.file_names(split)
    raise SourceError(
        f"{title} needs the annotation file of its split {split}; {os.path.abspath(files.folder)} has, down to "
        f"{_DEPTH} folders below, none called {' or '.join(names)}. It comes from: {benchmark.origin}."
    )


def _match(entries: Sequence[Entry], videos: Videos) -> tuple[list[tuple[Entry, str]], list[Entry]]:
    present, absent = [], []
    for entry in entries:
        path = videos.find(entry.names)
        if path is None:
            absent.append(entry)
        else:
            present.append((entry, path))
    return present, absent


def _check_present(title, folder, file, present, absent, videos: Videos, roots_option) -> None:
    """Stops when most videos aren't there: a wrong folder, an unmounted disk, names of another download."""
    total = len(present) + len(absent)
    if not total:
        raise SourceError(
            f"{file} must annotate at least one video; got none. Take it as published."
        )
    if 2 * len(absent) > total:
        names = " or ".join(absent[0].names)
        raise SourceError(
            f"Most videos of {title} must be there; of {total} that {file.name} names, {len(absent)} are not "
            f"below {os.path.abspath(folder)}, which holds {videos.count} video files. First: {names}, with any "
            f"ending of a video. Put them below that folder, or name theirs: {roots_option}=FOLDER."
        )


def _notes(title, file, present, absent, videos: Videos) -> list[str]:
    notes = []
    if absent:
        more = f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        names = ", ".join(entry.names[0] for entry in absent[:_SHOWN])
        notes.append(
            f"{title}: {len(absent)} of {len(present) + len(absent)} videos of {file.name} are not there: "
            f"{names}{more}. Results are of the others, and not those of the whole benchmark"
        )
    if videos.repeated:
        notes.append(
            f"{title}: {len(videos.repeated)} videos are there more than once (first: {videos.repeated[0]}); "
            "the one least deep is read"
        )
    return notes


def _numbering(
    title: str, own: tuple[str, ...], wanted: tuple[str, ...]
) -> tuple[tuple[str, ...], dict[str | int, int]]:
    """The class names that count, and the number of each of the benchmark's own labels, by name and by number."""
    names = own
    if own and wanted:
        place = {_plain(name): number for number, name in enumerate(wanted)}
        strange = [name for name in own if _plain(name) not in place]
        if strange:
            raise SourceError(
                f"Every class of {title} must be one of the {len(wanted)} classes of the training data; "
                f'"{strange[0]}" is not ({len(strange)} in all).{nearest(strange[0], wanted)} Judge a model of '
                "other classes with the evaluator zero_shot or a probe, and with data.train empty."
            )
        numbers = [place[_plain(name)] for name in own]
        names = wanted
    else:
        numbers = list(range(len(own)))
    return names, {
        **{name: number for name, number in zip(own, numbers)},
        **{old: number for old, number in enumerate(numbers)},
    }


def _plain(name: str) -> str:
    """A class name without case, spaces and signs: 'ApplyEyeMakeup' and 'apply_eye makeup' are one."""
    return "".join(c for c in name.casefold() if c.isalnum())


def _row(entry: Entry, path: str, split: str, number: Mapping[str | int, int]) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": stem(entry.names[0]),
        "path": path,
        "captions": [text for text in map(clean_text, entry.captions) if text],
        "split": split_name(split),
        "flip": entry.flip,
    }
    if entry.label is not None:
        row["label"] = number.get(entry.label, entry.label)
    if entry.start is not None:
        row["start"] = entry.start
    if entry.end is not None:
        row["end"] = entry.end
    return row
