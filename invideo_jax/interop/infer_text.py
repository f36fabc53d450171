"""What text tower a file of weights holds, from the shapes of its arrays."""

import dataclasses
from collections.abc import Callable

from invideo_jax.interop.given import Given, Shapes, Text, depth_of

USED = ("text_heads", "text_lora_alpha")  # what the user says, and readers here look at


def _heads(given: Given, width: int, head: int) -> int:
    """As the user or a config says, or as many of `head` channels as all published towers have."""
    return given.values.get("text_heads") or width // head or 1


def mobileclip(s: Shapes, given: Given, prefix: str = "") -> Text:
    """MobileCLIP's text tower of keys that begin with `prefix`."""
    vocabulary, width = s[f"{prefix}embedding_layer.weight"]
    block = f"{prefix}transformer."
    arguments = dict(
        width=width,
        depth=depth_of(s, block),
        heads=_heads(given, width, 64),
        mlp_width=s[f"{block}0.pre_norm_ffn.1.weight"][0],
        output_width=s[f"{prefix}projection_layer"][1],
        vocabulary=vocabulary,
        positions=s[f"{prefix}positional_embedding.pos_embed.pos_embed"][2],
        activation="gelu",
        causal=True,
        eps=1e-5,
    )
    return {"model": "clip_text", "arguments": arguments}


def clip(s: Shapes, given: Given, prefix: str = "") -> Text:
    """OpenAI CLIP's text tower of keys that begin with `prefix`."""
    vocabulary, width = s[f"{prefix}token_embedding.weight"]
    block = f"{prefix}transformer.resblocks."
    arguments = dict(
        width=width,
        depth=depth_of(s, block),
        heads=_heads(given, width, 64),
        mlp_width=s[f"{block}0.mlp.c_fc.weight"][0],
        output_width=s[f"{prefix}text_projection"][1],
        vocabulary=vocabulary,
        positions=s[f"{prefix}positional_embedding"][0],
        activation="gelu_quick",
        causal=True,
        eps=1e-5,
    )
    return {"model": "clip_text", "arguments": arguments}


def _clip_hf(s: Shapes, given: Given, prefix: str) -> Text:
    embeddings, block = f"{prefix}embeddings.", f"{prefix}encoder.layers."
    vocabulary, width = s[f"{embeddings}token_embedding.weight"]
    arguments = dict(
        width=width,
        depth=depth_of(s, block),
        heads=_heads(given, width, 64),
        mlp_width=s[f"{block}0.mlp.fc1.weight"][0],
        output_width=s.get("text_projection.weight", (0,))[0],
        vocabulary=vocabulary,
        positions=s[f"{embeddings}position_embedding.weight"][0],
        activation="gelu_quick",
        causal=True,
        eps=1e-5,
    )
    return {"model": "clip_text", "arguments": arguments}


def bert(s: Shapes, given: Given, prefix: str = "") -> Text:
    """BERT, with fusion blocks where it has cross-attention, of keys that begin with `prefix`."""
    embeddings, layer = f"{prefix}bert.embeddings.", f"{prefix}bert.encoder.layer."
    vocabulary, width = s[f"{embeddings}word_embeddings.weight"]
    depth = depth_of(s, layer)
    fusion = [i for i in range(depth) if f"{layer}{i}.crossattention.self.key.weight" in s]
    arguments = dict(
        width=width,
        depth=depth,
        heads=_heads(given, width, 64),
        mlp_width=s[f"{layer}0.intermediate.dense.weight"][0],
        fusion_from=fusion[0] if fusion else depth,
        context_width=0,
        vocabulary=vocabulary,
        positions=s[f"{embeddings}position_embeddings.weight"][0],
        types=s[f"{embeddings}token_type_embeddings.weight"][0],
        pad=0,
        word_head=f"{prefix}cls.predictions.bias" in s,
        activation="gelu",
        eps=1e-12,
    )
    return {"model": "bert", "arguments": arguments}


def llama(s: Shapes, given: Given, prefix: str = "") -> Text:
    """LLaMA of keys that begin with `prefix`; a projection of InternVL stands beside the decoder."""
    vocabulary, width = s[f"{prefix}embed_tokens.weight"]
    block = f"{prefix}layers.0."
    base = ".base_layer" if f"{block}self_attn.q_proj.base_layer.weight" in s else ""
    heads = _heads(given, width, 128)
    head = s[f"{block}self_attn.q_proj{base}.weight"][0] // heads
    adapted = {"query": "q", "key": "k", "value": "v", "out": "o"}
    key = lambda name: f"{block}self_attn.{adapted[name]}_proj.lora_A.default.weight"
    lora = [name for name in adapted if key(name) in s]
    rank = s[key(lora[0])][0] if lora else 0
    projection = prefix.removesuffix("transformer.") + "text_projection"
    arguments = dict(
        width=width,
        depth=depth_of(s, f"{prefix}layers."),
        heads=heads,
        mlp_width=s[f"{block}mlp.gate_proj.weight"][0],
        output_width=s.get(projection, (0, 0))[1],
        kv_heads=s[f"{block}self_attn.k_proj.weight"][0] // head,
        head_width=head,
        vocabulary=vocabulary,
        pad=0,
        theta=10000.0,
        activation="silu",
        eps=1e-6,
        lora_rank=rank,
        lora_alpha=given.values.get("text_lora_alpha", 2.0 * rank),  # the published factor is 2
        lora=lora or ["query", "value"],
    )
    return {"model": "llama_text", "arguments": arguments}


def _alone(read: Callable[..., Text], prefix: str = "") -> Callable[[Shapes, Given], Text]:
    """The reader of a file with nothing but a text tower, whose heads are all there are."""

    def of(s: Shapes, given: Given) -> Text:
        heads = {"text_heads": given.values["heads"]} if "heads" in given.values else {}
        given = dataclasses.replace(given, values=heads | dict(given.values))
        return read(s, given, prefix)

    return of


READERS: dict[str, Callable[[Shapes, Given], Text]] = {
    "bert": _alone(bert),
    "clip_text": _alone(clip),
    "clip_text_hf": _alone(_clip_hf, "text_model."),
    "mobileclip_text": _alone(mobileclip),
    "internvl_text": _alone(llama, "transformer."),
    "internvl_text_peft": _alone(llama, "transformer."),
    "llama_hf": _alone(llama, "model."),
}
