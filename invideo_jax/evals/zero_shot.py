"""Classification by the names of the classes: no example of them is learned from."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.evals import Given, prompts, ranking
from invideo_jax.evals.classification import Verdict, average, to_host
from invideo_jax.evals.embed import Embedder, on_host, towers_of
from invideo_jax.registry import nearest

MEANS = ("embedding", "cosine")


class Evaluator:
    """Compares each held-out video with the name of every class, put into prompt templates.

    `run` gives `top1`, `top5`, `mean_top1_top5` (their mean, which is published for Kinetics),
    `mean_class` (the mean of each class's own top1), `chance` (what scores that say nothing get): shares
    in 0..1; and `videos`, the number counted. Classes of equal score count as if in random order. A video
    that cannot be read, or whose class is not known, is left out.

    Args:
        examples: the first so many held-out videos.
        templates: 'actions', 'none' (the name alone), or a text file with a template a line, '{}' in it.
        mean: 'embedding', the cosine with the mean over the templates of the texts' embeddings;
            'cosine', the mean over the templates of the cosines (published), which differs by the length of
            that mean: a class whose templates disagree scores lower.
        modality: 'video', 'audio' or 'audio_video', what is classified.
        clips, crops: views of each video, over which scores are averaged.
        text_batch: prompts embedded at once.

    Source: ViCLIP (arXiv:2307.06942); InternVideo2 (arXiv:2403.15377), zero-shot action recognition.
    """

    def __init__(
        self,
        given: Given,
        *,
        examples: int,
        templates: str,
        mean: str,
        modality: str,
        clips: int,
        crops: int,
        text_batch: int,
    ):
        towers = towers_of(given, "zero_shot", modality=modality)
        self.embedder = Embedder(towers, modality=modality, text_batch=text_batch)
        self.given, self.examples, self.mean = given, examples, mean
        self.views = dict(clips=clips, crops=crops)
        self.templates = prompts.templates(templates)
        highest = jax.lax.Precision.HIGHEST
        self._scores = jax.jit(lambda video, text: jnp.dot(video, text.T, precision=highest))

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        verdicts = list(average(self._rows(params), self.views["clips"] * self.views["crops"]))
        if not verdicts:
            raise UserError(
                "The evaluator 'zero_shot' needs held-out videos with labels; got none. Give labels in "
                "data.eval, or take it out of the recipe's evals."
            )
        yield from judge(verdicts).items()

    def classes(self, params: Any) -> np.ndarray:
        """One vector for each class, float32 [classes, P]."""
        names = [prompts.words(name) for name in self.given.classes]
        texts = [prompts.fill(template, name) for name in names for template in self.templates]
        found = on_host(self.embedder.texts(params, texts))
        found = found.reshape(len(names), len(self.templates), -1).mean(axis=1)
        if self.mean == "cosine":
            return found
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    def _rows(self, params: Any) -> Iterator[tuple[int, int, np.ndarray | None]]:
        classes = self.classes(params)
        batches = self.given.batches(self.examples, taught=False, **self.views)
        for batch, embedding, real in self.embedder.batches(params, batches):
            scores = to_host(self._scores(embedding, classes))
            position, label = to_host(batch["position"]), to_host(batch["label"])
            known = real & (label >= 0) & (label < len(classes))
            for i in range(len(position)):
                yield int(position[i]), int(label[i]), scores[i] if known[i] else None


def judge(verdicts: list[Verdict]) -> dict[str, float]:
    """What `run` gives."""
    labels = np.array([v.label for v in verdicts])
    scores = np.stack([v.scores for v in verdicts])
    standing = ranking.standings(scores, labels, np.arange(scores.shape[1]))
    top1, top5 = (ranking.recall(standing, k) for k in (1, 5))
    means = {"top1": float(top1.mean()), "top5": float(top5.mean())}
    return means | {
        "mean_top1_top5": (means["top1"] + means["top5"]) / 2,
        "mean_class": float(np.mean([top1[labels == c].mean() for c in np.unique(labels)])),
        "chance": 1 / scores.shape[1],
        "videos": float(len(labels)),
    }


def make(
    given: Given,
    *,
    examples: int,
    templates: str = "actions",
    mean: str = "embedding",
    modality: str = "video",
    clips: int = 1,
    crops: int = 1,
    text_batch: int = 256,
) -> Evaluator:
    """The evaluator; arguments as of `Evaluator`."""
    if mean not in MEANS:
        raise UserError(
            f"mean must be one of {', '.join(MEANS)}; got {mean=}.{nearest(mean, MEANS)}"
        )
    if not given.classes:
        raise UserError(
            "The evaluator 'zero_shot' needs the names of the classes; the training data has none. Give "
            "labels by name in the manifest, or take it out of the recipe's evals."
        )
    return Evaluator(
        given,
        examples=examples,
        templates=templates,
        mean=mean,
        modality=modality,
        clips=clips,
        crops=crops,
        text_batch=text_batch,
    )
