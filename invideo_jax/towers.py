"""What a model of several modalities makes of each of them: what retrieval, zero-shot and search ask for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

PyTree = Any
Batch = Mapping[str, jax.Array]
Encoded = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Towers:
    """Pure functions of parameters and rows; whoever calls them jits them.

    Each gives 'embedding' [B, P] of length 1 in float32, and 'tokens' [B, N, D] where `match` can use them.

    Attributes:
        video: (params, batch) -> of whole clips, nothing hidden.
        text: (params, ids [B, L], valid [B, L]) -> of texts.
        audio: (params, batch) -> of the sound, and 'valid' bool [B], False without sound; or None.
        audio_video: (params, batch) -> of both together; rows without sound are not 'valid'; or None.
        match: (params, text tokens [B, L, D], valid [B, L], other tokens [B, N, D]) -> how much each pair
            belongs together, a logit [B]; or None. The other tokens are those of `video`.
        tokenize: texts -> ids int32 [B, L] and valid bool [B, L], NumPy.
        vocabulary: words that the text tower knows.
    """

    video: Callable[[PyTree, Batch], Encoded]
    text: Callable[[PyTree, jax.Array, jax.Array], Encoded]
    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
    audio: Callable[[PyTree, Batch], Encoded] | None = None
    audio_video: Callable[[PyTree, Batch], Encoded] | None = None
    match: Callable[[PyTree, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    vocabulary: int = 0
