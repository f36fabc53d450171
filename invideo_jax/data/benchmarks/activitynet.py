"""ActivityNet Captions as paragraph retrieval: the sentences of a whole video joined.

val_1.json and val_2.json, of two annotators, are {"v_ID": {"duration", "timestamps", "sentences"}}. Retrieval is
measured on the first.

Source: CLIP4Clip dataloader_activitynet_retrieval.py; InternVideo2 multi_modality/configs/data.py (`anet_ret_val`).
"""

import pathlib

from invideo_jax.data.benchmarks.base import Annotations, Benchmark, Entry, Files, Format
from invideo_jax.data.benchmarks.caption_lists import ORIGIN, caption_list
from invideo_jax.data.benchmarks.reading import each, json_of, texts


def _read(path: pathlib.Path, files: Files, split: str) -> Annotations:
    def entry(item: tuple[str, dict]) -> Entry:
        name, what = item
        text = " ".join(sentence.strip() for sentence in texts(what["sentences"]))
        return Entry((name, name.removeprefix("v_")), (text,))

    return Annotations(each(json_of(path, dict).items(), entry))


ACTIVITYNET = Benchmark(
    split="validation",
    formats=(
        Format(
            {
                "validation": ("val_1.json",),
                "validation_2": ("val_2.json",),
                "train": ("train.json",),
            },
            _read,
        ),
        caption_list(
            {
                "validation": ("anet_ret_val_1.json", "anet_ret_val.json"),
                "train": ("anet_ret_train.json",),
            },
            paragraph=True,
        ),
    ),
    origin=f"captions.zip of ActivityNet Captions (activity-net.org), or {ORIGIN}",
)
