"""Parameter trees to PyTorch state dicts (as NumPy arrays)."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from invideo_jax.errors import UserError
from invideo_jax.interop import names

PyTree = Any


def to_state_dict(
    params: PyTree, *, layout: str, cube: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """The PyTorch state dict of a parameter tree, keys in the published order.

    Args:
        params: nested dictionary of arrays, without boxes.
        layout: name in `names.LAYOUTS`.
        cube: (frames, rows, columns) of one cube, which the patch kernel does not tell.

    Raises:
        UserError: a parameter that the layout has no key for.
    """
    table, flat = names.get(layout), flatten_dict(params, sep="/")
    rows = [row for row in table.rows if not row.optional or row.ours[0] in flat]
    named = {path for row in rows for path in row.ours}
    if named != set(flat):
        odd = ", ".join(sorted(named ^ set(flat))[:5])
        raise UserError(f"Layout {layout!r} and the parameters must match; they differ in {odd}.")
    state: dict[str, np.ndarray] = {}
    for group in _groups(rows):
        depth = np.shape(flat[group[0].ours[0]])[0] if "{i}" in group[0].theirs else None
        for i in range(depth or 1):
            for row in group:
                arrays = [np.asarray(flat[path]) for path in row.ours]
                arrays = arrays if depth is None else [x[i] for x in arrays]
                turned = [TURNS[row.turn](x, cube) for x in arrays]
                whole = turned[0] if len(turned) == 1 else np.concatenate(turned)
                state[row.theirs.format(i=i)] = np.ascontiguousarray(whole)
    return state


def _groups(rows: list[names.Row]) -> list[list[names.Row]]:
    """Rows of one stack together, since a state dict lists block after block."""
    groups: list[list[names.Row]] = []
    last = None
    for row in rows:
        stack = row.theirs.split("{i}")[0] if "{i}" in row.theirs else None
        if stack is None or stack != last:
            groups.append([])
        groups[-1].append(row)
        last = stack
    return groups


def _conv(x: np.ndarray, cube: tuple[int, int, int]) -> np.ndarray:
    return x.reshape(*cube, -1, x.shape[-1]).transpose(4, 3, 0, 1, 2)


TURNS = {
    "copy": lambda x, cube: x,
    "linear": lambda x, cube: x.T,
    "conv": _conv,
    "token": lambda x, cube: x.reshape(1, 1, -1),
}
