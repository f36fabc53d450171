"""The clock leaves pauses out; the progress line says what it should in one row of a terminal."""

import io

import pytest

from invideo_jax.metrics import Window
from invideo_jax.progress import Clock, Lap, Progress, duration, quantity


class Time:
    """Time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_pauses_are_no_training_time_and_waiting_is_counted():
    time = Time()
    clock = Clock(time)
    time.now += 1
    with clock.waiting():
        time.now += 0.5
    with clock.pause():
        time.now += 60
    time.now += 2
    assert clock.lap() == Lap(seconds=3.5, waited=0.5, paused=60.0)
    time.now += 4
    with pytest.raises(RuntimeError), clock.pause():
        time.now += 10
        raise RuntimeError
    assert clock.lap() == Lap(seconds=4.0, waited=0.0, paused=10.0)


def test_a_lap_may_end_inside_a_pause_and_pauses_may_nest():
    time = Time()
    clock = Clock(time)
    time.now += 3
    with clock.pause():
        time.now += 10
        with clock.pause():
            time.now += 1
        assert clock.lap() == Lap(seconds=3.0, waited=0.0, paused=11.0)
        time.now += 20
    time.now += 2
    assert clock.lap() == Lap(seconds=2.0, waited=0.0, paused=20.0)


def window(step: int, *, steps: int = 10, fresh: int | None = None, **values) -> Window:
    values = {"loss": 0.84312, "learning_rate": 1.2e-4, "grad_norm": 0.834} | values
    return Window(step, steps, steps if fresh is None else fresh, values)


def test_the_line_and_the_figures():
    out = io.StringIO()
    progress = Progress(
        stage="masked",
        total_steps=4000,
        clips_per_step=32,
        tokens_per_clip=160,
        flops_per_clip=2e9,
        peak_flops=4e11,
        stream=out,
    )
    perf = progress.update(window(120), Lap(seconds=4.0, waited=0.02, paused=1.0))
    assert perf == {
        "perf/clips": 320.0,
        "perf/seconds": 4.0,
        "perf/paused_seconds": 1.0,
        "perf/clips_per_s": 80.0,
        "perf/data_wait": 0.005,
        "perf/tokens_per_s": 12800.0,
        "perf/flops_per_s": 1.6e11,
        "perf/mfu": 0.4,
    }
    # left: 3880 steps at 0.4 s
    assert out.getvalue() == (
        "masked  120/4000  loss 0.8431  lr 1.2e-04  grad 0.83  80.0 clips/s  160 GFLOP/s  MFU 40%  "
        "data 0.5%  left 25m 52s\n"
    )


def test_unknown_figures_are_left_out_and_names_may_have_a_prefix():
    out = io.StringIO()
    progress = Progress(stage="masked", total_steps=20, clips_per_step=2, stream=out)
    record = Window(10, 10, 10, {"masked/loss": 1.0, "masked/skipped": 3.0, "masked/ratio": [1.0]})
    perf = progress.update(record, Lap(5.0, 0.0, 0.0))
    assert set(perf) == {
        f"perf/{name}"
        for name in ("clips", "seconds", "paused_seconds", "clips_per_s", "data_wait")
    }
    assert out.getvalue() == (
        "masked 10/20  loss 1.0000  skipped 3  4.00 clips/s  data 0.0%  left 5s\n"
    )


def test_speed_counts_only_the_steps_that_this_process_did():
    progress = Progress(stage="masked", total_steps=100, clips_per_step=8, stream=None)
    perf = progress.update(window(50, steps=10, fresh=3), Lap(6.0, 0.0, 0.0))
    assert perf["perf/clips_per_s"] == 4.0 and perf["perf/clips"] == 80.0


def test_time_left_follows_the_last_windows():
    out = io.StringIO()
    progress = Progress(stage="masked", total_steps=200, clips_per_step=1, stream=out)
    progress.update(window(10), Lap(1000.0, 0.0, 0.0))  # a slow start
    for step in range(20, 70, 10):
        progress.update(window(step), Lap(10.0, 0.0, 0.0))
    assert out.getvalue().splitlines()[-1].endswith("left 2m 20s")
    progress.update(window(5), Lap(10.0, 0.0, 0.0), step=200)
    assert "200/200" in out.getvalue().splitlines()[-1]
    assert out.getvalue().splitlines()[-1].endswith("left 0s")


@pytest.mark.parametrize("value", [0.0, 1e-12, 99999.0, 1e30, float("nan"), float("inf")])
def test_the_line_fits_a_terminal(value):
    progress = Progress(
        stage="contrastive_high_resolution",
        total_steps=10_000_000,
        clips_per_step=1,
        flops_per_clip=1.0,
        peak_flops=1.0,
        stream=None,
    )
    perf = {
        "perf/clips_per_s": 99_949.0,
        "perf/flops_per_s": 9.994e17,
        "perf/mfu": 0.99,
        "perf/data_wait": 1.0,
    }
    values = {"loss": min(value, 99999.0), "learning_rate": value, "grad_norm": value}
    line = progress.line(10_000_000, values, perf, 86400 * 99)
    assert len(line) < 120 and "\n" not in line and "\x1b" not in line


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.00 "),
        (41.23, "41.2 "),
        (999.4, "999 "),
        (999.6, "1.00 k"),
        (5.129e12, "5.13 T"),
        (12_345, "12.3 k"),
        (2e20, "200 E"),
    ],
)
def test_quantities(value, text):
    assert quantity(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.6, "1m 00s"),
        (3599, "59m 59s"),
        (3600, "1h 00m"),
        (86399, "23h 59m"),
        (187_200, "2d 04h"),
        (-3, "0s"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
