"""How well hidden parts of held-out clips are filled in: loss, PSNR, and a few clips to look at."""

import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from invideo_jax.errors import UserError
from invideo_jax.evals import Given
from invideo_jax.losses import Mean
from invideo_jax.metrics import merge_means, replace_file

Batch = Mapping[str, jax.Array]
Clips = tuple[jax.Array, jax.Array, jax.Array]
_MAX_PSNR = 100.0  # dB; a perfect copy would be infinite and spoil the average


class Evaluator:
    """Reconstruction of hidden patches.

    `run` gives what `eval_loss` gives (by name; a loss on normalised targets is 1.0 for a model that
    predicts each patch's mean), and `psnr`: decibels on hidden pixels, the mean over clips. A model of
    normalised patches is given their true mean and contrast back before PSNR is measured, so compare
    it with models of the same kind only.

    Args:
        batches: called for each evaluation; gives device batches (`video`, `position`, `valid`, ...),
            always the same ones in the same order.
        eval_loss: (params, batch) -> name -> `losses.Mean` over valid rows; jitted by the caller.
        reconstruct: (params, batch) -> (original, masked, reconstruction), each float [B, T, H, W, 3]
            in 0..1; `masked` is grey and `reconstruction` predicted where patches are hidden, and
            both equal `original` elsewhere; jitted by the caller.
        workdir: clips to look at go to `workdir/reconstructions/step_XXXXXXXX.npz`; None keeps none.
        pictures: how many clips that file holds, the first valid ones.
    """

    def __init__(
        self,
        *,
        batches: Callable[[], Iterable[Batch]],
        eval_loss: Callable[[Any, Batch], Mapping[str, Any]],
        reconstruct: Callable[[Any, Batch], Clips],
        workdir: str | os.PathLike | None = None,
        pictures: int = 6,
    ):
        self.batches, self.eval_loss, self.reconstruct = batches, eval_loss, reconstruct
        self.folder = None if workdir is None else pathlib.Path(workdir) / "reconstructions"
        self.pictures = pictures if self.folder else 0
        self._psnr = jax.jit(psnr)

    def run(self, params: Any, step: int) -> Iterator[tuple[str, float]]:
        """Evaluates once; see the package's docstring for the contract."""
        kept: list[dict[str, np.ndarray]] = []
        values = merge_means(
            self._measure(params, kept)
        )  # reads batch by batch: memory stays small
        if not values:
            raise ValueError(
                "batches must give at least one batch; got none. Check the eval split."
            )
        if kept and jax.process_index() == 0:
            save(self.folder / f"step_{step:08d}.npz", kept)
        yield from sorted(values.items())

    def _measure(self, params: Any, kept: list) -> Iterator[dict[str, Mean]]:
        """Means of one batch after the other; fills `kept` with clips to look at."""
        for batch in self.batches():
            clips = self.reconstruct(params, batch)
            if len(kept) < self.pictures:
                kept += _first_valid(clips, batch, self.pictures - len(kept))
            yield dict(self.eval_loss(params, batch)) | {"psnr": self._psnr(*clips, batch["valid"])}


def make(given: Given, *, examples: int, pictures: int) -> Evaluator:
    """The evaluator on the first `examples` held-out clips, with `pictures` of them kept."""
    if given.reconstruct is None:
        raise UserError(
            "The evaluator 'reconstruction' needs a model that predicts pixels, which this stage's is not. "
            "Take it out of the recipe's evals, or switch it off: evals.reconstruction.every='0 steps'."
        )
    return Evaluator(
        batches=lambda: given.batches(examples),
        eval_loss=given.eval_loss,
        reconstruct=given.reconstruct,
        workdir=given.workdir,
        pictures=pictures,
    )


def psnr(
    original: jax.Array, masked: jax.Array, reconstruction: jax.Array, valid: jax.Array
) -> Mean:
    """Peak signal-to-noise ratio on hidden pixels, in decibels, as a sum over clips and their number.

    A pixel is hidden where `masked` differs from `original` in any channel. A clip's value is at most
    100 dB; clips without a hidden pixel and rows that are not valid have no weight.

    Args:
        original: float [B, T, H, W, 3], 0..1; so are `masked` and `reconstruction`.
        valid: bool [B].
    """
    hidden = jnp.any(masked != original, axis=-1)
    error = jnp.mean(jnp.square(reconstruction - original).astype(jnp.float32), axis=-1)
    pixels = jnp.sum(hidden, axis=(1, 2, 3)).astype(jnp.float32)
    mse = jnp.sum(jnp.where(hidden, error, 0.0), axis=(1, 2, 3)) / jnp.maximum(pixels, 1.0)
    decibels = -10.0 * jnp.log10(jnp.maximum(mse, 10.0 ** (-_MAX_PSNR / 10.0)))
    weight = (valid & (pixels > 0)).astype(jnp.float32)
    return Mean(jnp.sum(jnp.where(weight > 0, decibels, 0.0)), jnp.sum(weight))


def _first_valid(clips: Clips, batch: Batch, count: int) -> list[dict[str, np.ndarray]]:
    """The first `count` valid rows as host arrays, the same on every process."""
    names = ("original", "masked", "reconstruction", "position", "valid")
    rows = {n: _to_host(x) for n, x in zip(names, (*clips, batch["position"], batch["valid"]))}
    chosen = np.flatnonzero(rows.pop("valid"))[:count]
    return [{name: values[i] for name, values in rows.items()} for i in chosen]


def _to_host(x: jax.Array) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def save(path: pathlib.Path, clips: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Writes clips as one npz file, whole or not at all.

    Args:
        clips: dictionaries of `original`, `masked`, `reconstruction` (float [T, H, W, 3] in 0..1, stored
            as uint8) and `position` (integer), all clips of one shape.
    """
    clips = list(clips)
    stacked = {name: np.stack([clip[name] for clip in clips]) for name in clips[0]}
    for name in ("original", "masked", "reconstruction"):
        pixels = np.asarray(stacked[name], np.float32)
        stacked[name] = np.rint(np.clip(np.nan_to_num(pixels), 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **stacked)
    replace_file(path, buffer.getvalue())
