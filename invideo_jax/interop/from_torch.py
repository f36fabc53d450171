"""PyTorch state dicts (as NumPy arrays) to parameter trees."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from invideo_jax.errors import UserError
from invideo_jax.interop import names
from invideo_jax.registry import nearest

PyTree = Any
StateDict = Mapping[str, np.ndarray]

# How one PyTorch array becomes ours; `to_torch.TURNS` has the inverses.
TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "copy": lambda x: x,
    "linear": lambda x: x.T,  # (out, in) -> (in, out)
    # (O, C, t, h, w) -> (t*h*w*C, O): cubes are flattened with the channel fastest
    "conv": lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
    "token": lambda x: x.reshape(-1),  # (1, 1, D) -> (D,)
}


def to_params(state: StateDict, *, layout: str, expected: PyTree) -> PyTree:
    """The parameter tree of a PyTorch state dict.

    Args:
        state: key -> array.
        layout: name in `names.LAYOUTS`.
        expected: (abstract) parameter tree of the model, without boxes: what shapes must come out.

    Returns:
        Nested dictionary of arrays in the dtypes of `state`, contiguous.

    Raises:
        UserError: keys that are missing or not used, or arrays of another shape than the model's.
    """
    table = names.get(layout)
    state = {_spelled(key, table.aliases): value for key, value in state.items()}
    want = flatten_dict(expected, sep="/")
    rows = [row for row in table.rows if not row.optional or row.ours[0] in want]
    used: set[str] = set()
    found = {}
    for row in rows:
        depth = want[row.ours[0]].shape[0] if "{i}" in row.theirs else None
        keys = [row.theirs.format(i=i) for i in range(depth or 1)]
        used.update(keys)
        if all(key in state for key in keys):
            parts = [_turned(state[key], row, key) for key in keys]
            for path, *layers in zip(row.ours, *parts):
                whole = np.stack(layers) if depth is not None else layers[0]
                _check_shape(whole, want[path], path, keys[0])
                found[path] = np.ascontiguousarray(whole)
    _check_keys(used, set(state), layout)
    _check_paths(set(found), set(want), layout)
    return unflatten_dict(found, sep="/")


def _spelled(key: str, aliases: tuple[tuple[str, str], ...]) -> str:
    for pattern, spelling in aliases:
        key = re.sub(pattern, spelling, key)
    return key


def _turned(value: np.ndarray, row: names.Row, key: str) -> list[np.ndarray]:
    if row.turn == "linear" and value.ndim != 2 or row.turn == "conv" and value.ndim != 5:
        raise UserError(
            f"{key} must have {2 if row.turn == 'linear' else 5} dimensions; got {value.shape}."
        )
    if value.shape[0] % len(row.ours):
        raise UserError(
            f"{key} holds {len(row.ours)} equal arrays one after the other; got shape {value.shape}."
        )
    return [TURNS[row.turn](part) for part in np.split(value, len(row.ours))]


def _check_shape(value: np.ndarray, want: Any, path: str, key: str) -> None:
    if value.shape == tuple(want.shape):
        return
    hint = "Check the model's size: width, heads, MLP width."
    if value.ndim == len(want.shape) and value.shape[0] != want.shape[0]:
        hint = "Check patch, tubelet and channels." if "patch" in path else hint
    if path == "head/kernel" or path == "head/bias":
        hint = "Check patch and tubelet: the head predicts every pixel of a cube."
    raise UserError(
        f"The file and the model must have equal shapes; {key} gives {path} {value.shape}, the model "
        f"has {tuple(want.shape)} ({math.prod(want.shape)} numbers). {hint}"
    )


def _check_keys(used: set[str], have: set[str], layout: str) -> None:
    missing, left = sorted(used - have), sorted(have - used)
    if not missing and not left:
        return
    lines = [f"Every key must be used, and none be missing, of layout {layout!r}."]
    for what, keys in (("Missing", missing), ("Not used", left)):
        if keys:
            more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
            lines.append(f"{what}: {', '.join(keys[:5])}{more}.")
    hint = nearest(left[0], used) if left and missing else ""
    lines.append(f"Check layout, number of blocks, biases and last norm of the model.{hint}")
    raise UserError(" ".join(lines))


def _check_paths(found: set[str], want: set[str], layout: str) -> None:
    if found != want:
        lacking = ", ".join(sorted(want - found)[:5])
        raise UserError(f"Layout {layout!r} gives no value for parameters {lacking}. Use another.")
