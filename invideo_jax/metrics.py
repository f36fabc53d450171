"""Metrics: from sums on the device to lines in files. Nothing here makes the train loop wait.

A step in this module is the global number of updates done (what checkpoints are named by). A train step
returns, by name, a `losses.Mean` (a sum and its weight), a scalar, or a small vector (one number a layer).
`MetricsBuffer` reads them some steps later and merges a log window; the writers store the result.

Of clu these parts work without TensorFlow and are used or matched: `parameter_overview` (used for the
parameter table) and the method names of `metric_writers.MetricWriter` (whose own classes import
TensorFlow, so they are not used; one of them can be put into a `MultiWriter`). `clu.metrics` also
works, but its `Average` merges in float32 on the device; here sums and weights merge in float64 on the host.

Names: `<stage>/<metric>` for training, `eval/<evaluator>/<metric>` for evaluation, `perf/<what>` for
everything that depends on the clock. All but `perf/` is the same, bit for bit, in a run that was killed
and resumed.
"""

import collections
import fractions
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import logging

Value = float | list[float]
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Window(NamedTuple):
    """Metrics of one log window.

    Attributes:
        step: its last step.
        steps: how many steps it holds.
        fresh: how many of them this process ran; fewer than `steps` in the first window after a resume.
        values: name -> float, or list of floats for a vector. NaN where a Mean had no weight at all.
    """

    step: int
    steps: int
    fresh: int
    values: dict[str, Value]


class MetricsBuffer:
    """Holds device metrics for `lag` steps before reading them, and merges them over log windows.

    Reading step n - lag while step n runs keeps the device busy, and bounds how far the host runs ahead.
    Means merge exactly: sum of totals over sum of weights. Anything else is the value of the last step.

    Args:
        every: a window ends at each step divisible by this.
        lag: steps between dispatch and reading; 0 reads at once.
        state: what `state()` gave when the checkpoint was made that this run resumes from; windows
            then come out as if nothing had happened.
    """

    def __init__(self, *, every: int, lag: int = 2, state: Mapping[str, Any] | None = None):
        if every < 1 or lag < 0:
            raise ValueError(
                f"every must be at least 1 and lag at least 0; got every={every}, lag={lag}."
            )
        self.every, self.lag = every, lag
        self.latest: tuple[int, dict[str, Value]] | None = None  # the last step read, by itself
        self._waiting: collections.deque = collections.deque()
        state = state or {"step": 0, "steps": 0, "sums": {}, "last": {}}
        self._step, self._steps, self._fresh = state["step"], state["steps"], 0
        self._sums = {name: tuple(sums) for name, sums in state["sums"].items()}
        self._last = dict(state["last"])

    def add(self, step: int, metrics: Mapping[str, Any]) -> list[Window]:
        """Takes the metrics of the step just dispatched; returns windows that are complete by now."""
        self._waiting.append((step, dict(metrics)))
        return self._read(keep=self.lag)

    def drain(self) -> list[Window]:
        """Reads all that waits (this blocks); for the moments before a checkpoint or an evaluation."""
        return self._read(keep=0)

    def finish(self) -> list[Window]:
        """`drain`, and closes the last window where it ends early: the end of a stage."""
        windows = self.drain()
        return windows + [self._close()] if self._steps else windows

    def state(self) -> dict[str, Any]:
        """The open window as plain numbers, to be stored with a checkpoint; call `drain` first."""
        if self._waiting:
            raise ValueError(
                f"state() must follow drain(); got {len(self._waiting)} steps not read yet."
            )
        sums = {name: list(pair) for name, pair in self._sums.items()}
        return {"step": self._step, "steps": self._steps, "sums": sums, "last": dict(self._last)}

    def _read(self, keep: int) -> list[Window]:
        windows = []
        while len(self._waiting) > keep:
            step, metrics = self._waiting.popleft()
            self._absorb(step, jax.device_get(metrics))
            if step % self.every == 0:
                windows.append(self._close())
        return windows

    def _absorb(self, step: int, metrics: Mapping[str, Any]) -> None:
        now = {}
        for name, value in metrics.items():
            if _is_mean(value):
                total, weight = float(value.total), float(value.weight)
                before = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = (before[0] + total, before[1] + weight)
                now[name] = _divide(total, weight)
            else:
                now[name] = self._last[name] = np.asarray(value, np.float64).tolist()
        self.latest = (step, now)
        self._step, self._steps, self._fresh = step, self._steps + 1, self._fresh + 1

    def _close(self) -> Window:
        values = {name: _divide(*pair) for name, pair in self._sums.items()} | self._last
        window = Window(self._step, self._steps, self._fresh, dict(sorted(values.items())))
        self._sums, self._last, self._steps, self._fresh = {}, {}, 0, 0
        return window


def _is_mean(value: Any) -> bool:
    return getattr(value, "_fields", ()) == ("total", "weight")


def _divide(total: float, weight: float) -> float:
    return total / weight if weight else math.nan


