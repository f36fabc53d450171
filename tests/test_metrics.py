"""Metrics: windows merge exactly, files survive kills, and a resumed run writes the same lines."""

import json
import pathlib
import signal
import subprocess
import sys

import av
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from invideo_jax import metrics
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.tensorboard import TensorBoardWriter


def step_metrics(step: int) -> dict:
    """What a train step might return, a function of the step alone."""
    rng = np.random.default_rng(step)
    weight = float(rng.integers(1, 9))
    return {
        "loss": Mean(jnp.float32(rng.normal() * weight), jnp.float32(weight)),
        "learning_rate": jnp.float32(rng.random()),
        "skipped": jnp.int32(step // 7),
        "update_ratio": jnp.asarray(rng.random(3), jnp.float32),
    }


def windows_of(buffer: metrics.MetricsBuffer, steps) -> list:
    out = []
    for step in steps:
        out += buffer.add(step, step_metrics(step))
    return out


def without_fresh(windows):
    return [(w.step, w.steps, w.values) for w in windows]


@hypothesis.given(
    rows=st.lists(
        st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans()), min_size=1, max_size=40
    ),
    cut=st.integers(1, 7),
)
def test_a_window_has_the_mean_of_the_whole_batch_however_it_was_cut(rows, cut):
    values = np.array([v for v, _ in rows], np.float64)
    valid = np.array([v for _, v in rows])
    buffer = metrics.MetricsBuffer(every=1000, lag=0)
    for step, first in enumerate(range(0, len(rows), cut), start=1):
        v, ok = values[first : first + cut], valid[first : first + cut]
        buffer.add(step, {"loss": Mean(np.float64(v[ok].sum()), np.float64(ok.sum()))})
    (window,) = buffer.finish()
    if valid.any():
        np.testing.assert_allclose(
            window.values["loss"], values[valid].mean(), rtol=1e-12, atol=1e-9
        )
    else:
        assert np.isnan(window.values["loss"])


def test_values_other_than_means_are_those_of_the_last_step():
    buffer = metrics.MetricsBuffer(every=4, lag=0)
    (window,) = windows_of(buffer, range(1, 5))
    last = jax.device_get(step_metrics(4))
    assert window.step == 4 and window.steps == 4
    assert window.values["learning_rate"] == float(last["learning_rate"])
    assert window.values["update_ratio"] == [float(v) for v in last["update_ratio"]]
    assert window.values["skipped"] == 0.0
    assert buffer.latest[0] == 4
    assert buffer.latest[1]["loss"] == float(last["loss"].total) / float(last["loss"].weight)


def test_metrics_are_read_lag_steps_later_in_one_transfer_a_step(monkeypatch):
    reads = []
    original = jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(int(x["step"])) or original(x))
    buffer = metrics.MetricsBuffer(every=2, lag=3)
    seen = []
    for step in range(1, 8):
        windows = buffer.add(step, {"step": jnp.int32(step), "a": jnp.float32(1)})
        seen.append((list(reads), [w.step for w in windows]))
    assert [r for r, _ in seen] == [[], [], [], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]
    assert [w for _, w in seen] == [[], [], [], [], [2], [], [4]]
    assert [w.step for w in buffer.drain()] == [6] and reads == [1, 2, 3, 4, 5, 6, 7]
    assert [w.step for w in buffer.finish()] == [7] and buffer.finish() == []


@pytest.mark.parametrize("killed", [1, 5, 10, 13, 20, 29])
def test_windows_after_a_resume_are_bitwise_those_of_the_uninterrupted_run(killed):
    whole = metrics.MetricsBuffer(every=10, lag=2)
    expected = windows_of(whole, range(1, 31)) + whole.finish()

    first = metrics.MetricsBuffer(every=10, lag=2)
    before = windows_of(first, range(1, killed + 1)) + first.drain()
    state = json.loads(json.dumps(first.state()))  # as it travels in a checkpoint
    windows_of(first, range(killed + 1, killed + 3))  # steps lost by the kill
    second = metrics.MetricsBuffer(every=10, lag=2, state=state)
    after = windows_of(second, range(killed + 1, 31)) + second.finish()

    assert without_fresh(before + after) == without_fresh(expected)
    assert after[0].fresh == after[0].step - killed


def test_buffer_refuses_wrong_use():
    with pytest.raises(ValueError, match=r"every must be at least 1 .* got every=0, lag=2"):
        metrics.MetricsBuffer(every=0)
    buffer = metrics.MetricsBuffer(every=10)
    buffer.add(1, step_metrics(1))
    with pytest.raises(ValueError, match=r"state\(\) must follow drain\(\); got 1 steps"):
        buffer.state()


