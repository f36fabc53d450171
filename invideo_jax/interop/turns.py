"""How one array lies in PyTorch and in our parameters, by the names that `names.Row.turn` uses."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

Cube = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Turn:
    """Both directions.

    Attributes:
        ours: PyTorch array -> ours.
        theirs: our array, and (frames, rows, columns) of a cube -> PyTorch array.
        axes: axes of the PyTorch array; None for any number.
        dtypes: that ours and theirs always have; None for each other's.
    """

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray, Cube], np.ndarray]
    axes: int | None = None
    dtypes: tuple[type | None, type | None] = (None, None)


TURNS: dict[str, Turn] = {
    "copy": Turn(lambda x: x, lambda x, cube: x),
    "linear": Turn(lambda x: x.T, lambda x, cube: x.T, 2),  # (out, in) <-> (in, out)
    # (O, C, t, h, w) <-> (t*h*w*C, O): cubes are flattened with the channel fastest
    "conv": Turn(
        lambda x: x.transpose(2, 3, 4, 1, 0).reshape(-1, x.shape[0]),
        lambda x, cube: x.reshape(*cube, -1, x.shape[-1]).transpose(4, 3, 0, 1, 2),
        5,
    ),
    # (O, C, h, w) <-> (h*w*C, O)
    "conv2": Turn(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x, cube: x.reshape(*cube[1:], -1, x.shape[-1]).transpose(3, 2, 0, 1),
        4,
    ),
    # (O, 1, p, p) <-> (p*p, O): patches of a picture with one channel, whatever the clips' cubes are
    "square": Turn(
        lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
        lambda x, cube: x.T.reshape(x.shape[1], 1, math.isqrt(x.shape[0]), -1),
        4,
    ),
    # (O, C, ...) <-> (..., C, O): a convolution that stays one
    "kernel": Turn(
        lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x, cube: np.moveaxis(x, (-1, -2), (0, 1))
    ),
    # a number of steps, which is a parameter here, and parameters are float32
    "count": Turn(
        lambda x: x.astype(np.float32),
        lambda x, cube: x.astype(np.int64),
        0,
        (np.float32, np.int64),
    ),
    "token": Turn(lambda x: x.reshape(-1), lambda x, cube: x.reshape(1, 1, -1), 3),  # (1, 1, D)
    "heads": Turn(
        lambda x: x.reshape(-1), lambda x, cube: x.reshape(1, -1, 1, 1), 4
    ),  # (1, K, 1, 1)
    "table": Turn(lambda x: x[0], lambda x, cube: x[None], 3),  # (1, N, D)
    "table4": Turn(lambda x: x[0, 0], lambda x, cube: x[None, None], 4),  # (1, 1, N, D)
}


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array of a state dict that is no parameter.

    Attributes:
        make: shape of the parameter named beside it -> the array.
        fixed: whether it always has that value; else any value is read, and forgotten.
    """

    make: Callable[[tuple[int, ...]], np.ndarray]
    fixed: bool = True


BUFFERS: dict[str, Buffer] = {
    "arange": Buffer(lambda shape: np.arange(shape[0], dtype=np.int64)[None]),  # (1, N)
    "count": Buffer(lambda shape: np.zeros((), np.int64), fixed=False),  # batches seen in training
}
