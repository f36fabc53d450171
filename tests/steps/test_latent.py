"""Latent prediction: targets, moving average, losses, gradients, collapse, accumulation, a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import masking, sharding, state
from invideo_jax.errors import UserError
from invideo_jax.models import pixels, predictor, video_mae
from invideo_jax.steps import latent, masked

KEY = jax.random.key(7)
GRID = (2, 4, 4)
VIEWS = {
    "long": dict(name="multi_block", ratio=0.75, blocks=2, share=0.5),
    "short": dict(name="multi_block", ratio=0.5, blocks=4, share=0.15, context=10),
}


def tiny(**options):
    sizes = dict(width=32, depth=1, heads=4, mlp_width=64, patch=8, frames=4, image_size=32)
    encoder = video_mae.VideoMAEEncoder(**(sizes | options))
    predicts = predictor.Predictor(
        32, encoder.grid, width=16, depth=1, heads=4, mlp_width=32, dtype=encoder.dtype
    )
    return predictor.LatentModel(encoder, predicts)


def batch_of(rows, seed=0, dtype=np.uint8):
    rng = np.random.default_rng(seed)
    t, y, x = np.meshgrid(np.arange(4), np.arange(32), np.arange(32), indexing="ij")
    phase, speed = rng.uniform(0, 6, (rows, 1, 1, 1, 3)), rng.uniform(-2, 2, (rows, 1, 1, 1, 1))
    wave = np.sin(0.2 * (x + 2 * y)[None, ..., None] + speed * t[None, ..., None] + phase)
    return dict(
        video=jnp.asarray(np.rint(127 + 120 * wave).astype(dtype)),
        position=jnp.arange(rows, dtype=jnp.uint32) + 100 * seed,
        label=jnp.full(rows, -1, jnp.int32),
        valid=jnp.ones(rows, bool),
    )


@functools.cache
def fresh(model):
    init = lambda: sharding.unbox(predictor.init(model, jax.random.key(0)))
    return jax.tree.map(np.asarray, jax.jit(init)())


def start(model, tx):
    return state.create(jax.tree.map(jnp.array, fresh(model)), tx, keep_ema=True)


def test_the_loss_against_loops():
    model, batch = tiny(), batch_of(3)
    batch["valid"] = jnp.array([True, False, True])
    params = fresh(model)
    tokens, _ = model.encoder.apply({"params": params["encoder"]}, batch["video"])
    raw = np.asarray(tokens, np.float64)
    standard = raw - raw.mean(-1, keepdims=True)
    standard /= np.sqrt(np.square(standard).mean(-1, keepdims=True) + 1e-5)
    masks = latent.draw_views(GRID, masked.example_keys(KEY, batch["position"]), VIEWS)
    assert list(masks) == ["long", "short"]
    for name, target in (("l1", standard), ("cosine", raw)):
        means = []
        assert latent.normalises(name) == (target is standard)
        assert latent.normalises(name, "yes") and not latent.normalises(name, "no")
        for number, (visible, hidden) in enumerate(masks.values()):
            found = model.apply({"params": params}, batch["video"], visible, hidden, number)
            errors = []
            for b in (0, 2):
                for prediction, i in zip(np.asarray(found[b], np.float64), np.asarray(hidden[b])):
                    goal = target[b, i]
                    length = np.linalg.norm(prediction) * np.linalg.norm(goal)
                    cosine = 2 - 2 * prediction @ goal / length
                    errors.append(np.abs(prediction - goal).mean() if name == "l1" else cosine)
            means.append(np.mean(errors))
        run = latent.make_loss(model=model, stage_key=KEY, views=VIEWS, loss=name)
        for given in (batch, batch | {"latent": jnp.asarray(target, jnp.float32)}):
            loss, parts = run(params, given)
            np.testing.assert_allclose(loss.value, np.mean(means), rtol=1e-5)
            np.testing.assert_allclose(
                [parts["loss/long"].value, parts["loss/short"].value], means, rtol=1e-5
            )


def test_hidden_pixels_reach_the_student_by_the_target_only():
    model, batch = tiny(), batch_of(2)
    params = fresh(model)
    target = latent.target_features(model.encoder, params["encoder"], batch["video"])
    video = pixels.normalise(batch["video"], "imagenet")
    views = {"long": VIEWS["long"]}
    run = latent.make_loss(model=model, stage_key=KEY, views=views)

    def loss(video, target):
        more = {} if target is None else {"latent": target}
        return run(params, batch | {"video": video} | more)[0].value

    grad = jax.jit(jax.grad(loss))
    masks = latent.draw_views(GRID, masked.example_keys(KEY, batch["position"]), views)
    visible, hidden = masks["long"]
    for goal in (target, None):  # made inside the loss, the target carries no gradient either
        cubes = pixels.patchify(grad(video, goal), tubelet=2, patch=8)
        assert (np.asarray(masking.gather(cubes, hidden)) == 0).all()
        assert (np.abs(np.asarray(masking.gather(cubes, visible))).max(-1) > 0).all()


def test_the_predictor_tells_places_and_masks_apart():
    model, batch = tiny(), batch_of(1)
    params = fresh(model)
    visible, hidden = jnp.array([[0, 5]]), jnp.array([[7, 9, 20]])
    run = lambda hidden, mask: model.apply(
        {"params": params}, batch["video"], visible, hidden, mask
    )
    found = run(hidden, 0)
    assert np.abs(np.diff(found[0], axis=0)).max(-1).min() > 1e-3
    np.testing.assert_allclose(run(hidden[:, ::-1], 0), found[:, ::-1], atol=1e-6)
    assert np.abs(np.asarray(run(hidden, 1) - found)).max() > 1e-3


def test_the_target_moves_as_the_schedule_says():
    model, tx = tiny(), optax.sgd(0.1)
    decay = latent.momentum(0.5, 0.9, 4)
    step = jax.jit(
        latent.make_train_step(model=model, tx=tx, stage_key=KEY, views=VIEWS, ema_decay=decay)
    )
    current = start(model, tx)
    for n, want in enumerate((0.5, 0.6, 0.7)):
        before = current
        current, metrics = step(current, batch_of(2, seed=n))
        np.testing.assert_allclose(metrics["ema_decay"], want, rtol=1e-6)
        moved = jax.tree.map(lambda e, p, d=want: d * e + (1 - d) * p, before.ema, current.params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), current.ema, moved)
        # The targets are those of the average before the update.
        target = latent.target_features(
            model.encoder, before.ema["encoder"], batch_of(2, n)["video"]
        )
        given = latent.make_loss(model=model, stage_key=KEY, views=VIEWS)
        want_loss, _ = given(before.params, batch_of(2, n) | {"latent": target})
        np.testing.assert_allclose(metrics["loss"].value, want_loss.value, rtol=1e-5)
    np.testing.assert_allclose([decay(4), decay(99)], [0.9, 0.9], rtol=1e-6)


@pytest.mark.slow
def test_momentum_one_is_a_frozen_teacher():
    model, tx = tiny(), optax.sgd(0.1)
    options = dict(model=model, tx=tx, stage_key=KEY, views=VIEWS, loss="cosine")
    kept = jax.jit(latent.make_train_step(**options, ema_decay=latent.momentum(1.0, 1.0, 1)))
    taught = jax.jit(latent.make_train_step(**options))
    a = b = start(model, tx)
    b = b.replace(ema={})
    teacher = fresh(model)["encoder"]
    for n in range(2):
        batch = batch_of(2, seed=n)
        a, _ = kept(a, batch)
        goal = latent.target_features(model.encoder, teacher, batch["video"], normalise=False)
        b, metrics = taught(b, batch | {"latent": goal})
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), a.params, b.params)
    jax.tree.map(np.testing.assert_array_equal, a.ema, fresh(model))
    assert "ema_decay" not in metrics
    with pytest.raises(UserError, match="got neither. Set ema_decay"):
        jax.eval_shape(latent.make_train_step(**options), b, batch_of(2))


@pytest.mark.slow
def test_it_learns_and_does_not_collapse():
    model, tx = tiny(), optax.adam(5e-4)
    step = jax.jit(
        latent.make_train_step(
            model=model, tx=tx, stage_key=KEY, views=VIEWS, ema_decay=latent.momentum(0.99, 1, 60)
        ),
        donate_argnums=0,
    )
    current, seen = start(model, tx), []
    for n in range(31):
        current, metrics = step(current, batch_of(8, seed=n % 4))
        spread = {k: float(v) for k, v in metrics.items() if k.startswith("spread/")}
        seen.append(spread | {"loss": float(metrics["loss"].value)})
    assert seen[-1]["loss"] < seen[0]["loss"]
    for name in ("spread/places", "spread/clips"):
        assert min(s[name] for s in seen) > 0.5 * seen[0][name] > 1e-3, name


def test_spread_is_zero_where_all_is_alike():
    rng = np.random.default_rng(0)
    one = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    valid = jnp.array([True, True, False, True])
    same = latent.spread(jnp.broadcast_to(one(8), (4, 5, 8)), valid)
    np.testing.assert_allclose([same["spread/places"], same["spread/clips"]], 0, atol=1e-6)
    by_clip = latent.spread(jnp.broadcast_to(one(4, 1, 8), (4, 5, 8)), valid)
    assert by_clip["spread/places"] < 1e-6 < 0.1 < by_clip["spread/clips"]
    by_place = latent.spread(jnp.broadcast_to(one(1, 5, 8), (4, 5, 8)), valid)
    assert by_place["spread/clips"] < 1e-6 < 0.1 < by_place["spread/places"]
    x = one(4, 5, 8)
    unit = np.asarray(x / jnp.linalg.norm(x, axis=-1, keepdims=True))[[0, 1, 3]]
    want = np.mean([1 - np.square(unit[:, i].mean(0)).sum() for i in range(5)])
    bad = latent.spread(x.at[2].set(jnp.nan), valid)
    np.testing.assert_allclose(bad["spread/clips"], want, rtol=1e-5)


@pytest.mark.slow
def test_accumulation_and_a_mesh_change_nothing():
    with jax.enable_x64(True):
        model, tx = tiny(dtype=jnp.float64), optax.sgd(1.0)
        begin = start(model, tx)
        widen = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)
        begin = begin.replace(params=widen(begin.params), ema=widen(begin.ema))
        batch = batch_of(8)
        batch["valid"] = jnp.arange(8) % 3 != 1
        make = functools.partial(
            latent.make_train_step, model=model, tx=tx, stage_key=KEY, views=VIEWS,
            ema_decay=latent.momentum(0.9, 1.0, 10),
        )  # fmt: skip
        boxed = jax.eval_shape(lambda: predictor.init(model, jax.random.key(0)))
        found = [jax.jit(make())(begin, batch)]
        mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2, sequence=1)
        there = jax.device_put(begin, sharding.state_shardings(begin, boxed, mesh))
        given = sharding.global_batch({k: np.asarray(v) for k, v in batch.items()}, mesh)
        with sharding.use(mesh):
            found.append(jax.jit(make(accumulation=4))(there, given))
        keep = lambda new, metrics: jax.device_get(
            (new.params, new.ema, metrics["loss"], metrics["spread/clips"])
        )
        want = keep(*found[0])
        for other in found[1:]:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), keep(*other), want
            )


def test_targets_are_made_by_microbatches(monkeypatch):
    model, tx, seen = tiny(), optax.sgd(1.0), []
    plain = latent.target_features

    def noting(encoder, params, video, **options):
        seen.append((len(video), options))
        return plain(encoder, params, video, **options)

    monkeypatch.setattr(latent, "target_features", noting)
    step = latent.make_train_step(
        model=model, tx=tx, stage_key=KEY, views=VIEWS, loss="cosine", accumulation=4,
        ema_decay=latent.momentum(0.9, 1.0, 10),
    )  # fmt: skip
    jax.eval_shape(step, start(model, tx), batch_of(8))
    assert set(map(str, seen)) == {str((2, {"normalise": False}))}


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="got loss='l2'. Known: cosine, l1"):
        latent.make_loss(model=tiny(), stage_key=KEY, views=VIEWS, loss="l2")
    with pytest.raises(UserError, match="auto, yes, no; got normalise='on'"):
        latent.make_loss(model=tiny(), stage_key=KEY, views=VIEWS, normalise="on")
    with pytest.raises(UserError, match="auto, yes, no; got normalise='on'"):
        latent.make_loss(model=tiny(), stage_key=KEY, views=VIEWS, normalise="on")
    with pytest.raises(UserError, match="auto, yes, no; got normalise='on'"):
        latent.make_loss(model=tiny(), stage_key=KEY, views=VIEWS, normalise="on")
    with pytest.raises(UserError, match="got ema_final=1.5"):
        latent.momentum(0.9, 1.5, 3)
    wrong = tiny()
    with pytest.raises(UserError, match="got out_width=32, grid=\\(1, 4, 4\\)"):
        wrong.clone(predictor=wrong.predictor.clone(grid=(1, 4, 4))).check()
