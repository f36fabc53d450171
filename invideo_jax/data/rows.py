"""The rows that one process reads, through Grain: in order, loaded ahead by threads, in worker processes if asked."""

import os
from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from absl import flags

from invideo_jax.data.sources.base import SourceError
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.data.workers import StartWorker

AHEAD = 2  # decoded clips that each thread, and each worker's queue, may hold


class WorkerDied(RuntimeError):
    """A worker process ended by itself."""


class LocalRows:
    """Random access for Grain: the i-th row that this process reads -> the loaded example.

    Args:
        load: position -> example.
        rows: the rows of each batch.
        batch_size, start, steps: of all batches, and the first.
        skip: rows left out at the beginning, which were read before.
    """

    def __init__(
        self,
        load: Callable[[int], dict[str, Any]],
        rows: np.ndarray,
        batch_size: int,
        start: int,
        steps: int,
        skip: int = 0,
    ):
        self.load, self.rows, self.batch_size, self.start = load, rows, batch_size, start
        self.skip, self.size = skip, steps * len(rows) - skip

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        step, row = divmod(self.skip + index, len(self.rows))
        return self.load((self.start + step) * self.batch_size + int(self.rows[row]))

    def __repr__(self) -> str:
        return f"rows of batches of {self.batch_size} from step {self.start}"


def dataset(local: LocalRows, workers: int, threads: int) -> grain.IterDataset:
    """Grain's part: rows in order, loaded ahead by threads, in worker processes if asked.

    Batches are put together after the workers, never before: only so is the stream the same for every number of them.
    """
    # Grain's default holds 500 decoded examples a worker: over 1 GB at 16 frames of 224 pixels.
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=AHEAD * threads)
    rows = grain.MapDataset.source(local).to_iter_dataset(ahead)
    if not workers:
        return rows
    # Grain 0.2.18 asks an absl flag, which raises where nobody has parsed flags: notebooks, pytest (its issue 1355).
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=AHEAD)
    return rows.mp_prefetch(options, worker_init_fn=StartWorker(os.getpid()))


def check_shared_memory(workers: int, clip: ClipSpec) -> None:
    """Workers hand clips over in /dev/shm; where it is too small they would die by SIGBUS in the middle of a run.

    Raises:
        SourceError: too small.
    """
    if not os.path.isdir("/dev/shm"):
        return
    status = os.statvfs("/dev/shm")
    free = status.f_bavail * status.f_frsize
    # Per worker: its queue, the interleaving queue, one in each hand.
    need = workers * (2 * AHEAD + 2) * clip.frames * clip.size**2 * 3
    if need > free:
        raise SourceError(
            f"Workers need room for clips in /dev/shm: {need / 2**20:.0f} MiB for data.workers={workers}; "
            f"{free / 2**20:.0f} MiB are free. Lower data.workers, or start the container with a larger --shm-size."
        )


def explain(error: Exception) -> Exception:
    """Grain's error as one that says what happened here; others stay as they are."""
    if isinstance(error, StopIteration):  # would end the run as if all steps were done
        return RuntimeError("Grain's iterator ended before the last row that was asked of it.")
    if isinstance(error, RuntimeError) and "terminated unexpectedly" in str(error):
        code = str(error).split("exit code")[-1].split(".")[0].strip()
        hint = {
            "-9": " (killed: most often the machine ran out of memory)",
            "-7": " (/dev/shm is full)",
        }
        died = WorkerDied(
            f"A data worker must not end by itself; one ended with exit code {code}{hint.get(code, '')}. "
            "Lower data.workers or look at the messages above; data.workers=0 loads in this process."
        )
        died.__cause__ = error
        return died
    return error
