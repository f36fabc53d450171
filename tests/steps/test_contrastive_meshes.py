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
from tests.steps import plain_alignment as plain
from tests.steps import small_alignment as small

ROWS = 32  # each of 8 devices has a row of each of 4 microbatches
RATE = 0.01
ONE = dict(data=1)
MESHES = dict(data=dict(data=8), fsdp=dict(data=2, fsdp=4), tensor=dict(data=2, fsdp=2, tensor=2))
FORMS = ("dense", "chunked", "ring")
MATRIX = [
    *itertools.product(MESHES, (1, 2, 4), FORMS, ("softmax",)),
    *itertools.product(MESHES, (2,), FORMS, ("sigmoid",)),
]
KINDS_OF_LOSS = ("vtc", "avtm", "mlm", "uta")  # one of each


def step_on(sizes, made, params, batch, init, **options):
    """(averages, gradient) of one step, on the host: plain descent moves by the gradient times the rate.

    The rate is small, so that the temperature stays away from its bounds.
    """
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh, tx = sharding.make_mesh(**sizes, devices=devices), optax.sgd(RATE)
    step = contrastive.make_train_step(
        model=made,
        tx=tx,
        stage_key=small.KEY,
        chunk=5,
        equal_texts=True,
        **small.OPTIONS,
        **options,
    )
    boxed = jax.eval_shape(lambda: init(made, jax.random.key(0)))
    start = state.create(jax.tree.map(jnp.array, params), tx, keep_ema=False)
    start = jax.device_put(start, sharding.state_shardings(start, boxed, mesh))
    with sharding.use(mesh):
        rows = sharding.global_batch(batch, mesh)
        run = jax.jit(step).lower(start, rows)
        fast = dict(xla_backend_optimization_level=0)
        after, metrics = run.compile(compiler_options=fast)(start, rows)
    moved = jax.tree.map(
        lambda a, b: (b - np.asarray(a)) / RATE, jax.device_get(after.params), params
    )
    names = [*options["weights"], "loss", "grad_norm"]
    return jax.device_get({name: metrics[name] for name in names}), moved


def compare(found, want, weights):
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True)
    for a, b in pairs:
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    assert all(float(want[0][name].weight) > 4 for name in weights)
    assert max(np.abs(x).max() for x in jax.tree.leaves(want[1])) > 1e-2


@functools.cache
def alone(names, kind):
    """One device, one pass, all scores at once."""
    return plain_on(ONE, names, parts=1, form="dense", kind=kind)


def plain_on(sizes, names, *, parts, form, kind):
    made = plain.Plain(dropout=0.1, initial_bias=-2.0 if kind == "sigmoid" else None)
    given = made, plain.params(made), plain.batch(ROWS), plain.init
    weights = {name: small.ALL[name] for name in names}
    return step_on(sizes, *given, weights=weights, accumulation=parts, form=form, kind=kind)


def check(mesh, names, kind="softmax", **cut):
    with jax.enable_x64(True):
        want = alone(tuple(names), kind)
        compare(plain_on(MESHES[mesh], names, kind=kind, **cut), want, names)
    return want


def test_losses_of_every_kind_on_a_ring_of_eight_devices_in_two_microbatches():
    check("fsdp", KINDS_OF_LOSS, parts=2, form="ring")


@pytest.mark.slow
@pytest.mark.parametrize("mesh, parts, form, kind", MATRIX)
def test_all_losses_of_plain_towers_on_all_meshes(mesh, parts, form, kind):
    """All twelve losses, with dropout, masks and negatives; all parameters move."""
    _, moved = check(mesh, small.ALL, kind, parts=parts, form=form)
    assert min(np.abs(x).max() for x in jax.tree.leaves(moved)) > 1e-6


@pytest.mark.slow  # minutes of compiling each
@pytest.mark.parametrize("names", [("vtc", "vtm"), tuple(small.ALL)], ids=len)
def test_the_model_itself_on_a_ring_of_eight_devices_in_two_microbatches(names):
    weights = {name: small.ALL[name] for name in names}
    with jax.enable_x64(True):
        made = small.model(jnp.float64, dropout=0.1)
        given = made, small.params(np.float64), small.batch(ROWS, np.float64), stage2.init
        want = step_on(ONE, *given, weights=weights, accumulation=1, form="dense")
        found = step_on(MESHES["tensor"], *given, weights=weights, accumulation=2, form="ring")
    compare(found, want, weights)


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
