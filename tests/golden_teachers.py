"""Teachers of stage 1 for `tests.golden`: InternVL's vision tower over frames, and VideoMAE V2's encoder."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from invideo_jax import sharding
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import alignment, positions, teachers
from invideo_jax.models.video_encoder import VideoEncoder
from invideo_jax.models.video_mae import VideoMAEEncoder
from tests.golden import Outcome, Tensors
from tests.golden_internvideo2 import of_frames
from tests.originals import complete

_VISION = {  # theirs -> ours
    "in_chans": "channels",
    "patch_size": "patch",
    "img_size": "image_size",
    "qkv_bias": "qkv_bias",
    "drop_path_rate": "drop_path",
    "embed_dim": "width",
    "num_heads": "heads",
    "init_values": "layer_scale",
    "qk_normalization": "qk_norm",
    "depth": "depth",
    "attn_pool_num_heads": "pool_heads",
    "clip_embed_dim": "pool_width",
}
_MAE = {
    "in_chans": "channels",
    "patch_size": "patch",
    "img_size": "image_size",
    "qkv_bias": "qkv_bias",
    "drop_path_rate": "drop_path",
    "embed_dim": "width",
    "num_heads": "heads",
    "depth": "depth",
    "qk_scale": "scale",
    "init_values": "layer_scale",
    "all_frames": "frames",
    "tubelet_size": "tubelet",
}


def _translate(config: Mapping[str, Any], table: Mapping[str, str], own: Sequence[str]):
    """Our arguments; `own` are read elsewhere, any other name is an error."""
    for name, value in config.items():
        if name not in table and name not in own:
            raise ValueError(f"argument {name}={value!r} is not known here")
    return {table[k]: v for k, v in config.items() if k in table}


def _normalised(config: Mapping[str, Any], name: str) -> bool:
    kind = config.get(name, "l2")
    if kind not in ("l2", "none"):
        raise ValueError(f"{name} must be 'l2' or 'none'; got {kind!r}")
    return kind == "l2"


def _load(teacher: teachers.Teacher, state: Tensors, layout: str):
    boxed = jax.eval_shape(lambda: teacher.init(jax.random.key(0)))
    params = to_params(state, layout=layout, expected=sharding.unbox(boxed))
    cube = (teacher.encoder.tubelet, teacher.encoder.patch, teacher.encoder.patch)
    return params, to_state_dict(jax.device_get(params), layout=layout, cube=cube)


def internvl_teacher(config: Mapping[str, Any], frames: int, activation: str):
    """The teacher of the original's constructor arguments."""
    own = "mlp_ratio layerscale_no_force_fp32 clip_norm_type return_attn".split()
    own += ["clip_return_layer", "clip_return_interval"]
    config = complete("internvl", config)
    ours = _translate(config, _VISION, own)
    ours["layer_scale"] = ours.get("layer_scale") or 0.0
    encoder = VideoEncoder(
        **ours,
        frames=1,
        tubelet=1,
        mlp_width=int(ours["width"] * config["mlp_ratio"]),
        layer_scale_float32=not config.get("layerscale_no_force_fp32", False),
        activation=activation,
    )
    layers = alignment.last_blocks(
        encoder.depth, config["clip_return_layer"], config["clip_return_interval"]
    )
    return teachers.ImageTeacher(
        encoder, layers, _normalised(config, "clip_norm_type"), frames=frames
    )


def _of_video(teacher: teachers.ImageTeacher, params, video: jax.Array) -> dict[str, jax.Array]:
    """Features as the original gives them: it joins the frames of a clip only where it normalises."""
    if teacher.normalise:
        return teacher(params, video)
    alone = teachers.VideoTeacher(teacher.encoder, teacher.layers, False)
    return alone(params, video.reshape(-1, 1, *video.shape[2:]))


def run_internvl(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Features of the last blocks, the pooled feature and the attention, for both kinds of GELU."""
    video = jnp.asarray(inputs["video"].transpose(0, 2, 3, 4, 1))
    tensors, back = {}, {}
    for group, activation in (("out", "gelu"), ("out_tanh_gelu", "gelu_tanh")):
        teacher = internvl_teacher(meta["config"], video.shape[1], activation)
        params, back = _load(teacher, state, "internvl_vision")
        made = jax.jit(functools.partial(_of_video, teacher))(params, video)
        frames = teacher.encoder.grid[1] * teacher.encoder.grid[2]
        tensors |= {
            f"{group}/z": made["middle"].swapaxes(0, 1),
            f"{group}/x": made["final"],
            f"{group}/attn": made["attention"].reshape(-1, frames),
        }
    unit = {n for n in tensors if n[-2:] in ("/z", "/x")} if teacher.normalise else set()
    return Outcome(tensors, back, normalised=frozenset(unit))


def video_mae_teacher(config: Mapping[str, Any], frames: int, *, faithful: bool):
    """The teacher of the original's constructor arguments."""
    own = "mlp_ratio mae_norm_type mae_return_layer mae_return_interval".split()
    config = complete("mae_teacher", config)
    ours = _translate(config, _MAE, own)
    if ours["frames"] != frames:
        raise ValueError(f"all_frames={ours['frames']} must be the clip's frames, {frames}")
    ours["layer_scale"] = ours.get("layer_scale") or 0.0
    encoder = VideoMAEEncoder(
        **ours,
        mlp_width=int(ours["width"] * config["mlp_ratio"]),
        **dict(attend=teachers.exchanged) if faithful else {},
    )
    layers = alignment.last_blocks(
        encoder.depth, config["mae_return_layer"], config["mae_return_interval"]
    )
    return teachers.VideoMAETeacher(encoder, layers, _normalised(config, "mae_norm_type"))


def run_video_mae(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Features of the last blocks, with the attention as intended and as released."""
    video = jnp.asarray(inputs["video"].transpose(0, 2, 3, 4, 1))
    tensors, back = {}, {}
    for name, faithful in (
        ("z_intended_attention_over_tokens", False),
        ("z_official_with_documented_flash_layout", True),
    ):
        teacher = video_mae_teacher(meta["config"], video.shape[1], faithful=faithful)
        params, back = _load(teacher, state, "videomae_encoder")
        tensors[f"out/{name}"] = jax.jit(teacher)(params, video)["middle"].swapaxes(0, 1)
    unit = frozenset(tensors) if teacher.normalise else frozenset()
    table = positions.sinusoid(teacher.encoder.tokens, teacher.encoder.width)
    return Outcome(tensors | {"in/pos_embed": table[None]}, back, normalised=unit)


def _is_internvl(meta: Mapping[str, Any], tensors: Tensors) -> bool:
    return "out/z" in tensors and of_frames(tensors)


def _is_video_mae(meta: Mapping[str, Any], tensors: Tensors) -> bool:
    return any(name.startswith("out/z_") for name in tensors)


FAMILIES = [(_is_internvl, run_internvl), (_is_video_mae, run_video_mae)]
