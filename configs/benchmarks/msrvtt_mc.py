"""Multiple choice on MSR-VTT: which of five captions belongs to each of 2,990 videos.

    python -m invideo_jax.evaluate --workdir=DIR --config=configs/benchmarks/msrvtt_mc.py:FOLDER

After the folder: `towers` for models of two towers, which only compare embeddings; `frames=N` (8; what was used is
not
published).
Published, accuracy: InternVideo2 6B 94.4.
Source: arXiv:2403.15377; InternVideo2 multi_modality/dataset/ret_dataset.py (VidTxtRetMCEvalDataset).
"""

from configs.benchmarks import multiple_choice


def get_config(arg=None):
    return multiple_choice("msrvtt_mc", arg, split="test")
