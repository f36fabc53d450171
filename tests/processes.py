"""Starting the toy run as processes of their own, and reading what they print."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
TOY = pathlib.Path(__file__).with_name("toy_run.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def default_signals() -> None:
    """In the child: what a terminal would give it, also where the tests themselves run under nohup or in the background."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


class Run:
    """One process; its output goes to a file, so that nothing blocks on a full pipe."""

    def __init__(self, folder, *arguments, devices: int = 1, script=TOY, name="out", terminal=None):
        self.log = pathlib.Path(folder) / f"{name}-{time.monotonic_ns()}.log"
        environment = os.environ | dict(
            JAX_PLATFORMS="cpu",
            PYTHONPATH=str(REPOSITORY),
            XLA_FLAGS=f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false",
            TF_CPP_MIN_LOG_LEVEL="2",
        )
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(script), *map(str, arguments)],
                stdout=terminal or out,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=default_signals,
            )

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def until(self, pattern: str, seconds: float = 60) -> "Run":
        """Waits until a line matches; fails with the output if the process ends before."""
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            ended = self.process.poll() is not None
            if re.search(pattern, self.text, re.M):
                return self
            if ended:
                break
            time.sleep(0.01)
        raise AssertionError(f"no line {pattern!r} (rc {self.process.poll()}):\n{self.text}")

    def signal(self, number: int) -> "Run":
        os.kill(self.process.pid, number)
        return self

    def kill(self) -> "Run":
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        return self

    def end(self, seconds: float = 60) -> int:
        """The exit code; kills and fails when the process does not end."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"did not end in {seconds} s:\n{self.text}") from None

    def find(self, pattern: str) -> str:
        """First group of the last match."""
        found = re.findall(pattern, self.text, re.M)
        assert found, f"no {pattern!r} in:\n{self.text}"
        return found[-1]


def together(folder, *arguments, processes: int, devices: int = 1) -> list[Run]:
    """The processes of one run."""
    address = f"127.0.0.1:{free_port()}"
    return [
        Run(
            folder,
            *arguments,
            f"--coordinator_address={address}",
            f"--num_processes={processes}",
            f"--process_id={i}",
            devices=devices,
            name=f"out{i}",
        )
        for i in range(processes)
    ]
