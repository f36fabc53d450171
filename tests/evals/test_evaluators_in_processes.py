"""Evaluators of texts in several processes of one run find what one process finds, on all of them."""

import pathlib

import pytest
from processes import Run, free_port

SCRIPT = pathlib.Path(__file__).with_name("evaluate_in_processes.py")


def evaluate(folder, processes):
    port = free_port()
    runs = [
        Run(
            folder,
            i,
            processes,
            port,
            devices=8 // processes,
            script=SCRIPT,
            name=f"{processes}_{i}",
        )
        for i in range(processes)
    ]
    assert [run.end(240) for run in runs] == [0] * processes, runs[0].text
    found = {run.find(r"^found (.*)") for run in runs}
    assert len(found) == 1
    return found.pop()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tmp_path):
    want = evaluate(tmp_path, 1)
    assert '"accuracy_match": 0.' in want and '"text_video_r1_rerank": 0.' in want
    assert evaluate(tmp_path, 2) == want
