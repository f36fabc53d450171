"""Contrastive, matching and word losses against NumPy loops; negatives; masked words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import losses, negatives
from invideo_jax.text_masking import WordDraws, draw_words, mask_words


def features(size=6, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(size, width)).astype(np.float32) for _ in range(2))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def contrastive_loop(a, b, temperature, ids):
    """Both ways, one row after the other."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    total = 0.0
    for one, other in ((a, b), (b, a)):
        for i in range(len(ids)):
            share = softmax(np.array([one[i] @ other[j] / temperature for j in range(len(ids))]))
            same = [j for j in range(len(ids)) if ids[j] == ids[i]]
            total += -sum(np.log(share[j]) / len(same) for j in same) / len(ids) / 2
    return total


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 5], [7, 3, 7, 7, 1, 3], [2] * 6])
def test_contrastive_equals_a_loop_with_repeated_ids(ids):
    a, b = features()
    scores = losses.similarity(a, b, 0.2)
    found = losses.contrastive(scores, jnp.asarray(ids))
    np.testing.assert_allclose(found.value, contrastive_loop(a, b, 0.2, ids), rtol=1e-5)
    assert float(found.weight) == 6
    if len(set(ids)) == 6:
        np.testing.assert_allclose(losses.contrastive(scores).value, found.value, rtol=1e-6)


def test_contrastive_padding_neither_counts_nor_is_a_negative():
    a, b = features()
    ids, valid = np.array([4, 1, 4, 2, 1, 9]), np.array([1, 1, 1, 1, 0, 0], bool)
    run = lambda a, b: losses.contrastive(losses.similarity(a, b, 0.3), ids, valid)
    right = losses.contrastive(losses.similarity(a[:4], b[:4], 0.3), ids[:4])
    found = run(a, b)
    np.testing.assert_allclose(found.value, right.value, rtol=1e-6)
    assert float(found.weight) == 4
    gradient = jax.grad(lambda a: run(a, b).value)(jnp.asarray(a))
    assert np.all(np.asarray(gradient)[~valid] == 0) and np.abs(gradient[:4]).min() > 0
    nothing = losses.contrastive(losses.similarity(a, b, 0.3), ids, np.zeros(6, bool))
    assert float(nothing.value) == 0 and float(nothing.weight) == 0


def test_several_features_of_an_example_give_mean_or_maximum_of_pairs():
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=s).astype(np.float32) for s in ((4, 3, 5), (6, 5)))
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    pairs = np.einsum("asp,bp->asb", unit(a), unit(b)) / 0.5
    for reduce, want in (("mean", pairs.mean(1)), ("max", pairs.max(1))):
        np.testing.assert_allclose(losses.similarity(a, b, 0.5, reduce=reduce), want, atol=1e-5)
        np.testing.assert_allclose(losses.similarity(b, a, 0.5, reduce=reduce), want.T, atol=1e-5)


def test_a_scaled_gradient_and_a_clamped_value():
    x = jnp.array([0.3, -2.0])
    f = lambda x, k: jnp.square(losses.scaled_gradient(x, k)).sum()
    assert float(f(x, 0.25)) == float(f(x, 1.0))
    np.testing.assert_allclose(jax.grad(f)(x, 0.25), 0.25 * jax.grad(f)(x, 1.0))
    value, gradient = jax.value_and_grad(lambda t: losses.clamped(t, 0.1, 0.5) * 3)(2.0)
    assert float(value) == 1.5 and float(gradient) == 3.0


def test_matching_is_the_cross_entropy_of_one_then_zero():
    logits = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    weights = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0])
    labels = [1] * 3 + [0] * 6
    terms = [-np.log(softmax(row)[label]) for row, label in zip(logits, labels)]
    found = losses.matching(logits, weights)
    np.testing.assert_allclose(found.total, (np.array(terms) * weights).sum(), rtol=1e-5)
    assert float(found.weight) == 6


def test_words_are_averaged_over_all_of_the_batch_that_are_to_be_predicted():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 7)).astype(np.float32)
    labels = rng.integers(0, 7, (3, 4))
    chosen = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]], bool)
    terms = [-np.log(softmax(logits[i, j])[labels[i, j]]) for i, j in zip(*np.nonzero(chosen))]
    found = losses.cross_entropy(logits, np.where(chosen, labels, -100), chosen)
    np.testing.assert_allclose(found.value, np.mean(terms), rtol=1e-5)
    assert float(found.weight) == 3
    parts = [losses.cross_entropy(logits[i], labels[i], chosen[i]) for i in range(3)]
    np.testing.assert_allclose(sum(p.total for p in parts), found.total, rtol=1e-6)


