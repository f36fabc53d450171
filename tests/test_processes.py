"""Real processes of one run (`jax.distributed`, gloo): they save, resume in another number, and end together."""

import os
import shutil
import signal
import time

import pytest
from processes import Run, together

from invideo_jax import checkpoint, runtime

ABORTED = -signal.SIGABRT  # how JAX ends the survivors of a dead process


def steps_of(folder):
    return checkpoint.Checkpoints(folder / "checkpoints", trainer=False).steps()


def ends(runs, seconds=90):
    limit = time.monotonic() + seconds
    return [run.end(max(limit - time.monotonic(), 0.1)) for run in runs]


def finals(runs):
    return {run.find(r"^final (\w+)") for run in runs}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Digest after 9 steps of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run = Run(folder, folder / "w", "--steps", 9, "--every", 100)
    assert run.end() == 0, run.text
    return run.find(r"^final (\w+)")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A workdir with steps 1, 2, 3, 4 written by two processes of two devices."""
    folder = tmp_path_factory.mktemp("two")
    runs = together(folder, folder / "w", "--steps", 4, "--keep", 9, processes=2, devices=2)
    assert ends(runs) == [0, 0], runs[0].text + runs[1].text
    assert steps_of(folder / "w") == [1, 2, 3, 4] and len(finals(runs)) == 1
    assert runs[1].find(r"^(processes.*)") == "processes 2 devices 4"
    return folder / "w"


@pytest.fixture
def copy(two, tmp_path):
    return shutil.copytree(two, tmp_path / "w")


@pytest.mark.parametrize("processes, devices", [(4, 1), (1, 2)])
def test_another_number_of_processes_goes_on(copy, tmp_path, alone, processes, devices):
    if processes == 1:
        runs = [Run(tmp_path, copy, "--steps", 9, devices=devices)]
    else:
        runs = together(tmp_path, copy, "--steps", 9, processes=processes, devices=devices)
    assert ends(runs) == [0] * processes, runs[-1].text
    assert {run.find(r"^restored (\d+)") for run in runs} == {"4"}
    assert finals(runs) == {alone}


@pytest.mark.slow
@pytest.mark.parametrize("path", [(4, 2, 1), (1, 4, 2), (3, 1, 4)])
def test_numbers_of_processes_may_change_again_and_again(tmp_path, alone, path):
    for steps, processes in zip((3, 6, 9), path):
        runs = together(
            tmp_path, tmp_path / "w", "--steps", steps, "--rows", 96, processes=processes
        )
        assert ends(runs) == [0] * processes, runs[-1].text
    whole = Run(tmp_path, tmp_path / "whole", "--steps", 9, "--rows", 96, "--every", 100)
    assert whole.end() == 0 and finals(runs) == finals([whole])


def test_damage_that_one_process_sees_is_agreed_on(copy, tmp_path):
    """One step has lost data that only process 1 reads, another one has flipped bytes there."""
    folder = copy / "checkpoints"
    for step, hurt in ((4, "delete"), (3, "flip")):
        paths = list((folder / str(step) / "state" / "ocdbt.process_1" / "d").iterdir())
        path = max(paths, key=lambda p: p.stat().st_size)
        if hurt == "delete":
            path.unlink()
        else:
            data = bytearray(path.read_bytes())
            data[:4000:40] = bytes(b ^ 4 for b in data[:4000:40])
            path.write_bytes(data)
    began = time.monotonic()
    runs = together(tmp_path, copy, "--steps", 4, "--keep", 9, processes=2, devices=2)
    assert ends(runs) == [0, 0], runs[0].text + runs[1].text
    assert {run.find(r"^restored (\d+)") for run in runs} == {"2"}, runs[0].text
    assert "step 4 is damaged" in runs[0].text and "step 3 is damaged" in runs[1].text
    assert {"3.corrupt", "4.corrupt", "1", "2", "3", "4"} == set(os.listdir(folder))
    assert time.monotonic() - began < 60


def test_a_step_that_one_process_cannot_read_is_skipped_by_all(copy, tmp_path):
    """Without an agreement the one would go on to an older step and the other would train."""
    runs = together(
        tmp_path, copy, "--steps", 4, "--keep", 9, "--do", "unreadable", "--on", 1, processes=2
    )
    assert ends(runs) == [0, 0], runs[0].text + runs[1].text
    assert {run.find(r"^restored (\d+)") for run in runs} == {"3"}
    assert "step 4 is damaged and is not used: another process could not read" in runs[0].text
    assert "step 4 is damaged and is not used: OSError: planned." in runs[1].text


def test_sigterm_to_one_saves_one_step_on_all(tmp_path):
    folder = tmp_path / "w"
    runs = together(
        tmp_path, folder, "--steps", 10000, "--every", 10000, "--pause", 0.05, processes=2
    )
    runs[0].until("^step 3$")
    runs[1].signal(signal.SIGTERM)
    assert ends(runs) == [runtime.RESTART] * 2, runs[0].text + runs[1].text
    assert len({run.find(r"^stopping (\d+)") for run in runs}) == 1
    assert steps_of(folder) == [int(runs[0].find(r"^stopping (\d+)"))]


def test_exception_in_one_ends_both_soon(tmp_path):
    folder = tmp_path / "w"
    runs = together(
        tmp_path, folder, "--steps", 99, "--at", 5, "--do", "raise", "--on", 1, processes=2
    )
    runs[1].until("planned")
    began = time.monotonic()
    codes = ends(runs)
    assert codes[1] == runtime.CRASH and codes[0] in (ABORTED, runtime.CRASH), codes
    assert time.monotonic() - began < 40  # heartbeat of the toy run: 10 s
    assert steps_of(folder)[-1] >= 3


def test_kill_9_of_one_ends_both_and_resumes(tmp_path, alone):
    folder = tmp_path / "w"
    runs = together(tmp_path, folder, "--steps", 999, "--rows", 64, "--pause", 0.05, processes=2)
    runs[1].until("^saving 4$").kill()
    assert ends(runs)[0] in (ABORTED, runtime.CRASH), runs[0].text
    last = steps_of(folder)[-1]
    assert last >= 2  # 3 may have been in flight when 4 was about to be saved
    runs = together(tmp_path, folder, "--steps", 9, processes=2)
    assert ends(runs) == [0, 0] and {r.find(r"^restored (\d+)") for r in runs} == {str(last)}
    assert finals(runs) == {alone}


def test_hang_of_one_ends_both_with_stacks(tmp_path):
    folder = tmp_path / "w"
    do = ("--at", 4, "--do", "hang", "--on", 1, "--limit", 6)
    runs = together(tmp_path, folder, "--steps", 99, *do, processes=2)
    runs[1].until("^hanging")
    began = time.monotonic()
    codes = ends(runs)
    # The other one ends too: by its own watchdog, by JAX, or with the error of a lost connection.
    assert runtime.RESTART in codes and set(codes) <= {runtime.RESTART, ABORTED, runtime.CRASH}
    assert time.monotonic() - began < 40
    assert "in misbehave" in (folder / "hang-1.txt").read_text()
    assert steps_of(folder) == [1, 2, 3]


def test_a_process_with_another_config_is_named(tmp_path):
    runs = together(tmp_path, tmp_path / "w", "--do", "differ", "--on", 2, processes=3)
    assert ends(runs) == [runtime.USER_ERROR] * 3, [run.text for run in runs]
    for run in runs:
        assert "process 2 on " in run.text and "differs in config" in run.text
    assert not (tmp_path / "w").exists()


def test_all_processes_learn_that_the_workdir_is_taken(tmp_path):
    folder = tmp_path / "w"
    first = Run(tmp_path, folder, "--steps", 10000, "--pause", 0.05).until("^step 1$")
    runs = together(tmp_path, folder, "--steps", 9, processes=2)
    assert ends(runs) == [runtime.USER_ERROR] * 2, [run.text for run in runs]
    for run in runs:
        assert f"pid {first.process.pid}, since" in run.text
    first.signal(signal.SIGTERM)
    assert first.end() == runtime.RESTART
