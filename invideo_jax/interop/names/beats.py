"""BEATs, as microsoft/unilm publishes it and as InternVideo2's stage 2 holds it."""

from invideo_jax.interop.names.rows import Layout, Row, linear, norm, prefixed


def _block() -> list[Row]:
    t, o = "encoder.layers.{i}", "stack/blocks"
    attention = f"{t}.self_attn"
    return [
        Row(f"{attention}.grep_a", (f"{o}/gate_scale",), "heads", optional=True),
        *linear(f"{attention}.k_proj", f"{o}/key"),
        *linear(f"{attention}.v_proj", f"{o}/value"),
        *linear(f"{attention}.q_proj", f"{o}/query"),
        *linear(f"{attention}.out_proj", f"{o}/out"),
        *linear(f"{attention}.grep_linear", f"{o}/gate", optional=True),
        # One table, which each block lists; in the first block's list it comes before the matrices.
        Row(
            f"{attention}.relative_attention_bias.weight",
            ("relative_bias",),
            optional=True,
            tied=True,
        ),
        *norm(f"{t}.self_attn_layer_norm", f"{o}/norm1"),
        *linear(f"{t}.fc1", f"{o}/up"),
        *linear(f"{t}.fc2", f"{o}/down"),
        *norm(f"{t}.final_layer_norm", f"{o}/norm2"),
    ]


def beats(theirs: str = "", ours: str = "") -> tuple[Row, ...]:
    """The encoder without the classifier of fine-tuned files."""
    convolution = "encoder.pos_conv.0"
    rows = (
        *linear("post_extract_proj", "project", optional=True),
        Row("patch_embedding.weight", ("patch_embed/kernel",), "square"),
        Row("patch_embedding.bias", ("patch_embed/bias",), optional=True),
        Row(f"{convolution}.bias", ("position_bias",)),
        Row(f"{convolution}.weight_g", ("position_scale",), "token"),
        Row(f"{convolution}.weight_v", ("position_kernel",), "kernel"),
        *_block(),
        *norm("encoder.layer_norm", "norm"),
        *norm("layer_norm", "patch_norm"),
    )
    return tuple(prefixed(rows, theirs, ours))


# Newer PyTorch spells weight normalisation so.
ALIASES = (
    (r"(pos_conv\.0\.)parametrizations\.weight\.original0$", r"\1weight_g"),
    (r"(pos_conv\.0\.)parametrizations\.weight\.original1$", r"\1weight_v"),
)

LAYOUTS: dict[str, Layout] = {
    "beats": Layout(beats(), aliases=ALIASES, unused=(r"predictor\.(weight|bias)",)),
}
