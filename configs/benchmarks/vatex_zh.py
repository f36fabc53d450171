"""Text-video retrieval on VATEX in Chinese: the 1,500 test clips of HGR's split, ten captions each.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/vatex_zh.py:FOLDER

After the folder: `towers` for models of two towers (InternVideo2-CLIP, ViCLIP: 8 frames, no re-ranking), `frames=N`.
Published, R@1 of text-video and video-text: InternVideo2-CLIP 1B 54.9 and 76.4 (with `towers`).
Source: InternVideo2 multi_modality/scripts/evaluation/clip/zero_shot/1B/config_vatex_ch.py.
"""

from configs.benchmarks import retrieval


def get_config(arg=None):
    return retrieval("vatex_zh", arg, split="test", frames=4, text=40)
