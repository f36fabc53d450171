"""The shared part of train steps, on a small quadratic problem with a NumPy oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import losses, state
from invideo_jax.errors import UserError
from invideo_jax.steps import update as steps

RATE = 0.1


def loss_fn(params, batch):
    """Squared error of a linear model; `blocks` is a stack of two matrices, one after the other."""
    x = batch["x"] @ params["blocks"]["kernel"][0] @ params["blocks"]["kernel"][1]
    error = jnp.square(x @ params["head"] - batch["y"]).mean(-1)
    return losses.mean(error, batch["valid"]), {
        "size": losses.mean(jnp.abs(x[:, 0]), batch["valid"])
    }


def problem(rows=8, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    make = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = {"blocks": {"kernel": make(2, 3, 3)}, "head": make(3, 2)}
    batch = {"x": make(rows, 3), "y": make(rows, 2), "valid": np.arange(rows) != 2}
    return jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, batch)


def stepper(tx=None, **options):
    tx = tx or optax.adam(RATE)
    return jax.jit(functools.partial(steps.update, loss_fn=loss_fn, tx=tx, **options)), tx


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_one_step_of_sgd_against_plain_autodiff():
    params, batch = problem()
    step, tx = stepper(optax.sgd(RATE), schedule=lambda n: RATE + n)
    new, metrics = step(state.create(params, tx, keep_ema=False), batch)

    def plain(p):  # the mean over the valid rows, written out
        x = batch["x"] @ p["blocks"]["kernel"][0] @ p["blocks"]["kernel"][1] @ p["head"]
        return jnp.delete(jnp.square(x - batch["y"]).mean(-1), 2).mean()

    want, grads = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(metrics["loss"].value, want, rtol=1e-6)
    jax.tree.map(
        lambda n, p, g: np.testing.assert_allclose(n, p - RATE * g, rtol=1e-5, atol=1e-6),
        new.params,
        params,
        grads,
    )
    norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-6)
    np.testing.assert_allclose(metrics["learning_rate"], RATE)
    kernel = lambda t: np.asarray(t["blocks"]["kernel"]).reshape(2, -1)
    ratio = RATE * np.linalg.norm(kernel(grads), axis=1) / np.linalg.norm(kernel(params), axis=1)
    np.testing.assert_allclose(metrics["update_ratio/blocks"], ratio, rtol=1e-5)
    head = RATE * np.linalg.norm(grads["head"]) / np.linalg.norm(params["head"])
    np.testing.assert_allclose(metrics["update_ratio/head"], head, rtol=1e-5)
    assert int(new.step) == 1 and int(metrics["first_nonfinite"]) == -1
    assert float(metrics["size"].weight) == 7


def test_accumulation_changes_nothing_in_float64():
    with jax.enable_x64(True):
        params, batch = problem(dtype=np.float64)
        found = []
        for parts in (1, 2, 4):
            step, tx = stepper(optax.sgd(RATE), accumulation=parts)
            new, metrics = step(state.create(params, tx, keep_ema=False), batch)
            found.append((new.params, metrics["loss"].value, metrics["size"].value))
        for other in found[1:]:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10, rtol=1e-10),
                other,
                found[0],
            )


def test_accumulation_must_divide_the_batch():
    params, batch = problem(rows=6)
    step, tx = stepper(accumulation=4)
    with pytest.raises(UserError, match="got batch=6, accumulation=4"):
        step(state.create(params, tx, keep_ema=False), batch)


def test_clipping_scales_the_whole_gradient():
    params, batch = problem()
    plain, tx = stepper(optax.sgd(RATE))
    start = state.create(params, tx, keep_ema=False)
    free, metrics = plain(start, batch)
    norm = float(metrics["grad_norm"])
    cut, clipped_metrics = stepper(optax.sgd(RATE), clip_norm=norm / 4)[0](start, batch)
    np.testing.assert_allclose(clipped_metrics["grad_norm"], norm, rtol=1e-6)
    jax.tree.map(
        lambda c, f, p: np.testing.assert_allclose(c - p, (f - p) / 4, atol=1e-6),
        cut.params,
        free.params,
        params,
    )
    same, _ = stepper(optax.sgd(RATE), clip_norm=norm * 2)[0](start, batch)
    assert_same_bits(same.params, free.params)


def bad(where, params, batch):
    """A state or batch that makes one thing not finite."""
    if where == "loss":
        return params, batch | {"y": batch["y"].at[0, 0].set(jnp.nan)}
    if where == "huge":
        return params, batch | {"y": batch["y"].at[0, 0].set(1e30)}
    return params, batch


@pytest.mark.parametrize("where", ["loss", "huge"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_non_finite_update_is_a_bitwise_no_op_and_counted(where, parts):
    params, batch = problem()
    step, tx = stepper(accumulation=parts, ema_decay=0.9, schedule=lambda n: 0.0 + n)
    before, _ = step(state.create(params, tx, keep_ema=True), batch)
    _, poison = bad(where, params, batch)
    after, metrics = step(before, poison)
    for name in ("params", "opt_state", "ema"):
        assert_same_bits(getattr(after, name), getattr(before, name))
    assert (int(after.step), int(after.counters.skipped)) == (2, 1)
    assert steps.name_of_leaf(metrics["first_nonfinite"], params) == "loss"
    again, metrics = step(after, poison)
    assert int(metrics["skipped"]) == 2 and int(metrics["skipped_in_a_row"]) == 2
    good, metrics = step(again, batch)
    assert int(good.counters.skipped) == 2 and int(good.counters.skipped_in_a_row) == 0
    assert float(metrics["learning_rate"]) == 1.0  # the second update that was made
    want, _ = step(before, batch)
    assert_same_bits(good.params, want.params)


def test_the_first_bad_gradient_and_the_first_bad_update_are_named():
    params, batch = problem()

    @jax.custom_vjp
    def spoil(x):
        return x

    spoil.defvjp(lambda x: (x, None), lambda _, g: (g * jnp.nan,))
    poisoned = lambda p, b: loss_fn(p | {"head": spoil(p["head"])}, b)
    tx = optax.sgd(RATE)
    start = state.create(params, tx, keep_ema=False)
    new, metrics = jax.jit(functools.partial(steps.update, loss_fn=poisoned, tx=tx))(start, batch)
    assert steps.name_of_leaf(metrics["first_nonfinite"], params) == "gradient of head"
    assert_same_bits(new.params, params)
    tx = optax.sgd(float("inf"))
    new, metrics = jax.jit(functools.partial(steps.update, loss_fn=loss_fn, tx=tx))(start, batch)
    assert steps.name_of_leaf(metrics["first_nonfinite"], params) == "update of blocks/kernel"
    assert_same_bits(new.params, params)


def test_moving_average_and_its_warm_up():
    params, batch = problem()
    step, tx = stepper(ema_decay=0.9)
    one, _ = step(state.create(params, tx, keep_ema=True), batch)
    jax.tree.map(
        lambda e, p, n: np.testing.assert_allclose(e, 0.9 * p + 0.1 * n, rtol=1e-6, atol=1e-7),
        one.ema,
        params,
        one.params,
    )
    warm, _ = stepper(ema_decay=0.9, ema_warmup=True)[0](
        state.create(params, tx, keep_ema=True), batch
    )
    jax.tree.map(
        lambda e, p, n: np.testing.assert_allclose(e, 0.1 * p + 0.9 * n, rtol=1e-5, atol=1e-6),
        warm.ema,
        params,
        warm.params,
    )
    with pytest.raises(UserError, match="ema_decay=0.9 needs a moving average"):
        step(state.create(params, tx, keep_ema=False), batch)


def test_frozen_parameters_get_no_gradient_and_stay():
    params, batch = problem()
    mask = {"blocks": {"kernel": False}, "head": True}
    tx = optax.partition(
        {"train": optax.adam(RATE), "frozen": optax.set_to_zero()},
        {"blocks": {"kernel": "frozen"}, "head": "train"},
    )
    step, _ = stepper(tx, trainable=mask)
    start = state.create(params, tx, keep_ema=False)
    new, metrics = step(start, batch)
    assert_same_bits(new.params["blocks"], params["blocks"])
    assert (np.asarray(new.params["head"]) != np.asarray(params["head"])).all()
    assert "update_ratio/head" in metrics and "update_ratio/blocks" not in metrics
    assert steps.name_of_leaf(1, params, mask) == "gradient of head"
    free, _ = stepper(optax.adam(RATE))
    want, _ = free(state.create(params, optax.adam(RATE), keep_ema=False), batch)
    np.testing.assert_allclose(new.params["head"], want.params["head"], rtol=1e-6)
    # The backward pass through the frozen matrices is not there at all.
    count = lambda s, m: str(
        jax.make_jaxpr(lambda p, b: steps.gradients(loss_fn, p, b, trainable=m)[2])(s, batch)
    ).count("dot_general")
    assert count(params, mask) == 4  # three products forward, one backward
    assert count(params, {"blocks": {"kernel": True}, "head": True}) == 8


def test_a_batch_without_a_valid_row_changes_only_by_momentum_and_decay():
    params, batch = problem()
    step, tx = stepper(optax.sgd(RATE))
    new, metrics = step(
        state.create(params, tx, keep_ema=False), batch | {"valid": jnp.zeros(8, bool)}
    )
    assert_same_bits(new.params, params)
    assert float(metrics["loss"].weight) == 0 and int(metrics["first_nonfinite"]) == -1


@pytest.mark.parametrize("rows, parts", [(24, 1), (12, 2), (9, 3), (5, 6), (1, 24)])
def test_in_parts_is_the_same_function(rows, parts):
    seen = []

    def apply(scale, batch):
        seen.append(batch["x"].shape[0])
        return {"sum": scale * batch["x"].sum(1), "twice": 2 * batch["x"]}

    batch = {"x": jnp.arange(48.0).reshape(24, 2), "y": jnp.arange(24)}
    whole, cut = apply(3.0, batch), steps.in_parts(apply, rows)(3.0, batch)
    assert set(seen[1:]) == {24 // parts}
    assert whole.keys() == cut.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name], cut[name])


def test_parts_bound_the_memory():
    wide = jnp.ones((16, 4096))
    apply = lambda w, batch: {"y": jnp.tanh(jnp.tanh(batch["x"] @ w) @ w.T)}
    held = [
        jax.jit(steps.in_parts(apply, rows))
        .lower(wide, {"x": jnp.ones((256, 16))})
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for rows in (256, 128, 16)
    ]
    assert held[1] < 0.6 * held[0] and held[2] < 0.15 * held[0], held
