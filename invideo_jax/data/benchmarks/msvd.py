"""MSVD: about forty captions of a video; test_list.txt names videos, raw-captions.pkl has their captions.

The pickle is a dict of video -> list of captions, each a list of words. It is read as plain values: one that asks
for any class is refused. raw-captions.json, the same as JSON (words or whole texts), does as well.

Source: albanie/collaborative-experts misc/datasets/msvd; CLIP4Clip dataloader_msvd_retrieval.py.
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.caption_lists import ORIGIN, caption_list
from invideo_jax.data.benchmarks.reading import (
    AnnotationError,
    each,
    json_of,
    lines_of,
    pickle_of,
)

_CAPTIONS = ("raw-captions.json", "raw-captions.pkl")


def _read(path: pathlib.Path, files: Files, split: str) -> Annotations:
    held = files.find(_CAPTIONS)
    if held is None:
        raise AnnotationError(f"its captions are in {' or '.join(_CAPTIONS)}, which is not there")
    captions = json_of(held, dict) if held.suffix == ".json" else pickle_of(held)
    if not isinstance(captions, dict):
        raise AnnotationError(f"{held.name} must hold a dict; got {type(captions).__name__}")
    entry = lambda name: Entry((name,), tuple(_text(c, held.name) for c in captions[name]))
    return Annotations(each(lines_of(path), entry))


def _text(caption: object, file: str) -> str:
    if isinstance(caption, str):
        return caption
    if isinstance(caption, (list, tuple)) and all(isinstance(word, str) for word in caption):
        return " ".join(caption)
    raise ValueError(f"must have texts or lists of words in {file}; got {str(caption)[:80]!r}")


MSVD = Benchmark(
    split="test",
    formats=(
        Format(
            {
                "test": ("test_list.txt",),
                "validation": ("val_list.txt",),
                "train": ("train_list.txt",),
            },
            _read,
        ),
        caption_list(
            {
                "test": ("msvd_ret_test.json",),
                "validation": ("msvd_ret_val.json",),
                "train": ("msvd_ret_train.json",),
            }
        ),
    ),
    origin=f"msvd_data.zip of github.com/ArrowLuo/CLIP4Clip, or {ORIGIN}",
)
