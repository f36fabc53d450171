"""The masked train step as a whole, with a tiny model."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import losses, masking, sharding, state
from invideo_jax.models import pixels, video_mae
from invideo_jax.steps import masked

MASK = dict(name="tube", ratio=0.75)
KEY = jax.random.key(7)


def tiny(**options):
    return video_mae.build("Micro", **(dict(image_size=16, frames=4, depth=1) | options))


def batch_of(rows, seed=0, start=0):
    rng = np.random.default_rng(seed)
    # Smooth moving pictures, so that there is something to learn.
    t, y, x = np.meshgrid(np.arange(4), np.arange(16), np.arange(16), indexing="ij")
    phase = 0.2 * rng.uniform(-1, 1, (rows, 1, 1, 1, 3))
    wave = np.sin(0.3 * (x + y + 2 * t)[None, ..., None] + phase)
    video = np.rint(127 + 120 * wave).astype(np.uint8)
    return dict(
        video=jnp.asarray(video),
        position=jnp.arange(start, start + rows, dtype=jnp.uint32),
        label=jnp.full(rows, -1, jnp.int32),
        valid=jnp.ones(rows, bool),
    )


def start(model, tx, **options):
    params = jax.jit(lambda: sharding.unbox(video_mae.init(model, jax.random.key(0))))()
    return state.create(params, tx, keep_ema=False, **options)


def test_step_learns_compiles_once_and_takes_its_state(caplog):
    model, tx = tiny(), optax.adamw(1e-2)
    step = jax.jit(
        masked.make_train_step(
            model=model, tx=tx, stage_key=KEY, mask=MASK, schedule=lambda n: 3e-3 + 0 * n
        ),
        donate_argnums=0,
    )
    current, first = start(model, tx), None
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        for n in range(25):
            given = current
            current, metrics = step(current, batch_of(8, seed=n, start=8 * n))
            first = first or float(metrics["loss"].value)
            if n == 0:
                caplog.clear()
    compiled = [
        r.message for r in caplog.records if "compil" in r.message and "update" in r.message
    ]
    assert compiled == [] and step._cache_size() == 1
    assert all(x.is_deleted() for x in jax.tree.leaves(given))  # donated, as said
    assert float(metrics["loss"].value) < 0.5 < 0.9 < first
    assert int(current.step) == 25 and int(current.counters.skipped) == 0


def test_loss_against_the_formula_written_out():
    model = tiny()
    params, batch = start(model, optax.sgd(1.0)).params, batch_of(3)
    batch["valid"] = jnp.array([True, False, True])
    loss, _ = masked.make_loss(model=model, stage_key=KEY, mask=MASK)(params, batch)
    want = []
    for b in (0, 2):
        key = jax.random.fold_in(jax.random.fold_in(KEY, batch["position"][b]), 0)
        visible, hidden = masking.tube(key[None], grid=model.encoder.grid, ratio=0.75)
        video = batch["video"][b : b + 1]
        found, _ = model.apply({"params": params}, video, visible, hidden)
        cubes = np.asarray(pixels.patchify(video, tubelet=2, patch=8)[0], np.float64) / 255
        for prediction, i in zip(np.asarray(found[0]), np.asarray(hidden[0])):
            cube = cubes[i].reshape(-1, 3)
            target = (cube - cube.mean(0)) / (cube.std(0, ddof=1) + 1e-6)
            want.append(np.square(prediction.reshape(-1, 3) - target).mean())
    np.testing.assert_allclose(loss.value, np.mean(want), rtol=1e-4)


def test_rows_do_not_depend_on_their_neighbours():
    model = tiny(drop_path=0.5, depth=2)
    params, batch = start(model, optax.sgd(1.0)).params, batch_of(4)
    loss = jax.jit(masked.make_loss(model=model, stage_key=KEY, mask=MASK))
    each = [loss(params, {k: v[i : i + 1] for k, v in batch.items()})[0].value for i in range(4)]
    np.testing.assert_allclose(loss(params, batch)[0].value, np.mean(each), rtol=1e-5)
    moved = loss(params, batch | {"position": batch["position"] + 100})[0].value
    assert abs(float(moved) - float(np.mean(each))) > 1e-5


def test_accumulation_agrees_in_float64():
    with jax.enable_x64(True):
        model = tiny(dtype=jnp.float64)
        tx = optax.sgd(1.0)
        begin = start(model, tx)
        begin = begin.replace(params=jax.tree.map(lambda x: x.astype(jnp.float64), begin.params))
        found = []
        for parts in (1, 2, 4):
            step = masked.make_train_step(
                model=model, tx=tx, stage_key=KEY, mask=MASK, accumulation=parts
            )
            new, metrics = jax.jit(step)(begin, batch_of(4))
            found.append((new.params, metrics["loss"].value))
        for other in found[1:]:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), other, found[0])


@pytest.mark.parametrize("normalise", [True, False])
def test_reconstruction_shows_visible_cubes_and_uses_the_loss_s_masks(normalise):
    model = tiny()
    params, batch = start(model, optax.sgd(1.0)).params, batch_of(3)
    options = dict(model=model, stage_key=KEY, mask=MASK)
    original, hidden_shown, filled = jax.jit(
        masked.make_reconstruct(**options, normalise=normalise)
    )(params, batch)
    np.testing.assert_allclose(original, batch["video"] / 255.0, atol=1e-6)
    _, hidden = masked.draw_mask(
        model.encoder.grid, masked.example_keys(KEY, batch["position"]), MASK
    )
    mask = np.asarray(masking.mask_of(hidden, model.encoder.tokens))
    cut = lambda x: np.asarray(pixels.patchify(x, tubelet=2, patch=8))
    assert (cut(hidden_shown)[mask] == 0.5).all()
    for shown in (hidden_shown, filled):
        np.testing.assert_array_equal(cut(shown)[~mask], cut(original)[~mask])
    assert (np.abs(cut(filled)[mask] - cut(original)[mask]).max(-1) > 1e-3).all()
    if normalise:  # means of the true cubes are put back; head and its bias start near zero
        gap = cut(filled)[mask].mean(-1) - cut(original)[mask].mean(-1)
        assert np.abs(gap).max() < 0.15
    else:
        run = masked.make_loss(**options, target=dict(normalise=False), train=False)
        loss, _ = run(params, batch)
        assert float(loss.value) > 0


def test_a_perfect_prediction_reconstructs_the_video():
    model, batch = tiny(), batch_of(2)
    _, hidden = masked.draw_mask(
        model.encoder.grid, masked.example_keys(KEY, batch["position"]), MASK
    )
    cubes = masked.target_cubes(model.encoder, batch["video"], hidden)
    target, middle, spread = losses.normalise_cubes(cubes)
    back = (target.reshape(*target.shape[:2], -1, 3) * spread + middle).reshape(cubes.shape)
    np.testing.assert_allclose(back, cubes, atol=1e-6)


def test_unknown_objective_and_option_are_errors():
    options = dict(model=tiny(), stage_key=KEY, mask=MASK)
    with pytest.raises(ValueError, match='Unknown objective "pixel". Did you mean "pixels"'):
        masked.make_loss(objective="pixel", **options)
    with pytest.raises(TypeError, match="normalize"):
        masked.make_loss(target=dict(normalize=True), **options)