def test_merge_means_divides_once():
    parts = [
        {"loss": Mean(np.float32(3), np.float32(1)), "psnr": Mean(np.float32(0), np.float32(0))},
        {"loss": Mean(np.float32(1), np.float32(7)), "psnr": Mean(np.float32(0), np.float32(0))},
    ]
    merged = metrics.merge_means(parts)
    assert merged["loss"] == 0.5  # the mean of the means would be 1.57
    assert np.isnan(merged["psnr"])
    assert metrics.merge_means([]) == {}


# --- metrics.jsonl


def write_run(path: pathlib.Path, steps, *, steps_done=None, speed=1.0):
    """A stand-in for a run: a line for each second step and an evaluation at each fifth."""
    writer = metrics.JsonlWriter(path, steps_done=steps_done)
    for step in steps:
        if step % 2 == 0:
            writer.write_scalars(step, {"masked/loss": 1 / step, "perf/clips_per_s": speed * step})
        if step % 5 == 0:
            writer.write_scalars(step, {"eval/reconstruction/loss": 2 / step})
    writer.close()


def test_a_line_holds_the_numbers_exactly_and_speed_apart(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = metrics.JsonlWriter(path)
    value = float(np.float32(0.1))
    writer.write_scalars(
        3,
        {
            "masked/loss": np.float32(0.1),
            "masked/ratio": [1.0, 2.5],
            "perf/mfu": 0.5,
            "perf/clips": 4,
        },
    )
    writer.close()
    (first,) = path.read_bytes().splitlines()
    assert json.loads(first) == {
        "step": 3,
        "masked/loss": value,
        "masked/ratio": [1.0, 2.5],
        "perf": {"mfu": 0.5, "clips": 4.0},
    }
    assert metrics.deterministic(json.loads(first)) == {
        "step": 3,
        "masked/loss": value,
        "masked/ratio": [1.0, 2.5],
    }


def test_numbers_that_are_not_finite_are_strict_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.JsonlWriter(path)
    writer.write_scalars(1, {"a": np.nan, "b": np.inf, "c": [-np.inf, 1.0]})
    writer.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["a"] == "NaN"
    (record,) = metrics.read_jsonl(path)
    assert np.isnan(record["a"]) and record["b"] == np.inf and record["c"] == [-np.inf, 1.0]


@pytest.mark.parametrize("checkpoint", [0, 3, 4, 10, 11])
@pytest.mark.parametrize("lost", [0, 1, 6])
def test_a_resumed_run_leaves_the_lines_of_an_uninterrupted_one(tmp_path, checkpoint, lost):
    write_run(tmp_path / "whole.jsonl", range(1, 21))
    path = tmp_path / "killed.jsonl"
    write_run(path, range(1, checkpoint + lost + 1))
    write_run(path, range(checkpoint + 1, 21), steps_done=checkpoint, speed=7.0)
    whole, killed = (metrics.read_jsonl(p) for p in (tmp_path / "whole.jsonl", path))
    assert [metrics.deterministic(r) for r in killed] == [metrics.deterministic(r) for r in whole]
    assert killed != whole  # the clock differs


def test_an_evaluation_done_again_at_the_restored_step_is_not_written_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 11))  # killed after the evaluation at step 10, before the next save
    before = path.read_bytes()
    writer = metrics.JsonlWriter(path, steps_done=10)
    writer.write_scalars(10, {"eval/reconstruction/loss": 2 / 10})
    writer.write_scalars(10, {"eval/probe/top1": 0.5})
    writer.write_scalars(12, {"masked/loss": 1 / 12})
    writer.close()
    assert path.read_bytes() == before + (
        b'{"step": 10, "eval/probe/top1": 0.5}\n{"step": 12, "masked/loss": 0.08333333333333333}\n'
    )


def test_a_fresh_start_empties_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 9))
    write_run(path, range(1, 3), steps_done=None)
    assert [r["step"] for r in metrics.read_jsonl(path)] == [2]


