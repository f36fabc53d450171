"""The weights of teachers: where they come from, on which devices they lie, and what tells them apart.

Teachers stand beside the train state and are saved with no checkpoint: a run only keeps their digest.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from invideo_jax import digests, handover, sharding
from invideo_jax.errors import UserError

PyTree = Any
RANDOM = "random:"


def seed_of(source: str, *, key: str = "source") -> int | None:
    """S of 'random:S'; None for a folder.

    Raises:
        UserError: neither.
    """
    if not source:
        raise UserError(
            f"{key} must say where the teacher's weights are; got an empty one. Give a folder that "
            "python -m invideo_jax.interop.from_torch wrote, a workdir, or 'random:0' to try things out."
        )
    if not source.startswith(RANDOM):
        return None
    if not source.removeprefix(RANDOM).isdecimal():
        raise UserError(f"{key} must be a folder or 'random:SEED'; got {source!r}.")
    return int(source.removeprefix(RANDOM))


def identity(source: str, *, key: str = "source") -> str:
    """16 hex digits of where weights come from; reads only what stands beside them.

    Of an imported folder those of its files' hashes, of a workdir its checkpoint's digest.
    """
    if seed_of(source, key=key) is not None:
        said: Any = source
    else:
        said = handover.open_source(source, key=key).about["digest"]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def place(
    init_params: Callable[[], PyTree],
    sources: Mapping[str, str],
    mesh: Mesh,
    *,
    dtype: jnp.dtype = jnp.float32,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    key: str = "stages.NAME.teachers",
) -> PyTree:
    """The parameters of all teachers on their devices; no process ever holds a whole one.

    Args:
        init_params: () -> boxed parameters, {teacher: tree}; those of 'random:SEED' are computed by it.
        sources: teacher -> folder that `from_torch` wrote, workdir, or 'random:SEED'.
        mesh: devices; parameters lie as those of the student.
        dtype: what floating-point parameters are kept in.
        options: teacher -> further arguments of `handover.plan`.
        key: config key that messages name.
    """
    boxed = jax.eval_shape(init_params)
    where = sharding.param_shardings(boxed, mesh)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, _kept(x.dtype, dtype), sharding=s),
        sharding.unbox(boxed),
        where,
    )
    placed = {}
    with sharding.use(mesh):
        for name, wanted in target.items():
            at = f"{key}.{name}"
            if seed_of(sources[name], key=f"{at}.source") is not None:
                placed[name] = _random(init_params, name, wanted)
                continue
            found = handover.open_source(sources[name], key=at)
            more = (options or {}).get(name, {})
            table = handover.plan(wanted, found.shapes, about=found.about, key=at, **more)
            placed[name] = handover.apply(table, found.get, lambda n=name: init_params()[n])
    return placed


def _kept(have: jnp.dtype, dtype: jnp.dtype) -> jnp.dtype:
    return dtype if jnp.issubdtype(have, jnp.floating) else have


def _random(init_params: Callable[[], PyTree], name: str, wanted: PyTree) -> PyTree:
    def make() -> PyTree:
        tree = sharding.unbox(init_params())[name]
        return jax.tree.map(lambda x, want: x.astype(want.dtype), tree, wanted)

    return jax.jit(make, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))()


def digest(params: PyTree) -> str:
    """16 hex digits of the weights themselves, whatever devices they lie on.

    Raises:
        UserError: NaN or infinity among them.
    """
    found, bad = digests.tree_digests(params)
    if bad:
        raise UserError(
            f"The weights of a teacher must be finite; {len(bad)} arrays are not, the first is {bad[0]}. "
            "Convert the file again."
        )
    leaves = digests.named_leaves(params)
    return digests.combined(
        {name: (*digests.specification(leaf), found[name]) for name, leaf in leaves.items()}
    )
