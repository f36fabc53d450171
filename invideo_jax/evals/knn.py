"""Nearest neighbours of frozen features vote for the class."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from invideo_jax.evals import Given
from invideo_jax.evals.probe import Labelled, collect, share_right

_ROWS = 512  # held-out clips compared at once


class Evaluator:
    """k nearest training clips by cosine, each with the vote exp(cosine / temperature).

    `run` gives `top1` and `top5`, shares in 0..1.

    Args:
        examples, train_examples: how many clips are judged, and may be neighbours.
        k: number of neighbours.

    Source: DINO (arXiv:2104.14294), appendix; Wu et al. 2018 (arXiv:1805.01978).
    """

    def __init__(
        self, given: Given, *, examples: int, train_examples: int, k: int, temperature: float
    ):
        self.given, self.examples, self.train_examples = given, examples, train_examples
        self.k, self.temperature = k, temperature

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        train = collect(self.given, params, examples=self.train_examples, of="train")
        held_out = collect(self.given, params, examples=self.examples, of="held_out")
        classes = int(max(train.labels.max(), held_out.labels.max())) + 1
        scores = vote(train, held_out.features, classes, k=self.k, temperature=self.temperature)
        yield "top1", share_right(scores, held_out.labels, 1)
        yield "top5", share_right(scores, held_out.labels, 5)


def make(
    given: Given, *, examples: int, train_examples: int, k: int = 20, temperature: float = 0.07
) -> Evaluator:
    """The evaluator; arguments as of `Evaluator`."""
    return Evaluator(
        given, examples=examples, train_examples=train_examples, k=k, temperature=temperature
    )


def vote(
    train: Labelled, features: np.ndarray, classes: int, *, k: int, temperature: float
) -> np.ndarray:
    """Votes for each class, float32 [n, classes].

    Args:
        features: [n, P].
        k: neighbours; all training clips where there are fewer.
    """
    unit = lambda x: x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    bank, k = unit(train.features), min(k, len(train.labels))
    votes = np.zeros((len(features), classes), np.float32)
    for start in range(0, len(features), _ROWS):
        near = unit(features[start : start + _ROWS]) @ bank.T
        order = np.argsort(-near, axis=1, kind="stable")[:, :k]
        weight = np.exp(np.take_along_axis(near, order, axis=1) / temperature)
        rows = np.arange(len(near))[:, None] + start
        np.add.at(votes, (rows, train.labels[order]), weight)
    return votes
