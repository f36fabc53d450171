"""Losses, negatives and rows over the whole batch: loops in NumPy, and all forms on all meshes alike."""

import contextlib
import functools
import importlib.util
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

from invideo_jax import negatives, pairs, sharding
from invideo_jax.errors import UserError

MESHES = [dict(data=2, fsdp=1), dict(data=2, fsdp=4), dict(data=2, fsdp=2, tensor=2)]
WIDE = [
    *(dict(data=1, fsdp=n) for n in (1, 4, 8)),
    *(dict(data=n, fsdp=1) for n in (4, 8)),
    dict(data=2, fsdp=2),
    dict(data=1, tensor=8),
]


def mesh_of(sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return sharding.use(sharding.make_mesh(devices=devices, **sizes))


def example(size=24, width=5, seed=0, share=0.7, kinds=12, dtype=np.float64):
    """Embeddings of any length, ids with repetitions, rows that lack a side."""
    rng = np.random.default_rng(seed)
    a, b = (rng.normal(size=(size, width)).astype(dtype) * 3 for _ in range(2))
    return a, b, rng.integers(0, kinds, size).astype(np.uint32), rng.random(size) < share


def loss_loop(a, b, temperature, bias, ids, valid, kind):
    """One pair after the other; rows that are not valid do not exist."""
    rows = np.nonzero(valid)[0]
    a, b = (x / np.sqrt((x**2).sum(1, keepdims=True)) for x in (a, b))
    total = 0.0
    for one, other in ((a, b), (b, a)):
        for i in rows:
            scores = np.array([one[i] @ other[j] / temperature + bias for j in rows])
            same = np.array([ids[i] == ids[j] for j in rows])
            if kind == "softmax":
                total -= (scores - np.log(np.exp(scores).sum()))[same].mean() / 2
            else:
                total += np.log1p(np.exp(np.where(same, -scores, scores))).sum() / 2
    return total / len(rows)


@functools.cache
def runner(kind, form, chunk=1024):
    """Jitted (a, b, temperature, bias, ids, valid) -> (value, weight), four gradients."""

    def loss(a, b, temperature, bias, ids, valid):
        bias = bias if kind == "sigmoid" else None
        said = dict(ids=ids, valid=valid, kind=kind, bias=bias, form=form, chunk=chunk)
        found = pairs.contrastive(a, b, temperature=temperature, **said)
        return found.value, found.weight

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))


def assert_close(found, wanted, tolerance=1e-10):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 0, tolerance), found, wanted)


# -------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("kind", pairs.KINDS)
def test_each_form_is_a_loop_over_pairs(kind):
    a, b, ids, valid = example()
    want = loss_loop(a, b, 0.2, -1.5 * (kind == "sigmoid"), ids, valid, kind)
    with jax.enable_x64(True):
        for form in pairs.FORMS:
            run = runner(kind, form, chunk=5)
            given = np.float64(0.2), np.float64(-1.5), ids, valid
            (value, weight), grads = run(a, b, *given)
            assert value.dtype == grads[0].dtype == np.float64
            np.testing.assert_allclose(value, want, rtol=1e-10)
            assert float(weight) == valid.sum()


def compare(meshes, chunks, seeds, share):
    """Every form on each mesh against the dense one without a mesh: value, weight, four gradients."""
    with jax.enable_x64(True):
        for seed in seeds:
            a, b, ids, valid = example(seed=seed, share=share)
            given = a, b, np.float64(0.1), np.float64(-2.0), ids, valid
            for kind in pairs.KINDS:
                want = runner(kind, "dense")(*given)
                assert all(np.abs(x).max() > 1e-3 for x in want[1][: 3 + (kind == "sigmoid")])
                for sizes in meshes:
                    for form, chunk in ((f, c) for c in chunks for f in FORMS):
                        with mesh_of(sizes):
                            assert_close(runner(kind, form, chunk)(*given), want)


FORMS = ("chunked", "ring")


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_forms_and_meshes_agree_in_value_and_gradients(sizes):
    compare([sizes], chunks=[5], seeds=[3], share=0.7)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_forms_and_meshes_agree_however_chunks_fall(share):
    compare([*MESHES, *WIDE], chunks=[1, 7], seeds=range(2), share=share)


