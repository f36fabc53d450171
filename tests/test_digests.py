"""Digests: equal on every mesh, different for every change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from invideo_jax import digests

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool", "float8_e4m3fn"]


def naive_digest(x: np.ndarray) -> str:
    """The definition, element by element, in Python integers."""
    if x.dtype == np.bool_:
        x = x.astype(np.uint8)
    width = {1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]
    one = two = 0
    for i, bits in enumerate(np.ascontiguousarray(x).reshape(-1).view(width).tolist()):
        w = (i * 2654435761) % 2**32 | 1
        v = ((w ^ (w >> 15)) * 2246822519) % 2**32 | 1
        one, two = (one + bits * w) % 2**32, (two + bits * v) % 2**32
    return f"{one:08x}{two:08x}"


def array(dtype: str, shape, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    return (rng.standard_normal(shape) * 50).astype(jnp.dtype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 7), (0, 3)])
def test_digest_is_its_definition(dtype, shape):
    x = array(dtype, shape)
    found, not_finite = digests.tree_digests(dict(x=jnp.asarray(x)))
    assert found == dict(x=naive_digest(x)) and not not_finite


def test_digest_in_x64():
    with jax.enable_x64(True):
        x = array("float64", (3, 4))
        found, _ = digests.tree_digests(dict(x=jnp.asarray(x)))
        assert found["x"] == naive_digest(x.view(np.uint32))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_digest_does_not_depend_on_the_mesh(axis_type):
    x = array("float32", (8, 16, 4))
    wanted = naive_digest(x)
    for shape in [(1, 1), (2, 1), (4, 2), (2, 4), (1, 8), (8, 1)]:
        devices = np.array(jax.devices()[: shape[0] * shape[1]]).reshape(shape)
        mesh = jax.sharding.Mesh(devices, ("a", "b"), axis_types=(axis_type,) * 2)
        for spec in [(), ("a",), (None, "b"), ("a", "b"), (("a", "b"),)]:
            y = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
            found, _ = digests.tree_digests(dict(x=y))
            assert found["x"] == wanted, (shape, spec)


def test_every_flipped_bit_is_seen():
    x = array("float32", (16, 8))
    before = digests.tree_digests(dict(x=x))[0]
    for position in range(0, x.nbytes * 8, 7):
        flipped = bytearray(x.tobytes())
        flipped[position // 8] ^= 1 << position % 8
        y = np.frombuffer(flipped, np.float32).reshape(x.shape)
        assert digests.tree_digests(dict(x=y))[0] != before, position


def test_swapped_elements_and_zeroed_blocks_are_seen():
    x = array("float32", (64, 8))
    before = digests.tree_digests(dict(x=x))[0]
    rng = np.random.default_rng(1)
    for _ in range(50):
        y = x.copy()
        i, j = rng.choice(64, 2, replace=False)
        y[[i, j]] = y[[j, i]]
        assert digests.tree_digests(dict(x=y))[0] != before
        z = x.copy()
        z[i, : rng.integers(1, 9)] = 0
        assert digests.tree_digests(dict(x=z))[0] != before


def test_not_finite_leaves_are_named():
    tree = dict(
        a=jnp.array([1.0, jnp.nan]), b=jnp.array([1.0]), c=jnp.array([jnp.inf], jnp.bfloat16)
    )
    assert digests.tree_digests(tree)[1] == ["a", "c"]


def test_names_groups_and_nesting():
    tree = dict(params=dict(k=jnp.ones(2)), opt_state=(dict(mu=jnp.ones(2)), ()), ema={})
    named = digests.named_leaves(tree)
    assert sorted(named) == ["opt_state/0/mu", "params/k"]
    assert jax.tree.structure(digests.unflatten(named)) == jax.tree.structure(
        dict(params=dict(k=0), opt_state={"0": dict(mu=0)})
    )
    rows = {"params/k": ((2,), "float32", "00"), "opt_state/0/mu": ((2,), "float32", "00")}
    groups = digests.by_group(rows)
    assert set(groups) == {"params", "opt_state", "all"}
    assert groups == digests.by_group(dict(reversed(rows.items())))
    for changed in [((3,), "float32", "00"), ((2,), "int32", "00"), ((2,), "float32", "01")]:
        other = digests.by_group(rows | {"params/k": changed})
        assert other["params"] != groups["params"] and other["opt_state"] == groups["opt_state"]
        assert other["all"] != groups["all"]


def test_equal_names_are_refused():
    with pytest.raises(ValueError, match="leaf names must be unique; got 'a/b' twice"):
        digests.named_leaves({"a/b": 1, "a": {"b": 2}})
