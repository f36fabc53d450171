"""Hand-over of parameters into a stage: where each one comes from, and what is done to it on the way.

`plan` compares shapes only, so it runs before anything is read or compiled; `apply` then moves leaf by
leaf, each to the place its target says, so that no second whole model is ever in memory. A parameter that
the recipe does not account for, on either side, is an error. `sources` opens what is handed over.
"""

from invideo_jax.handover.matching import read_label_map
from invideo_jax.handover.moving import apply
from invideo_jax.handover.planning import plan
from invideo_jax.handover.sources import Source, from_state, from_tree, open_source
from invideo_jax.handover.table import Row, Table

__all__ = [
    "Row",
    "Source",
    "Table",
    "apply",
    "from_state",
    "from_tree",
    "open_source",
    "plan",
    "read_label_map",
]