@pytest.mark.parametrize("form", pairs.FORMS)
@pytest.mark.parametrize("kind", pairs.KINDS)
def test_rows_that_lack_a_side_might_as_well_not_be_there(kind, form):
    a, b, ids, valid = example()
    a[~valid], b[~valid] = np.nan, np.inf
    with jax.enable_x64(True):
        given = np.float64(0.1), np.float64(-2.0)
        some = runner(kind, "dense")(a[valid], b[valid], *given, ids[valid], valid[valid])
        with mesh_of(dict(data=2, fsdp=2)):
            run = runner(kind, form, chunk=5)
            found, grads = run(a, b, *given, ids, valid)
            nothing, flat = run(a, b, *given, ids, valid & False)
    assert_close((found, grads[2:]), (some[0], some[1][2:]))
    for ours, right in zip(grads[:2], some[1][:2]):
        assert_close(np.asarray(ours)[valid], right)
        assert np.all(np.asarray(ours)[~valid] == 0)
    assert float(nothing[0]) == float(nothing[1]) == 0 and not any(np.any(g) for g in flat)


@pytest.mark.parametrize("form", FORMS)
def test_low_temperature_and_bfloat16_are_summed_in_float32(form):
    a, b, ids, valid = example(dtype=np.float32)
    low = np.float32(0.001), np.float32(0), ids, valid  # scores up to 1000, whose exp overflows
    for kind in pairs.KINDS:
        want = runner(kind, "dense")(a, b, *low)
        found = runner(kind, form, chunk=5)(a, b, *low)
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(want)):
            np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * float(np.abs(y).max()))
    small = [jnp.asarray(x, jnp.bfloat16) for x in (a, b)]
    (found, _), grads = runner("softmax", form, chunk=5)(*small, *low)
    (want, _), _ = runner("softmax", "dense")(*(np.asarray(x, np.float32) for x in small), *low)
    assert found.dtype == np.float32 and grads[0].dtype == jnp.bfloat16
    np.testing.assert_allclose(found, want, rtol=1e-5)


@pytest.mark.parametrize("form", pairs.FORMS)
def test_a_number_that_is_none_is_not_hidden(form):
    a, b, ids, valid = example(dtype=np.float32)
    a[np.nonzero(valid)[0][3]] = np.nan
    for kind in pairs.KINDS:
        run = runner(kind, form, chunk=1024 if form == "dense" else 5)
        (value, _), _ = run(a, b, np.float32(0.1), np.float32(0), ids, valid)
        assert np.isnan(value)


# ----------------------------------------------------------------------------------------- negatives


@functools.cache
def drawer(form, chunk=1024, floor=0.0):
    """Jitted (keys, a, b, temperature, ids, valid) -> columns, whether there is one."""

    def draw(keys, a, b, temperature, ids, valid):
        said = dict(temperature=temperature, ids=ids, valid=valid)
        return pairs.hard_negatives(keys, a, b, floor=floor, form=form, chunk=chunk, **said)

    return jax.jit(draw)


def weights_loop(a, b, temperature, ids, valid, floor):
    """Probability of each column for each row."""
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    table = np.zeros((len(a), len(a)))
    for i in range(len(a)):
        scores = np.where(valid, np.exp(b @ a[i] / temperature), 0)
        for j in range(len(a)):
            if valid[j] and ids[i] != ids[j]:
                table[i, j] = scores[j] / scores.sum() + floor
    return table / np.maximum(table.sum(1, keepdims=True), 1e-30)


def shares(run, draws, *given):
    """How often each column is drawn for each row, and whether rows have one."""
    keys = jax.random.split(jax.random.key(0), (draws, len(given[0])))
    found, exists = jax.jit(jax.vmap(lambda k: run(k, *given)))(keys)
    return np.stack([(np.asarray(found) == j).mean(0) for j in range(len(given[0]))], 1), exists


@pytest.mark.parametrize("floor", [0.0, 0.05])
def test_negatives_come_as_often_as_their_weights_say(floor):
    a, b, ids, valid = example(size=8, kinds=6, seed=1, dtype=np.float32)
    assert 4 <= valid.sum() < 8
    want = weights_loop(a, b, 0.5, ids, valid, floor)
    share, exists = shares(drawer("dense", 1024, floor), 2000, a, b, np.float32(0.5), ids, valid)
    np.testing.assert_array_equal(exists, np.tile(valid, (2000, 1)))
    np.testing.assert_allclose(share[valid], want[valid], atol=0.05)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    made = np.asarray(negatives.weights(unit[0] @ unit[1].T / 0.5, ids, valid, floor=floor))
    made = made / made.sum(1, keepdims=True)
    np.testing.assert_allclose(made[valid], want[valid], atol=1e-6)


