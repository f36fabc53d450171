"""Parameter trees to PyTorch state dicts (as NumPy arrays)."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from invideo_jax.interop import mapping

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
    leaves = mapping.to_state(flatten_dict(params, sep="/"), layout=layout, cube=cube)
    return {key: np.asarray(value.read(), order="C") for key, value in leaves.items()}
