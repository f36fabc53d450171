"""Carries out a hand-over, leaf by leaf."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from invideo_jax import digests, sharding
from invideo_jax.handover.table import Row, Table
from invideo_jax.models import positions

PyTree = Any


def apply(
    table: Table, source_get: Callable[[str], Any], fresh_init: Callable[[], PyTree]
) -> PyTree:
    """The parameters of the new stage; all processes must call it together, under `sharding.use(mesh)`.

    Args:
        table: as planned; leaves are placed with the shardings of its targets.
        source_get: path -> NumPy or (sharded) jax array; asked once for each, in the table's order.
        fresh_init: () -> boxed or plain parameters of the whole new model; only what is fresh of them is
            computed.

    Raises:
        ValueError: the source gives another shape than planned.
    """
    made = _fresh({r.path: r.target for r in table.rows if r.transform == "fresh"}, fresh_init)
    leaves = {}
    for row in table.rows:
        if row.transform == "fresh":
            leaves[row.path] = made[row.path]
            continue
        value = source_get(row.source)
        if tuple(value.shape) != row.shape:
            raise ValueError(
                f"{row.source} must be {list(row.shape)} as planned; got {list(value.shape)}."
            )
        leaves[row.path] = _moved(row, value)
    return digests.unflatten(leaves)


def _fresh(wanted: Mapping[str, jax.ShapeDtypeStruct], init: Callable[[], PyTree]) -> dict:
    if not wanted:
        return {}

    def pick() -> dict:
        leaves = digests.named_leaves(sharding.unbox(init()))
        return {path: leaves[path].astype(want.dtype) for path, want in wanted.items()}

    # Unspecified shardings stay the compiler's choice; of the rest nothing is computed.
    return jax.jit(pick, out_shardings={path: want.sharding for path, want in wanted.items()})()


def _moved(row: Row, value: Any) -> jax.Array:
    """One leaf, transformed on the host unless it is copied from device to device."""
    want = row.target
    if isinstance(value, jax.Array) and row.transform == "copy":
        value = value if value.dtype == want.dtype else value.astype(want.dtype)
        return value if want.sharding is None else jax.device_put(value, want.sharding)
    array = _TRANSFORMS[row.transform](_on_host(value), **row.options)
    array = np.asarray(array.astype(want.dtype), order="C")  # ascontiguousarray makes [1] of []
    if array.shape != want.shape:
        raise ValueError(
            f"{row.path} must come out as {list(want.shape)}; got {list(array.shape)}."
        )
    if want.sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, want.sharding, lambda index: array[index])


def _on_host(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(value, tiled=True))
    return np.asarray(value)


def _interpolate(table: np.ndarray, *, old, new, prefix: int) -> np.ndarray:
    return positions.interpolate(
        table.astype(np.float32),
        old_times=old[0],
        old_space=tuple(old[1:]),
        grid=tuple(new),
        prefix=prefix,
    )


def _inflate(kernel: np.ndarray, *, frames: int, how: str) -> np.ndarray:
    return positions.inflate(kernel.astype(np.float32), frames, centre=how == "centre")


_TRANSFORMS: dict[str, Callable[..., np.ndarray]] = {
    "copy": lambda x: x,
    "positions": _interpolate,
    "inflate": _inflate,
    "rows": lambda x, *, rows: x[..., np.asarray(rows)],
}
