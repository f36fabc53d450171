"""How a process starts, is watched and ends: exit codes, lost saves, hangs, locks."""

import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time

import jax
import pytest
from processes import Run

from invideo_jax import checkpoint, runtime, stored, workdir

ENDLESS = ("--steps", 100000, "--pause", 0.02)


def steps_of(folder) -> list[int]:
    """Committed steps of a workdir."""
    return checkpoint.Checkpoints(folder / "checkpoints", trainer=False).steps()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Digest of the toy's state after 12 steps of one undisturbed process."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder, folder / "w", "--steps", 12)
    assert run.end() == 0, run.text
    return run.find(r"^final (\w+)")


# ---- kill -9 ----------------------------------------------------------------------------------------------------


def kill_loop(tmp_path, kills, rows, seed, wanted=None):
    """Kills at random moments after the start, restarts with the same command; no committed step may be lost."""
    rng = random.Random(seed)
    folder = tmp_path / "w"
    steps = 10 + 10 * kills
    command = (folder, "--rows", rows, "--steps", steps)
    for _ in range(kills):
        before = steps_of(folder)
        run = Run(tmp_path, *command)
        run.until(r"^(fresh|restored \d+)")
        if before:
            assert int(run.find(r"^restored (\d+)")) == before[-1], run.text
        run.until(r"^saving")
        time.sleep(rng.random() * 0.3)
        run.kill()
        assert "Traceback" not in run.text
        left = [n for n in os.listdir(folder / "checkpoints") if n.endswith("-tmp")]
        assert len(left) <= 1
    last = Run(tmp_path, *command)
    assert last.end() == 0, last.text
    whole = Run(tmp_path, tmp_path / "whole", "--rows", rows, "--steps", steps, "--every", 1000)
    assert whole.end() == 0 and whole.find(r"^final (\w+)") == last.find(r"^final (\w+)")


def test_kill_9_loses_no_committed_step(tmp_path):
    kill_loop(tmp_path, kills=3, rows=4096, seed=time.time_ns() % 1000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_loses_no_committed_step_many(tmp_path, seed):
    kill_loop(tmp_path, kills=15, rows=(64, 4096, 16384, 65536)[seed], seed=seed)


# ---- ends that used to lose the save in flight ------------------------------------------------------------------


@pytest.mark.parametrize("do, code", [("raise", 70), ("thread", 70), ("exit", 0)])
def test_an_end_with_a_save_in_flight_keeps_it(tmp_path, do, code):
    folder = tmp_path / "w"
    run = Run(tmp_path, folder, "--rows", 65536, "--steps", 20, "--at", 4, "--do", do)
    assert run.end() == code, run.text
    assert run.find(r"^saving (\d+)") == "3" and 3 in steps_of(folder), run.text
    assert not (folder / "lock").exists() or do == "thread"
    if do == "raise":
        assert "FloatingPointError: planned" in run.text


def test_sigterm_saves_and_asks_for_a_restart(tmp_path, uninterrupted):
    folder = tmp_path / "w"
    run = Run(tmp_path, folder, "--steps", 100000, "--every", 1000, "--pause", 0.02)
    run.until("^step 3$").signal(signal.SIGTERM)
    assert run.end() == runtime.RESTART, run.text
    stopped = int(run.find(r"^stopping (\d+)"))
    assert steps_of(folder) == [stopped]
    again = Run(tmp_path, folder, "--steps", stopped + 2)
    assert again.end() == 0 and int(again.find(r"^restored (\d+)")) == stopped


def test_sigterm_while_starting_stops_at_the_first_poll(tmp_path):
    folder = tmp_path / "w"
    run = (
        Run(tmp_path, folder, *ENDLESS, "--every", 100000)
        .until("^processes")
        .signal(signal.SIGTERM)
    )
    assert run.end() == runtime.RESTART, run.text
    assert steps_of(folder) == [int(run.find(r"^stopping (\d+)"))] and steps_of(folder)[0] <= 40


@pytest.mark.slow
def test_two_sigterms_are_one(tmp_path):
    folder = tmp_path / "w"
    run = Run(tmp_path, folder, *ENDLESS).until("^step 2$").signal(signal.SIGTERM)
    run.signal(signal.SIGTERM)
    assert run.end() == runtime.RESTART and len(steps_of(folder)) >= 1


def test_ctrl_c_finishes_the_step_and_saves(tmp_path):
    folder = tmp_path / "w"
    run = Run(tmp_path, folder, *ENDLESS, "--every", 100000).until("^step 3$").signal(signal.SIGINT)
    assert run.end() == runtime.INTERRUPTED, run.text
    assert "Ctrl-C: finishing this step" in run.text
    assert steps_of(folder) == [int(run.find(r"^stopping (\d+)"))]


def test_a_closed_terminal_finishes_the_step_and_saves(tmp_path):
    """The process gets SIGHUP, and what it would print afterwards has nowhere to go."""
    leader, follower = os.openpty()
    folder = tmp_path / "w"
    run = Run(tmp_path, folder, *ENDLESS, "--every", 100000, terminal=follower)
    os.close(follower)
    while b"step 3" not in os.read(leader, 1000):
        pass
    run.signal(signal.SIGHUP)
    time.sleep(0.1)
    os.close(leader)
    assert run.end() == runtime.INTERRUPTED
    assert len(steps_of(folder)) == 1 and steps_of(folder)[0] >= 3


def test_a_second_ctrl_c_ends_at_once_even_in_a_hang(tmp_path):
    run = Run(tmp_path, tmp_path / "w", "--steps", 9, "--at", 2, "--do", "hang").until("^hanging")
    run.signal(signal.SIGINT).until("Ctrl-C")
    began = time.monotonic()
    run.signal(signal.SIGINT)
    assert run.end() == runtime.INTERRUPTED and time.monotonic() - began < 3


def test_a_python_sigterm_handler_is_refused(tmp_path):
    """Installed after the start it would switch JAX's notice off without a word."""
    run = Run(tmp_path, tmp_path / "w", "--steps", 9, "--at", 2, "--do", "handler")
    assert run.end() == runtime.USER_ERROR
    assert "SIGTERM must be left to JAX" in run.text and "Traceback" not in run.text


def test_a_hang_ends_with_all_stacks_on_disk(tmp_path):
    folder = tmp_path / "w"
    run = Run(tmp_path, folder, "--steps", 9, "--at", 3, "--do", "hang", "--limit", 2)
    run.until("^hanging")
    began = time.monotonic()
    assert run.end() == runtime.RESTART, run.text
    # A limit of 2 s, and the end of the process on a busy machine.
    assert 1 < time.monotonic() - began < 30
    stacks = (folder / "hang-0.txt").read_text()
    assert "no progress for" in stacks and "phase 'step'" in stacks and "in misbehave" in stacks
    assert run.find(r"^saving (\d+)") == "2" and steps_of(folder) == [1, 2]


# ---- starting ---------------------------------------------------------------------------------------------------


def listeners(pid: int) -> list[str]:
    """Local addresses, as in /proc/net/tcp*, on which a process listens."""
    inodes = set()
    for link in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(link)))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in pathlib.Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1])
    return found


