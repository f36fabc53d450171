"""A run's folder: one writer at a time, writable, with space enough."""

import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

from invideo_jax.runtime import STORAGE, USER_ERROR, RunError, leave

BEAT_SECONDS = 10.0  # how often the holder touches its lock
STALE_SECONDS = 60.0  # a lock of another host that does not change for this long is dead


def _start_of(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot; None if there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _machine() -> str:
    """Names this boot of this machine and its process table: only there does a process number mean anything."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _alive_here(pid: int, started: str | None) -> bool:
    """Whether that very process still runs on this machine."""
    if Path("/proc/self/stat").exists():
        return _start_of(pid) == started
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


class Lock:
    """Holds `workdir/lock` while a run writes there; two runs in one workdir would delete each other's files.

    Use as a context manager, in process 0 only. A lock left by a killed process of this machine is taken over at once;
    one of another machine when it has not changed for `stale_seconds`, as seen by this process's own clock.

    Args:
        workdir: made when missing.
        beat_seconds: how often the lock file is rewritten.
        stale_seconds: see above.

    Raises:
        RunError: another run holds it (exit code 2); the folder cannot be written (exit code 74).
    """

    def __init__(
        self, workdir, *, beat_seconds: float = BEAT_SECONDS, stale_seconds: float = STALE_SECONDS
    ):
        self.path = Path(workdir) / "lock"
        self._beat_seconds, self._stale_seconds = beat_seconds, stale_seconds
        self._closed = threading.Event()
        self._mine = dict(
            host=socket.gethostname(),
            pid=os.getpid(),
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            machine=_machine(),
            started=_start_of(os.getpid()),
            token=secrets.token_hex(8),
        )

    def __enter__(self) -> "Lock":
        check_writable(self.path.parent)
        while not self._create():
            self._wait_until_stale()
        threading.Thread(target=self._beat, name="workdir-lock", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()
        if self._read().get("token") == self._mine["token"]:
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Creates the file with its content in one step; False if there is one already."""
        draft = self.path.with_name(f"lock.{self._mine['token']}")
        draft.write_text(json.dumps(self._mine))
        try:
            os.link(draft, self.path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links
            return self._create_exclusively()
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _create_exclusively(self) -> bool:
        try:
            with open(self.path, "x") as file:
                json.dump(self._mine, file)
        except FileExistsError:
            return False
        return True

    def _read(self) -> dict:
        """What the lock file says; {} if it is gone or unreadable."""
        try:
            content = json.loads(self.path.read_text())
            return content if isinstance(content, dict) else {}
        except (OSError, ValueError):
            return {}

    def _wait_until_stale(self) -> None:
        """Returns when the lock is gone or was removed as dead; raises when its holder lives."""
        first, began = self._read(), time.monotonic()
        if first and first.get("machine") == self._mine["machine"]:
            if _alive_here(int(first["pid"]), first.get("started")):
                raise self._held(first)
        else:
            if first:
                print(
                    f"workdir: {self.path} is held by {first.get('host')}, pid {first.get('pid')}, since "
                    f"{first.get('since')}; watching for {self._stale_seconds:.0f} s whether it lives",
                    flush=True,
                )
            while time.monotonic() - began < self._stale_seconds:
                time.sleep(min(1.0, self._stale_seconds / 10))
                if not self.path.exists():
                    return
                if self._read() != first:
                    raise self._held(self._read() or first)
        self._remove(first)

    def _remove(self, dead: dict) -> None:
        """Takes a dead lock away, unless another process was faster and this is its new lock."""
        guard = self.path.with_name("lock.takeover")
        with open(guard, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # looking and removing must be one step
            still_dead = self._read().get("token") == dead.get("token")
            if still_dead:
                self.path.unlink(missing_ok=True)
            guard.unlink(missing_ok=True)
        if dead and still_dead:
            print(
                f"workdir: took over the lock of a dead run ({dead.get('host')}, {dead.get('pid')})"
            )

    def _held(self, holder: dict) -> RunError:
        return RunError(
            f"a workdir belongs to one run at a time; {self.path} is held by host "
            f"{holder.get('host')}, pid {holder.get('pid')}, since {holder.get('since')}. "
            "Stop that run, or choose another --workdir."
        )

    def _beat(self) -> None:
        """Rewrites the file; ends this run if somebody else has taken it."""
        count = 0
        while not self._closed.wait(self._beat_seconds):
            count += 1
            draft = self.path.with_name(f"lock.{self._mine['token']}")
            try:
                if self._read().get("token") not in (self._mine["token"], None):
                    print(f"error: {self._held(self._read())}", file=sys.stderr, flush=True)
                    leave(USER_ERROR)
                draft.write_text(json.dumps(self._mine | dict(beat=count)))
                os.replace(draft, self.path)
            except (
                OSError
            ) as error:  # a full disk must not end the run here; the checkpoints will tell
                print(f"workdir: could not touch {self.path}: {error}", flush=True)


def check_writable(folder) -> None:
    """Makes the folder, writes a file, renames and removes it.

    Raises:
        RunError: it cannot be done; exit code 74.
    """
    folder = Path(folder)
    probe = folder / f".probe-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.rename(probe.with_suffix(".renamed")).unlink()
    except OSError as error:
        probe.unlink(missing_ok=True) if folder.is_dir() else None
        raise RunError(
            f"the workdir must be a folder this user can write; got {folder}: {error}. "
            "Choose another --workdir, or fix its rights or space.",
            STORAGE,
        ) from error


def check_space(folder, state_bytes: int, keep: int, existing: int = 0) -> None:
    """Makes sure that the checkpoints of a run will fit: those kept, one in flight, one being deleted.

    Args:
        folder: an existing folder on the file system in question.
        state_bytes: bytes of one checkpoint.
        keep: how many are kept at a time.
        existing: how many of them are there already.

    Raises:
        RunError: not enough space; exit code 74, with bytes needed and free.
    """
    needed = (max(keep - existing, 0) + 2) * state_bytes
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise RunError(
            f"{keep} checkpoints ({existing} there) and two on the way need {needed:,} more bytes in {folder}; "
            f"free: {free:,}. Free space, keep fewer checkpoints, or choose another --workdir.",
            STORAGE,
        )
