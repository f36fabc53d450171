"""Paragraph-video retrieval on DiDeMo: all descriptions of a video joined, its first 30 seconds.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/didemo.py:FOLDER

After the folder: `towers` for models of two towers (InternVideo2-CLIP, ViCLIP: 8 frames, no re-ranking), `frames=N`.
Published, R@1 of text-video and video-text: InternVideo2 1B 57.0 and 54.3; 6B 57.9 and 57.1.
Source: InternVideo2 multi_modality/scripts/evaluation/stage2/zero_shot/1B/config_didemo.py, configs/data.py
(max_txt_l); arXiv:2403.15377, tables 9 and 24.
"""

from configs.benchmarks import retrieval


def get_config(arg=None):
    return retrieval("didemo", arg, split="test", frames=8, text=64)
