"""How an array of the source becomes a parameter of another shape, found from names and shapes."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from invideo_jax.errors import UserError
from invideo_jax.handover.table import times

Grid = tuple[int, int, int]

INFLATE = ("repeat", "centre")
KERNEL = "patch_embed/kernel"
FIRST = "first"  # label map: the first classes
_HEAD = re.compile(r"(^|/)head/(kernel|bias)$")  # rows by class along the last axis


class Differs(Exception):
    """Shapes that nothing brings together; the text says what would."""


@dataclasses.dataclass(frozen=True)
class Match:
    """How a source array becomes a target one."""

    grid: Grid | None
    tubelet: int
    old_grid: Grid | None
    old_slots: int
    inflate: str
    label_map: str | Sequence[int]
    key: str

    def find(self, path: str, want: Any, have: Any) -> tuple[str, dict]:
        """(transform, options) for one parameter."""
        new, old = tuple(want.shape), tuple(have.shape)
        if not jnp.issubdtype(have.dtype, jnp.floating):
            raise Differs(f"must come from floating-point numbers; the source holds {have.dtype}")
        name = path.rsplit("/", 1)[-1]
        if "position" in name and len(new) == len(old) == 2 and new[1] == old[1] and self.grid:
            return self._positions(name, new[0], old[0])
        if _HEAD.search(path) and self.label_map and new[:-1] == old[:-1]:
            return "rows", dict(rows=self._classes(new[-1], old[-1]))
        if new == old:
            return "copy", {}
        if path.endswith(KERNEL) and new[1] == old[1]:
            return self._tubelet(new[0], old[0])
        hint = ""
        if _HEAD.search(path) and new[:-1] == old[:-1]:
            hint = (
                f". Keep the first classes: {self.key}.label_map=first; choose them: "
                f"{self.key}.label_map=FILE.json; start anew: {self.key}.fresh"
            )
        raise Differs(f"{list(new)} from {list(old)}{hint}")

    def _positions(self, name: str, new: int, old: int) -> tuple[str, dict]:
        """A table of [rows, D] over the grid, or over one of its axes, with or without a first row of its own."""
        t, h, w = self.grid
        # CLIP has one table for every frame, under the name that a table of whole clips has elsewhere.
        one_frame = new - h * w in (0, 1) and new - t * h * w not in (0, 1)
        flat = "image" in name or "spatial" in name or one_frame and "temporal" not in name
        spans = lambda t, h, w: (
            (1, h, w) if flat else (t, 1, 1) if "temporal" in name else (t, h, w)
        )
        now = spans(*self.grid)
        prefix = new - math.prod(now)
        if prefix not in (0, 1):
            if new == old:
                return "copy", {}  # positions of something else, as of words
            raise Differs(f"{new} rows are none of the grid {times(self.grid)}")
        rows = old - prefix
        before = spans(*self.old_grid) if self.old_grid and not self.old_slots else None
        if before is None:
            if not self.old_slots and rows == math.prod(now):
                return "copy", {}
            before = self._guess_grid(rows, now, flat, "temporal" in name)
        if math.prod(before) != rows:
            raise Differs(f"{rows} rows of the source are none of its grid {times(before)}")
        if before == now:
            return "copy", {}
        return "positions", dict(old=list(before), new=list(now), prefix=prefix)

    def _guess_grid(self, rows: int, now: Grid, flat: bool, temporal: bool) -> Grid:
        """The source's grid from its rows and the declared frames; the picture is square."""
        if temporal:
            return rows, 1, 1
        t = 1 if flat else self.old_slots
        if not t:
            raise Differs(
                f"{math.prod(now)} rows from {rows}. Declare how many frames the source was made for: "
                f"{self.key}.old_frames=4, say"
            )
        side = math.isqrt(rows // t)
        if t * side * side != rows:
            raise Differs(
                f"{rows} rows are no {t} square pictures: {self.key}.old_frames is not what the source had"
            )
        return t, side, side

    def _tubelet(self, new: int, old: int) -> tuple[str, dict]:
        """A kernel of [p*p*C, D] over the frames of a tubelet."""
        if new != old * self.tubelet:
            raise Differs(
                f"{new} pixels of a patch from {old}: a kernel of one frame can be spread over several, no "
                "other; use the source's patch and tubelet, or start the kernel anew"
            )
        if self.inflate not in INFLATE:
            raise Differs(
                f"tubelet {self.tubelet} from 1. Say how the kernel is spread over the frames: "
                f"{self.key}.inflate={' or '.join(INFLATE)}"
            )
        return "inflate", dict(frames=self.tubelet, how=self.inflate)

    def _classes(self, new: int, old: int) -> list[int]:
        rows = list(range(new)) if self.label_map == FIRST else [int(i) for i in self.label_map]
        if len(rows) != new or not all(0 <= i < old for i in rows):
            raise Differs(
                f"{new} classes from {old}: the label map must give each class one of the source's; "
                f"it has {len(rows)} entries from {min(rows, default=0)} to {max(rows, default=0)}"
            )
        return rows


def read_label_map(text: str) -> str | list[int]:
    """What `plan` takes as label map: '' and 'first' as they are, else the content of a JSON file.

    The file holds a list (source class by class), or an object {class: source class}.

    Raises:
        UserError: unreadable, or neither of the two.
    """
    if text in ("", FIRST):
        return text
    try:
        found = json.loads(pathlib.Path(text).read_text())
        if isinstance(found, dict):
            found = {int(k): v for k, v in found.items()}
            if sorted(found) != list(range(len(found))):
                raise ValueError("its keys are not 0, 1, 2, ...")
            found = [found[i] for i in range(len(found))]
        if not isinstance(found, list) or not all(type(i) is int for i in found):
            raise ValueError("it must hold whole numbers")
    except (OSError, ValueError) as error:
        raise UserError(
            f"label_map must be 'first', or a JSON file with the source's class for each class; got "
            f"{text!r} ({error})."
        ) from None
    return found
