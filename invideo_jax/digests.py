"""Fingerprints of array trees that don't depend on how the arrays are laid out over devices.

Orbax restores a flipped byte in array data without a word (its checksum covers the shard index, not the chunks), so a
checkpoint carries these fingerprints and nothing is used before they were computed anew and compared.
"""

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

PyTree = Any


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Leaves by name, in tree order: 'params/encoder/kernel', 'opt_state/1/mu/...'.

    Raises:
        ValueError: two leaves would have the same name (a key holds a '/').
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(
                f"leaf names must be unique; got {name!r} twice. Rename the key that holds a '/'."
            )
        named[name] = leaf
    return named


def leaf_digest(x: jax.Array) -> jax.Array:
    """Two sums of the bit patterns of `x`, each weighted by position, and whether all is finite.

    Integer sums wrap and commute, so the result is the same for every sharding and order of summation; odd weights
    (invertible modulo 2**32) make any single changed element change the sum.

    Args:
        x: array of any shape; 1, 2, 4 or 8 bytes an element.

    Returns:
        uint32 [3]: sum, other sum, 1 if every element is finite else 0.
    """
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.bool_(True)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    bits = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    u = jax.lax.bitcast_convert_type(x, bits).astype(jnp.uint32)
    place = jnp.uint32(0)
    for axis, size in enumerate(u.shape):
        iota = jax.lax.broadcasted_iota(jnp.uint32, u.shape, axis)
        place = place * jnp.uint32(size & 0xFFFFFFFF) + iota
    first = (place * jnp.uint32(2654435761)) | jnp.uint32(1)
    second = ((first ^ (first >> 15)) * jnp.uint32(2246822519)) | jnp.uint32(1)
    total = lambda w: jnp.sum(u * w, dtype=jnp.uint32)
    return jnp.stack([total(first), total(second), finite.astype(jnp.uint32)])


@functools.lru_cache(maxsize=64)
def _compiled(out_sharding: NamedSharding | None):
    """The jitted `leaf_digest`, its result replicated so that every process can read it."""
    return jax.jit(leaf_digest, out_shardings=out_sharding)


def tree_digests(tree: PyTree) -> tuple[dict[str, str], list[str]]:
    """Digest of every leaf; all processes must call it together.

    One small program is compiled per distinct (shape, dtype, sharding), not one per leaf.

    Args:
        tree: jax or NumPy arrays.

    Returns:
        name -> 16 hex digits, and the names of the leaves that hold NaN or infinity.
    """
    pending = {}
    for name, leaf in named_leaves(tree).items():
        sharding = getattr(leaf, "sharding", None)
        replicated = (
            NamedSharding(sharding.mesh, PartitionSpec())
            if isinstance(sharding, NamedSharding)
            else None
        )
        pending[name] = _compiled(replicated)(leaf)
    fetched = jax.device_get(pending)
    digests = {name: f"{int(d[0]):08x}{int(d[1]):08x}" for name, d in fetched.items()}
    return digests, [name for name, d in fetched.items() if not d[2]]


def combined(leaves: dict[str, tuple[Any, str, str]]) -> str:
    """One digest of many leaves, independent of their order.

    Args:
        leaves: name -> (shape, dtype name, leaf digest).

    Returns:
        16 hex digits; '-' for no leaf at all.
    """
    if not leaves:
        return "-"
    lines = [
        f"{name} {tuple(int(n) for n in shape)} {dtype} {digest}\n"
        for name, (shape, dtype, digest) in sorted(leaves.items())
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def by_group(leaves: dict[str, tuple[Any, str, str]]) -> dict[str, str]:
    """`combined` for each first part of the names ('params', 'opt_state', 'ema', ...), and 'all'."""
    groups: dict[str, dict] = {}
    for name, row in leaves.items():
        groups.setdefault(name.split("/", 1)[0], {})[name] = row
    return {group: combined(rows) for group, rows in sorted(groups.items())} | {
        "all": combined(leaves)
    }


def unflatten(named: dict[str, Any]) -> dict[str, Any]:
    """Nested dictionaries from 'a/b/c' names."""
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *parents, last = name.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def specification(leaf: Any) -> tuple[tuple[int, ...], str]:
    """(shape, dtype name) of an array or of an abstract one."""
    return tuple(leaf.shape), np.dtype(leaf.dtype).name
