"""Teachers of stage 1: InternVL's vision tower, and the encoder of VideoMAE V2."""

import dataclasses

from invideo_jax.interop.names import internvideo2, videomae
from invideo_jax.interop.names.rows import Layout, Row, patches


def _encoder_of(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of the encoder in a model that has one, without its name in front."""
    bare = lambda row: dataclasses.replace(
        row,
        theirs=row.theirs.removeprefix("encoder."),
        ours=tuple(path.removeprefix("encoder/") for path in row.ours),
    )
    return tuple(bare(row) for row in rows if row.theirs.startswith("encoder."))


LAYOUTS: dict[str, Layout] = {
    # InternVL-C's vision tower (internvl_c_13b_224px.pth) with InternVideo2's attention pool.
    "internvl_vision": Layout(
        (
            Row("pos_embed", ("position_embedding",), "table"),
            Row("cls_token", ("cls_token",), "token"),
            *patches("patch_embed.proj", "patch_embed"),
            *internvideo2.blocks(),
            *internvideo2.pool(),
        ),
        unused=(r"^transformer\.", r"^text_projection$", r"^logit_scale$"),  # its language model
    ),
    # VideoMAE V2 (vit_g_hybrid_1200e_pre.pth), of which only the encoder teaches.
    "videomae_encoder": Layout(
        _encoder_of(videomae.LAYOUTS["videomae"].rows),
        prefixes=("encoder.",),
        unused=(r"^decoder\.", r"^encoder_to_decoder\.", r"^mask_token$"),
    ),
}
