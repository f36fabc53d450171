"""Event files that TensorBoard opens, written without TensorFlow; needs the extra `tensorboard`."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.metrics import Value


class TensorBoardWriter:
    """Event files for TensorBoard, without TensorFlow; needs the extra `tensorboard`.

    Args:
        folder: where the event files go.
        steps_done: step of the checkpoint that the run resumes from: TensorBoard then forgets events of
            later steps. None forgets all earlier events of the folder.
    """

    def __init__(self, folder: str | os.PathLike, *, steps_done: int | None = None):
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError(
                "Writing TensorBoard files needs the package tensorboardX, which is not installed. "
                "Run: pip install 'invideo_jax[tensorboard]', or switch TensorBoard off in the config."
            ) from error
        purge = 0 if steps_done is None else steps_done + 1
        # The name of an event file has whole seconds: a restart within one would overwrite the file.
        earlier = len(list(pathlib.Path(folder).glob("events.*")))
        self._writer = tensorboardX.SummaryWriter(
            str(folder), purge_step=purge, filename_suffix=f".{earlier:06d}"
        )

    def write_scalars(self, step: int, scalars: Mapping[str, Value]) -> None:
        """One curve a name; a vector becomes `name/00`, `name/01`, ..."""
        for name, value in scalars.items():
            if isinstance(value, (list, tuple, np.ndarray)) and np.ndim(value):
                for i, v in enumerate(np.ravel(value)):
                    self._writer.add_scalar(f"{name}/{i:02d}", float(v), step)
            else:
                self._writer.add_scalar(name, float(value), step)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Stores the parameters as one text table."""
        rows = "\n".join(f"| {name} | {value} |" for name, value in sorted(hparams.items()))
        self._writer.add_text("hparams", f"| name | value |\n|---|---|\n{rows}", 0)

    def flush(self) -> None:
        """Writes what waits."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
