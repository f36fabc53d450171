"""Arrays that are read when they are wanted: a file of weights never lies in memory as a whole."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array, somewhere.

    Attributes:
        shape, dtype: of the array.
        rows: (start, stop) -> these rows of the first axis; of a number without axes, itself.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def read(self) -> np.ndarray:
        """The whole array."""
        return self.rows(0, self.shape[0] if self.shape else 1)


def leaf(value: Any) -> Leaf:
    """An array as a `Leaf`; a `Leaf` as it is."""
    if isinstance(value, Leaf):
        return value
    rows = lambda start, stop: np.asarray(value[start:stop] if np.ndim(value) else value)
    return Leaf(tuple(np.shape(value)), np.dtype(value.dtype), rows)


def deferred(shape: tuple[int, ...], dtype: Any, whole: Callable[[], np.ndarray]) -> Leaf:
    """A `Leaf` of what a function makes, which is made anew for each read."""
    rows = lambda start, stop: whole()[start:stop] if shape else whole()
    return Leaf(tuple(shape), np.dtype(dtype), rows)


def cast(value: Leaf, dtype: Any) -> Leaf:
    """The leaf in another floating-point type; whole numbers stay as they are."""
    kind = np.dtype(value.dtype)
    if kind.kind in "iub" or kind == np.dtype(dtype):
        return value
    return Leaf(value.shape, np.dtype(dtype), lambda a, b: value.rows(a, b).astype(dtype))
