"""Parameter path <-> PyTorch key: data only, used in both directions.

A layout is a list of rows in the order of the published state dict. In a key `{i}` is the number of a
block; the parameters of all blocks are one array stacked along its first axis. A row with several paths
is one PyTorch tensor that holds them one after the other along its first axis.
"""

import dataclasses

from invideo_jax.errors import UserError
from invideo_jax.registry import nearest


@dataclasses.dataclass(frozen=True)
class Row:
    """One PyTorch key.

    Attributes:
        theirs: key, with `{i}` inside stacks.
        ours: paths of the parameters that it holds.
        turn: how an array is laid out: a name in `from_torch.TURNS`.
        optional: may be absent on both sides (bias, branch factor, last norm that a model lacks).
    """

    theirs: str
    ours: tuple[str, ...]
    turn: str = "copy"
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Layout:
    """Rows in published order, and regular expressions that turn other spellings into theirs."""

    rows: tuple[Row, ...]
    aliases: tuple[tuple[str, str], ...] = ()


def _norm(theirs: str, ours: str, *, optional: bool = False) -> list[Row]:
    return [
        Row(f"{theirs}.weight", (f"{ours}/scale",), optional=optional),
        Row(f"{theirs}.bias", (f"{ours}/bias",), optional=optional),
    ]


def _linear(theirs: str, ours: str) -> list[Row]:
    return [
        Row(f"{theirs}.weight", (f"{ours}/kernel",), "linear"),
        Row(f"{theirs}.bias", (f"{ours}/bias",)),
    ]


def _patches(theirs: str) -> list[Row]:
    return [
        Row(f"{theirs}.weight", ("patch_embed/kernel",), "conv"),
        Row(f"{theirs}.bias", ("patch_embed/bias",)),
    ]


def _blocks(theirs: str, ours: str) -> list[Row]:
    """Blocks of MCG-NJU/VideoMAE: fused qkv kernel, biases of q and v apart."""
    t, o = f"{theirs}.blocks.{{i}}", f"{ours}/blocks"
    qkv = tuple(f"{o}/attention/{name}/kernel" for name in ("query", "key", "value"))
    return [
        Row(f"{t}.gamma_1", (f"{o}/scale1",), optional=True),
        Row(f"{t}.gamma_2", (f"{o}/scale2",), optional=True),
        *_norm(f"{t}.norm1", f"{o}/norm1"),
        Row(f"{t}.attn.q_bias", (f"{o}/attention/query/bias",), optional=True),
        Row(f"{t}.attn.v_bias", (f"{o}/attention/value/bias",), optional=True),
        Row(f"{t}.attn.qkv.weight", qkv, "linear"),
        *_linear(f"{t}.attn.proj", f"{o}/attention/out"),
        *_norm(f"{t}.norm2", f"{o}/norm2"),
        *_linear(f"{t}.mlp.fc1", f"{o}/mlp/up"),
        *_linear(f"{t}.mlp.fc2", f"{o}/mlp/down"),
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
        *_linear(f"{t}.attention.output.dense", f"{o}/attention/out"),
        *_linear(f"{t}.intermediate.dense", f"{o}/mlp/up"),
        *_linear(f"{t}.output.dense", f"{o}/mlp/down"),
        *_norm(f"{t}.layernorm_before", f"{o}/norm1"),
        *_norm(f"{t}.layernorm_after", f"{o}/norm2"),
    ]


_HEAD = [*_norm("decoder.norm", "decoder_norm"), *_linear("decoder.head", "head")]
_BRIDGE = Row("encoder_to_decoder.weight", ("encoder_to_decoder/kernel",), "linear")
_MASK_TOKEN = Row("mask_token", ("mask_token",), "token")

LAYOUTS: dict[str, Layout] = {
    # MCG-NJU/VideoMAE and InternVideo1, pretraining model.
    "videomae": Layout(
        (
            _MASK_TOKEN,
            *_patches("encoder.patch_embed.proj"),
            *_blocks("encoder", "encoder"),
            *_norm("encoder.norm", "norm", optional=True),
            *_blocks("decoder", "decoder"),
            *_HEAD,
            _BRIDGE,
        )
    ),
    # transformers 5, VideoMAEForPreTraining; version 4 spells two biases otherwise.
    "videomae_hf": Layout(
        (
            _MASK_TOKEN,
            *_patches("videomae.embeddings.patch_embeddings.projection"),
            *_hf_blocks("videomae.encoder.layer", "encoder"),
            *_norm("videomae.layernorm", "norm", optional=True),
            _BRIDGE,
            *_hf_blocks("decoder.decoder_layers", "decoder"),
            *_HEAD,
        ),
        aliases=(
            (r"\.attention\.attention\.q_bias$", ".attention.attention.query.bias"),
            (r"\.attention\.attention\.v_bias$", ".attention.attention.value.bias"),
        ),
    ),
}


def get(name: str) -> Layout:
    """The layout called `name`; UserError for an unknown one."""
    if name not in LAYOUTS:
        raise UserError(f"The layout must be known; got layout={name!r}.{nearest(name, LAYOUTS)}")
    return LAYOUTS[name]
