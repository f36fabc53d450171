"""MSR-VTT: the split 1k-A of JSFusion, and the official one.

1k-A: MSRVTT_JSFUSION_test.csv has the columns video_id and sentence; the lists of training videos,
MSRVTT_train.9k.csv and .7k.csv, have video_id, and the sentences are in MSRVTT_data.json. The official files are
{"videos": [{"video_id", "split"}], "sentences": [{"video_id", "caption"}]}.

Source: ArrowLuo/CLIP4Clip dataloaders/dataloader_msrvtt_retrieval.py; the readme of MSR-VTT 10K.
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.caption_lists import ORIGIN, caption_list
from invideo_jax.data.benchmarks.reading import (
    AnnotationError,
    each,
    grouped,
    json_of,
    records_of,
)
from invideo_jax.data.manifest import split_name

_DATA = "MSRVTT_data.json"
_SPLITS = {"validate": "validation"}


def _read_test(path: pathlib.Path, files: Files, split: str) -> Annotations:
    rows = records_of(path, ("video_id", "sentence"))
    captions = grouped((row["video_id"], row["sentence"]) for row in rows)
    return Annotations([Entry((name,), tuple(many)) for name, many in captions.items()])


def _read_train(path: pathlib.Path, files: Files, split: str) -> Annotations:
    data = files.find((_DATA,))
    if data is None:
        raise AnnotationError(f"its sentences are in {_DATA}, which is not there")
    captions = _sentences(json_of(data, dict))
    names = [row["video_id"] for row in records_of(path, ("video_id",))]
    return Annotations(each(dict.fromkeys(names), lambda n: Entry((n,), tuple(captions[n]))))


def _read_official(path: pathlib.Path, files: Files, split: str) -> Annotations:
    data = json_of(path, dict)
    captions = _sentences(data)

    def entry(video: dict) -> Entry | None:
        its = video["split"]
        if split_name(_SPLITS.get(its, its)) != split:
            return None
        return Entry((video["video_id"],), tuple(captions[video["video_id"]]))

    return Annotations([e for e in each(data.get("videos", ()), entry) if e is not None])


def _sentences(data: dict) -> dict[str, list[str]]:
    pair = lambda row: (row["video_id"], row["caption"])
    return grouped(each(data.get("sentences", ()), pair))


ONE_THOUSAND = Benchmark(
    split="test",
    formats=(
        Format({"test": ("MSRVTT_JSFUSION_test.csv",)}, _read_test),
        Format(
            {"train": ("MSRVTT_train.9k.csv",), "train_7k": ("MSRVTT_train.7k.csv",)}, _read_train
        ),
        caption_list(
            {
                "test": ("msrvtt_ret_test1k.json", "msrvtt_test1k.json", "msrvtt_test_1k.json"),
                "train": ("msrvtt_ret_train9k.json", "msrvtt_train_9k.json"),
                "train_7k": ("msrvtt_ret_train7k.json", "msrvtt_train_7k.json"),
            }
        ),
    ),
    origin=f"msrvtt_data.zip of github.com/ArrowLuo/CLIP4Clip, or {ORIGIN}",
)

FULL = Benchmark(
    split="test",
    formats=(
        Format(
            {
                "test": (_DATA, "test_videodatainfo.json"),
                "validation": (_DATA, "train_val_videodatainfo.json"),
                "train": (_DATA, "train_val_videodatainfo.json"),
            },
            _read_official,
        ),
    ),
    origin="MSR-VTT 10K as released for the challenge, or msrvtt_data.zip of github.com/ArrowLuo/CLIP4Clip",
)
