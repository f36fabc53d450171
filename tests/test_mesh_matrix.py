"""The real masked train step gives one loss and one gradient on every mesh and accumulation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import optim, sharding, state
from invideo_jax.models import video_mae
from invideo_jax.steps import masked

BATCH = 32
# data x fsdp x tensor x sequence on 8 devices.
LAYOUTS = ["8111", "1811", "1181", "1118", "2411", "4121", "2114", "1222", "2221", "2122", "1142"]
CASES = [(layout, parts) for layout in LAYOUTS for parts in (1, 2, 4)]
FAST = [("2221", 2), ("2114", 4), ("1811", 1)]
# 13 of 16 places hidden at each of 2 times: 6 visible tokens, which 4 or 8 devices do not divide.
MASK = dict(name="tube", ratio=0.82)
PARAMS = [pytest.param(*case, marks=() if case in FAST else pytest.mark.slow) for case in CASES]


def small(**overrides):
    """A VideoMAE with 8 heads of everything, so that every axis can be split eight ways."""
    sizes = dict(
        width=32, depth=2, heads=8, mlp_width=64, decoder_width=16, decoder_depth=2,
        decoder_heads=8, decoder_mlp_width=32, patch=8, tubelet=2, frames=4, image_size=32,
        scan=True, remat="full", layer_scale=0.5, drop_path=0.3,
    )  # fmt: skip
    return video_mae.make(**(sizes | overrides))


def make_batch(dtype=np.float64):
    rng = np.random.default_rng(0)
    return {
        "video": rng.normal(size=(BATCH, 4, 32, 32, 3)).astype(dtype),
        "position": np.arange(1000, 1000 + BATCH, dtype=np.uint32),
        "label": np.full(BATCH, -1, np.int32),
        "valid": np.arange(BATCH) % 5 != 3,
    }


def make_step(model, boxed, accumulation):
    # Plain gradient descent at rate 1: the change of the parameters is the gradient.
    tx, _ = optim.make_optimizer(
        "sgd", schedule=optax.constant_schedule(1.0), params=boxed, momentum=0.0
    )
    step = masked.make_train_step(
        model=model, tx=tx, stage_key=jax.random.key(7), mask=MASK,
        accumulation=accumulation,
    )  # fmt: skip
    return step, lambda params: state.create(params, tx, keep_ema=False)


def to_double(boxed):
    return jax.tree.map(lambda x: x.astype(jnp.float64), boxed)


@functools.cache
def initial(model):
    """Parameters in double precision, on the host."""
    init = lambda: sharding.unbox(video_mae.init(model, jax.random.key(0)))
    return jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(init)())


def run_step(mesh, accumulation=1):
    """(loss, gradient by path) of one jitted, donated step on `mesh`."""
    model = small(dtype=jnp.float64)
    boxed = jax.eval_shape(lambda: to_double(video_mae.init(model, jax.random.key(0))))
    step, make_state = make_step(model, boxed, accumulation)
    # Copied, because the step gives its input's buffers away.
    start = make_state(jax.tree.map(jnp.array, initial(model)))
    where = sharding.state_shardings(start, boxed, mesh)
    start = jax.device_put(start, where)
    batch = sharding.global_batch(make_batch(), mesh)
    with sharding.use(mesh):
        after, metrics = jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(where, None),
            # Halves the time to compile; how the program is split over devices stays the same.
            compiler_options={"xla_backend_optimization_level": 0},
        )(start, batch)
    gradient = jax.tree.map(lambda b, a: b - np.asarray(a), initial(model), after.params)
    assert int(metrics["skipped"]) == 0
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return float(metrics["loss"].value), {sharding.path_of(p): g for p, g in leaves}


@functools.cache
def one_device():
    return run_step(sharding.make_mesh(data=1, devices=jax.devices()[:1]))


def agree(got, want):
    assert got[0] == pytest.approx(want[0], rel=0, abs=1e-10)
    assert got[1].keys() == want[1].keys()
    for path, gradient in want[1].items():
        np.testing.assert_allclose(got[1][path], gradient, rtol=0, atol=1e-10, err_msg=path)


def mesh_of(layout):
    return sharding.make_mesh(**dict(zip(sharding.MESH_AXES, map(int, layout))))


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def test_the_reference_is_in_double_precision_and_every_gradient_is_there(x64):
    loss, gradient = one_device()
    assert 0.5 < loss < 5
    assert all(g.dtype == np.float64 for g in gradient.values())
    # Gradients are far above the tolerance, so agreement within it says something.
    smallest = min(np.abs(g).max() for g in gradient.values())
    assert smallest > 1e-6


@pytest.mark.parametrize("layout, parts", PARAMS)
def test_loss_and_gradients_equal_one_device(x64, layout, parts):
    agree(run_step(mesh_of(layout), parts), one_device())


def count_constraints(model, mesh, *, train):
    boxed = jax.eval_shape(lambda: video_mae.init(model, jax.random.key(0)))
    loss = masked.make_loss(model=model, stage_key=jax.random.key(7), mask=MASK)
    function = lambda params, batch: loss(params, batch)[0].total
    function = jax.grad(function) if train else function
    shapes = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in make_batch(np.float32).items()}
    lowered = jax.jit(function).lower(sharding.unbox(boxed), shapes)
    return lowered.as_text().count("sdy.sharding_constraint")


@pytest.mark.parametrize("scan, bodies", [(True, 2), (False, 4)])
def test_constraints_reach_the_lowered_program(scan, bodies):
    """Where they are lost (a plain `with mesh:`, a renamed helper), this count falls to 0."""
    model = small(scan=scan, remat="none")
    mesh = mesh_of("2221")
    with sharding.use(mesh):
        # Each block: its input and output, q, k, v, mixed values, MLP; and once the patches.
        assert count_constraints(model, mesh, train=False) == 7 * bodies + 1
        assert count_constraints(model, mesh, train=True) >= 2 * (7 * bodies)
    assert count_constraints(model, mesh, train=False) == 0
