"""What transformers wants beside VideoMAE's weights: config.json, preprocessor_config.json."""

from typing import Any

import flax.linen as nn

from invideo_jax.errors import UserError
from invideo_jax.interop import models
from invideo_jax.models import pixels, sizes

_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


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
