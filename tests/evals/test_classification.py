"""Accuracy over views: averaging, ties, batches of any size, the file of classes; views of a loader."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax.data.order import InTurn, Order, Repeated
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS, Given, classification

CLASSES, VIDEOS, VIEWS = 6, 7, 6


def logits_of(position):
    """Scores of a row, by its position only."""
    return np.random.default_rng(int(position)).normal(size=CLASSES).astype(np.float32)


def given_in_batches(rows, *, labels, folder=None, invalid=()):
    def batches(examples, *, clips=1, crops=1, taught=True):
        views, total = clips * crops, min(examples, VIDEOS) * clips * crops
        for start in range(0, total, rows):
            position = np.arange(start, start + rows)
            video = position // views
            known = (position < total) & ~np.isin(video, invalid)
            label = np.where(known, labels[np.minimum(video, VIDEOS - 1)], -1)
            yield dict(
                position=jnp.asarray(position, jnp.uint32),
                label=jnp.asarray(label, jnp.int32),
                valid=jnp.asarray(known),
                logits=jnp.asarray(np.stack([logits_of(p) for p in position])),
            )

    return Given(
        batches=batches,
        eval_loss=lambda *_: {},
        encode=lambda *_: None,
        predict=lambda params, batch: batch["logits"],
        classes=tuple("abcdef"),
        workdir=folder,
    )


def expected(labels, invalid=()):
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    top1, top5 = [], []
    for video in range(VIDEOS):
        if video in invalid:
            continue
        rows = [softmax(logits_of(VIEWS * video + i).astype(np.float64)) for i in range(VIEWS)]
        order = np.argsort(-np.mean(rows, 0), kind="stable")
        top1.append(order[0] == labels[video])
        top5.append(labels[video] in order[:5])
    return np.mean(top1), np.mean(top5)


@pytest.mark.parametrize("rows", [1, 4, 6, 42, 64])
def test_views_are_averaged_in_batches_of_any_size(rows, tmp_path):
    labels = np.array([0, 1, 2, 3, 4, 5, 0])
    given = given_in_batches(rows, labels=labels, folder=tmp_path, invalid=(2,))
    made = EVALUATORS.get("classification")(given, examples=100, clips=2, crops=3)
    found = dict(made.run({}, 5))
    top1, top5 = expected(labels, invalid=(2,))
    assert (found["top1"], found["top5"], found["videos"]) == (top1, top5, VIDEOS - 1)
    table = json.loads((tmp_path / "classification_2x3/step_00000005.json").read_text())
    assert sum(row["videos"] for row in table.values()) == 6 and "c" not in table
    assert sum(row["top1"] for row in table.values()) == round(top1 * 6)
    assert table["a"]["videos"] == sum(table["a"]["predicted"].values()) == 2


def test_mean_class_weighs_classes_and_not_videos():
    labels = np.array([1, 1, 1, 1, 1, 1, 2])
    made = classification.make(given_in_batches(7, labels=labels), examples=7)
    found = dict(made.run({}, 0))
    first = np.array([np.argmax(logits_of(v)) for v in range(VIDEOS)])
    want = (np.mean(first[:6] == 1) + float(first[6] == 2)) / 2
    assert found["mean_class"] == pytest.approx(want)


def test_ranks_count_ties_and_what_is_no_number():
    assert classification.rank(np.array([0.3, 0.3, 0.4]), 0) == 1
    assert classification.rank(np.array([0.3, 0.3, 0.4]), 1) == 2
    assert classification.rank(np.array([0.3, np.nan, 0.4]), 2) == 3
    assert classification.rank(np.array([0.3, 0.3, 0.4]), 7) == 3


def test_what_it_needs_is_said():
    given = given_in_batches(7, labels=np.full(VIDEOS, -1))
    with pytest.raises(UserError, match="held-out videos with labels; got none"):
        list(classification.make(given, examples=7).run({}, 0))
    without = Given(given.batches, given.eval_loss, given.encode)
    with pytest.raises(UserError, match="needs a model with classes"):
        classification.make(without, examples=7)


def test_positions_give_every_place_with_every_crop():
    order = Repeated(InTurn([2, 1]), 6)
    assert order.epoch == 18 and [order[p].record for p in (0, 5, 6, 12)] == [0, 0, 1, 0]
    assert order[18] is None
    spec = ClipSpec(4, 16, crop="three_crop", flip=0, views=2, repeats=6)
    seen = [(spec.of(p).view, spec.of(p).crop_index) for p in range(6, 12)]
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    centre = ClipSpec(4, 16, crop="center", flip=0, views=2, repeats=2)
    assert [centre.of(p).view for p in range(4)] == [0, 1, 0, 1]
    random = ClipSpec(4, 16, repeats=3)
    assert random.of(5) is random  # what is drawn differs by position
    with pytest.raises(ValueError, match="repeats must be 1 or all 6 views of a video"):
        ClipSpec(4, 16, crop="three_crop", flip=0, views=2, repeats=4)
    train = Repeated(Order([5], [1.0], seed=0, stage="s"), 2)
    assert [train[p] for p in (0, 2, 4)] == [train[p] for p in (1, 3, 5)]
