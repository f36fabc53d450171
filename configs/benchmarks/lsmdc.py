"""Text-video retrieval on LSMDC 2016: 1,000 clips of films.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/lsmdc.py:FOLDER

After the folder: `towers` for models of two towers (InternVideo2-CLIP, ViCLIP: 8 frames, no re-ranking), `frames=N`.
Published, R@1 of text-video and video-text: InternVideo2 1B 32.0 and 27.3; 6B 33.8 and 30.1.
Source: InternVideo2 multi_modality/scripts/evaluation/stage2/zero_shot/1B/config_lsmdc.py; arXiv:2403.15377, tables 9
and 24.
"""

from configs.benchmarks import retrieval


def get_config(arg=None):
    return retrieval("lsmdc", arg, split="test", frames=8, text=40)
