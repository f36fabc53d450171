"""VATEX: ten captions of a clip in English, ten in Chinese; clips are called ID_000122_000132, their seconds.

The official files are lists of {"videoID", "enCap", "chCap"}. Retrieval is measured on the half of the validation
clips that test_list.txt of HGR's split names.

Source: eric-xw.github.io/vatex-website; Chen et al. 2020 (HGR, arXiv:2003.00392) 4.1; InternVideo1
Downstream/Video-Text-Retrieval/data/VATEX.
"""

import functools
import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.caption_lists import caption_list
from invideo_jax.data.benchmarks.reading import AnnotationError, each, json_of, lines_of, texts

_TRAIN, _VALIDATION = "vatex_training_v1.0.json", "vatex_validation_v1.0.json"
_PUBLIC = "vatex_public_test_english_v1.1.json"  # English only
_OFFICIAL = (_VALIDATION, _TRAIN)
_REFERENCES = "ref_captions.json"  # {clip: [captions]}, as TS2-Net has it; English


def _captions(path: pathlib.Path, key: str) -> dict[str, tuple[str, ...]]:
    return dict(each(json_of(path), lambda row: (row["videoID"], texts(row[key]))))


def _read(path: pathlib.Path, files: Files, split: str, *, key: str) -> Annotations:
    return Annotations([Entry((name,), many) for name, many in _captions(path, key).items()])


def _read_list(path: pathlib.Path, files: Files, split: str, *, key: str) -> Annotations:
    """The listed clips, with captions from whichever file has them."""
    found: dict[str, tuple[str, ...]] = {}
    for name in _OFFICIAL:
        there = files.find((name,))
        found |= _captions(there, key) if there else {}
    references = files.find((_REFERENCES,)) if key == "enCap" else None
    if references and not found:
        pair = lambda item: (item[0], texts(item[1]))
        found = dict(each(json_of(references, dict).items(), pair))
    if not found:
        raise AnnotationError(
            f"the captions of its clips are in {_VALIDATION}, which is not there"
            + (f" ({_REFERENCES} would do as well)" if key == "enCap" else "")
        )
    return Annotations(each(lines_of(path), lambda name: Entry((name,), found[name])))


def _benchmark(key: str, language: str) -> Benchmark:
    official = {"validation": (_VALIDATION,), "train": (_TRAIN,)}
    if key == "enCap":
        official["public_test"] = (_PUBLIC,)
    lists = {
        "test": (f"vatex_{language}_ret_test.json", f"vatex_{language}_ret_val.json"),
        "train": (f"vatex_{language}_ret_train.json",),
    }
    return Benchmark(
        split="test",
        formats=(
            Format({"test": ("test_list.txt",)}, functools.partial(_read_list, key=key)),
            caption_list(lists),
            Format(official, functools.partial(_read, key=key)),
        ),
        origin=(
            "eric-xw.github.io/vatex-website for the captions; the list of the 1,500 test clips from "
            "github.com/cshizhe/hgr_v2t or InternVideo1's Downstream/Video-Text-Retrieval/data/VATEX"
        ),
    )


ENGLISH = _benchmark("enCap", "en")
CHINESE = _benchmark("chCap", "ch")
