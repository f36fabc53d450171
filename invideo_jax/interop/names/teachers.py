"""Teachers of stage 1: InternVL's vision tower, and the encoder of VideoMAE V2."""

import dataclasses

from invideo_jax.interop.names import videomae
from invideo_jax.interop.names.rows import Layout, Row, linear, norm, patches


def _encoder_of(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """The rows of the encoder in a model that has one, without its name in front."""
    bare = lambda row: dataclasses.replace(
        row,
        theirs=row.theirs.removeprefix("encoder."),
        ours=tuple(path.removeprefix("encoder/") for path in row.ours),
    )
    return tuple(bare(row) for row in rows if row.theirs.startswith("encoder."))


def _vision_blocks() -> list[Row]:
    t, o = "blocks.{i}", "stack/blocks"
    qkv = lambda part: tuple(f"{o}/attention/{n}/{part}" for n in ("query", "key", "value"))
    return [
        *norm(f"{t}.norm1", f"{o}/norm1", bias=False),
        Row(f"{t}.attn.qkv.weight", qkv("kernel"), "linear"),
        Row(f"{t}.attn.qkv.bias", qkv("bias"), optional=True),
        *linear(f"{t}.attn.proj", f"{o}/attention/out"),
        *norm(f"{t}.attn.q_norm", f"{o}/attention/query_norm", bias=False, optional=True),
        *norm(f"{t}.attn.k_norm", f"{o}/attention/key_norm", bias=False, optional=True),
        Row(f"{t}.ls1.gamma", (f"{o}/scale1",), optional=True),
        *norm(f"{t}.norm2", f"{o}/norm2", bias=False),
        *linear(f"{t}.mlp.fc1", f"{o}/mlp/up"),
        *linear(f"{t}.mlp.fc2", f"{o}/mlp/down"),
        Row(f"{t}.ls2.gamma", (f"{o}/scale2",), optional=True),
    ]


def _pool() -> list[Row]:
    t, parts = "clip_projector", ("query", "key", "value")
    return [
        *(row for n in parts for row in norm(f"{t}.norm1_{n[0]}", f"pool/norm_{n[0]}")),
        *(Row(f"{t}.cross_attn.{n[0]}_bias", (f"pool/{n}/bias",)) for n in parts),
        *(Row(f"{t}.cross_attn.{n[0]}.weight", (f"pool/{n}/kernel",), "linear") for n in parts),
        *linear(f"{t}.cross_attn.proj", "pool/out"),
    ]


LAYOUTS: dict[str, Layout] = {
    # InternVL-C's vision tower (internvl_c_13b_224px.pth) with InternVideo2's attention pool.
    "internvl_vision": Layout(
        (
            Row("pos_embed", ("position_embedding",), "table"),
            Row("cls_token", ("cls_token",), "token"),
            *patches("patch_embed.proj", "patch_embed"),
            *_vision_blocks(),
            *_pool(),
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
