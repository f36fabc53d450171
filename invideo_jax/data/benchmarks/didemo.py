"""DiDeMo as paragraph retrieval: all descriptions of a video joined, and its first 30 seconds.

test_data.json is a list of {"video", "description", "times", ...}, several of a video; test_list.txt, where it is
there, names the videos that count. Videos were cut to 30 seconds when they were annotated.

Source: LisaAnne/LocalizingMoments; CLIP4Clip dataloader_didemo_retrieval.py (which reads up to 31 s); InternVideo2
multi_modality/configs/data.py (`is_paragraph_retrieval`, `trimmed30`).
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.caption_lists import ORIGIN, caption_list
from invideo_jax.data.benchmarks.reading import each, grouped, json_of, lines_of

SECONDS = 30.0
_LISTS = {"test": "test_list.txt", "validation": "val_list.txt", "train": "train_list.txt"}


def _read(path: pathlib.Path, files: Files, split: str) -> Annotations:
    rows = each(json_of(path), lambda row: (row["video"], row["description"]))
    captions, notes = grouped(rows), ()
    listed = files.find((_LISTS[split],))
    if listed is not None:
        wanted = set(lines_of(listed))
        left = [name for name in captions if name not in wanted]
        captions = {name: many for name, many in captions.items() if name in wanted}
        if left:
            notes = (f"{path.name}: {len(left)} videos are not in {listed.name}, and left out",)
    entries = [Entry((name,), (" ".join(many),), end=SECONDS) for name, many in captions.items()]
    return Annotations(entries, notes=notes)


DIDEMO = Benchmark(
    split="test",
    formats=(
        Format(
            {
                "test": ("test_data.json",),
                "validation": ("val_data.json",),
                "train": ("train_data.json",),
            },
            _read,
        ),
        caption_list(
            {
                "test": ("didemo_ret_test.json",),
                "validation": ("didemo_ret_val.json",),
                "train": ("didemo_ret_train.json",),
            },
            paragraph=True,
            end=SECONDS,
        ),
    ),
    origin=f"github.com/LisaAnne/LocalizingMoments, data/, or {ORIGIN}",
)
