"""InternVideo2's video encoder: alone, with alignment heads (stage 1, distillation, stage 2), and CLIP's.

Linear weights of released files are fused or not under the same keys. Optional rows are those of
options: joint or separate positions, an image table, biases, query and key norms, layer scale, heads.
"""

from invideo_jax.interop.names.rows import Layout, Row, linear, norm, optional, patches, prefixed

_CLASS_TOKEN = Row("cls_token", ("cls_token",), "token")


def tables(theirs: str = "", ours: str = "") -> list[Row]:
    """Position tables; names of ours and theirs have these in front."""
    table = lambda key, path, turn="table": Row(theirs + key, (ours + path,), turn, optional=True)
    return [
        table("pos_embed_spatial", "position_spatial"),
        table("pos_embed_temporal", "position_temporal"),
        table("pos_embed_cls", "position_cls", "token"),
        table("pos_embed", "position_embedding"),
        table("img_pos_embed", "image_position_embedding"),
    ]


def blocks(theirs: str = "blocks", ours: str = "stack/blocks") -> list[Row]:
    """Blocks: one matrix of queries, keys and values; norms without bias."""
    t = f"{theirs}.{{i}}"
    qkv = lambda part: tuple(f"{ours}/attention/{n}/{part}" for n in ("query", "key", "value"))
    return [
        *norm(f"{t}.norm1", f"{ours}/norm1", bias=False),
        Row(f"{t}.attn.qkv.weight", qkv("kernel"), "linear"),
        Row(f"{t}.attn.qkv.bias", qkv("bias"), optional=True),
        *linear(f"{t}.attn.proj", f"{ours}/attention/out"),
        *norm(f"{t}.attn.q_norm", f"{ours}/attention/query_norm", bias=False, optional=True),
        *norm(f"{t}.attn.k_norm", f"{ours}/attention/key_norm", bias=False, optional=True),
        Row(f"{t}.ls1.gamma", (f"{ours}/scale1",), optional=True),
        *norm(f"{t}.norm2", f"{ours}/norm2", bias=False),
        *linear(f"{t}.mlp.fc1", f"{ours}/mlp/up"),
        *linear(f"{t}.mlp.fc2", f"{ours}/mlp/down"),
        Row(f"{t}.ls2.gamma", (f"{ours}/scale2",), optional=True),
    ]


def pool(theirs: str = "clip_projector", ours: str = "pool") -> list[Row]:
    """The attention pool."""
    parts = ("query", "key", "value")
    attention = f"{theirs}.cross_attn"
    return optional(
        [
            *(row for n in parts for row in norm(f"{theirs}.norm1_{n[0]}", f"{ours}/norm_{n[0]}")),
            *(Row(f"{attention}.{n[0]}_bias", (f"{ours}/{n}/bias",)) for n in parts),
            *(Row(f"{attention}.{n[0]}.weight", (f"{ours}/{n}/kernel",), "linear") for n in parts),
            *linear(f"{attention}.proj", f"{ours}/out"),
        ]
    )


def trunk(theirs: str = "", ours: str = "") -> list[Row]:
    """The encoder (`VideoEncoder`)."""
    rows = [
        _CLASS_TOKEN,
        *tables(),
        *patches("patch_embed.proj", "patch_embed"),
        *blocks(),
        *pool(),
    ]
    return prefixed(rows, theirs, ours)


def _head(theirs: str, ours: str) -> list[Row]:
    """One Linear, or Linear, GELU, Linear; then a norm."""
    return optional(
        [
            *linear(f"{theirs}.head", f"{ours}/out"),
            *linear(f"{theirs}.head.0", f"{ours}/up"),
            *linear(f"{theirs}.head.2", f"{ours}/down"),
            *norm(f"{theirs}.norm", f"{ours}/norm"),
        ]
    )


def aligned(theirs: str = "", ours: str = "") -> list[Row]:
    """The encoder with alignment heads (`AlignedEncoder`)."""
    encoder = prefixed(trunk(), "", "encoder/")
    rows = [
        *encoder[: 1 + len(tables())],
        *tables("clip_", "clip_"),
        *tables("mae_", "mae_"),
        *encoder[1 + len(tables()) :],
        *_head("clip_decoder.{i}", "clip_heads"),
        *_head("final_clip_decoder", "final_head"),
        *_head("mae_decoder.{i}", "mae_heads"),
    ]
    return prefixed(rows, theirs, ours)


LAYOUTS: dict[str, Layout] = {
    # The encoder alone: the teacher of distillation, InternVideo2-CLIP 1B and 6B. Files of the models
    # below have further keys, which nothing here uses.
    "internvideo2_encoder": Layout(
        tuple(trunk()),
        prefixes=("vision_encoder.",),
        unused=(
            r"^(clip|mae)_(img_)?pos_embed(_spatial|_temporal|_cls)?$",
            r"^(clip_decoder|mae_decoder|final_clip_decoder|fc_norm|head)\.",
        ),
    ),
    # Stage 1, distillation, and the vision encoder of stage 2.
    "internvideo2": Layout(tuple(aligned()), prefixes=("vision_encoder.",)),
    # InternVideo2-CLIP S, B, L: the vision side.
    "internvideo2_clip_vision": Layout(
        (
            *trunk("vision_encoder.", "encoder/"),
            *optional(norm("vision_align.0", "align_norm")),
            *optional(linear("vision_align.1", "align")),
        ),
        unused=(r"^text_encoder\.", r"^temp$"),
    ),
}
