"""Text-video retrieval on VATEX in English: the 1,500 test clips of HGR's split, ten captions each.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/vatex.py:FOLDER

After the folder: `towers` for models of two towers (InternVideo2-CLIP, ViCLIP: 8 frames, no re-ranking), `frames=N`.
Published, R@1 of text-video and video-text: InternVideo2 1B 70.4 and 85.4 (8 frames), 70.7 and 85.9 (4 frames); 6B
71.5 and 85.3.
Source: InternVideo2 multi_modality/scripts/evaluation/stage2/zero_shot/1B/config_vatex.py; arXiv:2403.15377, tables 9
and 24.
"""

from configs.benchmarks import retrieval


def get_config(arg=None):
    return retrieval("vatex", arg, split="test", frames=4, text=40)
