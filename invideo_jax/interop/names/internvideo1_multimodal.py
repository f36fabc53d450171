"""The multimodal branch of InternVideo1: UniFormerV2 in CLIP's clothes."""

from invideo_jax.interop.names.clip import fused_attention, residual_blocks, text
from invideo_jax.interop.names.rows import Layout, Row, linear, norm, prefixed

EXTRACTORS = 4


def _position(j: int) -> list[Row]:
    t, o = f"visual.transformer.dpe.{j}", f"global_blocks_{j}/position"
    return [
        Row(f"{t}.weight", (f"{o}/kernel",), "kernel", optional=True),
        Row(f"{t}.bias", (f"{o}/bias",), optional=True),
    ]


def _extractor(j: int) -> list[Row]:
    t, o = f"visual.transformer.dec.{j}", f"global_blocks_{j}"
    return [
        *fused_attention(f"{t}.attn", f"{o}/attention"),
        *norm(f"{t}.ln_1", f"{o}/norm1"),
        *linear(f"{t}.mlp.c_fc", f"{o}/up"),
        *linear(f"{t}.mlp.c_proj", f"{o}/down"),
        *norm(f"{t}.ln_2", f"{o}/norm2"),
        *norm(f"{t}.ln_3", f"{o}/norm3"),
    ]


def vision_rows() -> tuple[Row, ...]:
    """The video tower, without the prefix `clip.`, into the parameters of `UniFormerV2`."""
    return (
        Row("visual_proj", ("backbone/projection/kernel",)),
        Row("visual.class_embedding", ("backbone/cls_token",)),
        Row("visual.positional_embedding", ("backbone/position_embedding",)),
        Row("visual.conv1.weight", ("backbone/patch_embed/kernel",), "conv"),
        *norm("visual.ln_pre", "backbone/norm_pre"),
        Row("visual.transformer.temporal_cls_token", ("temporal_cls_token",), "token"),
        Row("visual.transformer.balance", ("balance",)),
        *residual_blocks("visual.transformer.resblocks", "backbone/stack"),
        *(row for j in range(EXTRACTORS) for row in _position(j)),
        *(row for j in range(EXTRACTORS) for row in _extractor(j)),
        *norm("visual_ln_post", "backbone/norm_post"),
    )


# The decoder of captions, and the token that hides words from it.
_CAPTIONS = (r"^text_mask_embedding$", r"^caption_decoder\.")

LAYOUTS: dict[str, Layout] = {
    # Both towers.
    "internvideo1_clip": Layout(
        (
            Row("logit_scale", ("logit_scale",)),
            *prefixed(vision_rows(), "", "vision/encoder/"),
            *text(ours="text/"),
        ),
        prefixes=("clip.",),
        unused=_CAPTIONS,
    ),
    # The video tower alone; files of the whole model hold the text tower and a decoder besides.
    "internvideo1_multimodal": Layout(
        vision_rows(),
        prefixes=("clip.",),
        unused=(
            r"^transformer\.",
            r"^token_embedding\.",
            r"^positional_embedding$",
            r"^ln_final\.",
            r"^text_projection$",
            r"^logit_scale$",
            *_CAPTIONS,
        ),
    ),
}
