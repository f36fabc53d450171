"""A regular file that hangs whoever opens it: the test holds a lease on it (Linux, any local disk)."""

import contextlib
import fcntl
import os
import signal
import sys

import pytest


@contextlib.contextmanager
def held(path):
    """Opening `path` blocks until the end of the block, or for /proc/sys/fs/lease-break-time (45 s).

    Skips the test where the system has no leases.
    """
    if sys.platform != "linux":
        pytest.skip("file leases are of Linux")
    # The kernel tells the holder of a waiting reader by a signal that would end it.
    before = signal.signal(signal.SIGIO, signal.SIG_IGN)
    file = os.open(path, os.O_RDWR)
    try:
        try:
            fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except OSError as error:
            pytest.skip(f"no leases on {path}: {error}")
        yield
    finally:
        os.close(file)  # gives the lease back
        signal.signal(signal.SIGIO, before)
