"""Recognition of the 51 actions of HMDB51, test videos of split 1 (`--config.data.eval_split=test_2`: another).

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/hmdb51.py:FOLDER

After the folder: `head` for a run of classification, judged by its own classes with 4 clips x 3 crops; `frames=N`.
Zero-shot: 8 frames, class names in sixteen sentences, the mean of their cosines.
Published, zero-shot top-1: InternVideo2-CLIP 1B 53.9, L 53.2, B 52.5; which split is not published.
Source: InternVideo2 multi_modality/scripts/evaluation/clip/zero_shot/1B/config_hmdb51.py; arXiv:2403.15377, 10.2.
"""

from configs.benchmarks import recognition


def get_config(arg=None):
    return recognition("hmdb51", arg, split="test", views=(4, 3))
