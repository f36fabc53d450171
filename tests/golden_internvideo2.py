"""InternVideo2's video encoder for `tests.golden`: students with alignment heads, the teacher, CLIP's."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from invideo_jax import losses, masking, optim, sharding, state
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import alignment, layers, pixels, teachers, video_encoder
from invideo_jax.models.alignment import AlignedEncoder, FinalSpec, HeadsSpec, ProjectedEncoder
from invideo_jax.models.video_encoder import VideoEncoder
from invideo_jax.steps import aligned
from invideo_jax.steps.update import update
from tests.golden import Outcome, Tensors
from tests.originals import complete

_ENCODER = {  # theirs -> ours
    "in_chans": "channels",
    "patch_size": "patch",
    "img_size": "image_size",
    "qkv_bias": "qkv_bias",
    "drop_path_rate": "drop_path",
    "embed_dim": "width",
    "num_heads": "heads",
    "depth": "depth",
    "init_values": "layer_scale",
    "qk_normalization": "qk_norm",
    "attn_pool_num_heads": "pool_heads",
    "clip_embed_dim": "pool_width",
    "num_frames": "frames",
    "tubelet_size": "tubelet",
}
_SWITCHES = ("mlp_ratio", "layerscale_no_force_fp32", "sep_pos_embed", "sep_image_video_pos_embed")
# They change how the original runs, and no number; `head_drop_path_rate` is never used there.
_WITHOUT_EFFECT = (
    "use_flash_attn use_fused_rmsnorm use_fused_mlp fused_mlp_heuristic use_checkpoint "
    "checkpoint_num head_drop_path_rate"
).split()
_HEADS = (
    "clip_teacher_embed_dim clip_teacher_final_dim clip_norm_type clip_return_layer "
    "clip_student_return_interval clip_student_return_index clip_student_decoder "
    "mae_teacher_embed_dim mae_norm_type mae_return_layer mae_student_return_interval"
).split()
_TEACHER = (
    "clip_norm_type return_attn clip_return_layer clip_return_interval clip_return_index".split()
)
ACTIVATIONS = {"out": "gelu", "out_tanh_gelu": "gelu_tanh"}
_NORMS = {"l2": True, "none": False}


def encoder_of(config: Mapping[str, Any], activation: str, own: Sequence[str] = ()) -> VideoEncoder:
    """The encoder of the original's constructor arguments, of which none may be left out here.

    Args:
        own: arguments that are read elsewhere.

    Raises:
        ValueError: an argument that nothing here knows.
    """
    for name, value in config.items():
        if name not in {*_ENCODER, *_SWITCHES, *_WITHOUT_EFFECT, *own}:
            raise ValueError(f"argument {name}={value!r} is not known here")
    ours = {_ENCODER[k]: v for k, v in config.items() if k in _ENCODER}
    ours["layer_scale"] = ours.get("layer_scale") or 0.0
    separate = lambda name, other: "separate" if config.get(name) else other
    return VideoEncoder(
        **ours,
        mlp_width=int(ours["width"] * config["mlp_ratio"]),
        layer_scale_float32=not config.get("layerscale_no_force_fp32", False),
        positions=separate("sep_pos_embed", "joint"),
        image_positions=separate("sep_image_video_pos_embed", "average"),
        activation=activation,
    )


def _blocks(depth: int, count: int, interval: float, index: Sequence[int] | None):
    """The student's blocks, ascending; of more blocks than heads the shallowest have one."""
    found = sorted(set(index)) if index else alignment.last_blocks(depth, count, interval)
    return tuple(found[:count])


def student_of(config: Mapping[str, Any], activation: str) -> AlignedEncoder:
    """The student (stage 1, distillation, stage 2) of the original's complete constructor arguments."""
    encoder = encoder_of(config, activation, _HEADS)
    get = config.get
    decoders = {"Linear_Decoder": False, "MLP_Decoder": True}
    mlp = decoders[get("clip_student_decoder", "Linear_Decoder")]
    unit = _NORMS[get("clip_norm_type", "l2")]
    clip = final = mae = None
    if count := config["clip_return_layer"]:
        interval, index = get("clip_student_return_interval", 1), get("clip_student_return_index")
        blocks = _blocks(encoder.depth, count, interval, index)
        clip = HeadsSpec(blocks, config["clip_teacher_embed_dim"], mlp, unit)
    if width := config["clip_teacher_final_dim"]:
        final = FinalSpec(width, mlp, unit)
    if get("mae_teacher_embed_dim", 0) and (count := get("mae_return_layer", 1)):
        blocks = _blocks(encoder.depth, count, get("mae_student_return_interval", 1), None)
        mae = HeadsSpec(
            blocks, config["mae_teacher_embed_dim"], True, _NORMS[get("mae_norm_type", "l2")]
        )
    return AlignedEncoder(encoder, clip, final, mae)


