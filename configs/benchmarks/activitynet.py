"""Paragraph-video retrieval on ActivityNet Captions: the sentences of a video joined, the first annotator's (val_1).

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/activitynet.py:FOLDER

After the folder: `towers` for models of two towers (InternVideo2-CLIP, ViCLIP: 8 frames, no re-ranking), `frames=N`.
Published, R@1 of text-video and video-text: InternVideo2 1B 60.4 and 54.8; 6B 63.2 and 56.5.
Source: InternVideo2 multi_modality/scripts/evaluation/stage2/zero_shot/1B/config_anet.py, configs/data.py
(max_txt_l); arXiv:2403.15377, tables 9 and 24.
"""

from configs.benchmarks import retrieval


def get_config(arg=None):
    return retrieval("activitynet", arg, split="validation", frames=8, text=150)
