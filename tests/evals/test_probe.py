"""Linear probe and nearest neighbours on features that are known, against plain NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS, Given, knn, probe
from invideo_jax.evals.probe import Labelled


def clusters(rows, seed, classes=4, noise=0.3):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(classes, 8))
    label = rng.integers(0, classes, rows)
    return Labelled((centres[label] + noise * rng.normal(size=(rows, 8))).astype(np.float32), label)


def given_of(train, held_out, rows=16):
    def batches(examples, *, of="held_out", taught=True):
        part = dict(train=train, held_out=held_out)[of]
        for start in range(0, min(examples, len(part.labels)), rows):
            label = part.labels[start : start + rows]
            features = part.features[start : start + rows]
            spare = rows - len(label)  # filled up, as the loader does
            yield dict(
                features=jnp.asarray(np.pad(features, ((0, spare), (0, 0)))),
                label=jnp.asarray(np.pad(label, (0, spare)), jnp.int32),
                valid=jnp.asarray(np.arange(rows) < len(label)),
            )

    return Given(batches, lambda *_: {}, lambda params, batch: batch["features"] * params)


def test_probe_finds_what_is_linear_and_is_at_chance_elsewhere():
    train, held_out = clusters(300, 1), clusters(100, 2)
    options = dict(examples=100, train_examples=300)
    make = lambda a, b: EVALUATORS.get("probe")(given_of(a, b), **options)
    found = dict(make(train, held_out).run(1.0, 0))
    assert found["top1"] > 0.95 and found["top5"] == 1.0 and found["train_top1"] > 0.95
    commonest = np.bincount(train.labels).argmax()
    assert found["majority"] == np.mean(held_out.labels == commonest)
    assert dict(make(train, held_out).run(1.0, 7)) == found  # deterministic
    scaled = dict(make(train, held_out).run(100.0, 0))
    assert scaled["top1"] == pytest.approx(found["top1"], abs=0.02)  # standardised
    noise = lambda part: part._replace(
        features=np.random.default_rng(3).normal(size=part.features.shape)
    )
    assert dict(make(noise(train), noise(held_out)).run(1.0, 0))["top1"] < 0.5


def test_fit_reaches_the_minimum():
    train = clusters(120, 1, noise=2.0)
    score = probe.fit(train, 4, l2=0.1, iterations=100)
    x = (train.features - train.features.mean(0)) / train.features.std(0)
    p = np.exp(score(train.features))
    p /= p.sum(1, keepdims=True)
    residual = (p - np.eye(4)[train.labels]) / len(x)
    np.testing.assert_allclose(residual.sum(0), 0, atol=1e-4)  # the gradient of the bias
    # x^T residual + l2 * kernel = 0; the kernel is what linear scores of unit vectors differ by
    unit = score(np.eye(8) * train.features.std(0) + train.features.mean(0))
    kernel = unit - score(train.features.mean(0)[None])
    np.testing.assert_allclose(x.T @ residual + 0.1 * kernel, 0, atol=1e-3)


def test_neighbours_agree_with_a_plain_loop():
    train, held_out = clusters(40, 1, noise=1.0), clusters(9, 2, noise=1.0)
    votes = knn.vote(train, held_out.features, 4, k=5, temperature=0.1)
    for row, want in zip(held_out.features, votes):
        near = train.features @ row / np.linalg.norm(row) / np.linalg.norm(train.features, axis=1)
        mine = np.zeros(4)
        for i in np.argsort(-near)[:5]:
            mine[train.labels[i]] += np.exp(near[i] / 0.1)
        np.testing.assert_allclose(want, mine, rtol=1e-3)
    found = dict(knn.make(given_of(train, held_out), examples=9, train_examples=40).run(1.0, 0))
    assert set(found) == {"top1", "top5"} and found["top5"] == 1.0


def test_labels_are_needed():
    part = clusters(10, 1)._replace(labels=np.full(10, -1))
    with pytest.raises(UserError, match="needs labels; got none among the train videos"):
        list(probe.make(given_of(part, part), examples=5, train_examples=5).run(1.0, 0))
