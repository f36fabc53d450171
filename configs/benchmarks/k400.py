"""Recognition of the 400 actions of Kinetics, validation videos.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/k400.py:FOLDER

After the folder: `head` for a run of classification, judged by its own classes with 4 clips x 3 crops; `frames=N`.
Zero-shot: 8 frames, class names in sixteen sentences, the mean of their cosines.
Published, zero-shot top-1 and mean of top-1 and top-5: InternVideo2-CLIP 1B 73.1 and 82.4, L 70.7 and 80.5, B 67.7
and 78.0.
Source: InternVideo2 multi_modality/scripts/evaluation/clip/zero_shot/1B/config_k400.py; arXiv:2403.15377, 10.2.
"""

from configs.benchmarks import recognition


def get_config(arg=None):
    return recognition("k400", arg, split="validation", views=(4, 3))
