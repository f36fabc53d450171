"""What model a file of weights is of, from the shapes of its arrays."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from invideo_jax.errors import UserError
from invideo_jax.interop import infer_sound, infer_text
from invideo_jax.interop.given import Given, Shapes, Text, depth_of
from invideo_jax.models import sizes
from invideo_jax.models.alignment import last_blocks
from invideo_jax.registry import nearest

# Attention heads do not show in shapes: those of the published models, by width.
HEADS = {row.width: row.heads for row in sizes.INTERNVIDEO2.values() if row.params} | {
    row.width: row.heads for row in sizes.VIDEO_MAE.values() if row.encoder_params
}
DECODER_HEADS = {
    row.decoder_width: row.decoder_heads for row in sizes.VIDEO_MAE.values() if row.params
}


def model_text(shapes: Shapes, layout: str, given: Given) -> Text:
    """The model of a state dict, as text for `models.make`.

    Args:
        shapes: key (as the layout spells it) -> shape.

    Raises:
        UserError: keys or shapes that say too little; the message names the option that helps.
    """
    if layout not in READERS:
        raise UserError(
            f"The model of layout {layout!r} is not made from a file alone.{nearest(layout, READERS)}"
        )
    try:
        text = READERS[layout](shapes, given)
    except KeyError as error:
        raise UserError(
            f"A file of layout {layout!r} must hold {error.args[0]}; it does not. Its keys begin with "
            f"{', '.join(sorted({k.split('.')[0] for k in shapes})[:8])}. Give another --layout."
        ) from error
    for name, value in given.values.items():
        if name not in ("clip_blocks", "mae_blocks", *infer_text.USED):  # used above
            _set(text, name, value)
    return text


def _set(text: Text, name: str, value: Any) -> None:
    """Sets an argument of the model, or of the model in it that has one of that name."""
    places, queue = [], [text]
    while queue:
        arguments = queue.pop(0)["arguments"]
        places.append(arguments)
        queue += [x for x in arguments.values() if isinstance(x, dict)]
    for arguments in places:
        if name in arguments:
            arguments[name] = value
            return
    known = sorted({key for arguments in places for key in arguments})
    raise UserError(f"--model.{name} must name an argument of the model.{nearest(name, known)}")


def heads_of(name: str, width: int, given: Given, table: Mapping[int, int]) -> int:
    """Attention heads: as given, by the named size, or of the published model of this width."""
    if name in given.values:
        return given.values[name]
    for rows in (sizes.INTERNVIDEO2, sizes.VIDEO_MAE):
        row = rows.get(given.size)
        if row is not None:
            found = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)}
            of = "decoder_width" if name.startswith("decoder") else "width"
            if name in found and found.get(of) == width:
                return found[name]
    if width in table:
        return table[width]
    raise UserError(
        f"The shapes do not tell the number of heads, and no published model has width {width}. Give "
        f"--model.{name}=N, or --size=NAME of a known size."
    )


# ---- VideoMAE ---------------------------------------------------------------------------------------


def _mae_encoder(s: Shapes, given: Given, keys: Mapping[str, str], last_norm: bool) -> Text:
    width, channels, tubelet, patch, _ = s[keys["patch"]]
    block = keys["block"] + "0."
    return {
        "model": "video_mae_encoder",
        "arguments": dict(
            width=width,
            depth=depth_of(s, keys["block"]),
            heads=heads_of("heads", width, given, HEADS),
            mlp_width=s[block + keys["up"]][0],
            patch=patch,
            tubelet=tubelet,
            frames=given.frames or 16,
            image_size=given.image_size or 224,
            channels=channels,
            normalisation="imagenet",
            last_norm=last_norm,
            eps=1e-6,
            qkv_bias=block + keys["bias"] in s,
            activation="gelu",
            scale=None,
            layer_scale=0.1 if block + "gamma_1" in s else 0.0,
        ),
    }


_ORIGINAL = dict(up="mlp.fc1.weight", bias="attn.q_bias")
_HF = dict(up="intermediate.dense.weight", bias="attention.attention.query.bias")


def _video_mae(patch: str, block: str, norm: str, names: Mapping[str, str], decoder: str):
    def read(s: Shapes, given: Given) -> Text:
        keys = dict(patch=patch, block=block, **names)
        encoder = _mae_encoder(s, given, keys, norm in s)
        width = s["encoder_to_decoder.weight"][0]
        arguments = dict(
            encoder=encoder,
            decoder_width=width,
            decoder_depth=depth_of(s, decoder),
            decoder_heads=heads_of("decoder_heads", width, given, DECODER_HEADS),
            decoder_mlp_width=s[f"{decoder}0.{names['up']}"][0],
            decoder_eps=1e-5 if names is _HF else 1e-6,  # transformers has 1e-5 there, always
        )
        if names is _HF:
            # Its defaults: the models with a last norm were made with mean pooling off.
            encoder["arguments"]["eps"] = 1e-12
        return {"model": "video_mae", "arguments": arguments}

    return read


def _mae_classifier(patch: str, block: str, head: str, names: Mapping[str, str]):
    def read(s: Shapes, given: Given) -> Text:
        keys = dict(patch=patch, block=block, **names)
        encoder = _mae_encoder(s, given, keys, False)
        eps = 1e-6
        if names is _HF:
            encoder["arguments"]["eps"], eps = 1e-12, 1e-5
        arguments = dict(encoder=encoder, classes=s[head][0], eps=eps)
        return {"model": "classifier", "arguments": arguments | _PLAIN}

    return read


_PLAIN = dict(variant="plain", merge="proj", merge_norm="kaiming_BN")


# ---- InternVideo2 -----------------------------------------------------------------------------------


def vision(s: Shapes, given: Given, prefix: str = "", *, frames: int = 8, **more: Any) -> Text:
    """InternVideo2's encoder of keys that begin with `prefix`; `frames` where nothing is given."""
    width, channels, tubelet, patch, _ = s[f"{prefix}patch_embed.proj.weight"]
    block, pool = f"{prefix}blocks.0.", f"{prefix}clip_projector.cross_attn.proj.weight"
    frames, image_size = _grid(s, given, prefix, patch, tubelet, frames)
    return {
        "model": "internvideo2",
        "arguments": dict(
            width=width,
            depth=depth_of(s, f"{prefix}blocks."),
            heads=heads_of("heads", width, given, HEADS),
            mlp_width=s[f"{block}mlp.fc1.weight"][0],
            patch=patch,
            tubelet=tubelet,
            frames=frames,
            image_size=image_size,
            channels=channels,
            normalisation="imagenet",
            pool_heads=heads_of("pool_heads", width, given, dict.fromkeys(HEADS, 16)),
            pool_width=s[pool][0] if pool in s else 0,
            activation="gelu_tanh",
            qkv_bias=f"{block}attn.qkv.bias" in s,
            qk_norm=f"{block}attn.q_norm.weight" in s,
            layer_scale=1e-5 if f"{block}ls1.gamma" in s else 0.0,
            layer_scale_float32=True,
            positions="joint" if f"{prefix}pos_embed" in s else "separate",
            image_positions="separate" if f"{prefix}img_pos_embed" in s else "average",
        )
        | more,
    }


