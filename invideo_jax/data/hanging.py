"""Reads that never return: a network disk that is gone, a file that somebody holds locked.

Such an example is given up after a time, and is bad from then on in the whole run, whoever reads it: another one
of its source stands in for it as for any bad video, so the batches depend on the example only. How a read is given up
depends on where it runs: a worker process is killed and started anew; a thread cannot be, it is left behind.
"""

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from invideo_jax.data.workers import Board, Busy
from invideo_jax.errors import UserError

MOST_LEFT = 8  # threads of a process that may stay behind in reads that hang
_LOOK_SECONDS = 0.1
_left: list[tuple[threading.Thread, str]] = []  # threads left behind, and what they read
_turn = threading.Lock()

T = TypeVar("T")


class TooManyHang(UserError):
    """More reads hang than threads may be left behind."""


class Patience:
    """Tells which reads last too long, by the time that somebody waited for them.

    Time in which nobody looks counts little: not while batches lie ready, and not while the machine sleeps or the whole run is
    stopped, after which healthy reads would look old.

    Args:
        board: what the reading threads are at.
        seconds: limit of one read.
    """

    def __init__(self, board: Board, seconds: float):
        self.board, self.seconds = board, seconds
        self.interval = min(0.5, seconds / 4)
        self._waited: dict[tuple, float] = {}
        self._looked = time.monotonic()

    def overdue(self) -> list[Busy]:
        """The reads over the limit; to be called every `interval` seconds while waiting."""
        now = time.monotonic()
        passed = min(now - self._looked, 2 * self.interval)
        self._looked, before, self._waited, found = now, self._waited, {}, []
        for busy in self.board.entries():
            read = (busy.pid, busy.since, busy.example)  # its path changes on the way
            self._waited[read] = before[read] + passed if read in before else 0.0
            if self._waited[read] >= self.seconds:
                found.append(busy)
        return found


class GivenUp(Exception):
    """A read was given up."""


def call(work: Callable[[], T], given_up: Callable[[], bool], path: str) -> T:
    """Runs `work` in a thread of its own, which is left behind when the read is given up.

    Args:
        work: reads one example.
        given_up: asked now and then; True ends the waiting.
        path: for messages.

    Returns:
        What `work` returns; what it raises is raised.

    Raises:
        GivenUp: what it says.
        TooManyHang: and too many threads were left behind before.
    """
    result: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            result.put((True, work()))
        except BaseException as error:
            result.put((False, error))

    thread = threading.Thread(target=run, name="read", daemon=True)
    thread.start()
    while True:
        try:
            good, value = result.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            if not given_up():
                continue
            _leave(thread, path)
            raise GivenUp from None
        if good:
            return value
        raise value


def _leave(thread: threading.Thread, path: str) -> None:
    with _turn:
        _left[:] = [(other, at) for other, at in _left if other.is_alive()]
        _left.append((thread, path))
        if len(_left) <= MOST_LEFT:
            return
        paths = "\n".join(f"  {at}" for _, at in _left)
    raise TooManyHang(
        f"At most {MOST_LEFT} reads may hang in a process without workers, where their threads cannot be ended; "
        f"these {len(_left)} do:\n{paths}\n"
        "Look at the disk they are on, take them out, or set data.workers=1: a worker that hangs is ended."
    )
