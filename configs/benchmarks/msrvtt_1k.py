"""Text-video retrieval on MSR-VTT, the 1,000 test clips of the split 1k-A.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/msrvtt_1k.py:FOLDER

After the folder: `towers` for models of two towers (InternVideo2-CLIP, ViCLIP: 8 frames, no re-ranking), `frames=N`.
Published, R@1 of text-video and video-text: InternVideo2 1B 51.9 and 50.9 (8 frames), 51.9 and 49.6 (4 frames); 6B
55.9 and 53.7.
Source: InternVideo2 multi_modality/scripts/evaluation/stage2/zero_shot/1B/config_msrvtt.py; arXiv:2403.15377, tables
9 and 24.
"""

from configs.benchmarks import retrieval


def get_config(arg=None):
    return retrieval("msrvtt_1k", arg, split="test", frames=4, text=40)
