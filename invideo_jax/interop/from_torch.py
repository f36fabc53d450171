"""PyTorch state dicts (as NumPy arrays) to parameter trees."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from invideo_jax.interop import mapping

PyTree = Any


def to_params(state: Mapping[str, Any], *, layout: str, expected: PyTree) -> PyTree:
    """The parameter tree of a PyTorch state dict.

    Args:
        state: key -> array or `Leaf`.
        layout: name in `names.LAYOUTS`.
        expected: (abstract) parameter tree of the model, without boxes: what shapes must come out.

    Returns:
        Nested dictionary of arrays in the dtypes of `state`, contiguous.

    Raises:
        UserError: keys that are missing or not used, or arrays of another shape than the model's.
    """
    shapes = {path: tuple(x.shape) for path, x in flatten_dict(expected, sep="/").items()}
    leaves = mapping.to_leaves(state, layout=layout, expected=shapes)
    arrays = {path: np.asarray(value.read(), order="C") for path, value in leaves.items()}
    return unflatten_dict(arrays, sep="/")
