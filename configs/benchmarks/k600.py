"""Recognition of the 600 actions of Kinetics, validation videos.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/k600.py:FOLDER

After the folder: `head` for a run of classification, judged by its own classes with 4 clips x 3 crops; `frames=N`.
Zero-shot: 8 frames, class names in sixteen sentences, the mean of their cosines.
Published, zero-shot top-1 and mean of top-1 and top-5: InternVideo2-CLIP 1B 72.8 and 81.8, L 69.9 and 79.6, B 66.8
and 77.0.
Source: InternVideo2 multi_modality/scripts/evaluation/clip/zero_shot/1B/config_k600.py; arXiv:2403.15377, 10.2.
"""

from configs.benchmarks import recognition


def get_config(arg=None):
    return recognition("k600", arg, split="validation", views=(4, 3))
