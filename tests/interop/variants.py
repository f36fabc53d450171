"""Files of numbers as `tests.golden` reads them, of other arguments than the files at hand, computed in PyTorch.

Constructor arguments have the names of the originals. What is computed comes from `interop/torch_model.py` and
from formulae restated here; nothing of it runs in JAX. Weights are random: matrices N(0, 1/inputs), biases
N(0, .1), norm weights 1 + N(0, .2), layer scale N(.6, .2), tokens and positions N(0, .3).
"""

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import save_file
from torch import nn

from invideo_jax.interop import torch_model

Tensors = dict[str, torch.Tensor]
# Defaults of the original classes, for the arguments that a file leaves out.
_TRUNK = dict(
    in_chans=3, patch_size=14, img_size=224, qkv_bias=False, init_values=1e-5, qk_normalization=True,
    mlp_ratio=4.3637, attn_pool_num_heads=16, clip_embed_dim=768, num_frames=8, tubelet_size=1,
    sep_pos_embed=False, sep_image_video_pos_embed=False, clip_norm_type="l2", clip_return_layer=1,
    clip_student_return_interval=1, clip_student_return_index=None, clip_teacher_final_dim=768,
    clip_student_decoder="Linear_Decoder", mae_norm_type="l2", mae_return_layer=1, mae_student_return_interval=1,
)  # fmt: skip
GROUPS = {"out": "gelu", "out_tanh_gelu": "gelu_tanh"}


def square(value: Any) -> int:
    """One side of a size."""
    return value[0] if isinstance(value, (list, tuple)) else value


def fill(module: nn.Module, seed: int) -> nn.Module:
    """The module with random weights of a seed, in evaluation mode."""
    rng = np.random.default_rng(seed)
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        if name not in module.state_dict() or not x.is_floating_point():
            continue
        draw = torch.tensor(rng.standard_normal(tuple(x.shape)), dtype=torch.float32)
        last = name.rpartition(".")[2]
        if "pos_embed" in last or last.endswith("_token"):
            value = 0.3 * draw
        elif "gamma" in last:
            value = 0.6 + 0.2 * draw
        elif last == "running_mean":
            value = 0.3 * draw
        elif last == "running_var":
            value = 1 + 0.5 * draw.abs()
        elif last.endswith("bias"):
            value = 0.1 * draw
        elif x.ndim == 1:
            value = 1 + 0.2 * draw
        else:
            value = draw / max(x[0].numel(), 1) ** 0.5
        x.data.copy_(value)
    return module.eval()


def normal(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers of a seed."""
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)


def unit(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1."""
    return x / x.norm(dim=-1, keepdim=True)


def random_mask(seed: int, batch: int, frames: int, places: int, seen: int) -> torch.Tensor:
    """bool [B, 1+N], True = hidden; `seen` of each frame's places are visible, and the class token."""
    rng = np.random.default_rng(seed)
    order = rng.random((batch, frames, places)).argsort(-1).argsort(-1)
    hidden = torch.tensor(order >= seen).reshape(batch, -1)
    return torch.cat([torch.zeros(batch, 1, dtype=torch.bool), hidden], 1)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.nonzero(~row[1:])[:, 0] for row in mask])


