"""Mesh, rules, constraints, state shardings, and which process reads which rows."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from invideo_jax import explain, sharding, state
from invideo_jax.errors import UserError
from invideo_jax.models import sizes as sizes_table
from invideo_jax.models import video_mae


def box(value, *names):
    return nn.LogicallyPartitioned(value, names)


def init_params(width=16, mlp=32):
    """A small tree with every kind of leaf; boxed."""
    key = jax.random.key(0)
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(key, i), shape)
    return {
        "patch_embed": {"kernel": box(draw(0, 24, width), "patch", "embed")},
        "blocks": {
            "up": {"kernel": box(draw(1, 3, width, mlp), "layers", "embed", "mlp")},
            "norm": {"scale": box(draw(2, 3, width), "layers", "norm")},
        },
        "mask_token": box(draw(3, width), "norm"),
    }


def make_state(params):
    return state.create(params, optax.adam(1e-3), keep_ema=True)


# ------------------------------------------------------------------------------------------- rules


def test_spec_follows_the_table():
    got = sharding.spec(("layers", "embed", "heads"))
    assert got == PartitionSpec(None, "fsdp", "tensor")
    assert sharding.spec(("batch", "tokens", "act_mlp")) == PartitionSpec(
        ("data", "fsdp"), "sequence", "tensor"
    )


def test_a_mesh_axis_serves_one_dimension_only():
    assert sharding.spec(("heads", "mlp")) == PartitionSpec("tensor", None)
    assert sharding.spec(("embed", "batch")) == PartitionSpec("fsdp", "data")


@pytest.mark.parametrize("with_mesh", [False, True])
def test_constrain_refuses_unknown_names_with_and_without_a_mesh(with_mesh):
    x = jnp.ones((4, 8))
    with pytest.raises(ValueError, match="got 'token'.*Did you mean \"tokens\""):
        if with_mesh:
            with sharding.use(sharding.make_mesh(data=8)):
                jax.jit(lambda x: sharding.constrain(x, "batch", "token"))(x)
        else:
            sharding.constrain(x, "batch", "token")


def test_constrain_wants_a_name_per_dimension():
    with pytest.raises(ValueError, match="one name per dimension"):
        sharding.constrain(jnp.ones((4, 8)), "batch")


def test_constrain_is_the_identity_without_a_mesh():
    x = jnp.ones((4, 8))
    assert sharding.constrain(x, "batch", "tokens") is x


def test_constrain_reaches_the_lowered_program_and_places_the_result():
    mesh = sharding.make_mesh(data=2, sequence=4)
    with sharding.use(mesh):
        f = jax.jit(lambda x: sharding.constrain(2 * x, "batch", "tokens", "act_embed"))
        x = jnp.arange(4 * 8 * 2.0).reshape(4, 8, 2)
        assert f.lower(x).as_text().count("sdy.sharding_constraint") == 1
        y = f(x)
    assert y.sharding.spec[:2] == ("data", "sequence")
    np.testing.assert_array_equal(y, 2 * np.asarray(x))


def test_constrain_allows_token_counts_that_do_not_divide():
    x = jnp.arange(4 * 10.0).reshape(4, 10)
    mesh = sharding.make_mesh(data=2, sequence=4)
    step = lambda x: sharding.constrain(x + 1, "batch", "tokens")
    with sharding.use(mesh):  # inside a step; an array that leaves it must divide, as parameters do
        y = jax.jit(step, out_shardings=sharding.replicated(mesh))(x)
    np.testing.assert_array_equal(y, np.asarray(x) + 1)


def test_rules_of_use_replace_the_table_and_must_name_mesh_axes():
    mesh = sharding.make_mesh(data=8)
    with sharding.use(mesh, {"frames": "data"}):
        assert sharding.spec(("frames",)) == PartitionSpec("data")
        with pytest.raises(ValueError, match="'batch'"):
            sharding.spec(("batch",))
    with pytest.raises(ValueError, match="batch='dta'.*Did you mean \"data\""):
        with sharding.use(mesh, {"batch": "dta"}):
            pass


def test_flax_init_with_an_unknown_name_is_refused():
    tree = {"kernel": box(jnp.ones((8, 8)), "embd", "mlp")}
    mesh = sharding.make_mesh(data=8)
    with pytest.raises(ValueError, match="Parameter kernel.*got 'embd'.*Did you mean \"embed\""):
        sharding.param_shardings(tree, mesh)


# ---------------------------------------------------------------------------------------- the mesh


def test_one_open_size_takes_the_rest():
    assert sharding.mesh_sizes(8, data=-1, tensor=2) == dict(data=4, fsdp=1, tensor=2, sequence=1)
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=2, sequence=2)
    assert dict(mesh.shape) == dict(data=1, fsdp=2, tensor=2, sequence=2)
    assert all(t == jax.sharding.AxisType.Auto for t in mesh.axis_types)


@pytest.mark.parametrize(
    "sizes, said",
    [
        (dict(data=3), r"devices, 8; got data=3.*product 3.*divisors: 1, 2, 4, 8"),
        (dict(data=4, fsdp=4), r"product 16"),
        (dict(data=-1, tensor=3), r"product 3"),
        (dict(data=-1, fsdp=-1), r"At most one"),
        (dict(data=0), r"mesh\.data=0"),
        (dict(tensor=2.0), r"mesh\.tensor=2\.0"),
    ],
)
def test_wrong_mesh_sizes_say_what_fits(sizes, said):
    with pytest.raises(UserError, match=said):
        sharding.mesh_sizes(8, **sizes)


def _tpu_slices(slices, chips):
    """Look-alikes of the devices of several slices of a CPU-like platform."""
    return [
        types.SimpleNamespace(
            slice_index=s, process_index=s, id=s * chips + i, platform="cpu", device_kind="fake"
        )
        for s in range(slices)
        for i in range(chips)
    ]


def test_slices_are_joined_along_data_only(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        sharding, "Mesh", lambda array, names, axis_types: seen.update(array=array) or array
    )
    sharding.make_mesh(data=-1, fsdp=2, tensor=2, devices=_tpu_slices(2, 8))
    owner = np.vectorize(lambda d: d.slice_index)(seen["array"])
    assert owner.shape == (4, 2, 2, 1)
    for i, s in enumerate([0, 0, 1, 1]):
        assert (owner[i] == s).all()
    with pytest.raises(UserError, match="multiple of the number of slices, 2.*data=1.*8 devices"):
        sharding.make_mesh(data=1, fsdp=16, devices=_tpu_slices(2, 8))


def test_batch_sizes_that_do_not_divide_name_the_nearest():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    sharding.check_batch(mesh, 24, accumulation=3)
    with pytest.raises(UserError, match=r"2\*2\*3 = 12; got batch_size=30. Nearest valid: 24, 36"):
        sharding.check_batch(mesh, 30, accumulation=3)
    with pytest.raises(UserError, match="Nearest valid: 4"):
        sharding.check_batch(mesh, 3)
    with pytest.raises(UserError, match="accumulation=0"):
        sharding.check_batch(mesh, 8, accumulation=0)


def test_heads_must_be_whole_on_each_device():
    mesh = sharding.make_mesh(data=2, tensor=4)
    sharding.check_heads(mesh, 12)
    with pytest.raises(UserError, match="heads=6, tensor=4.*from: 1, 2, 3, 6"):
        sharding.check_heads(mesh, 6)


def test_heads_of_all_models_in_a_model():
    model = video_mae.build("Micro")
    found = dict(sharding.heads_of(model))
    assert found == {"encoder.heads": model.encoder.heads, "decoder_heads": model.decoder_heads}


# --------------------------------------------------------------------------------------- the state


def test_state_follows_parameters_by_path_and_shape():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    got = sharding.abstract_sharded_state(init_params, make_state, mesh)
    where = {
        sharding.path_of(p): x.sharding.spec for p, x in jax.tree_util.tree_leaves_with_path(got)
    }
    kernel = PartitionSpec(None, "fsdp", "tensor")
    for prefix in ("params", "ema", "opt_state/0/mu", "opt_state/0/nu"):
        assert where[f"{prefix}/blocks/up/kernel"] == kernel
        assert where[f"{prefix}/patch_embed/kernel"] == PartitionSpec(None, "fsdp")
        assert where[f"{prefix}/mask_token"] == PartitionSpec(None)
    for scalar in ("step", "opt_state/0/count", "counters/skipped"):
        assert where[scalar] == PartitionSpec()


def test_a_large_array_that_follows_nothing_is_refused():
    mesh = sharding.make_mesh(data=8)
    boxed = jax.eval_shape(init_params)
    extra = {"table": jax.ShapeDtypeStruct((100, 100), jnp.float32)}
    with pytest.raises(ValueError, match=r"table \(100, 100\), which matches no parameter"):
        sharding.state_shardings(extra, boxed, mesh)


def test_dimensions_that_do_not_divide_name_parameter_axis_and_sizes():
    boxed = jax.eval_shape(lambda: init_params(width=20))
    mesh = sharding.make_mesh(data=1, fsdp=8)
    with pytest.raises(UserError, match=r"blocks/up/kernel.*'embed' = 20 over fsdp = 8.*1, 2, 4"):
        sharding.param_shardings(boxed, mesh)


def test_parameters_without_names_or_with_too_few_are_refused():
    with pytest.raises(ValueError, match=r"name its axes; a/b \(3,\)"):
        sharding.logical_axes({"a": {"b": jnp.ones(3)}})
    with pytest.raises(ValueError, match="one axis name per dimension; a"):
        sharding.logical_axes({"a": box(jnp.ones((2, 2)), "embed")})


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (1, 8, 1, 1), (2, 2, 2, 1), (1, 4, 2, 1)])
def test_init_gives_the_same_values_on_every_mesh_and_is_never_whole(sizes):
    names = dict(zip(sharding.MESH_AXES, sizes))
    mesh = sharding.make_mesh(**names)
    got = sharding.create_sharded_state(init_params, make_state, mesh)
    want = jax.jit(lambda: sharding.unbox(init_params()))()
    # Random bits are equal; since JAX 0.12 their way to a normal number may round otherwise.
    equal = lambda a, b: np.testing.assert_array_max_ulp(np.asarray(a), np.asarray(b), maxulp=4)
    jax.tree.map(equal, got.params, want)
    jax.tree.map(equal, got.ema, want)
    kernel = got.params["blocks"]["up"]["kernel"]
    part = kernel.addressable_shards[0].data.size
    assert part * names["fsdp"] * names["tensor"] == kernel.size
    assert not any(sharding.is_box(x) for x in jax.tree.leaves(got, is_leaf=sharding.is_box))


def test_moving_average_and_parameters_have_buffers_of_their_own():
    """Else donating the state to the first step would give one buffer away twice."""
    got = sharding.create_sharded_state(init_params, make_state, sharding.make_mesh(data=8))
    where = [
        shard.data.unsafe_buffer_pointer()
        for x in jax.tree.leaves((got.params, got.ema, got.opt_state))
        for shard in x.addressable_shards
    ]
    assert len(where) == len(set(where))


@pytest.mark.parametrize("size", ["S", "B", "L", "H", "H-internvideo1", "g"])
@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (1, 4, 2, 1)])
def test_published_models_are_spread_evenly(size, sizes):
    model = video_mae.build(size)
    boxed = jax.eval_shape(lambda: video_mae.init(model, jax.random.key(0)))
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes)))
    rows = explain.parameter_rows(boxed, mesh)
    count = sum(int(np.prod(row.shape)) for row in rows)
    assert count == sizes_table.video_mae(size).params
    held = sum(row.bytes for row in rows)
    assert 4 * count / 8 <= held < 1.05 * 4 * count / 8


# --------------------------------------------------------------------------------------- the batch


def _cluster(sizes, processes):
    """A mesh look-alike whose devices belong to processes in contiguous runs, as on real hosts."""
    count = int(np.prod(sizes))
    devices = np.empty(count, object)
    for i in range(count):
        devices[i] = types.SimpleNamespace(process_index=i * processes // count)
    shape = dict(zip(sharding.MESH_AXES, sizes))
    return types.SimpleNamespace(devices=devices.reshape(sizes), shape=shape)


def _naive_rows(mesh, batch_size, process):
    """Row by row: which device block is it in, and does the process own a copy of that block?"""
    data, fsdp, tensor, sequence = mesh.devices.shape
    rows = []
    for row in range(batch_size):
        block = row * data * fsdp // batch_size
        copies = [
            mesh.devices[block // fsdp, block % fsdp, t, s]
            for t in range(tensor)
            for s in range(sequence)
        ]
        if any(d.process_index == process for d in copies):
            rows.append(row)
    return rows


SIZES_24 = [(24, 1, 1, 1), (1, 24, 1, 1), (3, 8, 1, 1), (2, 3, 4, 1), (2, 1, 6, 2), (1, 2, 3, 4)]


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("sizes", SIZES_24)
def test_rows_of_processes_cover_the_batch(sizes, processes):
    mesh = _cluster(sizes, processes)
    rows = [sharding.rows_of_process(mesh, 48, p) for p in range(processes)]
    for p in range(processes):
        assert rows[p].tolist() == _naive_rows(mesh, 48, p)
    count = np.bincount(np.concatenate(rows), minlength=48)
    if sizes[2] * sizes[3] == 1:
        assert (count == 1).all(), "each row is read once where nothing crosses processes"
    else:
        assert (count >= 1).all()


def test_a_tensor_axis_across_processes_makes_them_read_the_same_rows():
    mesh = _cluster((2, 1, 4, 1), 4)  # 8 devices, 2 per process, 4 devices share a row block
    got = [sharding.rows_of_process(mesh, 8, p).tolist() for p in range(4)]
    assert got == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7]]


def test_rows_agree_with_jax():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp"))).devices_indices_map((16,))
    rows = {i for index in where.values() for i in range(16)[index[0]]}
    assert sorted(rows) == sharding.rows_of_process(mesh, 16).tolist()


@pytest.mark.parametrize("sizes", [(8, 1, 1, 1), (2, 2, 2, 1), (1, 4, 1, 2), (1, 1, 8, 1)])
def test_global_batch_holds_the_rows_in_order(sizes):
    mesh = sharding.make_mesh(**dict(zip(sharding.MESH_AXES, sizes)))
    batch = {
        "video": np.arange(16 * 3, dtype=np.uint8).reshape(16, 3),
        "position": np.arange(16, dtype=np.uint32),
    }
    got = sharding.global_batch(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(got[name], value)
        assert got[name].dtype == value.dtype
        assert got[name].sharding == sharding.batch_sharding(mesh)


def test_global_batch_of_one_process_of_several(monkeypatch):
    """Each process hands over its own rows only; the assembled shards are the right ones."""
    mesh = sharding.make_mesh(data=4, tensor=2)
    full = np.arange(100, 116)
    pieces = {}
    for process in range(4):
        owned = np.array([process])  # block p of 4 belongs to process p
        monkeypatch.setattr(sharding, "_blocks_of_process", lambda m, p, owned=owned: owned)
        rows = full[process * 4 : process * 4 + 4]

        def build(shape, place, shard, process=process):
            index = (slice(process * 4, process * 4 + 4), *[slice(None)] * (len(shape) - 1))
            pieces[process] = (shape, shard(index))
            return shape

        monkeypatch.setattr(jax, "make_array_from_callback", build)
        sharding.global_batch({"x": rows}, mesh)
    for process, (shape, piece) in pieces.items():
        assert shape == (16,)
        np.testing.assert_array_equal(piece, full[process * 4 : process * 4 + 4])


# ----------------------------------------------------------------------------------------- explain


def test_explain_counts_bytes_per_device():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    boxed = jax.eval_shape(init_params)
    rows = {r.path: r for r in explain.parameter_rows(boxed, mesh)}
    kernel = rows["blocks/up/kernel"]
    assert kernel == ("blocks/up/kernel", (3, 16, 32), ("layers", "embed", "mlp"),
                      ("-", "fsdp", "tensor"), 3 * 16 * 32 * 4 // 8)  # fmt: skip
    assert rows["mask_token"].bytes == 16 * 4
    abstract = sharding.abstract_sharded_state(init_params, make_state, mesh)
    totals = explain.state_bytes(abstract)
    params = sum(r.bytes for r in rows.values())
    assert totals["params"] == totals["ema"] == params
    assert totals["opt_state"] == 2 * params + 4
    real = sharding.create_sharded_state(init_params, make_state, mesh)
    held = sum(
        x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((real.params, real.opt_state))
    )
    assert held == totals["params"] + totals["opt_state"]


def test_explain_table_reads_well():
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    abstract = sharding.abstract_sharded_state(init_params, make_state, mesh)
    text = explain.table(jax.eval_shape(init_params), abstract, mesh)
    assert "mesh: data=1, fsdp=4, tensor=2, sequence=1 (8 devices)" in text
    assert "blocks/up/kernel    3x16x32  layers, embed, mlp  -, fsdp, tensor  768 B" in text
    assert "1,984 parameters" in text
