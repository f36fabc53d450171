"""Recognition of the 174 actions of Something-Something V2, validation videos; zero-shot it is SSv2-MC.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/ssv2.py:FOLDER

After the folder: `head` for a run of classification, judged by its own classes with 2 clips x 3 crops; `frames=N`.
Zero-shot: 8 frames; every video chooses among all 174 labels, as they are written, without sentences around them.
Published, zero-shot top-1: InternVideo2-CLIP 1B 61.5, 6B 63.5, L 59.6, B 55.9.
Source: InternVideo2 multi_modality/scripts/evaluation/clip/zero_shot/1B/config_ssv2_mc.py; arXiv:2403.15377, 10.2.
"""

from configs.benchmarks import recognition


def get_config(arg=None):
    return recognition("ssv2", arg, split="validation", views=(2, 3), templates="none")
