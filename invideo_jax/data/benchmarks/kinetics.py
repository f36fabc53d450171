"""Kinetics 400, 600 and 700: the official lists, and those of VideoMAE and InternVideo2.

Official: CSV with the columns label, youtube_id, time_start, time_end, split. Classes are numbered in the order of
their names, as every published list does. VideoMAE's: `path label` a line, with a space or a comma between; names of
the classes come from kinetics_400_labels.csv (id,name) or label_map_k400.txt (a name a line), where one is there.
Files are cut clips, ID_000012_000022 or ID.

Source: the readme of Kinetics (DeepMind); MCG-NJU/VideoMAE DATASET.md; X-CLIP labels/; OpenMMLab tools/data/kinetics.
"""

import functools
import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.reading import (
    AnnotationError,
    each,
    lines_of,
    records_of,
    table_of,
)

_COLUMNS = ("label", "youtube_id", "time_start", "time_end")


def _read(path: pathlib.Path, files: Files, split: str, *, classes: int) -> Annotations:
    names = _class_names(files, classes)
    first = lines_of(path)[:1]
    official = bool(first) and "youtube_id" in first[0]
    return (_official if official else _numbered)(path, names, classes)


def _official(path: pathlib.Path, names: tuple[str, ...], classes: int) -> Annotations:
    rows = records_of(path, _COLUMNS)
    names = names or tuple(sorted({row["label"] for row in rows if row["label"]}))
    if len(names) != classes:
        raise AnnotationError(
            f"it names {len(names)} classes, not {classes}, so that their numbers are unknown; put "
            f"{_name_files(classes)[0]} beside it"
        )
    known, ids = set(names), [row["youtube_id"] for row in rows]
    once = _once(ids)

    def entry(row: dict[str, str]) -> Entry:
        label, video = row["label"], row["youtube_id"]
        if label and label not in known:
            raise ValueError(f"must have one of the {classes} classes; got {label!r}")
        clip = f"{video}_{int(float(row['time_start'])):06d}_{int(float(row['time_end'])):06d}"
        called = (clip, video) if video in once else (clip,)
        return Entry(tuple(f"{label}/{name}" for name in called), label=label or None)

    return Annotations(each(rows, entry), names)


def _once(names: list[str]) -> set[str]:
    """Those that appear once."""
    seen, twice = set(), set()
    for name in names:
        (twice if name in seen else seen).add(name)
    return seen - twice


def _numbered(path: pathlib.Path, names: tuple[str, ...], classes: int) -> Annotations:
    def entry(line: str) -> Entry:
        video, _, label = line.rpartition("," if "," in line else " ")
        number = int(label)
        if not video.strip() or not 0 <= number < classes:
            raise ValueError(f"must be a path and a class from 0 to {classes - 1}")
        return Entry((video.strip(),), label=number)

    notes = ()
    if not names:
        notes = (
            f"{path.name} has class numbers only; put {' or '.join(_name_files(classes))} beside it where names "
            "are needed (zero_shot)",
        )
    return Annotations(each(lines_of(path), entry), names, notes)


def _name_files(classes: int) -> tuple[str, str]:
    return f"kinetics_{classes}_labels.csv", f"label_map_k{classes}.txt"


def _class_names(files: Files, classes: int) -> tuple[str, ...]:
    path = files.find(_name_files(classes))
    if path is None:
        return ()
    if path.suffix == ".txt":
        names = lines_of(path)
    else:
        rows = each(table_of(path)[1:], lambda row: (int(row[0]), row[1]))
        names = [name for _, name in sorted(rows)]
        if [number for number, _ in sorted(rows)] != list(range(len(rows))):
            raise AnnotationError(f"the numbers of {path.name} must be 0, 1, 2, ...")
    if len(names) != classes or len(set(names)) != classes:
        raise AnnotationError(f"{path.name} must name {classes} classes; it has {len(set(names))}")
    return tuple(names)


def _benchmark(classes: int) -> Benchmark:
    files = {
        "validation": ("validate.csv", "val.csv", "validation.csv"),
        "test": ("test.csv",),
        "train": ("train.csv",),
    }
    return Benchmark(
        split="validation",
        formats=(Format(files, functools.partial(_read, classes=classes)),),
        origin="the annotations of Kinetics (github.com/cvdfoundation/kinetics-dataset), or the lists that "
        "VideoMAE's DATASET.md describes",
    )


K400, K600, K700 = map(_benchmark, (400, 600, 700))
