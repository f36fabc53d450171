"""Text towers (BERT with fusion blocks, MobileCLIP's, CLIP's), and InternVideo2's stage 2."""

from invideo_jax.interop.names import clip
from invideo_jax.interop.names.internvideo2 import aligned
from invideo_jax.interop.names.rows import Layout, Row, linear, norm, optional, prefixed


def _bert_attention(theirs: str, ours: str, norm_path: str) -> list[Row]:
    """Attention and the norm behind it."""
    parts = ("query", "key", "value")
    return [
        *(row for p in parts for row in linear(f"{theirs}.self.{p}", f"{ours}/{p}")),
        *linear(f"{theirs}.output.dense", f"{ours}/out"),
        *norm(f"{theirs}.output.LayerNorm", norm_path),
    ]


def _bert_blocks(ours: str, *, cross: bool) -> list[Row]:
    t, o = "bert.encoder.layer.{i}", f"{ours}/blocks"
    rows = _bert_attention(f"{t}.attention", f"{o}/attention", f"{o}/norm1")
    if cross:
        rows += _bert_attention(f"{t}.crossattention", f"{o}/cross", f"{o}/cross_norm")
    rows += linear(f"{t}.intermediate.dense", f"{o}/mlp/up")
    rows += linear(f"{t}.output.dense", f"{o}/mlp/down")
    return optional(rows + norm(f"{t}.output.LayerNorm", f"{o}/norm2"))


def bert(theirs: str = "", ours: str = "") -> tuple[Row, ...]:
    """transformers' BertForMaskedLM, or BertModel inside it; the last layers may have cross-attention."""
    embeddings = "bert.embeddings"
    text = "text_stack/blocks/norm1/scale"
    head = (
        Row("cls.predictions.bias", ("head_bias",)),
        *linear("cls.predictions.transform.dense", "head_dense"),
        *norm("cls.predictions.transform.LayerNorm", "head_norm"),
        Row("cls.predictions.decoder.weight", ("word_embedding",), tied=True, beside="head_bias"),
        Row("cls.predictions.decoder.bias", ("head_bias",), tied=True),
    )
    rows = (
        Row(f"{embeddings}.position_ids", ("position_embedding",), buffer="arange"),
        Row(f"{embeddings}.word_embeddings.weight", ("word_embedding",)),
        Row(f"{embeddings}.position_embeddings.weight", ("position_embedding",)),
        Row(f"{embeddings}.token_type_embeddings.weight", ("type_embedding",)),
        *norm(f"{embeddings}.LayerNorm", "embedding_norm"),
        *_bert_blocks("text_stack", cross=False),
        *(
            Row(row.theirs, row.ours, row.turn, row.optional, after=text)
            for row in _bert_blocks("fusion_stack", cross=True)
        ),
        *optional(head),
    )
    return tuple(prefixed(rows, theirs, ours))


def mobileclip(theirs: str = "", ours: str = "") -> tuple[Row, ...]:
    """MobileCLIP's text tower."""
    t, o = "transformer.{i}", "stack/blocks"
    of = lambda part: tuple(f"{o}/attention/{name}/{part}" for name in ("query", "key", "value"))
    rows = (
        Row("projection_layer", ("projection/kernel",)),
        Row("embedding_layer.weight", ("word_embedding",)),
        Row("positional_embedding.pos_embed.pos_embed", ("position_embedding",), "table4"),
        *norm(f"{t}.pre_norm_mha.0", f"{o}/norm1"),
        Row(f"{t}.pre_norm_mha.1.qkv_proj.weight", of("kernel"), "linear"),
        Row(f"{t}.pre_norm_mha.1.qkv_proj.bias", of("bias")),
        *linear(f"{t}.pre_norm_mha.1.out_proj", f"{o}/attention/out"),
        *norm(f"{t}.pre_norm_ffn.0", f"{o}/norm2"),
        *linear(f"{t}.pre_norm_ffn.1", f"{o}/mlp/up"),
        *linear(f"{t}.pre_norm_ffn.4", f"{o}/mlp/down"),
        *norm("final_layer_norm", "norm"),
    )
    return tuple(prefixed(rows, theirs, ours))


_TEMPERATURE = Row("temp", ("temperature",))

LAYOUTS: dict[str, Layout] = {
    # transformers' BertForMaskedLM, as published with a pooler and a second head that nothing here uses;
    # and BertModel, whose keys have no name in front.
    "bert": Layout(
        bert(),
        aliases=(
            (r"\.gamma$", ".weight"),
            (r"\.beta$", ".bias"),
            (r"^(embeddings|encoder|pooler)\.", r"bert.\1."),
        ),
        unused=(r"bert\.pooler\.dense\.(weight|bias)", r"cls\.seq_relationship\.(weight|bias)"),
    ),
    # InternVideo2_Stage2_visual.
    "internvideo2_stage2": Layout(
        (
            _TEMPERATURE,
            *aligned("vision_encoder.", "vision/"),
            *bert("text_encoder.", "text/"),
            *linear("vision_proj", "vision_projection"),
            *linear("text_proj", "text_projection"),
            *linear("itm_head", "match_head"),
        )
    ),
    "mobileclip_text": Layout(mobileclip()),
    "clip_text": Layout(clip.text(), unused=("logit_scale", r"visual\..*")),
}