@pytest.mark.parametrize("sizes", [None, MESHES[2]], ids=str)
def test_every_form_and_mesh_draws_the_same_negatives(sizes):
    a, b, ids, valid = example(dtype=np.float32)
    keys = jax.random.split(jax.random.key(1), len(a))
    given = keys, a, b, np.float32(0.2), ids, valid
    for form, chunk, floor in (("chunked", 7, 0.05), ("ring", 5, 0.0), ("ring", 5, 0.05)):
        want, exists = drawer("dense", 1024, floor)(*given)
        assert np.unique(want).size > 5 and np.array_equal(exists, valid)
        with mesh_of(sizes) if sizes else contextlib.nullcontext():
            found = drawer(form, chunk, floor)(*given)
        np.testing.assert_array_equal(found[0], want)
        np.testing.assert_array_equal(found[1], exists)


@pytest.mark.parametrize("form", ["dense", "ring"])
def test_negatives_are_never_alike_nor_padding_however_unlikely_the_others(form):
    ids, valid = np.array([5, 5, 5, 7, 8, 9]), np.array([1, 1, 1, 1, 0, 0], bool)
    a = np.tile(np.float32([1, 0]), (6, 1))
    b = a * np.float32([1, 1, 1, -1, 1, 1])[:, None]  # only row 3 may be drawn, and is farthest
    for temperature, floor in ((1e-3, 0.0), (np.inf, 0.0), (1e-3, 0.01)):
        run = drawer(form, 4, floor)
        for seed in range(4):
            keys = jax.random.split(jax.random.key(seed), 6)
            found, exists = map(np.asarray, run(keys, a, b, np.float32(temperature), ids, valid))
            assert np.all(found[:3] == 3) and found[3] in (0, 1, 2) and found.dtype == np.int32
            np.testing.assert_array_equal(exists, valid)
    found, exists = run(keys, a, b, np.float32(1), np.full(6, 4), valid)
    assert not np.any(exists) and not np.any(found)


def test_a_negative_depends_on_its_rows_key_alone_and_temperature_inf_draws_all_alike():
    a, b, ids, valid = example(size=6, kinds=10**6, share=1.0, dtype=np.float32)
    given = a, b, np.float32(np.inf), ids, valid
    share, _ = shares(drawer("dense"), 3000, *given)
    np.testing.assert_allclose(share, (1 - np.eye(6)) / 5, atol=0.035)
    keys = jax.random.split(jax.random.key(0), (20, 6))
    mixed = jnp.concatenate([keys[0, :3], keys[1, 3:]])
    first, again = (np.asarray(drawer("dense")(k, *given)[0]) for k in (keys[0], mixed))
    np.testing.assert_array_equal(first[:3], again[:3])
    several = np.stack([drawer("dense")(k, *given)[0] for k in keys])
    assert np.all([np.unique(column).size > 1 for column in several.T])


def test_noise_is_gumbels_and_the_same_wherever_a_chunk_begins():
    words = jax.random.bits(jax.random.key(0), (40, 2), jnp.uint32)
    noise = np.asarray(pairs.gumbel(words, jnp.arange(5000), jnp.float32))
    assert np.all(np.isfinite(noise))
    later = pairs.gumbel(words, jnp.arange(777, 1000), jnp.float32)
    np.testing.assert_array_equal(noise[:, 777:1000], later)
    assert abs(noise.mean() - np.euler_gamma) < 0.012
    assert abs(noise.var() - np.pi**2 / 6) < 0.03
    # The share above x is 1 - exp(-exp(-x)); rows and columns are unlike each other.
    for x in (-1.0, 0.0, 2.0, 6.0):
        share = -np.expm1(-np.exp(-x))
        assert abs((noise > x).mean() - share) < 5 * np.sqrt(share / noise.size)
    for table in (noise[:, :40], noise[:, :40].T):
        assert np.abs(np.corrcoef(table) - np.eye(40)).max() < 0.7
    assert np.abs(np.corrcoef(noise) - np.eye(40)).max() < 0.08