def save(
    folder: pathlib.Path,
    name: str,
    meta: Mapping[str, Any],
    groups: Mapping[str, Mapping[str, torch.Tensor]],
) -> pathlib.Path:
    """Writes NAME.json and NAME.safetensors; `groups` are group -> key -> tensor."""
    arrays = {
        f"{group}/{key}": x.detach().contiguous().numpy().copy()
        for group, each in groups.items()
        for key, x in each.items()
    }
    listed = {k: [str(v.dtype), list(v.shape)] for k, v in arrays.items()}
    off = dict(use_flash_attn=False, use_fused_rmsnorm=False, use_fused_mlp=False)
    said = {"off": off, "torch": torch.__version__, "tensors": listed}
    (folder / f"{name}.json").write_text(json.dumps({**meta, **said}, indent=1))
    save_file(arrays, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


# ------------------------------------------------------------------------------- InternVideo2


def trunk(config: Mapping[str, Any], activation: str = "gelu") -> dict[str, Any]:
    """The arguments of `torch_model.InternVideo2` for the original's."""
    c = {**_TRUNK, **config}
    return dict(
        width=c["embed_dim"], depth=c["depth"], heads=c["num_heads"], channels=c["in_chans"],
        mlp_width=int(c["embed_dim"] * c["mlp_ratio"]), patch=square(c["patch_size"]),
        image_size=square(c["img_size"]), frames=c["num_frames"], tubelet=c["tubelet_size"],
        qkv_bias=c["qkv_bias"], qk_norm=c["qk_normalization"], layer_scale=c["init_values"],
        layer_scale_float32=True, pool_heads=c["attn_pool_num_heads"], pool_width=c["clip_embed_dim"],
        positions="separate" if c["sep_pos_embed"] else "joint", activation=activation,
        image_positions="separate" if c["sep_image_video_pos_embed"] else "average",
    )  # fmt: skip


def student(config: Mapping[str, Any], activation: str = "gelu") -> torch_model.InternVideo2:
    """The student of stage 1 (with a teacher of pixels in the arguments), distillation or stage 2."""
    c = {**_TRUNK, **config}

    def heads(kind, count, index, interval, **spec):
        index = index or [c["depth"] - 1 - int(i * interval) for i in range(count)]
        return dict(blocks=sorted(index)[:count], **spec)

    mlp, norm = c["clip_student_decoder"] == "MLP_Decoder", c["clip_norm_type"] == "l2"
    clip = heads(
        "clip", c["clip_return_layer"], c["clip_student_return_index"], c["clip_student_return_interval"],
        width=c["clip_teacher_embed_dim"], mlp=mlp, normalise=norm,
    )  # fmt: skip
    final = dict(width=c["clip_teacher_final_dim"], mlp=mlp, normalise=norm)
    mae = None
    if c.get("mae_teacher_embed_dim"):
        mae = heads(
            "mae", c["mae_return_layer"], None, c["mae_student_return_interval"],
            width=c["mae_teacher_embed_dim"], mlp=True, normalise=c["mae_norm_type"] == "l2",
        )  # fmt: skip
    final = final if c["clip_teacher_final_dim"] else None
    return torch_model.InternVideo2(trunk(config, activation), clip, mae, final)


def _student_outputs(out: Tensors) -> Tensors:
    found = {"x_clip_align": out["clip_middle"].swapaxes(0, 1)}
    found["x_align"] = out.get("clip_final", out["pooled"])
    return found | ({"x_mae_align": out["mae"].swapaxes(0, 1)} if "mae" in out else {})


def _inputs(config: Mapping[str, Any], seed: int, batch: int, frames: int | None = None):
    a = trunk(config)
    return normal(seed, batch, a["channels"], frames or a["frames"], *[a["image_size"]] * 2)


def _still(config: Mapping[str, Any], image: torch.Tensor) -> torch.Tensor:
    """As many equal frames as the patch kernel is long: what the originals need of an image."""
    return image.repeat(1, 1, config.get("tubelet_size", 1), 1, 1)


def _grid(config: Mapping[str, Any]) -> tuple[int, int]:
    a = trunk(config)
    return a["frames"] // a["tubelet"], (a["image_size"] // a["patch"]) ** 2


def _traced(model: torch_model.InternVideo2, run) -> tuple[Tensors, Tensors]:
    """Outputs of `run()`, and the inner activations under the published names."""
    seen: Tensors = {}
    keep = lambda name: lambda module, given, made: seen.update({name: made})
    before = lambda module, given: seen.update({"tokens_in_visible": given[0]})
    hooks = [model.blocks[0].register_forward_pre_hook(before)]
    hooks.append(model.patch_embed.register_forward_hook(keep("patch_embed")))
    hooks.append(model.clip_projector.register_forward_hook(keep("pooled")))
    for i, block in enumerate(model.blocks):
        for part, of in (
            (f"block{i}_attn", block.attn),
            (f"block{i}_mlp", block.mlp),
            (f"block{i}", block),
        ):
            hooks.append(of.register_forward_hook(keep(part)))
    made = run()
    for hook in hooks:
        hook.remove()
    t = model.grid[0]
    seen["patch_embed"] = seen["patch_embed"].unflatten(1, (t, -1))
    return made, seen


def gradients(model: nn.Module, loss: torch.Tensor) -> Tensors:
    """Parameter -> gradient, of those that have one."""
    names, params = zip(*model.named_parameters())
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    return {n: g for n, g in zip(names, grads) if g is not None}


def _distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (2 - 2 * (student * teacher).sum(-1)).mean()


def _train(model, losses, config) -> tuple[dict[str, Any], Tensors, Tensors]:
    """Two steps of AdamW as the published engine takes them; parameters without gradient stay."""
    said = dict(
        lr=0.01, weight_decay=0.05, eps=1e-6, betas=[0.9, 0.98], clip_grad_norm=3.0, steps=2
    )
    plain = lambda n, p: p.ndim <= 1 or n.endswith(".bias") or "pos_embed" in n or n == "cls_token"
    named = list(model.named_parameters())
    groups = [
        dict(params=[p for n, p in named if plain(n, p)], weight_decay=0.0),
        dict(params=[p for n, p in named if not plain(n, p)], weight_decay=said["weight_decay"]),
    ]
    optimiser = torch.optim.AdamW(groups, lr=said["lr"], betas=said["betas"], eps=said["eps"])
    found = {}
    for i in range(said["steps"]):
        loss = losses()["loss"]
        optimiser.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), said["clip_grad_norm"])
        found |= {f"loss_step{i}": loss.detach(), f"gradnorm_step{i}": norm}
        optimiser.step()
    found["loss_after2"] = losses()["loss"].detach()
    return said, found, {n: p.detach().clone() for n, p in named}


