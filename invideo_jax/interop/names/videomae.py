"""VideoMAE: MCG-NJU/VideoMAE (and InternVideo1), and transformers' VideoMAE."""

from invideo_jax.interop.names.rows import Layout, Row, linear, norm, patches


def _blocks(theirs: str, ours: str) -> list[Row]:
    """Blocks of MCG-NJU/VideoMAE: fused qkv kernel, biases of q and v apart."""
    t, o = f"{theirs}.{{i}}", f"{ours}/blocks"
    qkv = tuple(f"{o}/attention/{name}/kernel" for name in ("query", "key", "value"))
    return [
        Row(f"{t}.gamma_1", (f"{o}/scale1",), optional=True),
        Row(f"{t}.gamma_2", (f"{o}/scale2",), optional=True),
        *norm(f"{t}.norm1", f"{o}/norm1"),
        Row(f"{t}.attn.q_bias", (f"{o}/attention/query/bias",), optional=True),
        Row(f"{t}.attn.v_bias", (f"{o}/attention/value/bias",), optional=True),
        Row(f"{t}.attn.qkv.weight", qkv, "linear"),
        *linear(f"{t}.attn.proj", f"{o}/attention/out"),
        *norm(f"{t}.norm2", f"{o}/norm2"),
        *linear(f"{t}.mlp.fc1", f"{o}/mlp/up"),
        *linear(f"{t}.mlp.fc2", f"{o}/mlp/down"),
    ]


def _hf_blocks(theirs: str, ours: str) -> list[Row]:
    """Blocks of transformers' VideoMAE."""
    t, o = f"{theirs}.{{i}}", f"{ours}/blocks"
    a = f"{t}.attention.attention"
    return [
        Row(f"{a}.query.weight", (f"{o}/attention/query/kernel",), "linear"),
        Row(f"{a}.query.bias", (f"{o}/attention/query/bias",), optional=True),
        Row(f"{a}.key.weight", (f"{o}/attention/key/kernel",), "linear"),
        Row(f"{a}.value.weight", (f"{o}/attention/value/kernel",), "linear"),
        Row(f"{a}.value.bias", (f"{o}/attention/value/bias",), optional=True),
        *linear(f"{t}.attention.output.dense", f"{o}/attention/out"),
        *linear(f"{t}.intermediate.dense", f"{o}/mlp/up"),
        *linear(f"{t}.output.dense", f"{o}/mlp/down"),
        *norm(f"{t}.layernorm_before", f"{o}/norm1"),
        *norm(f"{t}.layernorm_after", f"{o}/norm2"),
    ]


_HEAD = [*norm("decoder.norm", "decoder_norm"), *linear("decoder.head", "head")]
_BRIDGE = Row("encoder_to_decoder.weight", ("encoder_to_decoder/kernel",), "linear")
_MASK_TOKEN = Row("mask_token", ("mask_token",), "token")
_HF_ALIASES = (
    (r"\.attention\.attention\.q_bias$", ".attention.attention.query.bias"),
    (r"\.attention\.attention\.v_bias$", ".attention.attention.value.bias"),
)

LAYOUTS: dict[str, Layout] = {
    # MCG-NJU/VideoMAE and InternVideo1, pretraining model.
    "videomae": Layout(
        (
            _MASK_TOKEN,
            *patches("encoder.patch_embed.proj", "encoder/patch_embed"),
            *_blocks("encoder.blocks", "encoder/stack"),
            *norm("encoder.norm", "encoder/norm", optional=True),
            *_blocks("decoder.blocks", "decoder"),
            *_HEAD,
            _BRIDGE,
        )
    ),
    # transformers 5, VideoMAEForPreTraining; version 4 spells two biases otherwise.
    "videomae_hf": Layout(
        (
            _MASK_TOKEN,
            *patches("videomae.embeddings.patch_embeddings.projection", "encoder/patch_embed"),
            *_hf_blocks("videomae.encoder.layer", "encoder/stack"),
            *norm("videomae.layernorm", "encoder/norm", optional=True),
            _BRIDGE,
            *_hf_blocks("decoder.decoder_layers", "decoder"),
            *_HEAD,
        ),
        aliases=_HF_ALIASES,
    ),
    # MCG-NJU/VideoMAE and InternVideo1, fine-tuning model (the mean of tokens, no last norm).
    "videomae_classification": Layout(
        (
            *patches("patch_embed.proj", "encoder/patch_embed"),
            *_blocks("blocks", "encoder/stack"),
            *norm("fc_norm", "fc_norm"),
            *linear("head", "head"),
        )
    ),
    # transformers 5, VideoMAEForVideoClassification with use_mean_pooling.
    "videomae_hf_classification": Layout(
        (
            *patches("videomae.embeddings.patch_embeddings.projection", "encoder/patch_embed"),
            *_hf_blocks("videomae.encoder.layer", "encoder/stack"),
            *norm("fc_norm", "fc_norm"),
            *linear("classifier", "head"),
        ),
        aliases=_HF_ALIASES,
    ),
}
