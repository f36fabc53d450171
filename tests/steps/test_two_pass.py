"""Gradients in two passes: exact for losses over the whole batch, and memory for one microbatch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import losses, sharding, state
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.steps import update

ROWS = 16


def encode(params, batch):
    """Two towers, each row on its own, and a loss of the row."""
    x = jnp.tanh(batch["x"] @ params["first"]) @ params["second"]
    y = batch["y"] @ params["frozen"] @ params["other"]
    return {"x": x, "y": y, "own": jnp.square(x).sum(-1) * batch["valid"]}


def join(params, encoded, batch):
    """Compares all rows with all others, by parameters of its own too."""
    scores = losses.similarity(encoded["x"] @ params["joint"], encoded["y"], params["temperature"])
    pairs = losses.contrastive(scores, batch["id"], batch["valid"])
    own = Mean(encoded["own"].sum(), batch["valid"].sum().astype(scores.dtype))
    total = Mean((pairs.value + 0.3 * own.value) * own.weight, own.weight)
    return total, {"pairs": pairs, "own": own}


SPLIT = update.Split(encode, join)


def problem(dtype=np.float64):
    rng = np.random.default_rng(0)
    make = lambda *shape: rng.normal(size=shape).astype(dtype)
    params = dict(
        first=make(6, 8), second=make(8, 4), frozen=make(4, 6), other=make(6, 4), joint=make(4, 4),
        temperature=np.asarray(0.7, dtype),
    )  # fmt: skip
    i = np.arange(ROWS)
    batch = dict(x=make(ROWS, 6), y=make(ROWS, 4), id=i // 2 * (i % 5), valid=i % 6 != 4)
    return params, batch


def plain(params, batch):
    """The loss as a formula over valid rows, without any of the above but the towers."""
    made = encode(params, batch)
    keep, ids = np.flatnonzero(batch["valid"]), batch["id"][batch["valid"]]
    x, y = made["x"][keep] @ params["joint"], made["y"][keep]
    length = lambda z: z / jnp.sqrt(jnp.square(z).sum(-1, keepdims=True) + 1e-12)
    scores = length(x) @ length(y).T / params["temperature"]
    target = (ids[:, None] == ids[None]) / (ids[:, None] == ids[None]).sum(1, keepdims=True)
    ways = [-(jax.nn.log_softmax(s, axis=1) * target).sum() / len(ids) for s in (scores, scores.T)]
    return sum(ways) / 2 + 0.3 * jnp.square(made["x"][keep]).sum() / len(ids)


def trainable(params):
    return {name: name != "frozen" for name in params}


@pytest.mark.parametrize("parts", [1, 4])
def test_loss_and_gradient_are_those_of_the_formula(parts):
    with jax.enable_x64(True):
        params, batch = problem()
        run = functools.partial(update.two_pass, SPLIT, accumulation=parts)
        loss, averages, grads = jax.jit(functools.partial(run, trainable=trainable(params)))(
            params, batch
        )
        want, wanted = jax.jit(jax.value_and_grad(lambda p: plain(p, batch)))(params)
        np.testing.assert_allclose(loss.value, want, rtol=1e-12)
        assert grads["frozen"] is None and averages.keys() == {"pairs", "own"}
        for name in params:
            if name != "frozen":
                np.testing.assert_allclose(grads[name], wanted[name], rtol=1e-10, atol=1e-12)
                assert np.abs(wanted[name]).max() > 1e-3


def test_devices_change_nothing():
    with jax.enable_x64(True):
        params, batch = problem()
        run = functools.partial(update.two_pass, SPLIT, trainable=trainable(params))
        want = jax.device_get(jax.jit(run)(params, batch))
        mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
        with sharding.use(mesh):
            rows = sharding.global_batch(batch, mesh)
            found = jax.device_get(jax.jit(functools.partial(run, accumulation=2))(params, rows))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_the_mean_over_microbatches_would_be_another_loss():
    """What the two passes are for: plain accumulation of such a loss is wrong."""
    with jax.enable_x64(True):
        params, batch = problem()
        mask = trainable(params)
        whole = update.two_pass(SPLIT, params, batch, trainable=mask)[0]
        parts = update.gradients(SPLIT, params, batch, trainable=mask, accumulation=2)[0]
        assert abs(float(whole.value - parts.value)) > 0.05


def test_a_step_in_two_passes_holds_parameters_within_bounds():
    params, batch = problem(np.float32)
    tx = optax.sgd(1.0)
    hold = lambda p: p | {"temperature": jnp.clip(p["temperature"], 0.69, 0.71)}
    step = functools.partial(
        update.update, loss_fn=SPLIT, tx=tx, find_gradients=update.two_pass, accumulation=4
    )
    fresh = lambda: state.create(jax.tree.map(jnp.array, params), tx, keep_ema=False)
    free, metrics = jax.jit(step)(fresh(), batch)
    held, _ = jax.jit(functools.partial(step, within_bounds=hold))(fresh(), batch)
    at = float(free.params["temperature"])
    assert not 0.69 <= at <= 0.71
    np.testing.assert_allclose(held.params["temperature"], np.clip(at, 0.69, 0.71), rtol=1e-6)
    np.testing.assert_array_equal(held.params["joint"], free.params["joint"])
    assert metrics["own"].weight == batch["valid"].sum() and int(metrics["first_nonfinite"]) == -1
    lost = dict(batch, x=batch["x"] * np.nan)
    after, metrics = jax.jit(functools.partial(step, within_bounds=hold))(fresh(), lost)
    assert int(after.counters.skipped) == 1
    np.testing.assert_array_equal(after.params["temperature"], params["temperature"])


def test_the_batch_must_be_cut_evenly():
    params, batch = problem(np.float32)
    with pytest.raises(UserError, match="got batch=16, accumulation=3"):
        update.two_pass(SPLIT, params, batch, trainable=trainable(params), accumulation=3)


def test_memory_is_for_one_microbatch():
    """Activations of 12 layers; what is kept of all rows is an eighth of one layer's."""
    depth, width, rows = 12, 64, 512

    def deep(params, batch):
        x = batch["x"]
        for i in range(depth):
            x = jnp.tanh(x @ params["layers"][i])
        return {"x": x[:, :8]}

    def spread(params, encoded, batch):
        x = losses.unit(encoded["x"]).mean(0)
        return Mean(jnp.square(x).sum(), jnp.ones(())), {}

    params = {"layers": jnp.ones((depth, width, width)) / width}
    split, batch = update.Split(deep, spread), {"x": jnp.ones((rows, width))}

    def held(parts):
        run = functools.partial(
            update.two_pass, split, accumulation=parts, trainable={"layers": True}
        )
        return jax.jit(run).lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    one, eight = held(1), held(8)
    assert one > depth * rows * width * 4 and eight < 0.4 * one, (one, eight)
