"""Defaults of the original classes' constructors, for arguments that a golden file leaves out.

Read off their signatures: OpenGVLab/InternVideo InternVideo2 single_modality/models/{internvideo2_pretrain,
internvideo2_distill,internvideo2_teacher,internvl_clip_vision,videomae,internvideo2_cat}.py and multi_modality
models/backbones/internvideo2/{internvideo2,internvideo2_clip_vision}.py; MCG-NJU/VideoMAE modeling_pretrain.py.
Those without effect on evaluated numbers are left out.
"""

from collections.abc import Mapping
from typing import Any

_TRUNK = dict(
    in_chans=3,
    patch_size=14,
    img_size=224,
    qkv_bias=False,
    embed_dim=1408,
    num_heads=16,
    mlp_ratio=4.3637,
    init_values=1e-5,
    qk_normalization=True,
    depth=40,
    attn_pool_num_heads=16,
    clip_embed_dim=768,
    num_frames=8,
    tubelet_size=1,
    sep_pos_embed=False,
)
_CLIP_HEADS = dict(
    clip_teacher_embed_dim=3200,
    clip_teacher_final_dim=768,
    clip_norm_type="l2",
    clip_return_layer=1,
    clip_student_return_interval=1,
)
_MAE_HEADS = dict(
    mae_teacher_embed_dim=1408,
    mae_norm_type="l2",
    mae_return_layer=1,
    mae_student_return_interval=1,
)
_RETURNED = dict(clip_norm_type="l2", clip_return_layer=1, clip_return_interval=1)
_WITHOUT_TIME = {
    k: v for k, v in _TRUNK.items() if k not in ("num_frames", "tubelet_size", "sep_pos_embed")
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "pretraining": _TRUNK | _CLIP_HEADS | _MAE_HEADS,
    "distillation": _TRUNK | _CLIP_HEADS | dict(embed_dim=384, num_heads=6, depth=12, mlp_ratio=4),
    "stage2": _TRUNK | _CLIP_HEADS | dict(mlp_ratio=48 / 11),
    "teacher": _TRUNK | _RETURNED,
    "clip": _TRUNK | dict(mlp_ratio=48 / 11),
    "classifier": _TRUNK | dict(num_classes=1000),
    "internvl": _WITHOUT_TIME
    | _RETURNED
    | dict(embed_dim=3200, num_heads=25, mlp_ratio=4, init_values=0.1, depth=48),
    "mae_teacher": dict(
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4,
        qkv_bias=False,
        init_values=0.0,
        all_frames=16,
        tubelet_size=2,
        mae_norm_type="l2",
        mae_return_layer=1,
        mae_return_interval=1,
    ),
    "mae_pretraining": dict(
        img_size=224,
        patch_size=16,
        encoder_in_chans=3,
        encoder_embed_dim=768,
        encoder_depth=12,
        encoder_num_heads=12,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=8,
        mlp_ratio=4,
        qkv_bias=False,
        init_values=0.0,
        tubelet_size=2,
    ),
}

# transformers' VideoMAEConfig.
HF = dict(
    image_size=224,
    patch_size=16,
    num_channels=3,
    num_frames=16,
    tubelet_size=2,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    layer_norm_eps=1e-12,
    decoder_num_attention_heads=6,
    decoder_hidden_size=384,
    decoder_num_hidden_layers=4,
    decoder_intermediate_size=1536,
)


def complete(kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of a class, a key of `DEFAULTS`; sizes as one number.

    Raises:
        ValueError: an image or patch that is not square.
    """
    found = DEFAULTS[kind] | dict(config)
    for name in ("img_size", "patch_size"):
        sides = found[name] if isinstance(found[name], (list, tuple)) else [found[name]]
        if len(set(sides)) != 1:
            raise ValueError(f"{name} must be square; got {found[name]}")
        found[name] = sides[0]
    return found
