"""How a process starts, is watched, and ends.

Exit codes (the launcher restarts on 70, 75, 134 and 137, and on nothing else):

    0    FINISHED     the run is done
    2    USER_ERROR   a setting, path or lock must be changed by a person
    65   NUMBERS      the numbers went bad: too many updates in a row were not finite
    70   CRASH        an exception nobody caught
    74   STORAGE      checkpoints cannot be written or none can be read
    75   RESTART      preempted and saved, or a hang was found: please start the same command again
    130  INTERRUPTED  Ctrl-C or a closed terminal: step finished, saved
    134  (JAX)        another process of the run died: JAX aborts the survivors without running Python
    137  (kernel)     kill -9, out of memory

Nothing that matters may depend on clean-up code: kill -9 and the abort above run none. What is here only makes the end
quick, its cause readable and its exit code true.
"""

import contextlib
import faulthandler
import hashlib
import os
import platform
import re
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

FINISHED, USER_ERROR, NUMBERS, CRASH, STORAGE, RESTART, INTERRUPTED = 0, 2, 65, 70, 74, 75, 130

HEARTBEAT_SECONDS = 30  # JAX's 100 leave the survivors of a dead host waiting 104 s
SHUTDOWN_SECONDS = 30  # JAX's 300 is how long an exception on one host waits for the others
LINGER_SECONDS = (
    5.0  # between the stacks of a hang and the end of the process, when there are others
)
LAST_WORDS_SECONDS = 10.0  # what callbacks of `before_exit` may take together

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "av")
FLAG_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_ENABLE_X64")


class RunError(Exception):
    """An error whose message is enough for the user: printed without traceback, ends with `exit_code`."""

    def __init__(self, message: str, exit_code: int = USER_ERROR):
        super().__init__(message)
        self.exit_code = exit_code


_before_exit: list[Callable[[], None]] = []
_interrupted = threading.Event()
_polls = 0
_preempted = False


def before_exit(callback: Callable[[], None]) -> None:
    """Registers what to do before the process ends abnormally: flush a log, let a running save end.

    All callbacks together have `LAST_WORDS_SECONDS`; they may be called from any thread.
    """
    _before_exit.append(callback)


def leave(code: int) -> None:
    """Ends this process now, after the `before_exit` callbacks; never waits for other processes.

    `sys.exit` on one process of several would wait for the others in JAX's shutdown barrier, and its code be lost.
    """

    def last_words():
        for callback in _before_exit:
            try:
                callback()
            except BaseException:  # the process ends anyway; say why and go on with the next one
                traceback.print_exc()

    thread = threading.Thread(target=last_words, daemon=True)
    thread.start()
    thread.join(LAST_WORDS_SECONDS)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def exit_code(error: BaseException) -> int:
    """The exit code for an exception: its own `exit_code`, else CRASH."""
    return getattr(error, "exit_code", CRASH)


def _uncaught(kind, error, trace) -> None:
    """Prints an exception nobody caught and ends the process with its code."""
    if issubclass(kind, KeyboardInterrupt):
        leave(INTERRUPTED)
    with contextlib.suppress(
        OSError, ValueError
    ):  # a closed terminal or pipe must not change the exit code
        if hasattr(error, "exit_code"):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exception(kind, error, trace)
    leave(exit_code(error))


