"""Multiple choice: the captions of an example are its choices, its label is the number of the right one.

MSR-VTT: 2,990 videos with five captions each. msrvtt_mc_test.json is a list of {"video", "caption": [5], "answer"};
msrvtt_mc_test.jsonl has {"clip_name", "options", "answer"} a line.

Source: VindLU (dataset of `mc_msrvtt`); ClipBERT's msrvtt_mc_test.jsonl; Yu et al. 2018 (JSFusion).
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.caption_lists import ORIGIN, file_name
from invideo_jax.data.benchmarks.reading import each, json_lines_of, json_of, texts
from invideo_jax.data.clean import clean_text


def _entry(name: str, choices: tuple[str, ...], answer: int) -> Entry:
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(f"must have an answer from 0 to {len(choices) - 1}; got {answer!r}")
    if not all(map(clean_text, choices)):
        raise ValueError("must have no empty choice: the numbers of the others would change")
    return Entry((name,), choices, label=answer)


def _read(path: pathlib.Path, files: Files, split: str) -> Annotations:
    entry = lambda row: _entry(file_name(row), texts(row["caption"]), row["answer"])
    return Annotations(each(json_of(path), entry))


def _read_lines(path: pathlib.Path, files: Files, split: str) -> Annotations:
    entry = lambda row: _entry(row["clip_name"], texts(row["options"]), row["answer"])
    return Annotations(each(json_lines_of(path), entry))


MSRVTT = Benchmark(
    split="test",
    formats=(
        Format({"test": ("msrvtt_mc_test.json",)}, _read),
        Format({"test": ("msrvtt_mc_test.jsonl",)}, _read_lines),
    ),
    origin=f"{ORIGIN}, or ClipBERT's text annotations (github.com/jayleicn/ClipBERT)",
)
