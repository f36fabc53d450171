"""What the worker processes of the loader need besides loading: ending with their parent, and saying what they do.

Grain 0.2.18, measured: when the parent ends by SIGTERM or SIGKILL its workers and the resource tracker live on for ever, with
their shared memory; a worker that hangs makes the parent wait for ever without a word.
"""

import dataclasses
import faulthandler
import itertools
import multiprocessing
import os
import signal
import struct
import sys
import threading
import time
from contextlib import contextmanager
from multiprocessing import shared_memory

_SLOT = struct.Struct(
    "qdqq464s"
)  # process id, since when (monotonic; 0: idle), source, record, path
_own_number = 0  # which worker this process is; the parent's own threads use row 0
_threads = itertools.count()
_local = threading.local()


@dataclasses.dataclass(frozen=True)
class Busy:
    """What one reading thread is at.

    Attributes:
        pid: its process.
        since: when it began, by the monotonic clock.
        source, record: number of the source, and of the example in it.
        path: the file, or the example's name until the file is known.
    """

    pid: int
    since: float
    source: int
    record: int
    path: str

    @property
    def example(self) -> tuple[int, int]:
        """(source, record)."""
        return self.source, self.record


class Board:
    """A small block of shared memory in which each reading thread writes what it is busy with.

    It lets the parent name the file that a hanging worker is stuck on, and end that worker. Made by the parent; pickles as
    the name of the memory (plain memory without workers). The resource tracker frees it when the parent is killed.
    """

    def __init__(self, workers: int, threads: int):
        self.threads = max(threads, 1)
        self.slots = max(workers, 1) * self.threads
        size = _SLOT.size * self.slots
        self._memory = shared_memory.SharedMemory(create=True, size=size) if workers else None
        self._view = self._memory.buf if workers else bytearray(size)
        self._view[:size] = bytes(size)
        self._owner = True

    def __getstate__(self):
        return {"name": self._memory.name, "threads": self.threads, "slots": self.slots}

    def __setstate__(self, state):
        self.threads, self.slots, self._owner = state["threads"], state["slots"], False
        self._memory = shared_memory.SharedMemory(state["name"])
        self._view = self._memory.buf

    @contextmanager
    def busy(self, name: str, source: int = 0, record: int = 0):
        """Notes that this thread works on an example until the end of the block.

        Gives a function to be told the path of the file, once that is known.
        """
        if not hasattr(_local, "number"):
            _local.number = next(_threads)
        slot = _own_number * self.threads + _local.number % self.threads
        since = time.monotonic()

        def note(path: str) -> None:
            self._write(slot, since, source, record, os.fsencode(path)[-464:])

        note(name)
        try:
            yield note
        finally:
            self._write(slot, 0.0, 0, 0, b"")

    def _write(self, slot: int, since: float, source: int, record: int, name: bytes) -> None:
        view = self._view
        if view is not None:  # None: this thread outlived its loader
            _SLOT.pack_into(view, slot * _SLOT.size, os.getpid(), since, source, record, name)

    def entries(self) -> list[Busy]:
        """What each busy thread is at, the longest first."""
        found = []
        for slot in range(self.slots):
            pid, since, source, record, name = _SLOT.unpack_from(self._view, slot * _SLOT.size)
            if since:
                found.append(Busy(pid, since, source, record, os.fsdecode(name.rstrip(b"\0"))))
        return sorted(found, key=lambda entry: entry.since)

    def clear(self) -> None:
        """Forgets everything, when all workers were ended."""
        self._view[:] = bytes(len(self._view))

    @property
    def closed(self) -> bool:
        """Whether the loader it belongs to has ended."""
        return self._view is None

    def pids(self) -> set[int]:
        """Workers that have begun to load and still run."""
        written = {
            _SLOT.unpack_from(self._view, slot * _SLOT.size)[0] for slot in range(self.slots)
        }
        return written & {child.pid for child in multiprocessing.active_children()}

    def close(self) -> None:
        """Frees the memory, in the parent also for the workers."""
        self._view = None
        if self._memory is not None:
            self._memory.close()
            if self._owner:
                self._memory.unlink()


class StartWorker:
    """Runs in each worker before its first example.

    Args:
        parent: process id of the training process.
    """

    def __init__(self, parent: int):
        self.parent = parent

    def __call__(self, number: int, count: int) -> None:
        global _own_number
        _own_number = number
        # Ctrl-C and a scheduler's SIGTERM go to the whole group; the parent decides when workers end, since it may have
        # to finish a step and save.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "SIGUSR1"):
            faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
        threading.Thread(target=_end_with, args=(self.parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process within half a second of its parent's death, however that came.

    Not prctl(PR_SET_PDEATHSIG): Linux sends that signal when the *thread* that started the process ends, and Grain starts
    workers from a pool whose threads end first thing on close(): workers would be killed in the middle of a write. This
    also works on macOS.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def kill(pids: set[int]) -> None:
    """Ends workers that don't answer."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def hang_report(board: Board) -> str:
    """What the reading threads are busy with; the stacks of all threads and workers go to stderr."""
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
    for pid in board.pids():
        os.kill(pid, signal.SIGUSR1)
    time.sleep(0.5)  # let them write before the run ends
    now = time.monotonic()
    busy = "; ".join(
        f"process {entry.pid} for {now - entry.since:.0f} s on {entry.path}"
        for entry in board.entries()[:8]
    )
    return (
        (f"At work: {busy}. " if busy else "No thread is loading anything. ")
        + "The stacks of all threads and workers are on stderr. A network disk that hangs is the usual cause; "
        "take out a file that hangs alone."
    )
