"""What a hand-over does with each parameter, to print and to keep."""

import collections
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from invideo_jax.metrics import replace_file


def times(grid: Iterable[int]) -> str:
    """'8x16x16'."""
    return "x".join(map(str, grid))


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of the new stage.

    Attributes:
        path: its path.
        target: its shape, dtype and (optionally) sharding.
        source: path in the source, None when fresh.
        shape, dtype: of the source array, None when fresh.
        transform: 'copy', 'positions', 'inflate', 'rows' or 'fresh'.
        options: what the transform takes; JSON-able.
    """

    path: str
    target: jax.ShapeDtypeStruct
    source: str | None
    shape: tuple[int, ...] | None
    dtype: str | None
    transform: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """What happens, in words."""
        told = {
            "copy": lambda o: "copy",
            "fresh": lambda o: f"fresh ({o['pattern']})",
            "positions": lambda o: f"interpolate {times(o['old'])} -> {times(o['new'])}",
            "inflate": lambda o: f"inflate to {o['frames']} frames ({o['how']})",
            "rows": lambda o: f"{len(o['rows'])} of {self.shape[-1]} classes",
        }[self.transform](self.options)
        cast = self.dtype not in (None, np.dtype(self.target.dtype).name)
        return told + f", {self.dtype} -> {np.dtype(self.target.dtype).name}" * cast


@dataclasses.dataclass(frozen=True)
class Table:
    """The whole hand-over of a stage.

    Attributes:
        rows: one for each parameter of the new stage, in the order of its tree.
        left: source paths that are not taken, each with the pattern of the recipe that says so.
        source: what is known of the source; JSON-able.
    """

    rows: tuple[Row, ...]
    left: Mapping[str, str]
    source: Mapping[str, Any]

    def __str__(self) -> str:
        cells = [(r.path, str(list(r.target.shape)), r.source or "-", r.text()) for r in self.rows]
        cells += [("-", "", path, f"not taken ({why})") for path, why in self.left.items()]
        head = ("parameter", "shape", "from", "how")
        wide = [max(len(row[i]) for row in (head, *cells)) for i in range(3)]
        line = lambda row: "  ".join([*(c.ljust(w) for c, w in zip(row, wide)), row[3]]).rstrip()
        lines = [self.summary(), "", line(head), *map(line, cells)]
        return "\n".join(lines) + "\n"

    def summary(self) -> str:
        """One line: what comes from where."""
        counts = collections.Counter(row.transform for row in self.rows)
        names = dict(
            copy="copied",
            positions="interpolated",
            inflate="inflated",
            rows="cut to the classes",
            fresh="fresh",
        )
        parts = [f"{counts[k]} {name}" for k, name in names.items() if counts[k]]
        parts += [f"{len(self.left)} of the source not taken"] * bool(self.left)
        text = lambda x: " + ".join(map(str, x.values())) if isinstance(x, Mapping) else str(x)
        said = " ".join(text(self.source[k]) for k in ("name", "weights") if self.source.get(k))
        return f"parameters from {said or 'the last stage'}: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-able."""
        return dict(
            source=dict(self.source),
            parameters=[
                dict(
                    path=row.path,
                    shape=list(row.target.shape),
                    dtype=np.dtype(row.target.dtype).name,
                    source=row.source,
                    source_shape=None if row.shape is None else list(row.shape),
                    source_dtype=row.dtype,
                    transform=row.transform,
                    **({"options": dict(row.options)} if row.options else {}),
                )
                for row in self.rows
            ],
            not_taken=dict(self.left),
        )

    def save(self, folder: str | pathlib.Path, stage: str) -> None:
        """Writes handover_<stage>.json and .txt."""
        folder = pathlib.Path(folder)
        text = json.dumps(self.to_json(), indent=1)
        replace_file(folder / f"handover_{stage}.json", text.encode())
        replace_file(folder / f"handover_{stage}.txt", str(self).encode())
