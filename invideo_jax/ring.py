"""All pairs of a batch whose rows lie on many devices: in chunks of columns, or block by block round a ring.

The rows of a batch are cut into equal blocks along the mesh axes of 'batch'. A walk brings every
block of columns together with every block of rows; what is summed for columns travels with them.
Without a mesh there is one block, and the same code runs without communication.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from invideo_jax.errors import UserError
from invideo_jax.sharding import spec

PyTree = Any
# (what rows have so far, columns, what columns have so far) -> (rows, columns' next)
Meet = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh axes that cut a batch into `parts` equal blocks of rows; no axes: one block."""

    axes: tuple[str, ...]
    parts: int

    def run(self, f: Callable, *by_row: PyTree, whole: PyTree = ()) -> tuple[PyTree, PyTree]:
        """`f` on every device: (blocks of `by_row` ..., whole) -> (values by row, values for all).

        Inside `f` the other methods may be used; values for all must be equal on all devices.
        """
        if self.parts == 1:
            return f(*by_row, whole)
        rows, everywhere = PartitionSpec(self.axes), PartitionSpec()
        return jax.shard_map(
            f,
            in_specs=(*(rows for _ in by_row), everywhere),
            out_specs=(rows, everywhere),
            check_vma=False,
        )(*by_row, whole)

    def sum(self, x: PyTree) -> PyTree:
        """Sum over all blocks."""
        return x if self.parts == 1 else jax.lax.psum(x, self.axes)

    def index(self) -> jax.Array | int:
        """Number of this device's block."""
        return 0 if self.parts == 1 else jax.lax.axis_index(self.axes)

    def rows(self, size: int) -> jax.Array:
        """Numbers of this block's `size` rows in the whole batch, int32."""
        return self.index() * size + jnp.arange(size, dtype=jnp.int32)

    def next(self, x: PyTree) -> PyTree:
        """Hands `x` on to the next block's device and takes that of the one before."""
        if self.parts == 1:
            return x
        to = [(i, (i + 1) % self.parts) for i in range(self.parts)]
        return jax.lax.ppermute(x, self.axes, to)

    def gather(self, x: PyTree) -> PyTree:
        """All blocks of `x`, joined."""
        if self.parts == 1:
            return x
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.axes, tiled=True), x)

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """This device's block of the sum of all devices' `x`."""
        if self.parts == 1:
            return x
        return jax.lax.psum_scatter(x, self.axes, scatter_dimension=0, tiled=True)

    def block_of_max(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The maximum of all devices' `x`, and this device's block of it."""
        if self.parts == 1:
            return x, x
        x = jax.lax.pmax(x, self.axes)
        size = len(x) // self.parts
        return x, jax.lax.dynamic_slice_in_dim(x, self.index() * size, size)


def split_of(size: int) -> Split:
    """How the mesh in use cuts `size` rows of a batch.

    Raises:
        UserError: blocks of unequal size.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Split((), 1)
    (axes,) = spec(("batch",))
    axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if size % parts:
        raise UserError(
            f"The rows must be a multiple of the mesh's {' x '.join(axes)} = {parts}; got "
            f"{size} rows. Use such a batch size, or form='dense'."
        )
    return Split(axes, parts)


def over_chunks(meet: Meet, rows: PyTree, columns: PyTree, sums: PyTree, chunk: int):
    """`meet` with at most `chunk` columns at a time; padding columns are zeros (False).

    Returns:
        (rows, sums of all columns).
    """
    size = len(jax.tree.leaves(columns)[0])
    count = -(-size // chunk)
    if count == 1:
        return meet(rows, columns, sums)
    each = -(-size // count)
    fill = count * each - size

    def cut(x):
        x = jnp.pad(x, ((0, fill), *((0, 0) for _ in x.shape[1:])))
        return x.reshape(count, each, *x.shape[1:])

    rows, sums = jax.lax.scan(
        lambda rows, piece: meet(rows, *piece), rows, jax.tree.map(cut, (columns, sums))
    )
    return rows, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:size], sums)


def around(split: Split, meet: Meet, rows: PyTree, columns: PyTree, sums: PyTree):
    """`meet` with every block of columns in turn; `sums` are at home again in the end.

    The columns are sent on before they are used, so that sending and computing may overlap.

    Returns:
        (rows, sums).
    """
    if split.parts == 1:
        return meet(rows, columns, sums)

    def hop(carry, _):
        rows, columns, sums = carry
        following = split.next(columns)
        rows, sums = meet(rows, columns, sums)
        return (rows, following, split.next(sums)), None

    (rows, _, sums), _ = jax.lax.scan(hop, (rows, columns, sums), length=split.parts)
    return rows, sums


def walk(
    split: Split,
    form: str,
    chunk: int,
    meet: Meet,
    rows: PyTree,
    columns: PyTree,
    start: Callable[[PyTree], PyTree],
    merge: Callable[[PyTree], PyTree],
) -> tuple[PyTree, PyTree]:
    """Every row of this device meets every column of the batch.

    Args:
        form: 'ring' passes blocks on; 'chunked' gathers the columns on every device.
        chunk: columns that are met at a time.
        meet: what happens then.
        rows: what rows have in the beginning.
        columns: this device's block; arrays [n, ...].
        start: columns -> what they have in the beginning, arrays [n, ...].
        merge: what all columns have on each device -> this device's block of it over all devices.

    Returns:
        What this device's rows have, and its columns.
    """
    piecewise = functools.partial(over_chunks, meet, chunk=chunk)
    if form == "ring":
        return around(split, piecewise, rows, columns, start(columns))
    columns = split.gather(columns)
    rows, sums = piecewise(rows, columns, start(columns))
    return rows, merge(sums)


# -------------------------------------------------------------------------------------- rows by number


def take(split: Split, x: jax.Array, index: jax.Array) -> jax.Array:
    """`x[index]` with blocks of `x` [B, ...] passing by; so do those of its gradient.

    Args:
        index: int [B], from 0 to B-1.
    """
    return (_take if jnp.issubdtype(x.dtype, jnp.inexact) else _picked)(split, x, index)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _take(split: Split, x: jax.Array, index: jax.Array) -> jax.Array:
    return _picked(split, x, index)


def _picked(split: Split, x: jax.Array, index: jax.Array) -> jax.Array:
    def run(x, index, _):
        def meet(out, block, _):
            rows, first = block
            here, place = _within(index, first, len(rows))
            return jnp.where(_wide(here, out), rows[place], out), ()

        block = x, split.index() * len(x)
        return around(split, meet, jnp.zeros_like(x), block, ())[0], ()

    return split.run(run, x, index)[0]


def _put_back(split: Split, index: jax.Array, grad: jax.Array):
    def run(index, grad, _):
        def meet(_, first, block):
            here, place = _within(index, first, len(block))
            return (), block.at[place].add(jnp.where(_wide(here, grad), grad, 0))

        first = split.index() * len(grad)
        return around(split, meet, (), first, jnp.zeros_like(grad))[1], ()

    return split.run(run, index, grad)[0], None


def _within(index, first, size):
    place = index - first
    here = (place >= 0) & (place < size)
    return here, jnp.where(here, place, 0)


def _wide(flags, like):
    return flags.reshape(-1, *(1 for _ in like.shape[1:]))


_take.defvjp(lambda split, x, index: (_picked(split, x, index), index), _put_back)
