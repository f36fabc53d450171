"""Mesh, logical-axis rules, and the shardings of state, batch and activations.

Parameters and activations carry logical axis names; `RULES` maps each name to mesh axes. Axis types
are Auto, and the mesh is always entered with `use`, i.e. `jax.set_mesh`: under a plain `with mesh:`
sharding constraints would silently do nothing. An unknown logical name is an error everywhere.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.core import meta
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest

PyTree = Any
MESH_AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. A mesh axis serves one dimension of an array only: the first that asks.
RULES: dict[str, str | tuple[str, ...] | None] = {
    # Parameters. Attention kernels are 2-D [D, K*head], so that their gradients are
    # reduce-scattered over fsdp and not all-reduced.
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "mlp": "tensor",
    "patch": None,
    "pixels": "tensor",
    "vocabulary": "tensor",
    "norm": None,
    # Activations.
    "batch": BATCH_AXES,
    "tokens": "sequence",
    "kv_tokens": None,
    "act_embed": None,
    "act_heads": "tensor",
    "act_mlp": "tensor",
    "act_vocabulary": "tensor",
}

# A state array that follows no parameter is replicated up to this size (counters, coefficients).
_SMALL = 4096


def _rules() -> dict[str, str | tuple[str, ...] | None]:
    return dict(nn.get_logical_axis_rules()) or RULES


def spec(names: Sequence[str | None], rules: Mapping | None = None) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names.

    Args:
        names: one logical name for each dimension, None for a dimension that is never split.
        rules: table to use; default is the one of the enclosing `use`, else `RULES`.

    Raises:
        ValueError: a name that the table does not have.
    """
    rules = _rules() if rules is None else rules
    taken: set[str] = set()
    parts = []
    for name in names:
        if name is not None and name not in rules:
            raise ValueError(
                f"Logical axis names must be in the rules table; got {name!r} in {tuple(names)}."
                f"{nearest(name, rules)} Add a new name to RULES in invideo_jax/sharding.py."
            )
        axes = rules[name] if name is not None else None
        axes = (axes,) if isinstance(axes, str) else (axes or ())
        free = tuple(a for a in axes if a not in taken)
        taken.update(free)
        parts.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*parts)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says how an activation lies on the mesh; does nothing where no mesh is set.

    A dimension that its mesh axes do not divide is allowed (the compiler pads it).

    Args:
        x: activation with `len(names)` dimensions.
        names: a logical name for each dimension, or None.

    Raises:
        ValueError: an unknown name or a wrong number of names; also without a mesh.
    """
    if len(names) != x.ndim:
        raise ValueError(
            f"constrain needs one name per dimension; got names={names} for shape={x.shape}."
        )
    where = spec(names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, where)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Mapping = RULES) -> Iterator[Mesh]:
    """Enters the mesh and the rules; trace, lower and run every jitted step inside it."""
    _check_rules(rules)
    with jax.set_mesh(mesh), nn.logical_axis_rules(tuple(rules.items())):
        yield mesh


def _check_rules(rules: Mapping) -> None:
    for name, axes in rules.items():
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis not in MESH_AXES:
                raise ValueError(
                    f"A rule must name mesh axes {MESH_AXES}; got {name}={axes!r}."
                    f"{nearest(axis, MESH_AXES)}"
                )


# ---------------------------------------------------------------------------------------- the mesh


def divisors(n: int) -> list[int]:
    """All divisors of `n`, ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def mesh_sizes(
    devices: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1, sequence: int = 1
) -> dict[str, int]:
    """Fills in the one size that is -1 and checks the product against the device count.

    Raises:
        UserError: more than one -1, a size below 1, or a product that is not `devices`.
    """
    sizes = dict(data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
    said = ", ".join(f"{k}={v}" for k, v in sizes.items())
    for name, size in sizes.items():
        if not isinstance(size, int) or (size < 1 and size != -1):
            raise UserError(
                f"Mesh sizes must be whole numbers >= 1, or -1 for 'the rest'; got mesh.{name}={size!r}."
            )
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise UserError(
            f"At most one mesh size may be -1; got {said}. Write numbers for all but one of them."
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (not open_axes and fixed != devices):
        raise UserError(
            f"The product of the mesh sizes must be the number of devices, {devices}; got {said}, "
            f"product {fixed}. Each size must divide {devices} (its divisors: "
            f"{_listed(divisors(devices))}), or write -1 for one of them."
        )
    if open_axes:
        sizes[open_axes[0]] = devices // fixed
    return sizes


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    sequence: int = 1,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """The mesh (data, fsdp, tensor, sequence), laid out so that inner axes are near neighbours.

    Devices of several slices (TPU `slice_index`) are joined along `data` only: the slow network
    between slices carries one gradient reduction a step, and nothing else.

    Args:
        data, fsdp, tensor, sequence: sizes; at most one may be -1, which takes the rest.
        devices: default all devices of all processes.

    Raises:
        UserError: sizes that do not fit the devices, or `data` that the slices do not divide.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor, sequence=sequence)
    shape = tuple(sizes[name] for name in MESH_AXES)
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        if sizes["data"] % slices:
            raise UserError(
                f"mesh.data must be a multiple of the number of slices, {slices}: data is the axis "
                f"that crosses slices; got data={sizes['data']}. Lower fsdp, tensor or sequence, so "
                f"that their product fits one slice of {len(devices) // slices} devices."
            )
        inner = (sizes["data"] // slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(array, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def check_batch(mesh: Mesh, batch_size: int, *, accumulation: int = 1, name="batch_size") -> None:
    """Raises UserError unless every device gets the same number of rows in every microbatch."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    unit = data * fsdp * accumulation
    if accumulation < 1:
        raise UserError(f"accumulation must be at least 1; got accumulation={accumulation}.")
    if batch_size < 1 or batch_size % unit:
        low = batch_size // unit * unit
        near = [n for n in (low, low + unit) if n > 0]
        raise UserError(
            f"{name} must be a multiple of data*fsdp*accumulation = {data}*{fsdp}*{accumulation} = "
            f"{unit}; got {name}={batch_size}. Nearest valid: {_listed(near)}."
        )


def check_heads(mesh: Mesh, heads: int, *, name="heads") -> None:
    """Raises UserError unless the tensor axis splits attention between whole heads."""
    tensor = mesh.shape["tensor"]
    if heads % tensor:
        raise UserError(
            f"The number of heads must be a multiple of mesh.tensor; got {name}={heads}, "
            f"tensor={tensor}. Use mesh.tensor from: {_listed(divisors(heads))}."
        )


def heads_of(module: nn.Module, at: str = "") -> Iterator[tuple[str, int]]:
    """Numbers of attention heads of a model and of the models in it, each with its path ('predictor.heads')."""
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        if field.name in ("heads", "decoder_heads"):
            yield f"{at}{field.name}", value
        elif isinstance(value, nn.Module) and field.name != "parent":
            yield from heads_of(value, f"{at}{field.name}.")


# --------------------------------------------------------------------------------------- the state


def path_of(key_path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as 'a/b/c'."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in key_path
    )


def is_box(x: Any) -> bool:
    """Whether a tree node is a parameter with its axis names around it."""
    return isinstance(x, meta.AxisMetadata)


def unbox(tree: PyTree) -> PyTree:
    """The same tree without the boxes that hold the axis names."""
    return jax.tree.map(lambda x: x.value if is_box(x) else x, tree, is_leaf=is_box)


def logical_axes(boxed: PyTree) -> dict[str, tuple[str | None, ...]]:
    """Parameter path -> logical names of its dimensions, from a boxed (or abstract boxed) tree.

    Raises:
        ValueError: a parameter without names, or with another number of names than dimensions.
    """
    found = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        path = path_of(key_path)
        if not is_box(leaf):
            raise ValueError(
                f"Every parameter must name its axes; {path} {leaf.shape} has none. "
                "Wrap its init in nn.with_logical_partitioning."
            )
        if len(leaf.names) != leaf.value.ndim:
            raise ValueError(
                f"A parameter needs one axis name per dimension; {path} {leaf.value.shape} has "
                f"{leaf.names}."
            )
        found[path] = tuple(leaf.names)
    return found


def _param_sharding(path: str, leaf: Any, names: Sequence, mesh: Mesh, rules: Mapping):
    try:
        where = spec(names, rules)
    except ValueError as error:
        raise ValueError(f"Parameter {path} {leaf.shape}: {error}") from None
    for name, size, axes in zip(names, leaf.shape, where):
        parts = math.prod(mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
        if size % parts:
            raise UserError(
                f"Each dimension of a parameter must be a multiple of its mesh axes; got {path} "
                f"{leaf.shape}, axis {name!r} = {size} over {axes} = {parts}. "
                f"Use a size of mesh.{axes} from: {_listed(divisors(size)[:20])}."
            )
    return NamedSharding(mesh, where)


def param_shardings(boxed: PyTree, mesh: Mesh, rules: Mapping = RULES) -> PyTree:
    """A NamedSharding for each parameter (the tree has no boxes).

    Raises:
        ValueError: unknown axis name. UserError: a dimension that its mesh axes do not divide.
    """
    names = logical_axes(boxed)
    return jax.tree_util.tree_map_with_path(
        lambda p, x: _param_sharding(path_of(p), x, names[path_of(p)], mesh, rules), unbox(boxed)
    )


def state_shardings(state: PyTree, boxed: PyTree, mesh: Mesh, rules: Mapping = RULES) -> PyTree:
    """A NamedSharding for each array of a train state.

    An array whose path ends in a parameter's path and which has its shape (parameters themselves,
    their moving average, the moments of the optimiser) lies as that parameter; scalars and small
    arrays are replicated.

    Args:
        state: (abstract) state without boxes.
        boxed: (abstract) parameter tree with axis names.

    Raises:
        ValueError: a large array that follows no parameter.
    """
    where = {
        path_of(p): s
        for p, s in jax.tree_util.tree_leaves_with_path(param_shardings(boxed, mesh, rules))
    }
    shapes = {path_of(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(unbox(boxed))}

    def one(key_path, leaf):
        parts = path_of(key_path).split("/")
        for i in range(len(parts)):
            tail = "/".join(parts[i:])
            if shapes.get(tail) == leaf.shape:
                return where[tail]
        if leaf.size > _SMALL:
            raise ValueError(
                f"A state array must follow a parameter or be small; got {'/'.join(parts)} "
                f"{leaf.shape}, which matches no parameter by path and shape."
            )
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(one, state)


def abstract_sharded_state(
    init_params: Callable[[], PyTree],
    make_state: Callable[[PyTree], PyTree],
    mesh: Mesh,
    rules: Mapping = RULES,
) -> PyTree:
    """ShapeDtypeStructs with shardings of `make_state(unboxed params)`; computes nothing.

    Args:
        init_params: gives the boxed parameters; makes its random key itself.
        make_state: builds the state around unboxed parameters.
    """
    boxed = jax.eval_shape(init_params)
    state = jax.eval_shape(make_state, unbox(boxed))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        state_shardings(state, boxed, mesh, rules),
    )


def create_sharded_state(
    init_params: Callable[[], PyTree],
    make_state: Callable[[PyTree], PyTree],
    mesh: Mesh,
    rules: Mapping = RULES,
) -> PyTree:
    """Initialises the state in place: no device ever holds more than its part.

    Values do not depend on the mesh (JAX's default random bits are computed per element).
    Arguments as in `abstract_sharded_state`.
    """
    shardings = jax.tree.map(
        lambda x: x.sharding, abstract_sharded_state(init_params, make_state, mesh, rules)
    )
    with use(mesh, rules):
        return jax.jit(lambda: make_state(unbox(init_params())), out_shardings=shardings)()


# --------------------------------------------------------------------------------------- the batch


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How every array of a batch lies: rows over data and fsdp, copied along tensor and sequence."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _blocks_of_process(mesh: Mesh, process_index: int | None) -> np.ndarray:
    """Which of the data*fsdp row blocks the devices of one process hold, ascending."""
    if process_index is None:
        process_index = jax.process_index()
    owner = np.vectorize(lambda d: d.process_index, otypes=[int])(mesh.devices)
    mine = (owner == process_index).any(axis=(2, 3)).reshape(-1)  # [data * fsdp]
    return np.flatnonzero(mine)


def rows_of_process(mesh: Mesh, batch_size: int, process_index: int | None = None) -> np.ndarray:
    """Rows of the global batch that this process must read.

    Where tensor or sequence cross processes, several processes read the same rows.

    Args:
        batch_size: rows of the global batch.
        process_index: default this process.

    Returns:
        int64 [rows], ascending row numbers in [0, batch_size).

    Raises:
        UserError: `batch_size` is no multiple of data*fsdp.
    """
    check_batch(mesh, batch_size)
    each = batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    blocks = _blocks_of_process(mesh, process_index)
    return (blocks[:, None] * each + np.arange(each)).reshape(-1)


def global_batch(local: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Global arrays from the rows that this process has read.

    Args:
        local: arrays [rows, ...], the rows in the order of `rows_of_process`.

    Returns:
        Arrays [B, ...] with `batch_sharding`; B follows from the number of rows.
    """
    blocks = _blocks_of_process(mesh, None)
    total = mesh.shape["data"] * mesh.shape["fsdp"]
    sharding = batch_sharding(mesh)

    def one(name: str, rows: np.ndarray) -> jax.Array:
        if len(rows) % len(blocks):
            raise ValueError(
                f"The rows of a process must be a multiple of its {len(blocks)} row blocks; got "
                f"{name} with {len(rows)} rows."
            )
        each = len(rows) // len(blocks)
        place = {int(block): i * each for i, block in enumerate(blocks)}

        def shard(index):
            start = (index[0].start or 0) // each
            return rows[place[start] : place[start] + each]

        return jax.make_array_from_callback((total * each, *rows.shape[1:]), sharding, shard)

    return {name: one(name, np.asarray(rows)) for name, rows in local.items()}