def load(model: Any, encoder: VideoEncoder, state: Tensors, layout: str):
    """Parameters of a state dict, and what brings a tree of them back."""
    module = video_encoder if isinstance(model, VideoEncoder) else alignment
    expected = sharding.unbox(jax.eval_shape(lambda: module.init(model, jax.random.key(0))))
    params = to_params(state, layout=layout, expected=expected)
    cube = (encoder.tubelet, encoder.patch, encoder.patch)
    return params, lambda tree: to_state_dict(jax.device_get(tree), layout=layout, cube=cube)


def frames_last(video: np.ndarray) -> jax.Array:
    """[B, C, T, H, W] to [B, T, H, W, C]."""
    return jnp.asarray(video.transpose(0, 2, 3, 4, 1))


def visible_of(mask: np.ndarray) -> jax.Array:
    """Ids of the visible patches of a published mask, whose first column is the class token's."""
    if mask[:, 0].any():
        raise ValueError("the class token must be visible")
    return masking.ids_of(jnp.asarray(mask[:, 1:]), int(mask[0, 1:].sum()))[0]


# ---------------------------------------------------------------------------------- the student


def _outputs(made: Mapping[str, jax.Array], model: AlignedEncoder) -> Tensors:
    """The published names; without a final head that output is the pooled vector."""
    out = {"x_align": made["clip_final" if model.final else "pooled"]}
    if model.clip:
        out["x_clip_align"] = made["clip_middle"].swapaxes(0, 1)
    if model.mae:
        out["x_mae_align"] = made["mae"].swapaxes(0, 1)
    return out


def _unit_names(model: AlignedEncoder) -> set[str]:
    named = [("x_clip_align", model.clip), ("x_align", model.final), ("x_mae_align", model.mae)]
    return {name for name, spec in named if spec and spec.normalise}


def _trace(model: AlignedEncoder, params, video, visible, wanted: Sequence[str]) -> Tensors:
    """Inner activations; branches before their factor are read off one block at a time."""
    encoder = model.encoder
    if not any(name.startswith("trace/") for name in wanted):
        return {}
    made = model.apply({"params": params}, video, visible, features=range(encoder.depth))
    embed = lambda m, x: m.encoder.patch_embed(
        pixels.patchify(x, tubelet=encoder.tubelet, patch=encoder.patch)
    )
    t, h, w = encoder.grid
    patches = model.apply({"params": params}, video, method=embed)
    found = {
        "patch_embed": patches.reshape(len(video), t, h * w, -1),
        "tokens_in_visible": made["embedded"],
        "pooled": made["pooled"],
    }
    block, x = video_encoder.block_of(encoder)(), made["embedded"]
    stacked = params["encoder"]["stack"]["blocks"]
    for i, own in enumerate(layers.unstack(stacked, encoder.depth)):
        inner = {"mutable": ["intermediates"], "capture_intermediates": True}
        _, seen = block.apply({"params": own}, x, **inner)
        seen = {k: v["__call__"][0] for k, v in seen["intermediates"].items() if k != "__call__"}
        x = made[f"block{i}"]
        found |= {f"block{i}_attn": seen["attention"], f"block{i}_mlp": seen["mlp"]}
        found[f"block{i}"] = x
    return {f"trace/{k}": v for k, v in found.items()}


_LOSS_NAMES = {
    "clip_middle": "loss_clip_middle",
    "clip_final": "loss_clip_final",
    "mae": "loss_mae",
}


def _objective(model: AlignedEncoder, batch: Tensors):
    """(params, batch) -> (loss, parts): the published sum of all parts, each with factor 1."""
    ratios = {name: 1.0 for name in _LOSS_NAMES if name in batch}
    run = aligned.align_objective(model, mask={}, ratios=ratios)
    return lambda params, batch: run(params, batch, None, False)


def _named(loss, parts, group: str) -> Tensors:
    found = {f"{group}/loss": loss.value}
    return found | {
        f"{group}/{theirs}": parts[ours].value if ours in parts else np.zeros(())
        for ours, theirs in _LOSS_NAMES.items()
    }


