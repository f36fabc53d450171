"""Masks against plain NumPy loops: exact counts, structure, dependence on the key alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import masking
from invideo_jax.errors import UserError

GRID = (4, 6, 5)
N = 4 * 6 * 5


def keys(n, seed=0):
    return jax.vmap(lambda p: jax.random.fold_in(jax.random.key(seed), p))(jnp.arange(n))


def as_mask(ids):
    visible, hidden = map(np.asarray, ids)
    mask = np.zeros((len(hidden), visible.shape[1] + hidden.shape[1]), bool)
    for row, chosen in zip(mask, hidden):
        row[chosen] = True
    return mask


def weights(n):
    return jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (n, N)), jnp.float32)


MAKERS = {
    "tube": (lambda k: masking.tube(k, grid=GRID, ratio=0.7), int(0.7 * 30) * 4),
    "random": (lambda k: masking.random(k, grid=GRID, ratio=0.7), int(0.7 * N)),
    "block": (lambda k: masking.block(k, grid=GRID, ratio=0.7), int(0.7 * 30) * 4),
    "attention": (
        lambda k: masking.attention(k, grid=GRID, ratio=0.7, weights=weights(len(k))),
        int(0.7 * 30) * 4,
    ),
}


@pytest.mark.parametrize("name", MAKERS)
def test_ids_are_exact_ascending_and_complete(name):
    make, hidden_tokens = MAKERS[name]
    visible, hidden = make(keys(7))
    assert hidden.shape == (7, hidden_tokens) and visible.shape == (7, N - hidden_tokens)
    assert visible.dtype == hidden.dtype == jnp.int32
    for v, h in zip(np.asarray(visible), np.asarray(hidden)):
        assert sorted([*v, *h]) == list(range(N))
        assert (np.diff(v) > 0).all() and (np.diff(h) > 0).all()


@pytest.mark.parametrize("name", ["tube", "random", "block"])
def test_an_example_s_mask_depends_on_its_own_key_only(name):
    make, _ = MAKERS[name]
    whole = np.asarray(make(keys(6))[1])
    order = np.array([4, 1, 5])
    np.testing.assert_array_equal(np.asarray(make(keys(6)[order])[1]), whole[order])
    assert (as_mask(make(keys(6))) != as_mask(make(keys(6, seed=1)))).any()
    assert len({row.tobytes() for row in whole}) == 6


def test_tube_repeats_one_pattern_over_time():
    mask = as_mask(MAKERS["tube"][0](keys(5))).reshape(5, 4, 30)
    for clip in mask:
        for frame in clip:
            np.testing.assert_array_equal(frame, clip[0])


def test_published_tube_of_videomae_has_160_visible_tokens():
    visible, hidden = masking.tube(keys(1), grid=(8, 14, 14), ratio=0.9)
    assert visible.shape[1] == 20 * 8 and hidden.shape[1] == 1408


def test_every_place_is_hidden_equally_often():
    for name in ("tube", "random"):
        share = as_mask(MAKERS[name][0](keys(600))).mean(0)
        np.testing.assert_allclose(share, 0.7, atol=0.09)  # 4.8 standard deviations


def test_block_masks_hide_rectangles_first():
    # One rectangle of 9 of 30 places, and exactly that many to hide: it must be a full rectangle.
    ids = masking.block(keys(20), grid=(2, 6, 5), ratio=0.3, blocks=1, share=0.3, aspect=(1, 1))
    for clip in as_mask(ids).reshape(20, 2, 6, 5):
        rows, columns = np.where(clip[0])
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (3, 3)
        np.testing.assert_array_equal(clip[0], clip[1])


def test_attention_keeps_tokens_in_proportion_to_weight():
    # Keeping 1 of 4 places: the frequency of each is its share of the weight.
    share = np.array([0.1, 0.2, 0.3, 0.4])
    ids = masking.attention(
        keys(4000), grid=(1, 2, 2), ratio=0.75, weights=jnp.tile(jnp.asarray(share), (4000, 1))
    )
    np.testing.assert_allclose((~as_mask(ids)).mean(0), share, atol=0.03)


def test_attention_per_frame_or_over_the_clip():
    w = weights(3).at[:, :30].multiply(1e6)
    frames = as_mask(masking.attention(keys(3), grid=GRID, ratio=0.8, weights=w))
    assert ((~frames).reshape(3, 4, 30).sum(-1) == 30 - 24).all()
    clip = as_mask(masking.attention(keys(3), grid=GRID, ratio=0.8, weights=w, per_frame=False))
    assert ((~clip).sum(-1) == N - 96).all() and ((~clip)[:, :30].sum(-1) >= 23).all()


def test_attention_keeps_no_token_of_weight_zero_while_others_remain():
    w = jnp.tile(jnp.arange(4) % 2.0, (50, 1))
    mask = as_mask(masking.attention(keys(50), grid=(1, 2, 2), ratio=0.5, weights=w))
    np.testing.assert_array_equal(mask, np.tile([True, False, True, False], (50, 1)))


def test_gather_scatter_and_mask_against_loops():
    rng = np.random.default_rng(0)
    tokens, new = rng.normal(size=(3, 7, 2)), rng.normal(size=(3, 4, 2))
    ids = np.stack([np.sort(rng.permutation(7)[:4]) for _ in range(3)]).astype(np.int32)
    put, mask = tokens.copy(), np.zeros((3, 7), bool)
    for b in range(3):
        for j, i in enumerate(ids[b]):
            put[b, i], mask[b, i] = new[b, j], True
    taken = np.stack([tokens[b, ids[b]] for b in range(3)])
    np.testing.assert_allclose(masking.gather(jnp.asarray(tokens), ids), taken, rtol=1e-6)
    np.testing.assert_allclose(
        masking.scatter(jnp.asarray(tokens), jnp.asarray(new), ids), put, rtol=1e-6
    )
    np.testing.assert_array_equal(masking.mask_of(jnp.asarray(ids), 7), mask)
    np.testing.assert_array_equal(masking.ids_of(jnp.asarray(mask), 4)[1], ids)


@pytest.mark.parametrize("ratio", [0.0, 0.001, 1.0, -1])
def test_a_ratio_that_hides_nothing_or_all_is_refused(ratio):
    with pytest.raises(UserError, match=rf"got ratio={ratio}, which hides"):
        masking.tube(keys(1), grid=GRID, ratio=ratio)


def test_unknown_mask_names_the_nearest():
    with pytest.raises(UserError, match="got mask='tubes'. Did you mean \"tube\""):
        masking.get("tubes")
