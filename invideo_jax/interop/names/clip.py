"""CLIP's transformers: OpenAI's names (also of ViCLIP), and those of transformers."""

from invideo_jax.interop.names.rows import Layout, Row, linear, norm, prefixed


def fused_attention(theirs: str, ours: str) -> list[Row]:
    """torch.nn.MultiheadAttention: query, key and value in one matrix and one bias."""
    of = lambda part: tuple(f"{ours}/{name}/{part}" for name in ("query", "key", "value"))
    return [
        Row(f"{theirs}.in_proj_weight", of("kernel"), "linear"),
        Row(f"{theirs}.in_proj_bias", of("bias")),
        *linear(f"{theirs}.out_proj", f"{ours}/out"),
    ]


def residual_blocks(theirs: str, ours: str) -> list[Row]:
    """CLIP's transformer blocks."""
    t, o = f"{theirs}.{{i}}", f"{ours}/blocks"
    return [
        *fused_attention(f"{t}.attn", f"{o}/attention"),
        *norm(f"{t}.ln_1", f"{o}/norm1"),
        *linear(f"{t}.mlp.c_fc", f"{o}/mlp/up"),
        *linear(f"{t}.mlp.c_proj", f"{o}/mlp/down"),
        *norm(f"{t}.ln_2", f"{o}/norm2"),
    ]


def _hf_blocks(theirs: str, ours: str) -> list[Row]:
    t, o = f"{theirs}.{{i}}", f"{ours}/blocks"
    names = dict(k_proj="key", v_proj="value", q_proj="query", out_proj="out")
    return [
        *(
            row
            for name, our in names.items()
            for row in linear(f"{t}.self_attn.{name}", f"{o}/attention/{our}")
        ),
        *norm(f"{t}.layer_norm1", f"{o}/norm1"),
        *linear(f"{t}.mlp.fc1", f"{o}/mlp/up"),
        *linear(f"{t}.mlp.fc2", f"{o}/mlp/down"),
        *norm(f"{t}.layer_norm2", f"{o}/norm2"),
    ]


def text(theirs: str = "", ours: str = "") -> tuple[Row, ...]:
    """The text transformer."""
    rows = (
        Row("positional_embedding", ("position_embedding",)),
        Row("text_projection", ("projection/kernel",)),
        *residual_blocks("transformer.resblocks", "stack"),
        Row("token_embedding.weight", ("word_embedding",)),
        *norm("ln_final", "norm"),
    )
    return tuple(prefixed(rows, theirs, ours))


def visual(theirs: str, ours: str, conv: str) -> tuple[Row, ...]:
    """The vision transformer; `conv` is the turn of the convolution, in two dimensions or three."""
    rows = (
        Row("class_embedding", ("cls_token",)),
        Row("positional_embedding", ("position_embedding",)),
        Row("temporal_positional_embedding", ("position_temporal",), "table", optional=True),
        Row("proj", ("projection/kernel",), optional=True),
        Row("conv1.weight", ("patch_embed/kernel",), conv),
        *norm("ln_pre", "norm_pre"),
        *residual_blocks("transformer.resblocks", "stack"),
        *norm("ln_post", "norm_post"),
    )
    return tuple(prefixed(rows, theirs, ours))


# The text half, in files of the whole model.
_TEXT = (
    r"^transformer\.",
    r"^token_embedding\.",
    r"^positional_embedding$",
    r"^ln_final\.",
    r"^text_projection$",
    r"^logit_scale$",
    r"^(input_resolution|context_length|vocab_size)$",
)

LAYOUTS: dict[str, Layout] = {
    # openai/CLIP, the vision half; and that of ViCLIP, whose convolution has a dimension of time.
    "clip_visual": Layout(visual("visual.", "", "conv2"), unused=_TEXT),
    "viclip_visual": Layout(
        visual("vision_encoder.", "", "conv"), unused=(r"^text_encoder\.", r"^temp$")
    ),
    # ViCLIP, whole.
    "viclip": Layout(
        (
            Row("temp", ("temperature",)),
            *visual("vision_encoder.", "vision/encoder/", "conv"),
            *text("text_encoder.", "text/"),
        )
    ),
    # transformers, CLIPVisionModel and CLIPVisionModelWithProjection; version 5 has no prefix.
    "clip_visual_hf": Layout(
        (
            Row("embeddings.class_embedding", ("cls_token",)),
            Row("embeddings.patch_embedding.weight", ("patch_embed/kernel",), "conv2"),
            Row("embeddings.position_embedding.weight", ("position_embedding",)),
            *norm("pre_layrnorm", "norm_pre"),
            *_hf_blocks("encoder.layers", "stack"),
            *norm("post_layernorm", "norm_post"),
            Row("visual_projection.weight", ("projection/kernel",), "linear", optional=True),
        ),
        prefixes=("vision_model.",),
        unused=(
            r"embeddings\.position_ids",
            r"^text_model\.",
            r"^text_projection\.",
            r"^logit_scale$",
        ),
    ),
    # transformers, CLIPTextModel and CLIPTextModelWithProjection, and the text half of CLIPModel.
    "clip_text_hf": Layout(
        (
            Row("text_model.embeddings.token_embedding.weight", ("word_embedding",)),
            Row("text_model.embeddings.position_embedding.weight", ("position_embedding",)),
            *_hf_blocks("text_model.encoder.layers", "stack"),
            *norm("text_model.final_layer_norm", "norm"),
            Row("text_projection.weight", ("projection/kernel",), "linear", optional=True),
        ),
        aliases=((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),),
        unused=(
            r"embeddings\.position_ids$",
            r"^vision_model\.",
            r"^visual_projection\.",
            r"^logit_scale$",
        ),
    ),
}
