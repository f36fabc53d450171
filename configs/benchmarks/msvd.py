"""Text-video retrieval on MSVD: 670 test videos, each caption a query, the best ranked caption of a video.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/msvd.py:FOLDER

After the folder: `towers` for models of two towers (InternVideo2-CLIP, ViCLIP: 8 frames, no re-ranking), `frames=N`.
Published, R@1 of text-video and video-text: InternVideo2 1B 58.1 and 83.3 (8 frames), 58.9 and 83.6 (4 frames); 6B
59.3 and 83.1.
Source: InternVideo2 multi_modality/scripts/evaluation/stage2/zero_shot/1B/config_msvd.py, configs/data.py
(max_txt_l); arXiv:2403.15377, tables 9 and 24.
"""

from configs.benchmarks import retrieval


def get_config(arg=None):
    return retrieval("msvd", arg, split="test", frames=4, text=64)