def _train(meta, model: AlignedEncoder, params, batch, back) -> Tensors:
    """Two steps of our optimiser with the published settings."""
    said = meta["adamw"]
    boxed = jax.eval_shape(lambda: alignment.init(model, jax.random.key(0)))
    tx, _ = optim.make_optimizer(
        "adamw",
        schedule=optax.constant_schedule(said["lr"]),
        params=boxed,
        weight_decay=said["weight_decay"],
        betas=tuple(said["betas"]),
        eps=said["eps"],
    )
    objective = _objective(model, batch)
    step = jax.jit(
        lambda state, batch: update(
            state, batch, loss_fn=objective, tx=tx, clip_norm=said["clip_grad_norm"]
        )
    )
    now = state.create(jax.tree.map(jnp.asarray, params), tx, keep_ema=False)
    found = {}
    for i in range(said["steps"]):
        now, metrics = step(now, batch)
        found[f"adamw/loss_step{i}"] = metrics["loss"].value
        found[f"adamw/gradnorm_step{i}"] = metrics["grad_norm"]
    found[f"adamw/loss_after{said['steps']}"] = objective(now.params, batch)[0].value
    # PyTorch's optimiser leaves parameters alone that got no gradient; ours decays their weights.
    before, untouched = back(params), meta.get("params_without_grad", ())
    after = back(now.params) | {k: before[k] for k in untouched}
    return found | {f"adamw_after{said['steps']}/{k}": v for k, v in after.items()}


def _learning(meta, model: AlignedEncoder, params, back, inputs: Tensors) -> Tensors:
    """Losses, gradients, train steps, and the engine's losses under the mask that it drew."""
    names = {"clip_middle": model.clip, "clip_final": model.final, "mae": model.mae}
    names = [name for name, spec in names.items() if spec]
    first = lambda name, x: x if name == "clip_final" else x.swapaxes(0, 1)
    features = {n: jnp.asarray(first(n, inputs[f"teacher_full/{n}"])) for n in names}
    video = frames_last(inputs["video"])

    def batch_of(mask):
        chosen = aligned.choose(features, visible_of(mask), prefix=model.prefix)
        return chosen | {"video": video, "valid": jnp.ones(len(video), bool)}

    batch = batch_of(inputs["mask"])
    objective = _objective(model, batch)
    run = jax.jit(jax.value_and_grad(_value(objective), has_aux=True))
    (_, (loss, parts)), grad = run(params, batch)
    made = _named(loss, parts, "loss") | {f"grad/{k}": v for k, v in back(grad).items()}
    made |= {
        f"teacher_vis/{k}_vis": batch[k].swapaxes(0, 1)
        for k in ("clip_middle", "mae")
        if k in batch
    }
    if "adamw" in meta:
        made |= _train(meta, model, params, batch, back)
    if "engine/mask" in inputs:
        made |= _named(*jax.jit(objective)(params, batch_of(inputs["engine/mask"])), "engine")
        # The engine's mask is a random draw: what can be compared is how much each frame keeps.
        kept = (~inputs["engine/mask"][:, 1:]).reshape(len(video), model.grid[0], -1).sum(-1)
        if (kept != kept[0, 0]).any():
            raise ValueError("the engine's mask must keep the same number of patches in each frame")
    if "video_before_stride2" in inputs:
        stride = inputs["video_before_stride2"].shape[2] // inputs["video"].shape[2]
        made["in/video"] = inputs["video_before_stride2"][:, :, ::stride]
    return made


def _value(objective):
    """For `jax.value_and_grad`: the loss's value, and all of it."""

    def run(params, batch):
        loss, parts = objective(params, batch)
        return loss.value, (loss, parts)

    return run


