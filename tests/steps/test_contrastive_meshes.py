"""The contrastive stage gives one loss and one gradient on every mesh, in every form, however it is cut."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from invideo_jax import sharding, state
from invideo_jax.models import stage2
from invideo_jax.steps import contrastive
from tests.steps import small_alignment as small

ROWS = 32  # each of 8 devices has a row of each of 4 microbatches
RATE = 0.01
FEW = dict(vtc=1.0, vtm=0.9)
MESHES = dict(one=dict(data=1), data=dict(data=8), fsdp=dict(data=2, fsdp=4),
              tensor=dict(data=2, fsdp=2, tensor=2))  # fmt: skip
MATRIX = [
    (mesh, parts, form)
    for mesh, parts, form in itertools.product(MESHES, (1, 2, 4), ("dense", "chunked", "ring"))
    # Each mesh and number of parts in one form, each form on each mesh; not all 36.
    if (list(MESHES).index(mesh) + parts + len(form)) % 3 == 0 or (mesh, parts) == ("tensor", 2)
]


def step_on(mesh, weights, *, parts, form, dropout):
    """(averages, gradient) of one step, on the host: plain descent moves by the gradient times the rate.

    The rate is small, so that the temperature stays away from its bounds.
    """
    made = small.model(jnp.float64, dropout=dropout)
    boxed = jax.eval_shape(lambda: stage2.init(made, jax.random.key(0)))
    tx = optax.sgd(RATE)
    step = contrastive.make_train_step(
        model=made, tx=tx, stage_key=small.KEY, weights=weights, accumulation=parts, form=form,
        chunk=5, equal_texts=True, **small.OPTIONS,
    )  # fmt: skip
    params = small.params(np.float64)
    start = state.create(jax.tree.map(jnp.array, params), tx, keep_ema=False)
    start = jax.device_put(start, sharding.state_shardings(start, boxed, mesh))
    rows = sharding.global_batch(small.batch(ROWS, np.float64), mesh)
    with sharding.use(mesh):
        run = jax.jit(step).lower(start, rows)
        after, metrics = run.compile(compiler_options={"xla_backend_optimization_level": 0})(
            start, rows
        )
    moved = jax.tree.map(
        lambda a, b: (b - np.asarray(a)) / RATE, jax.device_get(after.params), params
    )
    names = [*weights, "loss", "grad_norm"]
    return jax.device_get({name: metrics[name] for name in names}), moved


@functools.cache
def alone(names, dropout):
    """One device, one pass, all scores at once."""
    mesh = sharding.make_mesh(data=1, devices=jax.devices()[:1])
    weights = {name: small.ALL[name] for name in names}
    return step_on(mesh, weights, parts=1, form="dense", dropout=dropout)


def check(mesh, weights, *, parts, form, dropout):
    devices = jax.devices()[: 1 if mesh == "one" else 8]
    mesh = sharding.make_mesh(**MESHES[mesh], devices=devices)
    with jax.enable_x64(True):
        want = alone(tuple(weights), dropout)
        found = step_on(mesh, weights, parts=parts, form=form, dropout=dropout)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert all(float(want[0][name].weight) > 4 for name in weights)
    assert max(np.abs(x).max() for x in jax.tree.leaves(want[1])) > 1e-2


@pytest.mark.slow
def test_a_ring_of_eight_devices_in_two_microbatches_is_one_device():
    weights = {name: small.ALL[name] for name in FEW}
    check("tensor", weights, parts=2, form="ring", dropout=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh, parts, form", MATRIX)
def test_all_losses_on_all_meshes(mesh, parts, form):
    check(mesh, small.ALL, parts=parts, form=form, dropout=0.1)


@pytest.mark.slow
def test_memory_of_activations_falls_with_accumulation():
    """What a compiled step on 8 devices holds in between, of 64 rows each."""
    made = small.model()
    tx, mesh = optax.sgd(1.0), sharding.make_mesh(data=8)
    boxed = jax.eval_shape(lambda: stage2.init(made, jax.random.key(0)))
    rows = small.batch(512)

    def held(parts):
        step = contrastive.make_train_step(
            model=made, tx=tx, stage_key=small.KEY, weights=dict(vtc=1.0, vtm=1.0),
            accumulation=parts, form="chunked", chunk=32, **small.OPTIONS,
        )  # fmt: skip
        start = state.create(small.params(), tx, keep_ema=False)
        start = jax.device_put(start, sharding.state_shardings(start, boxed, mesh))
        with sharding.use(mesh):
            lowered = jax.jit(step).lower(start, sharding.global_batch(rows, mesh))
            return lowered.compile().memory_analysis().temp_size_in_bytes

    one, eight = held(1), held(8)
    assert eight < 0.5 * one, (one, eight)
