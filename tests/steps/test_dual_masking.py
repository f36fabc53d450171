"""The masks of VideoMAE V2 and of latent prediction, and the loss with a mask on the decoder."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import losses, masking, sharding, state
from invideo_jax.errors import UserError
from invideo_jax.models import pixels, video_mae
from invideo_jax.steps import masked

TUBE = dict(name="tube", ratio=0.75)
CELL = dict(name="running_cell", ratio=0.5)
KEY = jax.random.key(7)


def keys(n, seed=0):
    return jax.vmap(lambda p: jax.random.fold_in(jax.random.key(seed), p))(jnp.arange(n))


def as_mask(hidden, tokens):
    mask = np.zeros((len(hidden), tokens), bool)
    for row, chosen in zip(mask, np.asarray(hidden)):
        row[chosen] = True
    return mask


@pytest.mark.parametrize("ratio, count", [(0.25, 1), (0.5, 2), (0.75, 3), (0.6, 2)])
def test_running_cells_against_loops(ratio, count):
    t, h, w = grid = (5, 4, 6)
    visible, hidden = map(np.asarray, masking.running_cell(keys(12), grid=grid, ratio=ratio))
    assert hidden.shape == (12, t * h * w * count // 4)
    found = as_mask(hidden, t * h * w).reshape(-1, t, h, w)
    queue = [True] * count + [False] * (4 - count)
    patterns = []
    for start in range(4):
        mask = np.zeros((t, h, w), bool)
        pointer = start
        for s in range(t):
            pointer += 1
            cell = [queue[(place + pointer) % 4] for place in range(4)]
            for y in range(h):
                for x in range(w):
                    mask[s, y, x] = cell[2 * (y % 2) + x % 2]
        patterns.append(mask)
    starts = [[i for i, p in enumerate(patterns) if (p == clip).all()] for clip in found]
    assert all(len(s) == 1 for s in starts) and len({s[0] for s in starts}) > 1
    for v, h in zip(visible, hidden):
        assert sorted([*v, *h]) == list(range(found[0].size))
        assert (np.diff(v) > 0).all() and (np.diff(h) > 0).all()


def test_a_tube_and_running_cells_leave_exactly_half_of_the_hidden():
    """As published: 176 places hidden at 8 times; each is decoded at 4 of them."""
    grid = (8, 14, 14)
    _, hidden = masking.tube(keys(5), grid=grid, ratio=0.9)
    other = masking.running_cell(keys(5, seed=1), grid=grid, ratio=0.5)
    kept = masking.thin(hidden, other)
    assert kept.shape == (5, 704)
    want = as_mask(hidden, 1568) & as_mask(other[0], 1568)
    np.testing.assert_array_equal(as_mask(kept, 1568), want)
    per_place = as_mask(kept, 1568).reshape(5, 8, 196).sum(1)
    assert set(per_place.ravel()) == {0, 4}


def test_thinning_cuts_and_fills_to_an_exact_count():
    hidden = jnp.array([[0, 2, 3, 5], [1, 4, 6, 7]])
    visible = jnp.array([[0, 2, 3, 6], [0, 2, 3, 4]])
    dropped = jnp.array([[1, 4, 5, 7], [1, 5, 6, 7]])
    # Three are wanted of which two may stay; one is wanted, and the lowest other follows.
    np.testing.assert_array_equal(masking.thin(hidden, (visible, dropped)), [[0, 2], [1, 4]])


def test_running_cells_refuse_what_they_do_not_fill():
    with pytest.raises(
        UserError, match=r"even number of patches along each side; got grid=\(2, 3, 4\)"
    ):
        masking.running_cell(keys(1), grid=(2, 3, 4), ratio=0.5)
    with pytest.raises(UserError, match="got ratio=0.2"):
        masking.running_cell(keys(1), grid=(2, 4, 4), ratio=0.2)


def test_multi_block_counts_and_context():
    grid, n = (2, 6, 6), 72
    options = dict(grid=grid, ratio=0.5, blocks=3, share=0.2)
    visible, hidden = masking.multi_block(keys(9), **options)
    capped, same = masking.multi_block(keys(9), **options, context=10)
    np.testing.assert_array_equal(hidden, same)
    assert visible.shape == (9, 36) and hidden.shape == (9, 36) and capped.shape == (9, 10)
    for few, all_visible in zip(np.asarray(capped), np.asarray(visible)):
        assert (np.diff(few) > 0).all() and set(few) < set(all_visible)
    # Not the first in order, which would be one time only.
    assert (np.asarray(capped) >= 36).any(axis=1).all()
    kept, rest = masking.multi_block(keys(9), **options, context=10, predict_rest=True)
    np.testing.assert_array_equal(kept, capped)
    for v, h in zip(np.asarray(kept), np.asarray(rest)):
        assert sorted([*v, *h]) == list(range(n)) and (np.diff(h) > 0).all()
    roomy, _ = masking.multi_block(keys(9), **options, context=99)
    np.testing.assert_array_equal(roomy, visible)
    order = np.array([4, 0])
    alone, _ = masking.multi_block(keys(9)[order], **options, context=10)
    np.testing.assert_array_equal(alone, np.asarray(capped)[order])


def test_multi_block_rectangles_have_one_shape():
    # Two rectangles of 4 of 36 places with few places to hide: what is hidden is part of the first.
    ids = masking.multi_block(
        keys(30), grid=(1, 6, 6), ratio=4 / 36 + 1e-6, blocks=2, share=4 / 36, aspect=(1, 1)
    )
    for clip in as_mask(ids[1], 36).reshape(-1, 6, 6):
        rows, columns = np.where(clip)
        assert (np.ptp(rows), np.ptp(columns)) == (1, 1)


def tiny(**options):
    return video_mae.build("Micro", **(dict(image_size=32, frames=8, depth=1) | options))


def batch_of(rows, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        video=jnp.asarray(rng.integers(0, 256, (rows, 8, 32, 32, 3), dtype=np.uint8)),
        position=jnp.arange(rows, dtype=jnp.uint32),
        label=jnp.full(rows, -1, jnp.int32),
        valid=jnp.ones(rows, bool),
    )


def params_of(model):
    return jax.jit(lambda: sharding.unbox(video_mae.init(model, jax.random.key(0))))()


def test_the_loss_is_over_the_decoded_cubes_only():
    model, batch = tiny(), batch_of(2)
    params, grid = params_of(model), model.encoder.grid
    run = masked.make_loss(
        model=model, stage_key=KEY, mask=TUBE, target=dict(decoder_mask=CELL, normalise=True)
    )
    loss = jax.jit(lambda p, b: run(p, b)[0].value)(params, batch)
    example = masked.example_keys(KEY, batch["position"])
    visible, hidden = masked.draw_mask(grid, example, TUBE)
    decoded = masked.decoded_ids(grid, example, hidden, CELL)
    assert decoded.shape[1] * 2 == hidden.shape[1]
    prediction, out = model.apply({"params": params}, batch["video"], visible, decoded)
    assert out["decoder_in"].shape[1] == visible.shape[1] + decoded.shape[1]
    cubes = pixels.patchify(batch["video"] / 255.0, tubelet=2, patch=8)
    target, _, _ = losses.normalise_cubes(masking.gather(cubes, decoded))
    np.testing.assert_allclose(loss, np.square(prediction - target).mean(), rtol=1e-5)
    # Cubes that are hidden and not decoded count for nothing.
    skipped = as_mask(hidden, 64) & ~as_mask(decoded, 64)
    whole = np.asarray(pixels.patchify(batch["video"], tubelet=2, patch=8)).copy()
    whole[skipped] = 255 - whole[skipped]
    other = pixels.unpatchify(whole, grid=grid, tubelet=2, patch=8)
    same = jax.jit(lambda p, b: run(p, b)[0].value)(params, batch | {"video": jnp.asarray(other)})
    np.testing.assert_allclose(same, loss, rtol=1e-6)
    plain = masked.make_loss(model=model, stage_key=KEY, mask=TUBE)(params, batch)[0].value
    for none in (None, dict(name="", ratio=0.5)):
        target = dict(decoder_mask=none)
        found = masked.make_loss(model=model, stage_key=KEY, mask=TUBE, target=target)
        np.testing.assert_allclose(found(params, batch)[0].value, plain, rtol=1e-6)
    assert abs(float(plain - loss)) > 1e-5


@pytest.mark.slow
def test_accumulation_changes_nothing_under_two_masks():
    model, tx = tiny(), optax.sgd(0.1)
    begin = state.create(params_of(model), tx, keep_ema=False)
    found = []
    for parts in (1, 4):
        step = masked.make_train_step(
            model=model, tx=tx, stage_key=KEY, mask=TUBE, target=dict(decoder_mask=CELL),
            accumulation=parts,
        )  # fmt: skip
        new, metrics = jax.jit(step)(begin, batch_of(4))
        found.append((new.params, metrics["loss"].value))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), *found)
