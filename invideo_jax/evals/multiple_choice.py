"""Which of a few texts belongs to a video: MSR-VTT and LSMDC multiple choice, SSv2-MC."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.evals import Given, ranking
from invideo_jax.evals.classification import to_host
from invideo_jax.evals.embed import Embedder, on_host, texts_of, towers_of
from invideo_jax.evals.retrieval import Judge


class Evaluator:
    """Chooses the text whose score with the video is highest.

    The texts of an example are its candidates, and its label is the number of the right one. `run` gives
    `accuracy` by cosines, with match=True `accuracy_match` by the fusion layers, `chance` (the mean of
    1 / candidates): shares in 0..1; and `examples`, the number counted. Candidates of equal score share
    the point. An example that cannot be read, has fewer than two candidates or no right one is left out.

    Args:
        examples: the first so many held-out videos.
        text: kind of texts that holds the candidates, as of `Given.texts`.
        match: whether the fusion layers judge too; videos are read once more for it.
        text_batch: texts embedded, or pairs judged, at once.

    Source: InternVideo2 (arXiv:2403.15377), multi_modality tasks/retrieval_mc.py.
    """

    def __init__(self, given: Given, *, examples: int, text: str, match: bool, text_batch: int):
        towers = towers_of(given, "multiple_choice", match=match)
        self.embedder = Embedder(towers, text_batch=text_batch)
        self.judge = Judge(self.embedder, pairs=text_batch) if match else None
        self.given, self.examples, self.text = given, examples, text

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        listed = self._candidates()
        # Of each example: its row among all of all batches, its embedding, its candidates, the right one.
        found, first = [], 0
        batches = self.given.batches(self.examples, taught=False)
        for batch, embedding, real in self.embedder.batches(params, batches):
            vectors = to_host(embedding)
            position, label = to_host(batch["position"]), to_host(batch["label"])
            for i in np.flatnonzero(real & (position < len(listed))):
                choices = listed[position[i]]
                if len(choices) > 1 and 0 <= label[i] < len(choices) and choices[label[i]].strip():
                    found.append((first + i, vectors[i], choices, int(label[i])))
            first += len(position)
        if not found:
            raise UserError(
                "Multiple choice needs examples with several texts and the number of the right one as "
                f"label; got none of the kind {self.text!r}. Take it out of the recipe's evals, or "
                "evaluate on the benchmark's own files (data.eval)."
            )
        number = np.array([len(choices) for *_, choices, _ in found])
        right = np.array([label for *_, label in found])
        sentences = [text for *_, choices, _ in found for text in choices]
        texts = on_host(self.embedder.texts(params, sentences))
        videos = np.repeat(np.stack([vector for _, vector, *_ in found]), number, axis=0)
        yield "accuracy", accuracy(np.sum(texts * videos, axis=1), number, right)
        if self.judge is not None:
            rows = np.repeat([row for row, *_ in found], number)
            pairs = np.stack([rows, np.arange(len(rows))], axis=1)
            batches = self.given.batches(self.examples, taught=False)
            scores = self.judge.scores(params, batches, sentences, pairs)
            yield "accuracy_match", accuracy(scores, number, right)
        yield "chance", float(np.mean(1 / number))
        yield "examples", float(len(found))

    def _candidates(self):
        which = dict(examples=self.examples, of="held_out", kind=self.text)
        texts_of(self.given, "multiple_choice", **which)  # an error where there is none at all
        return self.given.texts(**which)


def accuracy(scores: np.ndarray, number: np.ndarray, right: np.ndarray) -> float:
    """Share of examples whose right candidate has the highest score.

    Args:
        scores: of all candidates of all examples, one after the other.
        number: candidates of each example.
        right: which of them is right.
    """
    table = np.full((len(number), number.max()), -np.inf)
    table[np.arange(table.shape[1]) < number[:, None]] = scores
    standing = ranking.standings(table, right, np.arange(table.shape[1]))
    return float(np.mean(ranking.recall(standing, 1)))


def make(
    given: Given,
    *,
    examples: int,
    text: str = "video",
    match: bool = False,
    text_batch: int = 256,
) -> Evaluator:
    """The evaluator; arguments as of `Evaluator`."""
    return Evaluator(given, examples=examples, text=text, match=match, text_batch=text_batch)
