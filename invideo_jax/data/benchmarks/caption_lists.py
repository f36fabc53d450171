"""VindLU's JSON lists of retrieval sets, which UMT and InternVideo2 evaluate with as well.

A list of {"video" (or "image"): file name, "caption": text or list of texts}.

Source: klauscc/VindLU DATA.md; OpenGVLab/InternVideo InternVideo2/multi_modality/DATASET.md, dataset/ret_dataset.py.
"""

import functools
import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Entry, Files, Format
from invideo_jax.data.benchmarks.reading import each, grouped, json_of, texts

ORIGIN = "the annotation files of VindLU (github.com/klauscc/VindLU, anno_downstream)"


def caption_list(
    files: dict[str, tuple[str, ...]], *, paragraph: bool = False, end: float | None = None
) -> Format:
    """A format of such lists.

    Args:
        files: split -> file names.
        paragraph: the captions of a video are joined to one text, with a space between, in their order.
        end: seconds of each video that are used, from its begin; None: all.
    """
    return Format(files, functools.partial(read, paragraph=paragraph, end=end))


def read(
    path: pathlib.Path, files: Files, split: str, *, paragraph: bool, end: float | None
) -> Annotations:
    """Rows of one video are one entry, with all their captions."""
    del files, split
    rows = each(json_of(path), lambda row: (file_name(row), texts(row["caption"])))
    captions = grouped((name, text) for name, many in rows for text in many)
    entries = [
        Entry((name,), (" ".join(many),) if paragraph else tuple(many), end=end)
        for name, many in captions.items()
    ]
    return Annotations(entries)


def file_name(row: dict) -> str:
    """The video of a row.

    Raises:
        KeyError: it has none.
    """
    return str(row["image"] if "video" not in row and "image" in row else row["video"])
