"""What is known of a file's model before its shapes are read."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
Text = dict[str, Any]  # a model as `models.describe` writes it


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user says of the file's model; empty where shapes shall tell.

    Attributes:
        frames, image_size: of the clips the file's model was made for.
        size: row of `sizes` for what shapes do not tell.
        values: further arguments of the model or its encoder, by name.
        config: what the file itself says of its model, in its own words.
    """

    frames: int = 0
    image_size: int = 0
    size: str = ""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def depth_of(shapes: Shapes, prefix: str) -> int:
    """Number of blocks whose keys begin with `prefix`."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in shapes)
    return 1 + max((int(m[1]) for m in found if m), default=-1)
