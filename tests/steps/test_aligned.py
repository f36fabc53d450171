"""Alignment: its losses against plain loops, masks from attention, accumulation, meshes, caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import feature_store, losses, masking, sharding, state
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.models import alignment, teachers, video_encoder
from invideo_jax.steps import aligned, masked, update

ROWS, FRAMES, SIZE = 8, 4, 16
GRID = (2, 2, 2)
MASK = dict(name="attention", ratio=0.5, per_frame=True)
RATIOS = dict(clip_middle=1.0, clip_final=0.5, mae=2.0)


@functools.cache
def everything():
    """A student, its two teachers with parameters, and a batch with whole features in it."""
    of = aligned.Teachers(
        clip=teachers.internvl("Micro", frames=2, image_size=SIZE, layers=2),
        mae=teachers.video_mae_teacher("Micro", frames=FRAMES, image_size=SIZE, layers=2),
        stride=2,
    )
    encoder = video_encoder.build("Micro", frames=2, image_size=SIZE, layer_scale=0.5)
    student = alignment.AlignedEncoder(
        encoder,
        clip=alignment.HeadsSpec((1, 2), 48),
        final=alignment.FinalSpec(32),
        mae=alignment.HeadsSpec((1, 2), 32, mlp=True),
    )
    of.check(encoder.grid)
    frozen = sharding.unbox(jax.jit(of.init)(jax.random.key(1)))
    params = sharding.unbox(jax.jit(lambda k: alignment.init(student, k))(jax.random.key(2)))
    rng = np.random.default_rng(3)
    batch = dict(
        video=rng.integers(0, 256, (ROWS, FRAMES, SIZE, SIZE, 3), np.uint8),
        position=np.arange(10, 10 + ROWS, dtype=np.uint32),
        label=np.full(ROWS, -1, np.int32),
        valid=np.arange(ROWS) < 6,
    )
    return student, of, params, frozen, batch


KEY = jax.random.key(4)


def make_loss(student, train=False, **more):
    options = dict(model=student, stage_key=KEY, objective="aligned", mask=MASK, train=train)
    return masked.make_loss(**options, target=dict(ratios=RATIOS, stride=2) | more)


@functools.cache
def taught():
    student, of, _, frozen, batch = everything()
    teach = aligned.make_teach(of, stage_key=KEY, grid=GRID, mask=MASK)
    features = jax.jit(of.features)(frozen, batch)
    return jax.device_get(batch | jax.jit(teach)(frozen, batch)), jax.device_get(features)


def test_objective_is_a_loop():
    student, _, params, _, _ = everything()
    batch, features = taught()
    total, parts = jax.jit(make_loss(student))(params, batch)
    run = lambda p, v, i: student.apply({"params": p}, v, i)
    out = jax.device_get(jax.jit(run)(params, batch["video"][:, ::2], batch["visible"]))
    sums = dict.fromkeys(RATIOS, 0.0)
    for b in range(6):  # the other rows are not valid
        places = [0, *(batch["visible"][b] + 1)]
        for name, whole, ids in (
            ("clip_middle", features["clip_middle"][b], places),
            ("mae", features["mae"][b], batch["visible"][b]),
        ):
            each = []
            for k in range(2):
                for row, place in enumerate(ids):
                    each.append(2 - 2 * float(out[name][b, k, row] @ whole[k, place]))
            sums[name] += np.mean(each)
        sums["clip_final"] += 2 - 2 * float(out["clip_final"][b] @ features["clip_final"][b])
    for name in RATIOS:
        assert 0 <= parts[name].value <= 4
        np.testing.assert_allclose(parts[name].value, sums[name] / 6, rtol=2e-6)
    want = sum(RATIOS[name] * sums[name] / 6 for name in RATIOS)
    np.testing.assert_allclose(total.value, want, rtol=2e-6)
    assert total.weight == 6


def test_a_teacher_is_its_own_best_student():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 2, 5, 7)).astype(np.float32)
    x /= np.sqrt((x * x).sum(-1, keepdims=True))
    valid = np.ones(3, bool)
    assert abs(losses.cosine_distance(x, x, valid).value) < 1e-6
    np.testing.assert_allclose(losses.cosine_distance(x, -x, valid).value, 4, rtol=1e-6)
    apart = np.square(x - x[::-1]).sum(-1).mean()
    np.testing.assert_allclose(losses.cosine_distance(x, x[::-1], valid).value, apart, rtol=1e-6)


def test_parts_can_be_left_out():
    student, _, params, _, _ = everything()
    batch, _ = taught()
    only = {k: v for k, v in batch.items() if k != "mae"}
    loss = make_loss(student, ratios=dict(clip_middle=1.0, clip_final=0.0, mae=0.0))
    total, parts = jax.jit(loss)(params, only)
    assert list(parts) == ["clip_middle"] and total.value == parts["clip_middle"].value
    for wrong in (dict(clip_middle=0.0), dict(clip=1.0)):
        with pytest.raises(UserError, match="clip_middle, clip_final, mae"):
            make_loss(student, ratios=wrong)


def test_teachers_see_the_frames_that_they_should():
    _, of, _, frozen, batch = everything()
    run = jax.jit(of.features)
    before = run(frozen, batch)
    odd = dict(batch, video=batch["video"].copy())
    odd["video"][:, 1::2] = 255 - odd["video"][:, 1::2]
    after = run(frozen, odd)
    np.testing.assert_array_equal(before["clip_middle"], after["clip_middle"])
    assert np.abs(before["mae"] - after["mae"]).max() > 0.01


def test_features_are_chosen_at_visible_places():
    batch, features = taught()
    assert batch["visible"].shape == (ROWS, 4) and batch["clip_middle"].shape[2] == 5
    for b in range(ROWS):
        ids = batch["visible"][b]
        assert (np.diff(ids) > 0).all() and (ids < 4).sum() == 2  # as many of each frame
        np.testing.assert_array_equal(batch["mae"][b], features["mae"][b][:, ids])
        np.testing.assert_array_equal(
            batch["clip_middle"][b], features["clip_middle"][b][:, [0, *(ids + 1)]]
        )


def test_attention_decides_what_is_seen():
    """Over a whole clip, places of no attention are never seen; over frames, each gives its share."""
    keys = jax.vmap(jax.random.key)(jnp.arange(64))
    attention = np.tile(np.r_[np.full(4, 1.0), np.zeros(4)], (64, 1)).astype(np.float32)
    draw = lambda **mask: aligned.entries(
        {"attention": attention}, keys, grid=GRID, mask=dict(name="attention", ratio=0.5, **mask)
    )["visible"]
    assert (np.asarray(draw(per_frame=False)) == np.arange(4)).all()
    assert (np.sum(np.asarray(draw(per_frame=True)) < 4, axis=1) == 2).all()
    with pytest.raises(UserError, match="needs a teacher that gives an attention"):
        aligned.entries({}, keys, grid=GRID, mask=MASK)


@pytest.mark.parametrize("name", ["tube", "random"])
def test_masks_without_attention(name):
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    made = aligned.entries({}, keys, grid=GRID, mask=dict(name=name, ratio=0.5))
    want, _ = masking.get(name)(masked.fold(keys, masked.MASK), grid=GRID, ratio=0.5)
    np.testing.assert_array_equal(made["visible"], want)
    assert list(made) == ["visible"]


def test_a_mask_as_published():
    """The golden file's engine drew its mask in this form: 4 of 16 patches a frame, and the class token."""
    rng = np.random.default_rng(0)
    attention = rng.dirichlet(np.ones(16), (2, 4)).astype(np.float32).reshape(2, 64)
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    mask = dict(name="attention", ratio=0.75)
    made = aligned.entries({"attention": attention}, keys, grid=(4, 4, 4), mask=mask)
    assert made["visible"].shape == (2, 16)
    assert (np.asarray(made["visible"]).reshape(2, 4, 4) // 16 == np.arange(4)[:, None]).all()


def step(student, accumulation):
    options = dict(model=student, stage_key=KEY, objective="aligned", mask=MASK)
    return masked.make_train_step(
        **options, target=dict(ratios=RATIOS, stride=2), tx=TX, accumulation=accumulation
    )


TX = optax.sgd(0.1)


def in_parts(rows):
    _, of, _, _, _ = everything()
    teach = aligned.make_teach(of, stage_key=KEY, grid=GRID, mask=MASK)
    return jax.jit(update.in_parts(teach, rows))


@pytest.mark.parametrize("rows", [4, 2])
def test_teachers_see_one_microbatch_at_a_time(rows):
    _, _, _, frozen, batch = everything()
    whole, parts = taught()[0], in_parts(rows)(frozen, batch)
    assert parts.keys() == whole.keys() - batch.keys()
    np.testing.assert_array_equal(whole["visible"], parts["visible"])
    for name, x in parts.items():
        np.testing.assert_allclose(whole[name], x, atol=2e-6)


def test_accumulation_changes_nothing():
    student, _, params, _, _ = everything()
    batch, _ = taught()
    fresh = state.create(params, TX, keep_ema=False)
    one, four = (jax.jit(step(student, n))(fresh, batch) for n in (1, 4))
    for a, b in zip(jax.tree.leaves(one[0].params), jax.tree.leaves(four[0].params)):
        np.testing.assert_allclose(a, b, atol=2e-6)
    np.testing.assert_allclose(one[1]["loss"].value, four[1]["loss"].value, rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_equal_one():
    student, of, params, frozen, batch = everything()
    teach = aligned.make_teach(of, stage_key=KEY, grid=GRID, mask=MASK)
    results = []
    for parts, sizes in ((1, dict(data=1)), (2, dict(data=2, fsdp=2, tensor=1, sequence=2))):
        devices = 1 if parts == 1 else 8
        mesh = sharding.make_mesh(**sizes, devices=jax.devices()[:devices])
        boxed = jax.eval_shape(lambda: alignment.init(student, jax.random.key(2)))
        of_teachers = jax.eval_shape(lambda: of.init(jax.random.key(1)))
        with sharding.use(mesh):
            lying = jax.device_put(frozen, sharding.param_shardings(of_teachers, mesh))
            placed = jax.device_put(params, sharding.param_shardings(boxed, mesh))
            rows = sharding.global_batch(batch, mesh)
            rows = dict(rows) | jax.jit(update.in_parts(teach, ROWS // parts))(lying, rows)
            new, out = jax.jit(step(student, 1))(state.create(placed, TX, keep_ema=False), rows)
        results.append(jax.device_get((rows["visible"], out["loss"], new.params)))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    for a, b in zip(jax.tree.leaves(results[0][1:]), jax.tree.leaves(results[1][1:])):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_no_gradient_reaches_a_teacher():
    student, of, params, frozen, batch = everything()
    loss = make_loss(student)

    def whole(frozen):
        return loss(params, batch | of.features(frozen, batch))[0].total

    grads = jax.tree.leaves(jax.jit(jax.grad(whole))(frozen))
    assert grads and all((np.asarray(g) == 0).all() for g in grads)


def test_a_cache_trains_as_the_teacher_does(tmp_path):
    """Features of whole clips from disk give the loss that the teacher gives, bit for bit."""
    student, _, params, _, batch = everything()
    live, features = taught()
    facts = {"teacher": "abc", "clip": {"frames": 4}}
    with feature_store.Writer(tmp_path, facts, part_bytes=1) as writer:
        for i in range(ROWS - 1):
            writer.add(f"v{i}", {name: x[i] for name, x in features.items()})
    reader = feature_store.Reader(tmp_path, facts)
    ids = [f"v{i}" for i in range(ROWS - 1)] + [None]  # the last row is not valid
    cached = batch | reader.rows(ids)
    loss = jax.jit(make_loss(student))
    a, b = loss(params, live), loss(params, cached)
    assert jax.tree.map(float, a) == jax.tree.map(float, b)
    assert isinstance(a[0], Mean) and float(a[0].value) > 0.5
