"""What lies where: every parameter with its axes and bytes per device, and the state in total."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from invideo_jax import sharding

PyTree = Any


class Row(NamedTuple):
    """One parameter: path, shape, logical axes, mesh axes of each dimension, bytes per device."""

    path: str
    shape: tuple[int, ...]
    logical: tuple[str | None, ...]
    mesh: tuple[str, ...]
    bytes: int


def bytes_per_device(x: Any) -> int:
    """Bytes of one device's part of an (abstract) array that has a sharding."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def parameter_rows(boxed: PyTree, mesh: Mesh, rules: Mapping = sharding.RULES) -> list[Row]:
    """A row for each parameter, in the order of the tree.

    Args:
        boxed: (abstract) parameter tree with axis names.
    """
    names = sharding.logical_axes(boxed)
    where = jax.tree.leaves(sharding.param_shardings(boxed, mesh, rules))
    rows = []
    leaves = jax.tree_util.tree_leaves_with_path(sharding.unbox(boxed))
    for (key_path, leaf), place in zip(leaves, where, strict=True):
        path = sharding.path_of(key_path)
        part = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
        axes = tuple("+".join((a,) if isinstance(a, str) else a or ()) or "-" for a in place.spec)
        rows.append(Row(path, tuple(leaf.shape), names[path], axes, bytes_per_device(part)))
    return rows


def state_bytes(state: Any) -> dict[str, int]:
    """Bytes per device of each field of a train state ('params', 'opt_state', 'ema', ...).

    Args:
        state: from `sharding.abstract_sharded_state`, or a real state.
    """
    fields = {name: getattr(state, name) for name in state.__dataclass_fields__}
    return {n: sum(map(bytes_per_device, jax.tree.leaves(tree))) for n, tree in fields.items()}


def human_bytes(n: int) -> str:
    """'12 B', '3.4 KiB', '1.2 GiB'."""
    value, unit = float(n), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{n} B" if unit == "B" else f"{value:.1f} {unit}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Text columns, left-aligned, two spaces apart; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def table(boxed: PyTree, state: Any, mesh: Mesh, rules: Mapping = sharding.RULES) -> str:
    """The text of `--explain`: mesh, parameters, totals.

    Args:
        boxed: (abstract) parameter tree with axis names.
        state: from `sharding.abstract_sharded_state`.
    """
    rows = parameter_rows(boxed, mesh, rules)
    cells = [("parameter", "shape", "logical axes", "mesh axes", "bytes/device")]
    for row in rows:
        logical = ", ".join(n or "-" for n in row.logical)
        shape = "x".join(map(str, row.shape))
        cells.append((row.path, shape, logical, ", ".join(row.mesh), human_bytes(row.bytes)))
    totals = state_bytes(state)
    said = ", ".join(f"{n} {human_bytes(b)}" for n, b in totals.items() if b)
    count = sum(math.prod(row.shape) for row in rows)
    sizes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return (
        f"mesh: {sizes} ({mesh.size} devices)\n\n{columns(cells)}\n\n{count:,} parameters. "
        f"State per device: {said}; together {human_bytes(sum(totals.values()))}."
    )