def test_a_torn_last_line_is_removed_wherever_it_was_torn(tmp_path, caplog):
    write_run(tmp_path / "whole.jsonl", range(1, 9))
    whole = (tmp_path / "whole.jsonl").read_bytes()
    start = whole.rstrip(b"\n").rfind(b"\n") + 1
    path = tmp_path / "torn.jsonl"
    for end in range(start + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert [r["step"] for r in metrics.read_jsonl(path)] == [2, 4, 5, 6]
        metrics.JsonlWriter(path, steps_done=100).close()
        assert path.read_bytes() == whole[:start]
    path.write_bytes(whole[:start] + b"\0\0\0\0\n" + whole[start:])
    metrics.JsonlWriter(path, steps_done=100).close()
    assert path.read_bytes() == whole
    assert "1 line(s) cut off by a sudden end were removed" in caplog.text


def test_the_file_is_never_half_rewritten(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_run(path, range(1, 9))
    before = path.read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(metrics.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        metrics.JsonlWriter(path, steps_done=2)
    assert path.read_bytes() == before


_ENDLESS = """
import itertools, sys
from invideo_jax import metrics
writer = metrics.JsonlWriter(sys.argv[1])
print("ready", flush=True)
for step in itertools.count(1):
    writer.write_scalars(step, {f"masked/loss_{i}": 1 / (step + i) for i in range(200)})
"""


def test_kill_9_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    child = subprocess.Popen([sys.executable, "-c", _ENDLESS, path], stdout=subprocess.PIPE)
    child.stdout.readline()
    while path.stat().st_size < 200_000:
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    lines = path.read_bytes().splitlines(keepends=True)
    torn = [i for i, line in enumerate(lines) if metrics._parse(line) is None]
    assert torn in ([], [len(lines) - 1])
    metrics.JsonlWriter(path, steps_done=10**9).close()
    records = metrics.read_jsonl(path)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    assert len(records) >= len(lines) - 1


# --- the other writers


def test_tensorboard_opens_what_was_written(tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    writer = TensorBoardWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write_scalars(step, {"masked/loss": np.float32(step / 8), "ratio": [0.5, step]})
    writer.write_hparams({"seed": 3})
    writer.flush()
    writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("masked/loss")] == [
        (1, 0.125),
        (2, 0.25),
        (3, 0.375),
    ]
    assert [e.value for e in events.Scalars("ratio/01")] == [1.0, 2.0, 3.0]
    assert b"| seed | 3 |" in events.Tensors("hparams/text_summary")[0].tensor_proto.string_val[0]


def test_tensorboard_forgets_steps_that_a_resume_does_again(tmp_path):
    pytest.importorskip("tensorboardX")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps_done, steps in ((None, (1, 8, 9)), (None, (1, 2, 3, 4)), (2, (3, 4, 5))):
        writer = TensorBoardWriter(tmp_path, steps_done=steps_done)
        for step in steps:
            writer.write_scalars(step, {"loss": float(step)})
        writer.close()
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5]


def test_absent_tensorboard_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"pip install 'invideo_jax\[tensorboard\]'"):
        metrics.open_writers(tmp_path, steps_done=None, tensorboard=True)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_only_process_0_writes(tmp_path):
    for index in (1, 0):
        with metrics.open_writers(tmp_path, steps_done=None, process_index=index) as writer:
            writer.write_scalars(1, {"a": index})
            writer.write_hparams({"seed": 1})
            writer.flush()
        assert (tmp_path / "metrics.jsonl").exists() == (index == 0)
    assert metrics.read_jsonl(tmp_path / "metrics.jsonl")[0] == {"step": 1, "a": 0.0}


def test_multi_writer_sends_everything_to_all(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    with metrics.MultiWriter([metrics.JsonlWriter(p) for p in paths]) as writer:
        writer.write_scalars(1, {"a": 1.0})
    assert paths[0].read_bytes() == paths[1].read_bytes() != b""


def decode(data: bytes) -> np.ndarray:
    """The one picture of a PNG file, by PyAV's decoder."""
    context = av.CodecContext.create("png", "r")
    (frame,) = [*context.decode(av.Packet(data)), *context.decode(None)]
    return frame.to_ndarray(format="rgb24")


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (64, 200)])
def test_png_is_lossless(shape):
    picture = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(decode(metrics.png(picture)), picture)
    np.testing.assert_array_equal(decode(metrics.png(picture[::-1, ::-1])), picture[::-1, ::-1])


def test_png_refuses_other_arrays():
    with pytest.raises(ValueError, match=r"must be uint8 \[H, W, 3\]; got float32 \[2, 2, 3\]"):
        metrics.png(np.zeros((2, 2, 3), np.float32))


def test_parameter_table_needs_shapes_only():
    params = {
        "encoder": {"kernel": jax.ShapeDtypeStruct((768, 3072), jnp.float32)},
        "bias": jnp.zeros(10),
    }
    table = metrics.parameter_table(params)
    row = next(line for line in table.splitlines() if "encoder/kernel" in line)
    assert "(768, 3072)" in row and "float32" in row and "2,359,296" in row
    assert table.splitlines()[-1] == f"Total: {2359306:,} -- {2359306 * 4:,} bytes"
