"""The classification step: mixing against a plain loop, microbatches, frozen trunk, batch norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import mixing, optim, sharding, state
from invideo_jax.errors import UserError
from invideo_jax.models import classifier
from invideo_jax.steps import classify

KEY = jax.random.key(7)
MIX = dict(mixup=0.8, cutmix=1.0, group=4)


@functools.cache
def tiny(**options):
    sizes = dict(image_size=16, frames=4, depth=1, classes=5, init_scale=1.0)
    return classifier.build("Micro", encoder="internvideo2", **(sizes | options))


@functools.cache
def params_of(model):
    return jax.jit(lambda: sharding.unbox(classifier.init(model, jax.random.key(0))))()


def batch_of(rows=8, start=0, seed=0):
    rng = np.random.default_rng(seed)
    return dict(
        video=jnp.asarray(rng.integers(0, 256, (rows, 4, 16, 16, 3), np.uint8)),
        position=jnp.arange(start, start + rows, dtype=jnp.uint32),
        label=jnp.asarray(rng.integers(0, 5, rows), jnp.int32),
        valid=jnp.ones(rows, bool),
    )


def step_of(model, freeze=(), **options):
    boxed = jax.eval_shape(lambda: classifier.init(model, jax.random.key(0)))
    freeze = (*freeze, *([classifier.STATISTICS] if model.counts_batches else []))
    tx, _ = optim.make_optimizer(
        "adamw", schedule=lambda n: 1e-2 + 0 * n, params=boxed, freeze=freeze
    )
    trainable = optim.trainable_mask(boxed, freeze)
    step = classify.make_train_step(
        model=model, tx=tx, stage_key=KEY, trainable=trainable, **options
    )
    return jax.jit(step), state.create(
        params_of(model), tx, keep_ema=bool(options.get("ema_decay"))
    )


def same(a, b, **bounds):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **bounds), a, b)


def test_mixing_agrees_with_a_plain_loop():
    batch = classify.mixed_batch(batch_of(), KEY, **MIX)
    own, other = (np.asarray(batch[n], np.float64) for n in ("video", "other"))
    mixed = np.asarray(mixing.videos(own, other, mixing.Mix(batch["share"], batch["box"])))
    targets = mixing.targets(
        batch["label"], batch["other_label"], batch["share"], classes=5, smoothing=0.1
    )
    for row in range(8):
        partner = (row // 4) * 4 + 3 - row % 4
        np.testing.assert_array_equal(other[row], own[partner])
        share, (top, bottom, left, right) = (
            float(batch["share"][row]),
            np.asarray(batch["box"][row]),
        )
        want = own[row].copy()
        if (bottom - top) * (right - left):
            want[:, top:bottom, left:right] = own[partner][:, top:bottom, left:right]
            assert share == pytest.approx(1 - (bottom - top) * (right - left) / 256)
        else:
            want = share * own[row] + (1 - share) * own[partner]
        np.testing.assert_allclose(mixed[row], want, atol=1e-3)
        target = np.full(5, 0.1 / 5)
        target[int(batch["label"][row])] += 0.9 * share
        target[int(batch["label"][partner])] += 0.9 * (1 - share)
        np.testing.assert_allclose(targets[row], target, atol=1e-6)


def test_draws_have_the_published_distribution():
    keys = jax.random.split(jax.random.key(1), 4000)
    drawn = mixing.draw(keys, size=(224, 224), mixup=0.8, cutmix=1.0)
    cut = np.asarray((drawn.box[:, 1] > drawn.box[:, 0]) & (drawn.box[:, 3] > drawn.box[:, 2]))
    assert cut.mean() == pytest.approx(0.5, abs=0.03)
    mixup = np.asarray(drawn.share)[~cut]
    assert mixup.mean() == pytest.approx(0.5, abs=0.03)
    assert mixup.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)  # of Beta(.8, .8)
    none = mixing.draw(keys[:50], size=(8, 8), mixup=0.8, cutmix=1.0, probability=0.0)
    assert (none.share == 1).all() and not none.box.any()
    only = mixing.draw(keys[:200], size=(224, 224), mixup=0.0, cutmix=1.0)
    assert (np.asarray(only.box[:, 1]) > np.asarray(only.box[:, 0])).mean() > 0.9


def test_microbatches_and_groups_change_nothing_but_memory():
    model = tiny(drop_path=0.3, dropout=0.2)
    results = []
    for accumulation in (1, 4):
        step, current = step_of(model, mix=MIX, smoothing=0.1, accumulation=accumulation)
        new, metrics = step(current, batch_of())
        results.append((float(metrics["loss"].value), float(metrics["grad_norm"])))
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    # A draw belongs to the position of its group, whatever batch that is in.
    whole = classify.mixed_batch(batch_of(8), KEY, **MIX)
    part = classify.mixed_batch({k: v[4:] for k, v in batch_of(8).items()}, KEY, **MIX)
    same(part, {k: v[4:] for k, v in whole.items()})
    with pytest.raises(UserError, match="mix.group must divide the batch; got group=3, batch=8"):
        classify.mixed_batch(batch_of(8), KEY, **(MIX | dict(group=3)))


def test_rows_without_a_label_weigh_nothing_and_a_wrong_label_stops():
    model, params = tiny(), params_of(tiny())
    loss = jax.jit(classify.make_loss(model=model, stage_key=KEY, train=False))
    batch = batch_of()
    some = batch | dict(label=batch["label"].at[2:].set(-1))
    rest = {name: x[:2] for name, x in batch.items()}
    (a, more), (b, _) = loss(params, some), loss(params, rest)
    assert float(a.weight) == 2 and float(a.value) == pytest.approx(float(b.value), rel=1e-5)
    assert float(more["accuracy"].weight) == 2
    assert np.isnan(loss(params, batch | dict(label=batch["label"].at[0].set(5)))[0].value)
    mixed = classify.mixed_batch(some, KEY, mixup=0.8, cutmix=0.0)
    assert float(loss(params, mixed)[0].weight) == 0  # every partner is unknown, or the row is


def test_a_probe_trains_its_head_only():
    step, current = step_of(tiny(), freeze=(r"^encoder/",), smoothing=0.0)
    new, first = step(current, batch_of())
    same(new.params["encoder"], current.params["encoder"], atol=0)
    assert not np.array_equal(new.params["head"]["kernel"], current.params["head"]["kernel"])
    for _ in range(20):
        new, last = step(new, batch_of())
    assert float(last["loss"].value) < float(first["loss"].value) - 0.1


def test_batch_norm_moves_with_the_step_and_not_when_it_is_skipped():
    model = tiny(variant="cat", merge="cls_avg1", merge_norm="BN")
    step, current = step_of(model, freeze=(r"^encoder/",), ema_decay=0.5)
    new, metrics = step(current, batch_of())
    _, out = model.apply({"params": current.params}, batch_of()["video"], train=True)
    want = classifier.with_statistics(current.params, out["statistics"])["down_norm"]
    for name in ("mean", "variance", "batches"):
        np.testing.assert_allclose(new.params["down_norm"][name], want[name], atol=1e-5)
        np.testing.assert_allclose(new.ema["down_norm"][name], want[name], atol=1e-5)
    assert not any(name.startswith("batch_statistics") for name in metrics)
    bad = batch_of() | dict(label=jnp.full(8, 99, jnp.int32))
    kept, metrics = step(new, bad)
    assert int(metrics["skipped"]) == 1
    same(kept.params, new.params, atol=0)
    with pytest.raises(UserError, match="accumulation must be 1; got accumulation=2"):
        step_of(model, accumulation=2)


@pytest.mark.slow
def test_eight_devices_equal_one():
    model = tiny(variant="cat", merge="cls_avg1", merge_norm="kaiming_BN")
    step, current = step_of(model, freeze=(r"^encoder/",), mix=MIX)
    one, metrics = step(current, batch_of(16))
    mesh = sharding.make_mesh(data=8, fsdp=1, tensor=1, sequence=1)
    with sharding.use(mesh):
        host = {name: np.asarray(x) for name, x in batch_of(16).items()}
        eight, more = step(current, sharding.global_batch(host, mesh))
    assert float(more["loss"].value) == pytest.approx(float(metrics["loss"].value), rel=1e-5)
    same(eight.params["down_norm"], one.params["down_norm"], atol=1e-5)


def test_ranks_and_ties():
    scores = jnp.asarray([[0.1, 0.5, 0.5, 0.2], [jnp.nan, 0.0, 0.0, 0.0]])
    assert classify.hits(scores, jnp.asarray([1, 0]), 1).tolist() == [True, False]
    assert classify.hits(scores, jnp.asarray([2, 0]), 1).tolist() == [False, False]
    assert classify.hits(scores, jnp.asarray([2, 0]), 2).tolist() == [True, False]