def _grid(s: Shapes, given: Given, prefix: str, patch: int, tubelet: int, frames: int):
    """(frames, image size) of the position table."""
    if f"{prefix}pos_embed" not in s:
        side = math.isqrt(s[f"{prefix}pos_embed_spatial"][1])
        return s[f"{prefix}pos_embed_temporal"][1] * tubelet, side * patch
    rows = s[f"{prefix}pos_embed"][1] - 1
    if not given.frames and given.image_size:
        frames = rows // (given.image_size // patch) ** 2 * tubelet
    frames = given.frames or frames
    slots = frames // tubelet
    side = math.isqrt(rows // slots) if slots else 0
    if slots < 1 or slots * side * side != rows or given.image_size not in (0, side * patch):
        fits = [
            t for t in range(1, 129) if rows % t == 0 and math.isqrt(rows // t) ** 2 * t == rows
        ]
        some = ", ".join(
            f"{t * tubelet} ({math.isqrt(rows // t) * patch} pixels)" for t in fits[:6]
        )
        raise UserError(
            f"The file's position table has {rows} places, which {frames} frames do not explain. Give "
            f"--old_frames, the frames of the file's model: {some}."
        )
    return frames, side * patch


def _heads(s: Shapes, name: str, depth: int) -> Text | None:
    count = depth_of(s, f"{name}.")
    if not count:
        return None
    mlp = f"{name}.0.head.0.weight" in s
    width = s[f"{name}.0.norm.weight"][0]
    blocks = list(last_blocks(depth, count))
    spec = dict(blocks=blocks, width=width, mlp=mlp, normalise=True)
    return {"model": "heads", "arguments": spec}


def aligned(s: Shapes, given: Given, prefix: str = "", *, frames: int = 8) -> Text:
    """InternVideo2's encoder with its alignment heads."""
    encoder = vision(s, given, prefix, frames=frames)
    depth, final = encoder["arguments"]["depth"], f"{prefix}final_clip_decoder"
    arguments = dict(
        encoder=encoder,
        clip=_heads(s, f"{prefix}clip_decoder", depth),
        mae=_heads(s, f"{prefix}mae_decoder", depth),
        final=None,
    )
    if f"{final}.norm.weight" in s:
        spec = dict(width=s[f"{final}.norm.weight"][0], mlp=f"{final}.head.0.weight" in s)
        arguments["final"] = {"model": "final", "arguments": spec | dict(normalise=True)}
    for name in ("clip", "mae"):
        blocks = given.values.get(f"{name}_blocks")
        if blocks and arguments[name]:
            arguments[name]["arguments"]["blocks"] = list(blocks)
    return {"model": "aligned", "arguments": arguments}


def _classifier(s: Shapes, given: Given) -> Text:
    encoder = vision(s, given)
    a, (classes, inputs) = encoder["arguments"], s["head.weight"]
    merging = dict(_PLAIN)
    if "extra_mlp.0.weight" in s:
        merging["variant"] = "attentive"
    elif any(key.startswith("down_norm.") for key in s):
        each = "down.0.weight" in s
        width = (1 + a["frames"] // a["tubelet"]) * a["pool_width"] if each else 2 * a["width"]
        merge = "cls_avgN" if each else "cls_avg1"
        if inputs not in (width, width + a["pool_width"]):
            raise UserError(
                f"head.weight takes {inputs} features, which merging by {merge!r} does not make of "
                f"{a['frames']} frames. Give --old_frames."
            )
        norm = "LN" if "down_norm.running_mean" not in s else "kaiming_BN"
        norm = "BN" if norm != "LN" and "down_norm.weight" in s else norm
        merge += "_proj" * (inputs > width)
        merging = dict(variant="cat", merge=merge, merge_norm=norm)
    return {"model": "classifier", "arguments": dict(encoder=encoder, classes=classes) | merging}


# ---- video and text -------------------------------------------------------------------------------


def _projected(s: Shapes, given: Given) -> Text:
    encoder = vision(s, given, "vision_encoder.", layer_scale_float32=False)
    width = s["vision_align.1.weight"][0]
    return {"model": "projected", "arguments": dict(encoder=encoder, width=width)}


def _clip(s: Shapes, given: Given) -> Text:
    text = infer_text.mobileclip(s, given, "text_encoder.")
    return _towers(_projected(s, given), text)


def _towers(vision: Text, text: Text, **more: Any) -> Text:
    limits = dict(initial_temperature=0.01, temperature_range=[0.01, float("inf")])
    return {"model": "video_clip", "arguments": dict(vision=vision, text=text, **limits | more)}


def _pooled(encoder: Text) -> Text:
    return {"model": "pooled", "arguments": dict(encoder=encoder)}


def _clip_llama(s: Shapes, given: Given) -> Text:
    encoder = vision(s, given, "vision_encoder.", layer_scale_float32=False)
    return _towers(_pooled(encoder), infer_text.llama(s, given, "text_encoder.transformer."))


def _clip_head(s: Shapes, given: Given) -> Text:
    projector = "vision_encoder.clip_projector."
    width, _ = s[f"{projector}cross_attn.q.weight"]
    pool = dict(
        width=width,
        pool_heads=heads_of("pool_heads", width, given, dict.fromkeys(HEADS, 16)),
        pool_width=s[f"{projector}cross_attn.proj.weight"][0],
    )
    return {"model": "clip_head", "arguments": pool}


def _viclip(s: Shapes, given: Given) -> Text:
    encoder = _clip_visual(_OPENAI, "vision_encoder.")(s, given)
    return _towers(_pooled(encoder), infer_text.clip(s, given, "text_encoder."))


def _internvideo1(s: Shapes, given: Given) -> Text:
    limits = dict(initial_temperature=0.07, temperature_range=[0.01, 1.0], logarithmic=True)
    return _towers(_pooled(_uniformer(s, given)), infer_text.clip(s, given), **limits)


def _stage2(s: Shapes, given: Given) -> Text:
    arguments = dict(
        vision=aligned(s, given, "vision_encoder.", frames=4),
        text=infer_text.bert(s, given, "text_encoder."),
        width=s["vision_proj.weight"][0],
        initial_temperature=0.07,
        temperature_range=[0.001, 0.5],
    )
    return {"model": "stage2", "arguments": arguments}


def _stage2_audiovisual(s: Shapes, given: Given) -> Text:
    text = _stage2(s, given)
    heads = dict(video="itm_head", audio="atm_head", audio_video="avtm_head")
    sound = "audio_encoder.patch_embedding.weight" in s
    text["arguments"] |= dict(
        audio=infer_sound.beats(s, given, "audio_encoder.") if sound else None,
        fusion_width=s["av_concat_vision_proj.0.weight"][0],
        views=[view for view, head in heads.items() if f"{head}.weight" in s],
        joint="av_fusion.weight" in s,
    )
    return text


# ---- teachers -------------------------------------------------------------------------------------


def _videomae_encoder(s: Shapes, given: Given) -> Text:
    keys = dict(patch="patch_embed.proj.weight", block="blocks.", **_ORIGINAL)
    return _mae_encoder(s, given, keys, "norm.weight" in s)


def _internvl(s: Shapes, given: Given) -> Text:
    text = vision(s, given, frames=1)  # frames of a clip are examples of their own
    text["arguments"]["layer_scale"] = 0.1 if text["arguments"]["layer_scale"] else 0.0
    return text


# Keys of CLIP's image encoder: convolution, positions, blocks, the projection; in a block, its MLP.
_OPENAI = ("conv1.weight", "positional_embedding", "transformer.resblocks.", "proj", "mlp.c_fc")
_HF_CLIP = (
    "embeddings.patch_embedding.weight",
    "embeddings.position_embedding.weight",
    "encoder.layers.",
    "visual_projection.weight",
    "mlp.fc1",
)


def _clip_visual(keys: tuple[str, ...], prefix: str = "", *, out: int = 1):
    """Reads CLIP's image encoder of keys with a prefix; `out` is the projection's axis of outputs."""
    patch, table, block, projection = (f"{prefix}{key}" for key in keys[:-1])
    up = f"{block}0.{keys[-1]}.weight"

    def read(s: Shapes, given: Given) -> Text:
        width, channels, *_, size = s[patch]
        times = s.get(f"{prefix}temporal_positional_embedding")
        arguments = dict(
            width=width,
            depth=depth_of(s, block),
            # All published ones have 64 channels a head.
            heads=given.values.get("heads", width // 64 or 1),
            mlp_width=s[up][0],
            embed=s[projection][out] if projection in s else 0,
            patch=size,
            frames=times[1] if times else given.frames or 8,
            image_size=math.isqrt(s[table][0] - 1) * size,
            channels=channels,
            joint=times is not None,
            normalisation="clip",
            activation="gelu_quick",
        )
        return {"model": "clip_vit", "arguments": arguments}

    return read


def _uniformer(s: Shapes, given: Given) -> Text:
    backbone = _clip_visual(_OPENAI, "visual.")(s, given)
    backbone["arguments"]["embed"] = s["visual_proj"][1]  # beside the tower's keys
    extractors = depth_of(s, "visual.transformer.dec.")
    arguments = dict(backbone=backbone, extractors=extractors)
    return {"model": "uniformer_v2", "arguments": arguments}


READERS: dict[str, Callable[[Shapes, Given], Text]] = {
    "internvl_vision": _internvl,
    "videomae_encoder": _videomae_encoder,
    "clip_visual": _clip_visual(_OPENAI, "visual."),
    "clip_visual_hf": _clip_visual(_HF_CLIP, out=0),
    "viclip_visual": _clip_visual(_OPENAI, "vision_encoder."),
    "internvideo1_multimodal": _uniformer,
    "videomae": _video_mae(
        "encoder.patch_embed.proj.weight",
        "encoder.blocks.",
        "encoder.norm.weight",
        _ORIGINAL,
        "decoder.blocks.",
    ),
    "videomae_hf": _video_mae(
        "videomae.embeddings.patch_embeddings.projection.weight",
        "videomae.encoder.layer.",
        "videomae.layernorm.weight",
        _HF,
        "decoder.decoder_layers.",
    ),
    "videomae_classification": _mae_classifier(
        "patch_embed.proj.weight", "blocks.", "head.weight", _ORIGINAL
    ),
    "videomae_hf_classification": _mae_classifier(
        "videomae.embeddings.patch_embeddings.projection.weight",
        "videomae.encoder.layer.",
        "classifier.weight",
        _HF,
    ),
    "internvideo2_stage1": aligned,
    "internvideo2_distill": aligned,
    "internvideo2_classification": _classifier,
    "internvideo2_encoder": vision,
    "internvideo2_clip_vision": _projected,
    "internvideo2_clip": _clip,
    "internvideo2_clip_llama": _clip_llama,
    "internvideo2_clip_head": _clip_head,
    "viclip": _viclip,
    "internvideo1_clip": _internvideo1,
    **infer_text.READERS,
    "internvideo2_stage2": _stage2,
    "internvideo2_stage2_audiovisual": _stage2_audiovisual,
    "beats": infer_sound.beats,
}
