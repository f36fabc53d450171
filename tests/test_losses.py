"""Losses as sums and weights, and pixel targets against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import losses


def test_mean_is_divided_once_whatever_the_split():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=10).astype(np.float32), rng.integers(0, 2, 10).astype(bool)
    whole = losses.mean(jnp.asarray(x), jnp.asarray(w))
    parts = jax.tree.map(
        jnp.add,
        losses.mean(jnp.asarray(x[:3]), jnp.asarray(w[:3])),
        losses.mean(jnp.asarray(x[3:]), jnp.asarray(w[3:])),
    )
    np.testing.assert_allclose(whole.value, x[w].mean(), rtol=1e-6)
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-6)
    assert float(whole.weight) == w.sum()


def test_a_term_without_weight_counts_for_nothing():
    found = losses.mean(jnp.array([1.0, jnp.nan, jnp.inf]), jnp.array([True, False, False]))
    assert float(found.value) == 1.0
    assert float(losses.mean(jnp.ones(2), jnp.zeros(2)).value) == 0.0


def test_cubes_are_standardised_per_channel():
    rng = np.random.default_rng(0)
    cubes = rng.uniform(size=(2, 3, 4 * 3)).astype(np.float32)
    found, middle, spread = losses.normalise_cubes(jnp.asarray(cubes))
    for b in range(2):
        for n in range(3):
            for c in range(3):
                x = cubes[b, n, c::3]
                want = (x - x.mean()) / (np.sqrt(np.var(x, ddof=1)) + 1e-6)
                np.testing.assert_allclose(found[b, n, c::3], want, atol=1e-5)
    back = found.reshape(2, 3, 4, 3) * spread + middle
    np.testing.assert_allclose(back.reshape(cubes.shape), cubes, atol=1e-6)
    variance = np.asarray(found).reshape(2, 3, 4, 3).var(axis=2, ddof=1)
    np.testing.assert_allclose(variance, 1.0, atol=1e-3)


def test_a_flat_cube_gives_zeros():
    found, _, _ = losses.normalise_cubes(jnp.full((1, 1, 12), 0.3))
    np.testing.assert_allclose(found, 0, atol=0.1)  # rounding of the mean over eps, and finite


def test_predicting_the_mean_costs_n_minus_one_over_n():
    n = 2 * 8 * 8
    cubes = np.random.default_rng(0).uniform(size=(4, 5, n * 3)).astype(np.float32)
    target, _, _ = losses.normalise_cubes(jnp.asarray(cubes))
    loss = losses.squared_error(jnp.zeros_like(target), target, jnp.ones(4, bool))
    np.testing.assert_allclose(loss.value, (n - 1) / n, rtol=1e-4)


def test_padding_rows_do_not_count():
    rng = np.random.default_rng(0)
    p, t = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    valid = np.array([True, False, True])
    found = losses.squared_error(jnp.asarray(p), jnp.asarray(t), jnp.asarray(valid))
    np.testing.assert_allclose(found.value, np.square(p - t)[valid].mean(), rtol=1e-6)