def merge_means(parts: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The mean of each name over several dictionaries of `losses.Mean`: sum of totals / sum of weights.

    Args:
        parts: device or host values, one dictionary a batch; read one after the other.
    """
    sums: dict[str, tuple[float, float]] = {}
    for part in parts:
        for name, mean in jax.device_get(dict(part)).items():
            total, weight = sums.get(name, (0.0, 0.0))
            sums[name] = (total + float(mean.total), weight + float(mean.weight))
    return {name: _divide(*pair) for name, pair in sums.items()}


class MetricWriter(Protocol):
    """What a writer does; the method names are those of `clu.metric_writers.MetricWriter`."""

    def write_scalars(self, step: int, scalars: Mapping[str, Value]) -> None: ...

    def write_hparams(self, hparams: Mapping[str, Any]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line: `{"step": 20, "masked/loss": 0.9, ..., "perf": {"clips_per_s": 41.0}}`.

    Every line is written by one system call and ends in a newline, so that a kill leaves at most one
    torn line, at the end, which the next start removes. Numbers that are not finite are the strings
    "NaN", "Infinity" and "-Infinity" (JSON has none).

    Args:
        path: the file; its folder is made.
        steps_done: step of the checkpoint that the run resumes from: lines of later steps are dropped,
            since they will be written again. None starts an empty file.
    """

    def __init__(self, path: str | os.PathLike, *, steps_done: int | None = None):
        self.path = pathlib.Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if steps_done is None else list(_lines_until(self.path, steps_done))
        replace_file(self.path, b"".join(kept))
        # An evaluation may be done again at the very step of the checkpoint; its line is there already.
        self._done = {_what(record) for record in map(_parse, kept) if record["step"] == steps_done}
        self._file = open(self.path, "ab", buffering=0)

    def write_scalars(self, step: int, scalars: Mapping[str, Value]) -> None:
        """Appends one line; names under `perf/` go into its "perf" object.

        A line of the restored checkpoint's own step that is in the file already is not repeated.
        """
        plain, perf = {}, {}
        for name, value in scalars.items():
            group = perf if name.startswith("perf/") else plain
            group[name.removeprefix("perf/")] = _encode(value)
        record = {"step": int(step), **plain, **({"perf": perf} if perf else {})}
        if _what(record) not in self._done:
            self._append(record)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """Does nothing: the resolved config is a file of the workdir."""

    def flush(self) -> None:
        """Waits until the lines are on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes and closes; closing twice is fine."""
        if not self._file.closed:
            self.flush()
            self._file.close()

    def _append(self, record: Mapping[str, Any]) -> None:
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if (written := self._file.write(line)) != len(line):
            raise OSError(
                f"{self.path}: only {written} of {len(line)} bytes written. Is the disk full?"
            )


def _lines_until(path: pathlib.Path, steps_done: int) -> Iterable[bytes]:
    """Whole lines of `path` with a step of at most `steps_done`; says how many were not readable."""
    broken = 0
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        record = _parse(line)
        if record is None:
            broken += 1
        elif record["step"] <= steps_done:
            yield line
    if broken:
        logging.warning("%s: %d line(s) cut off by a sudden end were removed.", path, broken)


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None


def _what(record: Mapping[str, Any]) -> tuple[int, frozenset[str]]:
    """Step and names of a line: no two lines of a run have the same."""
    return record["step"], frozenset(record)


def replace_file(path: pathlib.Path, content: bytes) -> None:
    """Writes `content` to `path` so that a kill leaves the old file or the new one, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _encode(value: Any) -> Any:
    value = np.asarray(value, np.float64).tolist()
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _decode(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_decode(v) for v in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def read_jsonl(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The records of a metrics file, whole lines only, numbers that are not finite as floats."""
    lines = pathlib.Path(path).read_bytes().splitlines(keepends=True)
    return [_decode(record) for record in map(_parse, lines) if record is not None]


def deterministic(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without what depends on the clock: the part that is equal in a resumed run."""
    return {name: value for name, value in record.items() if name != "perf"}


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a uint8 picture [H, W, 3]."""
    import av

    picture = np.ascontiguousarray(picture)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(
            f"A picture must be uint8 [H, W, 3]; got {picture.dtype} {list(picture.shape)}."
        )
    context = av.CodecContext.create("png", "w")
    context.height, context.width = picture.shape[:2]
    context.pix_fmt, context.time_base = "rgb24", fractions.Fraction(1, 25)
    context.options = {"pred": "mixed"}  # a filter per row: photographs get a third smaller
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


class MultiWriter:
    """Sends everything to several writers; with none of them it does nothing. See `MetricWriter`."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self.writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Value]) -> None:
        self._each("write_scalars", step, scalars)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        self._each("write_hparams", hparams)

    def flush(self) -> None:
        self._each("flush")

    def close(self) -> None:
        self._each("close")

    def _each(self, method: str, *arguments: Any) -> None:
        for writer in self.writers:
            getattr(writer, method)(*arguments)

    def __enter__(self) -> "MultiWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def open_writers(
    workdir: str | os.PathLike,
    *,
    steps_done: int | None,
    tensorboard: bool = False,
    process_index: int | None = None,
) -> MultiWriter:
    """The writers of a run: `metrics.jsonl` always, `tb/` on wish; process 0 alone writes.

    Args:
        steps_done: step of the restored checkpoint, None for a fresh start.
        tensorboard: whether to write event files (extra `tensorboard`).
        process_index: which process this is; by default what JAX says.
    """
    if (jax.process_index() if process_index is None else process_index) != 0:
        return MultiWriter([])
    workdir = pathlib.Path(workdir)
    writers: list[MetricWriter] = []
    if tensorboard:
        from invideo_jax.tensorboard import TensorBoardWriter

        writers.append(TensorBoardWriter(workdir / "tb", steps_done=steps_done))
    writers.append(JsonlWriter(workdir / "metrics.jsonl", steps_done=steps_done))
    return MultiWriter(writers)


def parameter_table(params: Any) -> str:
    """Name, shape, dtype and size of every parameter, and the total, as text (by clu).

    Args:
        params: nested dictionary of arrays or of `jax.ShapeDtypeStruct`s.
    """
    from clu import parameter_overview

    return parameter_overview.get_parameter_overview(params, include_stats=False)
