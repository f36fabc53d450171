"""Position tables."""

import functools

import numpy as np


@functools.lru_cache(maxsize=16)
def sinusoid(tokens: int, width: int) -> np.ndarray:
    """The fixed table of VideoMAE: sine on even, cosine on odd channels, over the flattened index.

    Entry (p, j) is the sine or cosine of p / 10000^(2 * floor(j / 2) / width), computed in float64.

    Args:
        tokens: N, of the t-major flattened grid.
        width: D, even or odd.

    Returns:
        float32 [N, D], read-only.

    Source: Attention is all you need (arXiv:1706.03762) 3.5; VideoMAE modeling_finetune.py.
    """
    channel = np.arange(width)
    angle = np.arange(tokens)[:, None] / np.power(10000.0, 2 * (channel // 2) / width)
    table = np.where(channel % 2 == 0, np.sin(angle), np.cos(angle)).astype(np.float32)
    table.setflags(write=False)
    return table
