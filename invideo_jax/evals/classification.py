"""Accuracy of a classifier: several clips and crops of each video, their probabilities averaged."""

import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from invideo_jax.errors import UserError
from invideo_jax.evals import Given
from invideo_jax.metrics import replace_file


class Verdict(NamedTuple):
    """What is said of one video.

    Attributes:
        label: its class.
        scores: mean probabilities over its views, float64 [classes].
    """

    label: int
    scores: np.ndarray


class Evaluator:
    """Accuracy over held-out videos with a label; a video that cannot be read is not counted.

    `run` gives `top1`, `top5` and `mean_class` (the mean of each class's own top1), shares in 0..1;
    `loss`, the mean negative logarithm of the right class's averaged probability; `videos`, the number
    counted.

    Args:
        examples: the first so many held-out videos.
        clips, crops: views of each video, clips spread over time, crops 1 or 3.
        per_class: whether what is right and what is mistaken for what, class by class, is kept in
            `workdir/classification_<clips>x<crops>/step_XXXXXXXX.json`.

    Source: the test of VideoMAE and InternVideo2, `final_test` and `merge`.
    """

    def __init__(self, given: Given, *, examples: int, clips: int, crops: int, per_class: bool):
        self.given, self.examples = given, examples
        self.views = dict(clips=clips, crops=crops)
        name = f"classification_{clips}x{crops}"
        self.folder = given.workdir / name if per_class and given.workdir else None
        self._scores = jax.jit(lambda params, batch: jax.nn.softmax(given.predict(params, batch)))

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        verdicts = list(self.verdicts(params))
        if not verdicts:
            raise UserError(
                "The evaluator 'classification' needs held-out videos with labels; got none. Give "
                "labels in data.eval, or take it out of the recipe's evals."
            )
        labels = np.array([v.label for v in verdicts])
        ranks = np.array([rank(v.scores, v.label) for v in verdicts])
        classes = sorted(set(labels.tolist()))
        own = [float(np.mean(ranks[labels == c] == 0)) for c in classes]
        right = [max(v.scores[v.label], np.finfo(np.float64).tiny) for v in verdicts]
        if self.folder is not None and jax.process_index() == 0:
            self._keep(self.folder / f"step_{step:08d}.json", verdicts, ranks)
        yield "top1", float(np.mean(ranks == 0))
        yield "top5", float(np.mean(ranks < 5))
        yield "mean_class", float(np.mean(own))
        yield "loss", float(-np.mean(np.log(right)))
        yield "videos", float(len(verdicts))

    def verdicts(self, params: Any) -> Iterator[Verdict]:
        """One for each video, in their order."""
        views = self.views["clips"] * self.views["crops"]
        rows = self._rows(params)
        return average(rows, views)

    def _rows(self, params: Any) -> Iterator[tuple[int, int, np.ndarray | None]]:
        for batch in self.given.batches(self.examples, taught=False, **self.views):
            scores = to_host(self._scores(params, batch))
            position, label, valid = (to_host(batch[n]) for n in ("position", "label", "valid"))
            for i in range(len(position)):
                known = valid[i] and label[i] >= 0
                yield int(position[i]), int(label[i]), scores[i] if known else None

    def _keep(self, file: pathlib.Path, verdicts: Sequence[Verdict], ranks: np.ndarray) -> None:
        names = self.given.classes
        name = lambda c: names[c] if c < len(names) else str(c)
        table: dict[str, dict[str, Any]] = {}
        for verdict, place in zip(verdicts, ranks):
            row = table.setdefault(
                name(verdict.label), {"videos": 0, "top1": 0, "top5": 0, "predicted": {}}
            )
            guess = name(int(np.argmax(verdict.scores)))
            row["videos"] += 1
            row["top1"] += int(place == 0)
            row["top5"] += int(place < 5)
            row["predicted"][guess] = row["predicted"].get(guess, 0) + 1
        for row in table.values():
            row["predicted"] = dict(sorted(row["predicted"].items(), key=lambda x: -x[1]))
        replace_file(file, json.dumps(dict(sorted(table.items())), indent=1).encode())


def make(
    given: Given, *, examples: int, clips: int = 1, crops: int = 1, per_class: bool = True
) -> Evaluator:
    """The evaluator; arguments as of `Evaluator`."""
    if given.predict is None:
        raise UserError(
            "The evaluator 'classification' needs a model with classes, which this stage's has not. Take it "
            "out of the recipe's evals; 'probe' and 'knn' judge the features of any encoder."
        )
    return Evaluator(given, examples=examples, clips=clips, crops=crops, per_class=per_class)


def average(rows: Iterable[tuple[int, int, np.ndarray | None]], views: int) -> Iterator[Verdict]:
    """Averages the rows of each video.

    Args:
        rows: (position, label, probabilities or None where there are none); the video of a row is
            position // views. In order of position.
        views: rows of each video.
    """
    video, label, parts = None, -1, []

    def done() -> Iterator[Verdict]:
        if parts:
            yield Verdict(label, np.mean(np.asarray(parts, np.float64), axis=0))

    for position, its_label, scores in rows:
        if position // views != video:
            yield from done()
            video, parts = position // views, []
        if scores is not None:
            label = its_label
            parts.append(scores)
    yield from done()


def rank(scores: np.ndarray, label: int) -> int:
    """How many classes come before the label; of equal scores the first class does.

    A label beyond the classes, or a score that is not finite, comes last.
    """
    if label >= len(scores) or not np.isfinite(scores).all():
        return len(scores)
    before = np.arange(len(scores)) < label
    return int(((scores > scores[label]) | ((scores == scores[label]) & before)).sum())


def to_host(x: jax.Array) -> np.ndarray:
    """The whole array on every process."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)