def run_student(meta, state_dict: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Outputs for both kinds of GELU, inner activations, losses, gradients and two train steps."""
    # Of the classes with these outputs one has a second teacher.
    second = any(key.startswith("mae_") for key in state_dict)
    config = complete("pretraining" if second else "distillation", meta["config"])
    config |= {} if second else {"mae_teacher_embed_dim": 0}
    video, visible = frames_last(inputs["video"]), visible_of(inputs["mask"])
    made, unit = {}, set()
    for group, activation in ACTIVATIONS.items():
        model = student_of(config, activation)
        params, back = load(model, model.encoder, state_dict, "internvideo2")
        out = _outputs(jax.jit(model.apply)({"params": params}, video, visible), model)
        made |= {f"{group}/{k}": v for k, v in out.items()}
        unit |= {f"{group}/{k}" for k in _unit_names(model)}
    # Everything else was made with the exact GELU.
    model = student_of(config, ACTIVATIONS["out"])
    made |= _trace(model, params, video, visible, wanted)
    if "teacher_full/clip_middle" in inputs:
        made |= _learning(meta, model, params, back, inputs)
    inputs_of_losses = ("teacher_full/", "engine/attn", "engine/mask")
    given = {n for n in wanted if n.startswith(inputs_of_losses)}
    bounds, notes = _after_training(made, inputs)
    return Outcome(
        made,
        back(params),
        normalised=frozenset(unit),
        bounds=bounds,
        given=frozenset(given),
        notes=notes,
    )


def _after_training(made: Tensors, inputs: Tensors):
    """Bounds of the trained parameters: where a gradient is about Adam's epsilon (1e-6), its noise of
    1e-8 is a hundredth of an update, 1e-4 at the published rate of .01. A float64 run is as far away.

    Raises:
        ValueError: more than 1 of 1000 numbers needs it.
    """
    names = [n for n in made if n.startswith("adamw_after") and n in inputs]
    beyond = sum(int((np.abs(made[n] - inputs[n]) > 1e-5).sum()) for n in names)
    total = sum(inputs[n].size for n in names)
    if beyond * 1000 > total:
        raise ValueError(f"{beyond} of {total} trained numbers differ by more than 1e-5")
    notes = (f"adamw_after: {beyond} of {total} numbers differ by more than 1e-5",) if names else ()
    return {n: 1e-4 for n in names}, notes


# ------------------------------------------------------------------------------------- the others


def run_teacher(meta, state_dict: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """The teacher of distillation: features of blocks, the pooled one, what the pool looks at."""
    config, made = complete("teacher", meta["config"]), {}
    for group, activation in ACTIVATIONS.items():
        encoder = encoder_of(config, activation, _TEACHER)
        count, interval = config["clip_return_layer"], config["clip_return_interval"]
        index = config.get("clip_return_index")
        blocks = tuple(sorted(index)) if index else None
        blocks = blocks or alignment.last_blocks(encoder.depth, count, interval)
        unit = _NORMS[config["clip_norm_type"]]
        params, back = load(encoder, encoder, state_dict, "internvideo2_encoder")
        teacher = teachers.VideoTeacher(encoder, blocks, unit)
        out = jax.jit(teacher)(params, frames_last(inputs["video"]))
        made[f"{group}/z"] = out["middle"].swapaxes(0, 1)
        made[f"{group}/x"] = out["final"]
        if config.get("return_attn", True):
            made[f"{group}/attn"] = out["attention"]
    normalised = {n for n in made if n.endswith(("/z", "/x"))} if unit else ()
    return Outcome(made, back(params), normalised=frozenset(normalised))


def run_clip(meta, state_dict: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """CLIP's vision tower on videos and images, its projection, and the contrastive loss."""
    own, align = "vision_encoder.", "state_vision_align/"
    extra = {k.removeprefix(align): v for k, v in inputs.items() if k.startswith(align)}
    merged = {own + k: v for k, v in state_dict.items()}
    merged |= {f"vision_align.{k}": v for k, v in extra.items()}
    made = {}
    for group, activation in ACTIVATIONS.items():
        encoder = encoder_of(complete("clip", meta["config"]), activation)
        model = ProjectedEncoder(encoder, extra["1.weight"].shape[0])
        params, back = load(model, encoder, merged, "internvideo2_clip_vision")
        for kind in ("video", "image"):
            out = jax.jit(model.apply)({"params": params}, frames_last(inputs[kind]))
            made[f"{group}/{kind}_feat"] = out["pooled"]
            made[f"{group}/{kind}_aligned"] = out["projected"]
    returned = back(params)
    made |= {align + k: returned[f"vision_align.{k}"] for k in extra}
    if temperature := re.search(r"temp_clamped_([0-9.]+)", " ".join(wanted)):
        low = float(temperature.group(1))

        def vtc(params, t):
            out = model.apply({"params": params}, frames_last(inputs["video"]))
            t = losses.clamped(t, low, np.inf)
            scores = losses.similarity(out["projected"], inputs["text_feat"], t)
            return losses.contrastive(scores).value

        # As everything but `out_tanh_gelu`, with the exact GELU.
        model = model.clone(encoder=encoder.clone(activation=ACTIVATIONS["out"]))
        value, (grad, slope) = jax.jit(jax.value_and_grad(vtc, (0, 1)))(params, jnp.float32(low))
        made |= {f"loss/vtc_{temperature.group(0)}": value, "grad_temp": slope}
        made |= {f"grad/{k.removeprefix(own)}": v for k, v in back(grad).items()}
    back_state = {k.removeprefix(own): v for k, v in returned.items() if k.startswith(own)}
    return Outcome(made, back_state)


def of_frames(tensors: Tensors) -> bool:
    """Whether the positions of a file's state are those of one frame of its clips."""
    table, video = tensors.get("state/pos_embed"), tensors.get("in/video")
    if table is None or video is None or video.ndim != 5:
        return False
    patch = tensors["state/patch_embed.proj.weight"].shape[-1]
    one = (video.shape[3] // patch) * (video.shape[4] // patch)
    return video.shape[2] > 1 and table.shape[1] == 1 + one


def _is(output: str):
    """Claims files of InternVideo2 with this output."""
    pool = "state/clip_projector.norm1_q.weight"
    return lambda meta, tensors: output in tensors and pool in tensors


FAMILIES = [
    (_is("out/x_clip_align"), run_student),
    (lambda meta, tensors: _is("out/z")(meta, tensors) and not of_frames(tensors), run_teacher),
    (_is("out/video_feat"), run_clip),
]