def write_student(folder, name, config, *, seed=1, learn=True, train=False) -> pathlib.Path:
    """Stage 1 (with mae_teacher_embed_dim) or distillation."""
    c, (t, places) = {**_TRUNK, **config}, _grid(config)
    video, mask = _inputs(config, seed, 2), random_mask(seed, 2, t, places, max(places // 3, 1))
    model = fill(student(config), seed)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ids, groups = _visible(mask), {"state": state, "in": {"video": video, "mask": mask}}
    for group, activation in GROUPS.items():
        other = student(config, activation)
        other.load_state_dict(state)
        with torch.no_grad():
            groups[group] = _student_outputs(other.eval()(video, ids))
    with torch.no_grad():
        _, groups["trace"] = _traced(model, lambda: model(video, ids))
    meta = dict(what=name, config=dict(config), seed=seed)
    if not learn:
        return save(folder, name, meta, groups)
    full = {"clip_middle": unit(normal(seed + 1, c["clip_return_layer"], 2, 1 + t * places, c["clip_teacher_embed_dim"]))}  # fmt: skip
    if c["clip_teacher_final_dim"]:
        full["clip_final"] = unit(normal(seed + 2, 2, c["clip_teacher_final_dim"]))
    if "mae" in model(video, ids):
        full["mae"] = unit(normal(seed + 3, c["mae_return_layer"], 2, t * places, c["mae_teacher_embed_dim"]))  # fmt: skip
    shown = lambda x, mask: x[:, ~mask].reshape(len(x), 2, -1, x.shape[-1])
    seen = {"clip_middle_vis": shown(full["clip_middle"], mask)}
    seen |= {"mae_vis": shown(full["mae"], mask[:, 1:])} if "mae" in full else {}

    def losses():
        out = _student_outputs(model(video, ids))
        zero = torch.zeros(())
        each = {
            "loss_clip_middle": _distance(out["x_clip_align"], seen["clip_middle_vis"]),
            "loss_clip_final": _distance(out["x_align"], full["clip_final"]) if "clip_final" in full else zero,
            "loss_mae": _distance(out["x_mae_align"], seen["mae_vis"]) if "mae" in full else zero,
        }  # fmt: skip
        return each | {"loss": sum(each.values())}

    groups |= {"teacher_full": full, "teacher_vis": seen, "loss": losses()}
    groups["grad"] = gradients(model, groups["loss"]["loss"])
    meta["params_without_grad"] = sorted(set(state) - set(groups["grad"]))
    if train:
        meta["adamw"], groups["adamw"], groups["adamw_after2"] = _train(model, losses, config)
    return save(folder, name, meta, groups)


def write_vision(folder, name, config, *, seed=1) -> pathlib.Path:
    """Stage 2's vision tower on clips and images, masked and not; the alignment loss."""
    c, (t, places) = {**_TRUNK, **config}, _grid(config)
    model = fill(student(config), seed)
    state = model.state_dict()
    image = _inputs(config, seed + 1, 2, 1)
    given = {"video": _inputs(config, seed, 2), "image": _still(config, image)}
    shown = {"video": given["video"], "image": image}
    given["video_mask"] = random_mask(seed, 2, t, places, max(places // 4, 1))
    given["image_mask"] = random_mask(seed + 1, 2, 1, places, max(places // 2, 1))
    groups: dict[str, Tensors] = {"state": state, "in": given, "out": {}, "out_tanh_gelu": {}}
    for group, activation in GROUPS.items():
        other = student(config, activation)
        other.load_state_dict(state)
        for kind in ("video", "image"):
            for mask in ("mask", "nomask"):
                ids = _visible(given[f"{kind}_mask"]) if mask == "mask" else None
                last = c["depth"] - 2
                with torch.no_grad():
                    out = other.eval()(shown[kind], ids, features=(last,))
                case = dict(x_vis=out["tokens"], x_pool_vis=out["pooled"]) | _student_outputs(out)
                groups[group] |= {f"{kind}_{mask}/{k}": v for k, v in case.items()}
                groups[group][f"{kind}_{mask}_xvisonly"] = out["tokens"].clone()
                groups[group][f"{kind}_{mask}_xvisonly_idx-2"] = out[f"block{last}"]
    out = _student_outputs(model(given["video"], _visible(given["video_mask"])))
    if c["clip_teacher_final_dim"]:
        given["uta_target_middle"] = unit(normal(seed + 2, *out["x_clip_align"].shape))
        given["uta_target_final"] = unit(normal(seed + 3, *out["x_align"].shape))
        loss = _distance(out["x_clip_align"], given["uta_target_middle"])
        loss = loss + _distance(out["x_align"], given["uta_target_final"])
        groups |= {"loss": {"uta": loss}, "grad": gradients(model, loss)}
    return save(folder, name, dict(what=name, config=dict(config), seed=seed), groups)


def _pool_attention(pool: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Mean over heads of the pool's attention to all but the class token, [B, N]."""
    cross = pool.cross_attn
    q = cross.q(pool.norm1_q(x.mean(1, keepdim=True))) + cross.q_bias
    k = cross.k(pool.norm1_k(x)) + cross.k_bias
    split = lambda y: y.unflatten(-1, (cross.heads, -1)).transpose(1, 2)
    q, k = split(q), split(k)
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 0, 1:]


def write_teacher(folder, name, config, *, seed=1, frames=None) -> pathlib.Path:
    """The teacher of distillation; with `frames`, InternVL's over that many frames of a clip."""
    each = {**config, "num_frames": 1} if frames else dict(config)
    each.pop("clip_return_index", None)
    video, count = _inputs(each, seed, 2, frames), config.get("clip_return_layer", 1)
    interval = config.get("clip_return_interval", 1)
    blocks = config.get("clip_return_index") or [config["depth"] - 1 - int(i * interval) for i in range(count)]  # fmt: skip
    blocks, norm = sorted(blocks), config.get("clip_norm_type", "l2") == "l2"
    base = fill(torch_model.InternVideo2(trunk(each)), seed)
    groups = {"state": base.state_dict(), "in": {"video": video}}
    for group, activation in GROUPS.items():
        model = torch_model.InternVideo2(trunk(each, activation))
        model.load_state_dict(base.state_dict())
        shown = video
        if frames:
            shown = video.swapaxes(1, 2).flatten(0, 1)[:, :, None]
        with torch.no_grad():
            out = model.eval()(shown, features=blocks)
            attention = _pool_attention(model.clip_projector, out["tokens"])
        z, x = torch.stack([out[f"block{i}"] for i in blocks]), out["pooled"]
        if frames and norm:
            z = z.unflatten(1, (2, frames))
            z = torch.cat([z[:, :, :, :1].mean(2), z[:, :, :, 1:].flatten(2, 3)], 2)
            x = x.unflatten(0, (2, frames)).mean(1)
        groups[group] = dict(z=unit(z) if norm else z, x=unit(x) if norm else x)
        if config.get("return_attn", True):
            groups[group]["attn"] = attention
    return save(folder, name, dict(what=name, config=dict(config), seed=seed), groups)


def write_clip(folder, name, config, *, seed=1, shared=24) -> pathlib.Path:
    """CLIP's vision tower with its projection."""
    image = _inputs(config, seed + 1, 3, 1)
    base = fill(torch_model.ProjectedInternVideo2(trunk(config), shared), seed)
    state = base.state_dict()
    given = {"video": _inputs(config, seed, 3), "image": _still(config, image)}
    given["text_feat"] = normal(seed + 2, 3, shared)
    part = lambda start: {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}
    groups = {
        "state": part("vision_encoder."),
        "state_vision_align": part("vision_align."),
        "in": given,
    }
    for group, activation in GROUPS.items():
        model = torch_model.ProjectedInternVideo2(trunk(config, activation), shared)
        model.load_state_dict(state)
        groups[group] = {}
        for kind in ("video", "image"):
            with torch.no_grad():
                out = model.eval()(image if kind == "image" else given[kind])
            groups[group] |= {f"{kind}_feat": out["pooled"], f"{kind}_aligned": out["projected"]}
    return save(folder, name, dict(what=name, config=dict(config), seed=seed), groups)


def write_classifier(folder, name, config, *, seed=1, variant="plain", fresh=True, after=False) -> pathlib.Path:  # fmt: skip
    """A classifier.

    Args:
        fresh: whether the running statistics start at 0 and 1.
        after: whether the state is that behind the training step, and `out/logits` with it.
    """
    head = dict(
        variant=variant, classes=config.get("num_classes", 1000), eps=1e-5,
        merge=config.get("merge_method", "proj"), merge_norm=config.get("merge_norm", "kaiming_BN"),
    )  # fmt: skip
    make = lambda activation: torch_model.InternVideo2(trunk(config, activation), classifier=head)
    model = fill(make("gelu"), seed)
    norm = getattr(model, "down_norm", None)
    counts = isinstance(norm, nn.BatchNorm1d)
    if counts and fresh:
        norm.reset_running_stats()
    video, label = _inputs(config, seed, 3), torch.tensor([1, 0, 2])
    groups: dict[str, Tensors] = {"out": {}, "in": {"video": video, "label": label}}
    state = {k: v.clone() for k, v in model.state_dict().items()}
    if counts:
        with torch.no_grad():
            groups["out"]["train_logits"] = model.train()(video)["logits"]
        for key in ("running_mean", "running_var"):
            groups["out"][f"after_train_down_norm.{key}"] = getattr(norm, key).clone()
        if after:
            state = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    model.eval()
    groups["state"] = state
    logits = model(video)["logits"]
    groups["out"]["logits"] = logits
    tanh = make("gelu_tanh")
    tanh.load_state_dict(state)
    with torch.no_grad():
        groups["out"]["logits_tanh_gelu"] = tanh.eval()(video)["logits"]
        _, seen = _traced(model, lambda: model(video))
    kept = {k: v for k, v in seen.items() if re.fullmatch(r"block\d+|pooled", k)}
    groups["trace"] = kept | {"tokens_in": seen["tokens_in_visible"]}
    loss = F.cross_entropy(logits, label)
    groups |= {"loss": {"cross_entropy": loss}, "grad": gradients(model, loss)}
    last, table = config["depth"] + 1, {}
    for key, p in model.named_parameters():
        decay = 0.0 if p.ndim <= 1 or key.endswith(".bias") or "pos_embed" in key or key == "cls_token" else 0.05  # fmt: skip
        block = re.match(r"blocks\.(\d+)", key)
        first = key in ("cls_token", "pos_embed") or key.startswith("patch_embed")
        number = int(block.group(1)) + 1 if block else 0 if first else last
        table[key] = [decay, 0.75 ** (last - number)]
    meta = dict(what=name, config=dict(config), seed=seed, fc_norm_eps=1e-5)
    meta["param_weight_decay_and_lr_scale_at_layer_decay_0_75"] = table
    return save(folder, name, meta, groups)


def changed(file: pathlib.Path, name: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any] = {}) -> pathlib.Path:  # fmt: skip
    """A copy of a file under another name with these tensors, and further arguments in its json."""
    meta = json.loads(file.with_suffix(".json").read_text())
    meta["config"] |= config
    copy = file.with_name(f"{name}.safetensors")
    copy.with_suffix(".json").write_text(json.dumps(meta))
    save_file(dict(tensors), copy)
    return copy
