"""Parameter path <-> PyTorch key: data only, used in both directions.

A layout is a list of rows in the order of the published state dict; each family of models is one file.
"""

from invideo_jax.errors import UserError
from invideo_jax.interop.names import (
    beats,
    clip,
    internvideo1_multimodal,
    internvideo2,
    internvideo2_audiovisual,
    internvideo2_classification,
    internvideo2_clip,
    internvideo2_stage2,
    llama,
    teachers,
    videomae,
)
from invideo_jax.interop.names.rows import Layout, Row
from invideo_jax.registry import nearest

__all__ = ["LAYOUTS", "Layout", "Row", "get"]

LAYOUTS: dict[str, Layout] = {
    **beats.LAYOUTS,
    **clip.LAYOUTS,
    **internvideo1_multimodal.LAYOUTS,
    **internvideo2.LAYOUTS,
    **internvideo2_classification.LAYOUTS,
    **teachers.LAYOUTS,
    **videomae.LAYOUTS,
    **internvideo2_stage2.LAYOUTS,
    **internvideo2_audiovisual.LAYOUTS,
    **internvideo2_clip.LAYOUTS,
    **llama.LAYOUTS,
}


# Stage 1 and distillation differ by the heads that a model has, which are optional rows.
LAYOUTS |= dict.fromkeys(("internvideo2_stage1", "internvideo2_distill"), LAYOUTS["internvideo2"])


def get(name: str) -> Layout:
    """The layout called `name`; UserError for an unknown one."""
    if name not in LAYOUTS:
        raise UserError(f"The layout must be known; got layout={name!r}.{nearest(name, LAYOUTS)}")
    return LAYOUTS[name]
