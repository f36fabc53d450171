"""What a run left in its workdir, read for the report; every file but the metrics may be absent."""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import numpy as np

from invideo_jax.errors import UserError
from invideo_jax.metrics import read_jsonl


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The contents of a workdir.

    Attributes:
        path: the folder.
        records: lines of `metrics.jsonl`, in order.
        config: `config.json`, the resolved config; {} when absent.
        config_sources: `config_sources.json`, where each key was set ('file:line' or 'command line:
            ...'); {} when absent.
        environment: `environment.json`: versions, devices, code; {} when absent.
        parameters: `parameters.txt`, the table of parameters; None when absent.
        bad_examples: rows of `bad_examples.jsonl`, and of the other processes' lists; [] when absent.
        clips: newest file of `reconstructions/`: arrays by name, uint8 [n, T, H, W, 3]; {} when none.
        clips_step: the step that they were made at.
    """

    path: pathlib.Path
    records: list[dict[str, Any]]
    config: dict[str, Any]
    config_sources: dict[str, str]
    environment: dict[str, Any]
    parameters: str | None
    bad_examples: list[dict[str, Any]]
    clips: dict[str, np.ndarray]
    clips_step: int | None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric; names of speed figures start with `perf/`."""
        key = name.removeprefix("perf/")
        rows = [
            (r["step"], (r.get("perf", {}) if key != name else r).get(key)) for r in self.records
        ]
        pairs = [(step, value) for step, value in rows if isinstance(value, (int, float))]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def names(self) -> list[str]:
        """Names of all scalar metrics that are no speed figures, in order of appearance."""
        seen = {
            name: None
            for record in self.records
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float))
        }
        return list(seen)

    def total(self, name: str) -> float:
        """The sum of a metric over the run, finite values only; 0 when it was never logged."""
        return sum(value for value in self.series(name)[1] if math.isfinite(value))

    @property
    def step(self) -> int:
        """The last step that was logged."""
        return max((record["step"] for record in self.records), default=0)


def read(path: str | os.PathLike) -> Workdir:
    """Reads a workdir.

    Raises:
        UserError: no such folder, or nothing was logged in it yet.
    """
    path = pathlib.Path(path)
    if not path.is_dir():
        raise UserError(
            f"WORKDIR must be the folder of a run; got {path}, which is no folder. "
            "Give what was given to the training as --workdir."
        )
    metrics = path / "metrics.jsonl"
    records = read_jsonl(metrics) if metrics.is_file() else []
    if not records:
        raise UserError(
            f"{path} has no metrics yet ({metrics.name} is {'empty' if metrics.exists() else 'absent'}). "
            "Wait for the first log line of the training, or check that this is the right folder."
        )
    clips, clips_step = _newest_clips(path / "reconstructions")
    return Workdir(
        path=path,
        records=records,
        config=_json(path / "config.json"),
        config_sources=_json(path / "config_sources.json"),
        environment=_json(path / "environment.json"),
        parameters=_text(path / "parameters.txt"),
        bad_examples=[
            row for file in sorted(path.glob("bad_examples*.jsonl")) for row in _rows(file)
        ],
        clips=clips,
        clips_step=clips_step,
    )


def _newest_clips(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], int | None]:
    files = sorted(folder.glob("step_*.npz"))
    if not files:
        return {}, None
    with np.load(files[-1]) as arrays:
        return {name: arrays[name] for name in arrays}, int(files[-1].stem.removeprefix("step_"))


def _text(path: pathlib.Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _json(path: pathlib.Path) -> dict[str, Any]:
    text = _text(path)
    try:
        return json.loads(text) if text else {}
    except ValueError as error:
        raise UserError(f"{path} must be JSON; {error}. Restore or remove the file.") from error


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """JSON lines; the last one may be torn, as the file may be growing."""
    rows = []
    for line in (_text(path) or "").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
