"""What tower of sounds a file of weights is of."""

import dataclasses
import pathlib

from invideo_jax.interop import reading
from invideo_jax.interop.given import Given, Shapes, Text, depth_of

# What BEATs' own settings have where a file is silent, and which of our arguments they are.
_BEATS_CONFIG = {
    "encoder_attention_heads": ("heads", 12),
    "max_distance": ("max_distance", 1280),
    "deep_norm": ("deep_norm", False),
    "layer_norm_first": ("layer_norm_first", False),
    "activation_fn": ("activation", "gelu"),
}
_BEATS_ACTIVATIONS = {"gelu": "gelu", "gelu_accurate": "gelu_tanh", "gelu_fast": "gelu_tanh"}


def read(given: Given, file: pathlib.Path, layout: str) -> Given:
    """`given`, with what a published file of BEATs says of its model beside the weights."""
    if layout != "beats":
        return given
    return dataclasses.replace(given, config=reading.settings(file, "cfg"))


def beats(s: Shapes, given: Given, prefix: str = "") -> Text:
    """BEATs, by the settings in the file; by those of the third iteration where there are none."""
    embed, _, patch, _ = s[f"{prefix}patch_embedding.weight"]
    width, inputs, length = s[f"{prefix}encoder.pos_conv.0.weight_v"]
    block = f"{prefix}encoder.layers."
    attention = f"{block}0.self_attn."
    table = s.get(f"{attention}relative_attention_bias.weight", (0, width // 64 or 1))
    arguments = dict(
        width=width,
        depth=depth_of(s, block),
        heads=table[1],
        mlp_width=s[f"{block}0.fc1.weight"][0],
        patch=patch,
        mels=64,
        embed=embed,
        conv_positions=length,
        conv_groups=width // inputs,
        buckets=table[0],
        max_distance=800,
        gated=f"{attention}grep_a" in s,
        deep_norm=True,
        layer_norm_first=False,
        patch_bias=f"{prefix}patch_embedding.bias" in s,
        activation="gelu",
    )
    if given.config:
        found = {ours: given.config.get(n, usual) for n, (ours, usual) in _BEATS_CONFIG.items()}
        name = found["activation"]
        arguments |= found | dict(activation=_BEATS_ACTIVATIONS.get(name, name))
    return {"model": "beats", "arguments": arguments}