def test_many_runs_start_at_once_and_listen_to_nobody_outside(tmp_path):
    runs = [Run(tmp_path, tmp_path / str(i), *ENDLESS) for i in range(3)]
    for run in runs:
        run.until("^step 2$")
    loopback = (
        "0100007F:",
        "0000000000000000FFFF00000100007F:",
        "00000000000000000000000001000000:",
    )
    for run in runs:
        assert all(a.startswith(loopback) for a in listeners(run.process.pid))
        run.signal(signal.SIGTERM)
    assert [run.end() for run in runs] == [runtime.RESTART] * 3


def test_half_an_address_is_refused(tmp_path):
    run = Run(tmp_path, tmp_path / "w", "--coordinator_address=127.0.0.1:1", "--process_id=0")
    assert run.end() == runtime.USER_ERROR and "Traceback" not in run.text
    assert "Give all three flags" in run.text and "num_processes=None" in run.text


def test_without_a_start_nothing_is_polled():
    assert runtime.preempted() is False and not jax.distributed.is_initialized()


def test_exit_codes():
    assert runtime.exit_code(ValueError()) == 70
    assert runtime.exit_code(runtime.RunError("x")) == 2
    assert runtime.exit_code(runtime.RunError("x", runtime.NUMBERS)) == 65
    assert runtime.exit_code(checkpoint.CheckpointError("p", 1, "c", "f")) == 74
    for line in ("0", "2", "65", "70", "74", "75", "130", "134", "137"):
        assert re.search(rf"^    {line} ", runtime.__doc__, re.M)


def test_environment_is_json_and_knows_the_versions():
    found = json.loads(json.dumps(runtime.environment()))
    assert found["packages"]["jax"] == jax.__version__
    assert found["devices"].startswith("8 x ") and found["processes"] == 1
    assert "XLA_FLAGS" in found["flags"] and "PATH" not in str(found["flags"])


