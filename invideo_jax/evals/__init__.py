"""Evaluators: what a model can do on held-out clips, measured during or after training.

The contract. An evaluator is one file of this folder and one line in `EVALUATORS`: a function
`make(given, **options)` with what the run gives to all (`Given`) and the evaluator's own options, the
keys of `config.evals.<name>` but `every`. It raises UserError where the model cannot do what it
measures. What it makes has one method:

    run(params, step) -> iterator of (name, value)

    params: the parameter tree to judge, as the train step holds it; never changed, never donated.
    step: the global step (updates done), for naming files; it must not change any value.
    name: letters, digits and underscores; the caller adds the prefix `eval/<evaluator>/`.
    value: a Python float, the same on every process.

All processes call `run` together. Averages are `losses.Mean`s over rows whose `valid` is true, divided
once at the end, so that padding rows and the batch size change nothing. What is random comes from
`batch["position"]`, so that each evaluation sees the same masks, on any number of devices and hosts.
Only process 0 writes files.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from invideo_jax.registry import Registry
from invideo_jax.towers import Towers

PyTree = Any
Batch = Mapping[str, jax.Array]

EVALUATORS = Registry(
    "evaluator",
    {
        "reconstruction": "invideo_jax.evals.reconstruction:make",
        "loss": "invideo_jax.evals.loss:make",
        "classification": "invideo_jax.evals.classification:make",
        "multi_view": "invideo_jax.evals.classification:make",  # as well, with other options
        "probe": "invideo_jax.evals.probe:make",
        "knn": "invideo_jax.evals.knn:make",
        "attentive_probe": "invideo_jax.evals.attentive_probe:make",
        "zero_shot": "invideo_jax.evals.zero_shot:make",
        "multiple_choice": "invideo_jax.evals.multiple_choice:make",
        "retrieval": "invideo_jax.evals.retrieval:make",
        # The same of other texts: one recipe may measure several.
        "retrieval_audio": "invideo_jax.evals.retrieval:make_audio",
        "retrieval_audio_video": "invideo_jax.evals.retrieval:make_audio_video",
        "retrieval_speech": "invideo_jax.evals.retrieval:make_speech",
    },
)


@dataclasses.dataclass(frozen=True)
class Given:
    """What evaluators are made from; functions of arrays are jitted.

    Attributes:
        batches: (examples, *, of='held_out', clips=1, crops=1) -> device batches, always the same ones
            in the same order; the first `examples` held-out ('held_out') or training ('train') videos,
            cut as for evaluation. Each gives clips * crops rows, at consecutive positions. Rows beyond
            them are not `valid`. taught=False leaves out what a teacher adds and `eval_loss` needs.
        eval_loss: (params, batch) -> name -> `losses.Mean` over valid rows.
        encode: (params, batch) -> pooled features of whole clips, [B, P].
        reconstruct: (params, batch) -> (original, masked, reconstruction), or None.
        predict: (params, batch) -> logits [B, classes], or None.
        classes: names of the labels, in their order; empty where unknown.
        workdir: folder for files.
        encode_tokens: (params, batch) -> the frozen encoder's tokens of whole clips, [B, N, D], or None.
        towers: of a model of several modalities; its functions are not jitted. None for others.
        texts: (examples, *, of='held_out', kind='video') -> for each of the first `examples` videos, in
            the order of `batches`, its texts of one kind: 'video', 'audio', 'audio_video', 'fused',
            'speech' (the transcript), or the first there is of 'fused|video'. An empty tuple where
            an example has none. A row of a batch with one view belongs to the texts at its position.
            None where the data has no texts.
    """

    batches: Callable[..., Iterable[Batch]]
    eval_loss: Callable[[PyTree, Batch], Mapping[str, Any]]
    encode: Callable[[PyTree, Batch], jax.Array]
    reconstruct: Callable[[PyTree, Batch], tuple[jax.Array, jax.Array, jax.Array]] | None = None
    predict: Callable[[PyTree, Batch], jax.Array] | None = None
    classes: tuple[str, ...] = ()
    workdir: pathlib.Path | None = None
    encode_tokens: Callable[[PyTree, Batch], jax.Array] | None = None
    towers: Towers | None = None
    texts: Callable[..., Sequence[tuple[str, ...]]] | None = None
