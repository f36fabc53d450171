"""Recognition of the 700 actions of Kinetics, validation videos.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/k700.py:FOLDER

After the folder: `head` for a run of classification, judged by its own classes with 4 clips x 3 crops; `frames=N`.
Zero-shot: 8 frames, class names in sixteen sentences, the mean of their cosines.
Published, zero-shot top-1 and mean of top-1 and top-5: InternVideo2-CLIP 1B 64.9 and 75.2, L 61.9 and 72.9, B 57.9
and 69.3.
Source: InternVideo2 multi_modality/scripts/evaluation/clip/zero_shot/1B/config_k700.py; arXiv:2403.15377, 10.2.
"""

from configs.benchmarks import recognition


def get_config(arg=None):
    return recognition("k700", arg, split="validation", views=(4, 3))