def _on_interrupt() -> None:
    """First Ctrl-C: ask for a save at the next step through JAX's preemption notice; second: end at once.

    The notice is what makes several processes agree on the step; a flag of one process would not.
    """
    if _interrupted.is_set():
        os._exit(INTERRUPTED)
    _interrupted.set()
    print("\nCtrl-C: finishing this step, then saving. Once more to stop at once.", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _on_hangup(terminals: list[int]) -> None:
    """The terminal was closed: like a first Ctrl-C; what is written to it from now on must not fail."""
    with open(os.devnull, "w") as nowhere:
        for number in terminals:
            os.dup2(nowhere.fileno(), number)
    _interrupted.set()
    os.kill(os.getpid(), signal.SIGTERM)


def _watch_interrupts() -> None:
    """Serves Ctrl-C and hang-up from a thread: Python's handlers wait for the main thread, which may be compiling."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    actions = {signal.SIGINT: _on_interrupt}
    signal.signal(signal.SIGINT, lambda *_: None)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # not under nohup
        terminals = [number for number in (1, 2) if os.isatty(number)]  # not to be seen once closed
        actions[signal.SIGHUP] = lambda: _on_hangup(terminals)
        signal.signal(signal.SIGHUP, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def serve(keep_open=writer):
        while True:
            for number in reader.recv(16):
                if number in actions:
                    actions[number]()

    threading.Thread(target=serve, name="ctrl-c", daemon=True).start()


def _local_address() -> str:
    """An address for the coordinator of a run of one process: no port, so nothing can collide or listen outside."""
    if sys.platform == "linux":
        return f"unix-abstract:invideo_jax-{os.getpid()}-{secrets.token_hex(8)}"
    return f"unix:{tempfile.mkdtemp(prefix='invideo_jax')}/coordinator"


def _address(coordinator_address, num_processes, process_id) -> dict:
    """Arguments of `jax.distributed.initialize` that say who and where this process is."""
    if coordinator_address is None and num_processes == 1 and process_id in (None, 0):
        coordinator_address, process_id = _local_address(), 0
    arguments = dict(
        coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id
    )
    if None not in arguments.values():
        # JAX's own default binds every interface, and the service has no authentication.
        bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator_address)
        arguments |= dict(coordinator_bind_address=bind, cluster_detection_method="deactivate")
    return arguments


def _several_cpu_devices() -> bool:
    """Whether this process was asked for more than one (fake) CPU device."""
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    return int(asked[-1] if asked else jax.config.jax_num_cpu_devices) > 1


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    shutdown_seconds: int = SHUTDOWN_SECONDS,
    initialization_seconds: int = 300,
) -> None:
    """Joins the processes of the run, also when there is one; call it before anything touches a device.

    Without it SIGTERM kills a process at once (exit 143) and nothing is saved; with it JAX turns SIGTERM into a notice
    that `preempted` sees on all processes at the same step. With no arguments JAX looks for a cluster it knows (TPU
    pod, Slurm, Open MPI, Kubernetes); where there is none this is a run of one process.

    Args:
        coordinator_address: 'host:port' of process 0; also $JAX_COORDINATOR_ADDRESS. Process 0 binds exactly this
            address (or $JAX_COORDINATOR_BIND_ADDRESS), not all interfaces.
        num_processes: how many processes; 1 without an address means a local run whatever the cluster says.
        process_id: 0 .. num_processes - 1.
        heartbeat_seconds: a silent process is given up after this.
        shutdown_seconds: the longest wait for the others at a normal end.
        initialization_seconds: the longest wait for the others at the start.

    Raises:
        RunError: half an address, an unreachable coordinator, a device already in use, or a Python SIGTERM handler.
    """
    sys.excepthook = _uncaught
    threading.excepthook = lambda a: _uncaught(a.exc_type, a.exc_value, a.exc_traceback)
    if _several_cpu_devices():
        # Programs in flight at the same time starve each other of the threads that collectives wait in: seen to hang
        # with 8 devices on 2 cores.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    limits = dict(
        heartbeat_timeout_seconds=heartbeat_seconds,
        shutdown_timeout_seconds=shutdown_seconds,
        initialization_timeout=initialization_seconds,
    )
    said = (
        coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        num_processes,
        process_id,
    )
    try:
        if said == (None, None, None):
            _join_cluster_or_alone(limits)
        else:
            jax.distributed.initialize(**_address(*said), **limits)
    except (ValueError, RuntimeError) as error:
        raise RunError(
            "the processes of the run must find each other; got "
            f"coordinator_address={said[0]}, num_processes={num_processes}, process_id={process_id}: "
            f"{str(error).splitlines()[0]} Give all three flags (--coordinator_address=HOST:PORT "
            "--num_processes=N --process_id=I) or none, make the coordinator's port reachable from every "
            "host, and touch no device before this."
        ) from error
    if threading.current_thread() is threading.main_thread():
        _watch_interrupts()
    check_sigterm()


def _join_cluster_or_alone(limits: dict) -> None:
    """Joins the cluster JAX finds here; where it finds none, this is a run of one process."""
    try:
        jax.distributed.initialize(**limits)
    except ValueError as error:
        if "coordinator_address" not in str(error):
            raise
        jax.distributed.initialize(**_address(None, 1, 0), **limits)


def check_sigterm() -> None:
    """Makes sure that SIGTERM still reaches JAX.

    Raises:
        RunError: Python has a SIGTERM handler, which silently switches JAX's preemption notice off.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if handler not in (signal.SIG_DFL, None):
        raise RunError(
            f"SIGTERM must be left to JAX, which saves on preemption; got a Python handler {handler!r}. "
            "Remove signal.signal(SIGTERM, ...) from the code or the library that set it."
        )


def preempted() -> bool:
    """Whether the run shall save and stop now; True on all processes at the same call.

    Every process must call it equally often, at the same places (each step, each evaluation batch, after compiling):
    the calls are counted here, and the count is what the processes agree on. Once True it stays True.

    Raises:
        RunError: see `check_sigterm`.
    """
    global _polls, _preempted
    if not _preempted and jax.distributed.is_initialized():
        check_sigterm()  # 1 us; a library may have set its handler at any time
        _polls += 1
        _preempted = bool(multihost_utils.reached_preemption_sync_point(_polls))
    return _preempted


def stop_code() -> int:
    """The exit code of a run that stopped because `preempted` said so."""
    return INTERRUPTED if _interrupted.is_set() else RESTART


def gather_texts(text: str) -> list[str]:
    """The text of every process, in process order; all processes must call it together."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode()[:4096], np.uint8)
    padded = np.zeros(4096, np.uint8)
    padded[: data.size] = data
    rows = multihost_utils.process_allgather(padded)
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(rows)]


def fail_together(error: Exception | None) -> None:
    """Raises on all processes when any process has an error, instead of leaving the others waiting.

    Args:
        error: what went wrong here, or None.

    Raises:
        the error itself where it happened; RunError with its text elsewhere.
    """
    code = 0 if error is None else exit_code(error)
    rows = gather_texts("" if error is None else f"{code} {error}")
    if error is not None:
        raise error
    for process, row in enumerate(rows):
        if row:
            number, _, message = row.partition(" ")
            raise RunError(f"process {process}: {message}", int(number))


def same_everywhere(values: dict[str, str]) -> None:
    """Makes sure that all processes run the same thing.

    Args:
        values: what -> text that must be equal ('config', 'jax', 'git', 'XLA_FLAGS', ...).

    Raises:
        RunError: names the odd processes, their hosts and what differs.
    """
    short = lambda text: hashlib.sha256(str(text).encode()).hexdigest()[:8]
    mine = f"{socket.gethostname()} " + " ".join(
        f"{k}={short(v)}" for k, v in sorted(values.items())
    )
    hosts, rows = zip(*(row.split(" ", 1) for row in gather_texts(mine)))
    usual = statistics.mode(rows)
    odd = []
    for process, row in enumerate(rows):
        differ = [a.split("=")[0] for a, b in zip(row.split(), usual.split()) if a != b]
        if differ:
            odd.append(f"process {process} on {hosts[process]} differs in {', '.join(differ)}")
    if odd:
        raise RunError(
            f"all processes must run the same code and config; {'; '.join(odd)}. "
            "Bring these hosts to the same checkout, packages and flags."
        )


def environment() -> dict:
    """What a result depends on besides code and data: versions, flags, git state, devices.

    Returns:
        JSON-able: python, platform, packages, flags, git (hash and dirty), devices, processes.
    """
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    devices = jax.devices()
    return dict(
        python=platform.python_version(),
        platform=platform.platform(),
        packages=packages,
        flags={name: os.environ[name] for name in FLAG_VARIABLES if name in os.environ},
        git=git_state(),
        devices=f"{len(devices)} x {devices[0].device_kind}",
        processes=jax.process_count(),
    )


def git_state() -> str | None:
    """Commit of the checkout this package runs from, '+dirty' if files differ; None outside a checkout."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():
        return None

    def git(*arguments):
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + ("+dirty" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.SubprocessError):
        return None


class Watchdog:
    """Ends a process that makes no progress: JAX itself never notices a hang, its heartbeats come from a C++ thread.

    Every process has one, so that all of a run end. Use as a context manager; `beat` at each step, evaluation batch
    and save. On expiry all stacks go to `hang-<process>.txt` and the exit code is RESTART.

    Args:
        workdir: where the stacks are written.
        limits: phase -> seconds without a beat; 0 switches a phase off. The limit of 'step' is never less than ten
            times the median of its last beats, so that slow steps are no hang.
    """

    LIMITS = dict(startup=1800.0, step=300.0, eval=1800.0, save=900.0)

    def __init__(self, workdir: str | os.PathLike, limits: dict[str, float] | None = None):
        self.limits = self.LIMITS | dict(limits or {})
        self.file = Path(workdir) / f"hang-{jax.process_index()}.txt"
        self._phase, self._last = "startup", time.monotonic()
        self._steps: list[float] = []
        self._closed, self._others_hang = threading.Event(), threading.Event()

    def __enter__(self) -> "Watchdog":
        self._last = time.monotonic()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        if jax.process_count() > 1:
            threading.Thread(target=self._watch_others, name="watchdog-others", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._closed.set()

    def beat(self, phase: str) -> None:
        """Says that the process lives, and what it does next.

        Args:
            phase: a key of `limits`.
        """
        if phase not in self.limits:
            raise KeyError(f"watchdog phase must be one of {sorted(self.limits)}; got {phase!r}.")
        now = time.monotonic()
        if phase == self._phase == "step":
            self._steps = self._steps[-99:] + [now - self._last]
        self._phase, self._last = phase, now

    def limit(self) -> float:
        """Seconds the present phase may take between two beats."""
        limit = self.limits[self._phase]
        if self._phase == "step" and limit and self._steps:
            limit = max(limit, 10 * statistics.median(self._steps))
        return limit

    def _watch(self) -> None:
        shortest = min((x for x in self.limits.values() if x), default=60.0)
        while not self._closed.wait(min(1.0, shortest / 5)):
            limit, idle = self.limit(), time.monotonic() - self._last
            if limit and idle > limit:
                self._expire(f"no progress for {idle:.0f} s (limit {limit:.0f} s)")
            elif self._others_hang.is_set():
                self._expire(f"another process found a hang; no progress here for {idle:.0f} s")

    def _watch_others(self) -> None:
        """Looks for the stacks of other processes, whose limits may be shorter; its own thread, as storage may hang."""
        sizes = lambda: {p.name: p.stat().st_size for p in self.file.parent.glob("hang-*.txt")}
        before = sizes()
        while not self._closed.wait(1.0):
            with contextlib.suppress(OSError):
                if sizes() != before:
                    self._others_hang.set()

    def _expire(self, what: str) -> None:
        where = f"phase '{self._phase}', {socket.gethostname()}, process {jax.process_index()}"
        message = f"{what}; {where}"
        print(f"hang: {message}; stacks in {self.file}", file=sys.stderr, flush=True)
        writer = threading.Thread(target=self._dump, args=(message,), daemon=True)
        writer.start()
        writer.join(5.0)  # a hung file system may be the very cause
        if jax.process_count() > 1:
            # When the first process leaves, JAX aborts the others: let their watchdogs write their stacks before.
            time.sleep(LINGER_SECONDS)
        leave(RESTART)

    def _dump(self, message: str) -> None:
        """Appends all stacks to the file, or to stderr where that cannot be."""
        try:
            with open(self.file, "a") as file:
                print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
