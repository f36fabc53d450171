"""LLaMA as a text tower: transformers' names, with LoRA's as peft writes them, and InternVL's around them."""

from invideo_jax.interop.names.rows import Layout, Row, linear, norm, optional, prefixed

_ATTENTION = dict(q_proj="query", k_proj="key", v_proj="value", o_proj="out")
_MLP = dict(gate_proj="gate", up_proj="up", down_proj="down")
# The other spellings: peft since version 0.6 calls the layer beside LoRA its base; files of adapters
# have no name of the adapter. The last are buffers of old versions of transformers.
ALIASES = (
    (r"\.base_layer\.weight$", ".weight"),
    (r"\.lora_([AB])\.weight$", r".lora_\1.default.weight"),
)
BUFFERS = (r"rotary_emb\.inv_freq$",)


def _adapted(theirs: str, ours: str, base: str) -> list[Row]:
    """A matrix, and LoRA's two where it has them."""
    factors = [
        Row(f"{theirs}.lora_{n}.default.weight", (f"{ours}/lora_{n.lower()}",), "linear")
        for n in "AB"
    ]
    return [Row(f"{theirs}{base}.weight", (f"{ours}/kernel",), "linear"), *optional(factors)]


def decoder(theirs: str = "", ours: str = "", *, bases: tuple[str, ...] = ()) -> list[Row]:
    """transformers' LlamaModel; `bases` are the layers whose matrix is called a base layer's."""
    t, o = "layers.{i}", "stack/blocks"
    of = lambda name: ".base_layer" if name in bases else ""
    rows = [
        Row("embed_tokens.weight", ("word_embedding",)),
        *(
            row
            for name, our in _ATTENTION.items()
            for row in _adapted(f"{t}.self_attn.{name}", f"{o}/attention/{our}", of(name))
        ),
        *(
            row
            for name, our in _MLP.items()
            for row in linear(f"{t}.mlp.{name}", f"{o}/{our}", bias=False)
        ),
        *norm(f"{t}.input_layernorm", f"{o}/norm1", bias=False),
        *norm(f"{t}.post_attention_layernorm", f"{o}/norm2", bias=False),
        *norm("norm", "norm", bias=False),
    ]
    return prefixed(rows, theirs, ours)


def text(theirs: str = "", ours: str = "", *, bases: tuple[str, ...] = ()) -> list[Row]:
    """InternVL's text tower: the decoder and a projection."""
    rows = [
        Row("text_projection", ("projection/kernel",)),
        *decoder("transformer.", bases=bases),
    ]
    return prefixed(rows, theirs, ours)


_VISION = (
    r"^(pos_embed|cls_token|logit_scale)$",
    r"^(patch_embed|blocks|clip_projector|attn_pool)\.",
)

LAYOUTS: dict[str, Layout] = {
    # The text half of internvl_c_13b_224px.pth, and of files of InternVideo2-CLIP 1B and 6B.
    "internvl_text": Layout(
        tuple(text()),
        aliases=ALIASES,
        prefixes=("text_encoder.",),
        unused=(*BUFFERS, *_VISION, r"^vision_encoder\.", r"^temp$"),
    ),
    # The same as newer versions of peft spell it.
    "internvl_text_peft": Layout(
        tuple(text(bases=("q_proj", "v_proj"))),
        aliases=ALIASES[1:],
        prefixes=("text_encoder.",),
        unused=(*BUFFERS, *_VISION, r"^vision_encoder\.", r"^temp$"),
    ),
    # transformers, LlamaModel and LlamaForCausalLM, whose scores of next words nothing here uses.
    "llama_hf": Layout(
        tuple(decoder("model.")),
        aliases=(
            (r"^base_model\.model\.", ""),
            (r"^(embed_tokens|layers|norm)\.", r"model.\1."),
            *ALIASES,
        ),
        unused=(*BUFFERS, r"^lm_head\.weight$"),
    ),
}
