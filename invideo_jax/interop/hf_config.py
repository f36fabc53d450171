"""What stands beside weights of transformers: config.json, read and written, preprocessor_config.json."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from invideo_jax.errors import UserError
from invideo_jax.interop import models
from invideo_jax.interop.given import Given
from invideo_jax.models import pixels, sizes

TEXT = ("bert", "clip_text_hf", "llama_hf")  # layouts of text towers
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu_quick": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}
_OURS = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"gelu_new": "gelu_tanh"}
# What the file says that shapes do not.
_VIDEO_NAMES = {
    "num_attention_heads": "heads",
    "decoder_num_attention_heads": "decoder_heads",
    "layer_norm_eps": "eps",
    "hidden_act": "activation",
}
_TEXT_NAMES = {
    "num_attention_heads": "heads",
    "layer_norm_eps": "eps",
    "rms_norm_eps": "eps",
    "hidden_act": "activation",
}


def read(given: Given, file: pathlib.Path, layout: str) -> Given:
    """What the config.json beside a file of transformers says, where the user says nothing.

    Raises:
        UserError: it cannot be read, or says something that no model here has.
    """
    path = file.with_name("config.json")
    if not (layout.startswith("videomae_hf") or layout in TEXT) or not path.is_file():
        return given
    try:
        found = json.loads(path.read_text())
        if layout in TEXT:
            return dataclasses.replace(given, values=_text(found, layout) | dict(given.values))
        values = {ours: found[name] for name, ours in _VIDEO_NAMES.items() if name in found}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if layout.endswith("classification"):
        values.pop("decoder_heads", None)
    return dataclasses.replace(
        given,
        frames=given.frames or found.get("num_frames", 0),
        image_size=given.image_size or found.get("image_size", 0),
        values=_with_our_activation(values) | dict(given.values),
    )


def _with_our_activation(values: dict[str, Any]) -> dict[str, Any]:
    if "activation" not in values:
        return values
    return values | {"activation": _OURS.get(values["activation"], values["activation"])}


def _text(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    """Arguments of a text tower."""
    config = config.get("text_config") or config  # CLIPModel's, beside that of images
    values = {ours: config[name] for name, ours in _TEXT_NAMES.items() if name in config}
    if layout != "clip_text_hf" and config.get("pad_token_id") is not None:
        values["pad"] = config["pad_token_id"]
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta"))
    if layout == "llama_hf" and theta is not None:
        values["theta"] = float(theta)
    kind = rope.get("rope_type", rope.get("type", "default"))
    for name, value, want in [
        ("rope_type", kind, ("default",)),
        ("attention_bias", config.get("attention_bias", False), (False,)),
        ("mlp_bias", config.get("mlp_bias", False), (False,)),
        ("position_embedding_type", config.get("position_embedding_type"), (None, "absolute")),
    ]:
        if value not in want:
            raise UserError(
                f"The text towers here have {name}={want[-1]!r}; the folder's config.json says {value!r}."
            )
    return _with_our_activation(values)


def text_config(model: nn.Module, layout: str) -> dict[str, Any]:
    """config.json of transformers' BERT, CLIPTextModel or LlamaModel.

    Raises:
        UserError: the model has something that transformers' has not.
    """
    found = dict(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        intermediate_size=model.mlp_width,
        hidden_act=_ACTIVATIONS[model.activation],
        initializer_range=0.02,
    )
    if layout == "llama_hf":
        if model.lora_rank:
            raise UserError(
                f"transformers' LlamaModel has no LoRA; got lora_rank={model.lora_rank}. Use layout "
                "'internvl_text'."
            )
        return found | dict(
            architectures=["LlamaModel"],
            model_type="llama",
            num_key_value_heads=model.kv_heads or model.heads,
            head_dim=model.head_width or model.width // model.heads,
            rms_norm_eps=model.eps,
            rope_theta=model.theta,
            pad_token_id=model.pad,
            attention_bias=False,
            mlp_bias=False,
        )
    found |= dict(layer_norm_eps=model.eps, max_position_embeddings=model.positions)
    if layout == "bert":
        return found | dict(
            architectures=["BertForMaskedLM" if model.word_head else "BertModel"],
            model_type="bert",
            type_vocab_size=model.types,
            pad_token_id=model.pad,
        )
    last = model.vocabulary - 1  # where the feature is taken
    projected = "CLIPTextModelWithProjection"
    return found | dict(
        architectures=[projected if model.output_width else "CLIPTextModel"],
        model_type="clip_text_model",
        projection_dim=model.output_width or model.width,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )


def config(model: nn.Module, layout: str) -> dict[str, Any]:
    """config.json of transformers' VideoMAE models.

    Raises:
        UserError: the model has something that transformers' has not.
    """
    encoder, _ = models.encoder_of(model)
    classes = layout.endswith("classification")
    for name, value in [("scale", None), ("layer_scale", 0.0)]:
        if getattr(encoder, name) != value:
            raise UserError(
                f"transformers' VideoMAE has no {name}; got {name}={getattr(encoder, name)!r}. Use layout "
                f"'{layout.replace('_hf', '')}'."
            )
    decoder = model if hasattr(model, "decoder_width") else _decoder_of(encoder.width)
    found = dict(
        architectures=["VideoMAEForVideoClassification" if classes else "VideoMAEForPreTraining"],
        model_type="videomae",
        image_size=encoder.image_size,
        patch_size=encoder.patch,
        num_channels=encoder.channels,
        num_frames=encoder.frames,
        tubelet_size=encoder.tubelet,
        hidden_size=encoder.width,
        num_hidden_layers=encoder.depth,
        num_attention_heads=encoder.heads,
        intermediate_size=encoder.mlp_width,
        hidden_act=_ACTIVATIONS[encoder.activation],
        layer_norm_eps=encoder.eps,
        qkv_bias=encoder.qkv_bias,
        use_mean_pooling=not encoder.last_norm,
        decoder_num_attention_heads=decoder.decoder_heads,
        decoder_hidden_size=decoder.decoder_width,
        decoder_num_hidden_layers=decoder.decoder_depth,
        decoder_intermediate_size=decoder.decoder_mlp_width,
        norm_pix_loss=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02,
    )
    if classes:
        found["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.classes)}
        found["label2id"] = {label: int(i) for i, label in found["id2label"].items()}
    return found


def _decoder_of(width: int) -> sizes.VideoMAESize:
    """Some decoder, for the config of a model that has none."""
    rows = sizes.VIDEO_MAE
    return next((row for row in rows.values() if row.width == width), rows["B"])


def processor(model: nn.Module) -> dict[str, Any]:
    """preprocessor_config.json of transformers' VideoMAEImageProcessor."""
    encoder, _ = models.encoder_of(model)
    mean, std = map(list, pixels.NORMALISATION[encoder.normalisation])
    return dict(
        image_processor_type="VideoMAEImageProcessor",
        do_resize=True,
        size={"shortest_edge": encoder.image_size},
        do_center_crop=True,
        crop_size={"height": encoder.image_size, "width": encoder.image_size},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=mean,
        image_std=std,
    )
