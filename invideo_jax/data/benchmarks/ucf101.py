"""UCF101: testlist01.txt names 'ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi', classInd.txt numbers the classes from 1.

Source: UCF101TrainTestSplits-RecognitionTask.zip (Soomro et al. 2012).
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.reading import AnnotationError, each, lines_of

CLASSES = 101


def _read(path: pathlib.Path, files: Files, split: str) -> Annotations:
    numbers = files.find(("classInd.txt",))
    if numbers is None:
        raise AnnotationError("its classes are in classInd.txt, which is not there")
    rows = each(lines_of(numbers), lambda line: (int(line.split()[0]), line.split()[1]))
    if sorted(number for number, _ in rows) != list(range(1, CLASSES + 1)):
        raise AnnotationError(f"classInd.txt must number {CLASSES} classes; it has {len(rows)}")
    place = {name: number - 1 for number, name in rows}

    def entry(line: str) -> Entry:
        video = line.split()[0]  # lists of training videos have the number behind it
        return Entry((video,), label=place[video.split("/")[0]])

    names = tuple(name for _, name in sorted(rows))
    return Annotations(each(lines_of(path), entry), names)


def _files() -> dict[str, tuple[str, ...]]:
    ending = {1: "", 2: "_2", 3: "_3"}
    return {
        f"{split}{end}": (f"{split}list0{number}.txt",)
        for split in ("test", "train")
        for number, end in ending.items()
    }


UCF101 = Benchmark(
    split="test",
    formats=(Format(_files(), _read),),
    origin="UCF101TrainTestSplits-RecognitionTask.zip (crcv.ucf.edu/data/UCF101.php)",
)