# --------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("sizes", [None, MESHES[1], MESHES[2]], ids=str)
def test_rows_are_taken_and_their_gradients_put_back(sizes):
    rng = np.random.default_rng(0)
    x, index = rng.normal(size=(16, 3, 2)), rng.integers(0, 16, 16).astype(np.int32)
    assert np.unique(index).size < 16
    back = rng.normal(size=x.shape)
    want = np.zeros_like(x)
    for i, j in enumerate(index):
        want[j] += back[i]

    def both(form):
        value = lambda x: (pairs.take_rows(x, index, form=form) * back).sum()
        flags = np.arange(16) % 3 == 0, np.arange(16, dtype=np.int32)
        taken = [pairs.take_rows(jnp.asarray(f), index, form=form) for f in flags]
        return pairs.take_rows(x, index, form=form), jax.grad(value)(x), *taken

    with jax.enable_x64(True):
        for form in ("dense", "ring"):
            with mesh_of(sizes) if sizes else contextlib.nullcontext():
                found = jax.jit(both, static_argnums=0)(form)
            np.testing.assert_array_equal(found[0], x[index])
            np.testing.assert_allclose(found[1], want, atol=1e-12)
            np.testing.assert_array_equal(found[2], index % 3 == 0)
            np.testing.assert_array_equal(found[3], index)


# -------------------------------------------------------------------------------------------- memory


def compiled(f, sizes, rows, width):
    """A program over `rows` rows on each device of the mesh."""
    with mesh_of(sizes):
        mesh = jax.sharding.get_mesh()
        where, whole = sharding.batch_sharding(mesh), jax.NamedSharding(mesh, jax.P())
        size = rows * mesh.shape["data"] * mesh.shape["fsdp"]

        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=where if shape else whole)

        given = [array((size, width), jnp.float32)] * 2
        given += [array((), jnp.float32), array((size,), jnp.uint32), array((size,), bool)]
        given += [array((size, 2), jnp.uint32)]
        results = jax.tree.map(lambda x: where if x.ndim else whole, jax.eval_shape(f, *given))
        return jax.jit(f, out_shardings=results).lower(*given).compile()


def loss_of(form, kind="softmax"):
    def loss(a, b, t, ids, valid, _):
        return pairs.contrastive(
            a, b, temperature=t, ids=ids, valid=valid, kind=kind, form=form, chunk=8
        ).value

    return jax.value_and_grad(loss, (0, 1, 2))


def draw_of(form, kind=None):
    def draw(a, b, t, ids, valid, keys):
        keys, said = jax.random.wrap_key_data(keys), dict(temperature=t, ids=ids, valid=valid)
        column, exists = pairs.hard_negatives(keys, a, b, floor=0.1, form=form, chunk=8, **said)
        return pairs.take_rows(a, column, form=form), exists

    return draw


def largest(program) -> int:
    """Elements of the largest array on a device."""
    shapes = re.findall(r"\w\[([\d,]+)\]", program.as_text())
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize(
    "make, kind", [(loss_of, "softmax"), (loss_of, "sigmoid"), (draw_of, None)]
)
def test_on_the_ring_no_array_and_no_memory_grows_with_the_devices(make, kind):
    rows, width = 32, 20
    four, eight = (compiled(make("ring", kind), dict(data=2, fsdp=n), rows, width) for n in (2, 4))
    assert largest(four) == largest(eight) == rows * width  # nothing of B*B, B*P, nor rows*B
    assert eight.memory_analysis().temp_size_in_bytes == four.memory_analysis().temp_size_in_bytes


def test_in_chunks_no_device_holds_the_scores_of_its_rows():
    rows, width, size = 32, 4, 256
    ours = largest(compiled(loss_of("chunked"), dict(data=2, fsdp=4), rows, width))
    dense = largest(compiled(loss_of("dense"), dict(data=2, fsdp=4), rows, width))
    assert ours == size * width and dense >= rows * size


@pytest.mark.slow
def test_a_million_pairs_fit_256_megabytes_of_each_of_1024_tpu_chips():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: the TPU compiler is absent")
    command = [sys.executable, "tests/benchmarks/bench_contrastive_memory.py", "--only=ring"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "1024 chips" in done.stdout and "ring, 1,048,576 pairs" in done.stdout


# -------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(kind="softmx"), "kind must be one of .*got kind='softmx'.*softmax"),
        (dict(form="rings"), "form must be one of .*got form='rings'.*ring"),
        (dict(bias=1.0), "bias is of kind='sigmoid'; got kind='softmax'"),
        (dict(form="ring", chunk=0), "chunk must be at least 1 column; got chunk=0"),
        (dict(form="ring"), "multiple of the mesh's data x fsdp = 8; got 12 rows"),
    ],
)
def test_wrong_options_say_so(options, words):
    a, b, ids, valid = example(size=12)
    with mesh_of(dict(data=2, fsdp=4)), pytest.raises(UserError, match=words):
        pairs.contrastive(a, b, temperature=0.1, ids=ids, valid=valid, **options)
