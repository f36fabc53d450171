"""Recognition of the 101 actions of UCF101, test videos of split 1 (`--config.data.eval_split=test_2`: another).

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/ucf101.py:FOLDER

After the folder: `head` for a run of classification, judged by its own classes with 4 clips x 3 crops; `frames=N`.
Zero-shot: 8 frames, class names in sixteen sentences, the mean of their cosines.
Published, zero-shot top-1: InternVideo2-CLIP 1B 88.8, L 85.9, B 83.4; which split is not published.
Source: InternVideo2 multi_modality/scripts/evaluation/clip/zero_shot/1B/config_ucf101.py; arXiv:2403.15377, 10.2.
"""

from configs.benchmarks import recognition


def get_config(arg=None):
    return recognition("ucf101", arg, split="test", views=(4, 3))
