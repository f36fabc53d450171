"""HMDB51: a file for each class and split, 'brush_hair_test_split1.txt', with lines `video id`.

id 1 is a training video, 2 a test video, 0 neither; 30 test videos of each class.

Source: test_train_splits.rar (Kuehne et al. 2011), its readme.
"""

import functools
import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.reading import AnnotationError, each, lines_of

CLASSES = 51
_FIRST = "brush_hair"


def _read(path: pathlib.Path, files: Files, split: str, *, number: int, wanted: str) -> Annotations:
    ending = _ending(number)
    found = files.named(lambda name: name.endswith(ending))
    if len(found) != CLASSES:
        raise AnnotationError(f"there must be {CLASSES} files *{ending}; got {len(found)}")
    entries = []
    for file in found:
        folder = file.name.removesuffix(ending)
        marked = each(
            lines_of(file), lambda line: tuple(line.rsplit(maxsplit=1)[i] for i in (0, 1))
        )
        entries += [
            Entry((f"{folder}/{video}",), label=folder) for video, mark in marked if mark == wanted
        ]
    return Annotations(entries, tuple(f.name.removesuffix(ending) for f in found))


def _marked(line: str) -> tuple[str, str]:
    video, mark = line.rsplit(maxsplit=1)
    return video, mark


def _ending(number: int) -> str:
    return f"_test_split{number}.txt"


def _formats() -> tuple[Format, ...]:
    formats = []
    for split, wanted in (("test", "2"), ("train", "1")):
        for number in (1, 2, 3):
            name = split if number == 1 else f"{split}_{number}"
            read = functools.partial(_read, number=number, wanted=wanted)
            formats.append(Format({name: (_FIRST + _ending(number),)}, read))
    return tuple(formats)


HMDB51 = Benchmark(
    split="test",
    formats=_formats(),
    origin="test_train_splits.rar of HMDB51 (serre-lab.clps.brown.edu)",
)