def test_git_state(monkeypatch, tmp_path):
    package = tmp_path / "invideo_jax"
    package.mkdir()
    (package / "runtime.py").write_text("a")
    monkeypatch.setattr(runtime, "__file__", str(package / "runtime.py"))
    assert runtime.git_state() is None
    git = lambda *a: (
        subprocess.run(
            ["git", "-C", tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", *a],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    assert runtime.git_state() == git("rev-parse", "HEAD").strip()
    (package / "runtime.py").write_text("b")
    assert runtime.git_state().endswith("+dirty")


# ---- watchdog ---------------------------------------------------------------------------------------------------


def test_watchdog_limits(tmp_path):
    dog = runtime.Watchdog(tmp_path, dict(step=5.0, eval=0.0))
    assert dog.limit() == 1800.0
    dog.beat("step")
    assert dog.limit() == 5.0
    dog._steps = [1.0, 2.0, 90.0]
    assert dog.limit() == 20.0  # ten times the median: slow steps are no hang
    dog.beat("eval")
    assert dog.limit() == 0.0
    with pytest.raises(KeyError, match="watchdog phase must be one of .*'eval'.*; got 'lunch'"):
        dog.beat("lunch")


# ---- the workdir ------------------------------------------------------------------------------------------------


def test_second_run_in_a_workdir_is_refused(tmp_path):
    folder = tmp_path / "w"
    first = Run(tmp_path, folder, *ENDLESS).until("^step 2$")
    second = Run(tmp_path, folder, *ENDLESS)
    assert second.end() == runtime.USER_ERROR
    assert "a workdir belongs to one run at a time" in second.text
    assert f"host {socket.gethostname()}, pid {first.process.pid}, since 2" in second.text
    first.signal(signal.SIGTERM)
    assert first.end() == runtime.RESTART, first.text
    assert not (folder / "lock").exists()


def dead_lock(folder, **changes):
    """A lock left by somebody."""
    with workdir.Lock(folder) as lock:
        content = lock._read()
    content.update(changes)
    (folder / "lock").write_text(json.dumps(content))


def test_lock_of_a_dead_process_is_taken_at_once(tmp_path, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    dead_lock(tmp_path, pid=ended.pid, token="a")
    began = time.monotonic()
    with workdir.Lock(tmp_path) as lock:
        assert lock._read()["pid"] == os.getpid()
    assert (
        time.monotonic() - began < 1
        and "took over the lock of a dead run" in capsys.readouterr().out
    )


def test_lock_of_a_reused_process_number_is_taken(tmp_path):
    dead_lock(tmp_path, started="1", token="a")
    with workdir.Lock(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_lock_of_another_host_is_watched(tmp_path, capsys):
    dead_lock(tmp_path, machine="elsewhere", host="far", token="a")
    with workdir.Lock(tmp_path, stale_seconds=0.5):
        pass
    said = capsys.readouterr().out
    assert "held by far, pid" in said and "took over" in said


def test_lock_of_a_living_host_is_respected(tmp_path):
    dead_lock(tmp_path, machine="elsewhere", host="far", token="a")
    path, stop = tmp_path / "lock", threading.Event()

    def beat():
        content = json.loads(path.read_text())
        for n in range(1000):
            if stop.wait(0.1):
                return
            draft = tmp_path / "draft"
            draft.write_text(json.dumps(content | dict(beat=n)))
            os.replace(draft, path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(runtime.RunError, match="held by host far"):
            workdir.Lock(tmp_path, stale_seconds=3).__enter__()
    finally:
        stop.set()
        thread.join()


def test_only_one_of_many_gets_a_dead_lock(tmp_path):
    dead_lock(tmp_path, started="1", token="a")
    got, refused, done = [], [], threading.Event()

    def enter(lock):
        try:
            with lock:
                got.append(lock)
                done.wait(30)
        except runtime.RunError as error:
            refused.append(error)

    threads = [threading.Thread(target=enter, args=(workdir.Lock(tmp_path),)) for _ in range(8)]
    [t.start() for t in threads]
    deadline = time.monotonic() + 25
    while len(got) + len(refused) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    done.set()
    [t.join() for t in threads]
    assert len(got) == 1 and len(refused) == 7


def test_the_lock_beats(tmp_path):
    with workdir.Lock(tmp_path, beat_seconds=0.05) as lock:
        time.sleep(0.3)
        assert lock._read()["beat"] >= 2
    assert os.listdir(tmp_path) == []


def test_a_workdir_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        runtime.RunError, match="must be a folder this user can write; got .*file"
    ) as e:
        workdir.check_writable(tmp_path / "file")
    assert e.value.exit_code == 74
    workdir.check_writable(tmp_path / "new" / "folder")
    assert os.listdir(tmp_path / "new" / "folder") == []


def test_space_is_counted(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    workdir.check_space(tmp_path, 1000, 3)
    with pytest.raises(runtime.RunError, match=r"need [\d,]+ more bytes in .*; free: [\d,]+") as e:
        workdir.check_space(tmp_path, free // 4, 3)
    assert e.value.exit_code == 74
    workdir.check_space(tmp_path, free // 4, 3, existing=3)


@pytest.mark.slow
def test_kill_9_then_the_same_command_at_once(tmp_path):
    folder = tmp_path / "w"
    Run(tmp_path, folder, *ENDLESS).until("^step 3$").kill()
    assert (folder / "lock").exists()
    began = time.monotonic()
    again = Run(tmp_path, folder, "--steps", 3).until("^restored")
    assert time.monotonic() - began < 15
    assert again.end() == 0


@pytest.mark.slow
def test_listing_needs_no_lock(tmp_path):
    folder = tmp_path / "w"
    run = Run(tmp_path, folder, *ENDLESS, "--keep", 50).until("^step 9$")
    step = steps_of(folder)[0]
    assert set(stored.read_arrays(folder / "checkpoints", step, under="params/")) == {
        "params/w",
        "params/b",
    }
    run.signal(signal.SIGTERM)
    assert run.end() == runtime.RESTART