# ----------------------------------------------------------------------------------- negatives


def table(size=6, seed=0):
    return np.random.default_rng(seed).normal(size=(size, size)).astype(np.float32) * 3


def test_the_constant_inside_the_softmax_does_nothing_and_outside_it_is_a_floor():
    scores, ids = table(), jnp.array([0, 1, 0, 2, 3, 4])
    want = np.stack([softmax(row) for row in scores])
    inside = np.stack([softmax(row + 1e-4) for row in scores])
    same = np.equal.outer(ids, ids)
    np.testing.assert_allclose(negatives.weights(scores, ids), np.where(same, 0, inside), atol=1e-6)
    floored = negatives.weights(scores, ids, floor=1e-4)
    np.testing.assert_allclose(floored, np.where(same, 0, want + 1e-4), atol=1e-6)
    assert float(np.asarray(floored)[~same].min()) >= 1e-4


def test_the_highest_allowed_column_is_taken():
    ids, noise = jnp.array([0, 1, 0, 2, 3, 4]), np.random.default_rng(0).normal(size=(6, 6))
    same = np.equal.outer(ids, ids)
    picked, found = negatives.highest(jnp.asarray(noise), negatives.candidates(ids))
    np.testing.assert_array_equal(picked, np.where(same, -9, noise).argmax(1))
    assert np.all(found)
    _, found = negatives.highest(jnp.asarray(noise), negatives.candidates(jnp.full(6, 4)))
    assert not np.any(found)


# -------------------------------------------------------------------------------- masked words


def words_loop(ids, draws, pad, first, mask):
    shown, chosen = ids.copy(), np.zeros(ids.shape, bool)
    for place in np.ndindex(*ids.shape):
        if ids[place] in (pad, first) or not draws.chosen[place]:
            continue
        chosen[place] = True
        if draws.hidden[place]:
            shown[place] = mask
        elif draws.swapped[place]:
            shown[place] = draws.words[place]
    return shown, chosen


def test_words_are_masked_as_a_loop_does_it_with_the_same_draws():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 9, (4, 20)).astype(np.int32)
    flags = [rng.random((4, 20)) < p for p in (0.6, 0.6, 0.5)]
    draws = WordDraws(*flags, rng.integers(0, 9, (4, 20)).astype(np.int32))
    found = mask_words(
        jnp.asarray(ids), WordDraws(*map(jnp.asarray, draws)), pad=0, first=1, mask=2
    )
    for ours, want in zip(found, words_loop(ids, draws, 0, 1, 2)):
        np.testing.assert_array_equal(ours, want)
    assert found[0].dtype == jnp.int32


def test_masking_has_the_published_shares_and_spares_padding_and_the_first_word():
    ids = np.full((400, 32), 2000, np.int32)
    ids[:, 0], ids[:, 20:] = 101, 0
    ids[:, 19] = 102
    keys = jax.random.split(jax.random.key(0), 400)
    draws = jax.jit(lambda k: draw_words(k, length=32, vocabulary=30522))(keys)
    shown, chosen = (np.asarray(x) for x in mask_words(jnp.asarray(ids), draws))
    assert not chosen[:, 0].any() and not chosen[:, 20:].any()
    np.testing.assert_array_equal(shown[~chosen], ids[~chosen])
    assert abs(chosen[:, 1:20].mean() - 0.5) < 0.02 and abs(chosen[:, 19].mean() - 0.5) < 0.08
    mask, same = (shown == 103)[chosen].mean(), (shown == ids)[chosen].mean()
    assert abs(mask - 0.8) < 0.02 and abs(same - 0.1) < 0.02 and abs(1 - mask - same - 0.1) < 0.02
    random = shown[chosen & (shown != 103) & (shown != ids)]
    assert random.min() < 2000 and random.max() > 28000
    alone = jax.jit(lambda k: draw_words(k, length=32, vocabulary=30522))(keys[7:8])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[0], y[7]), alone, draws)
