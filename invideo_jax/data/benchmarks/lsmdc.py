"""LSMDC 2016: lines of clip, start and end as aligned, start and end as extracted, sentence; tabs between.

The 1,000 clips of the retrieval test are in LSMDC16_challenge_1000_publictect.csv (spelt so), without header. The
files of clips are cut already, MOVIE/CLIP.avi.

Source: the readme of the LSMDC 2016 retrieval challenge; CLIP4Clip dataloader_lsmdc_retrieval.py.
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.caption_lists import ORIGIN, caption_list
from invideo_jax.data.benchmarks.reading import each, grouped, lines_of

_COLUMNS = 6


def _read(path: pathlib.Path, files: Files, split: str) -> Annotations:
    def pair(line: str) -> tuple[str, str]:
        if line.startswith('"'):  # a few lines of the training file stand in quotes
            line = line.removeprefix('"').removesuffix('"')
        cells = line.split("\t")
        if len(cells) != _COLUMNS:
            raise ValueError(f"must have {_COLUMNS} cells between tabs; got {len(cells)}")
        return cells[0], cells[-1]

    captions = grouped(each(lines_of(path), pair))
    return Annotations([Entry((name,), tuple(many)) for name, many in captions.items()])


LSMDC = Benchmark(
    split="test",
    formats=(
        Format(
            {
                "test": ("LSMDC16_challenge_1000_publictect.csv",),
                "validation": ("LSMDC16_annos_val.csv",),
                "train": ("LSMDC16_annos_training.csv",),
            },
            _read,
        ),
        caption_list(
            {
                "test": ("lsmdc_ret_test_1000.json",),
                "validation": ("lsmdc_ret_val.json",),
                "train": ("lsmdc_ret_train.json",),
            }
        ),
    ),
    origin=f"MPII, after registration (sites.google.com/site/describingmovies), or {ORIGIN}",
)
