"""As `tests.interop.variants`: files of VideoMAE, the original and transformers', and of the teacher."""

import pathlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from invideo_jax.interop import torch_model
from tests.interop.variants import Tensors, fill, gradients, normal, random_mask, save, square, unit


def _mae_arguments(c: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        width=c["embed_dim"], depth=c["depth"], heads=c["num_heads"], channels=c.get("in_chans", 3),
        mlp_width=int(c["embed_dim"] * c.get("mlp_ratio", 4)), patch=square(c.get("patch_size", 16)),
        image_size=square(c["img_size"]), frames=c["frames"], tubelet=c.get("tubelet_size", 2),
        qkv_bias=c.get("qkv_bias", False), scale=c.get("qk_scale"), layer_scale=c.get("init_values", 0.0),
        activation="gelu", eps=1e-6, last_norm=True,
    )  # fmt: skip


def write_mae_teacher(folder, name, config, *, seed=1) -> pathlib.Path:
    """VideoMAE V2's encoder as teacher; the attention as intended, and over heads as released."""
    a = _mae_arguments({**config, "frames": config.get("all_frames", 16)})
    model = fill(torch_model.MAEEncoder(a), seed)
    video = normal(seed, 2, a["channels"], a["frames"], *[a["image_size"]] * 2)
    count, interval = config.get("mae_return_layer", 1), config.get("mae_return_interval", 1)
    blocks = sorted(a["depth"] - 1 - int(i * interval) for i in range(count))

    def features():
        with torch.no_grad():
            out = model(video, features=blocks)
        z = [out["tokens" if i == a["depth"] - 1 else f"block{i}"] for i in blocks]
        z = torch.stack(z)
        return unit(z) if config.get("mae_norm_type", "l2") == "l2" else z

    def over_heads(q, k, v, heads, scale=None):
        split = lambda x: x.unflatten(-1, (heads, -1))
        mixed = F.scaled_dot_product_attention(split(q), split(k), split(v), scale=scale)
        return mixed.transpose(1, 2).reshape(q.shape)

    found, right = {"z_intended_attention_over_tokens": features()}, torch_model.attend
    try:
        torch_model.attend = over_heads
        found["z_official_with_documented_flash_layout"] = features()
    finally:
        torch_model.attend = right
    groups = {"state": model.state_dict(), "out": found}
    groups["in"] = {"video": video, "pos_embed": model.place[None]}
    return save(folder, name, dict(what=name, config=dict(config), seed=seed), groups)


def _cubes(video: torch.Tensor, tubelet: int, patch: int) -> torch.Tensor:
    """[B, C, T, H, W] to [B, N, pixels of a cube, C]."""
    b, channels = video.shape[:2]
    x = video.unflatten(4, (-1, patch)).unflatten(3, (-1, patch)).unflatten(2, (-1, tubelet))
    return x.permute(0, 2, 4, 6, 3, 5, 7, 1).reshape(b, -1, tubelet * patch**2, channels)


def write_mae(folder, name, config, *, seed=1, seen=2) -> pathlib.Path:
    """VideoMAE's pretraining model: outputs, targets, losses, gradients; 16 frames, a tube mask."""
    c = {**dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=8, mlp_ratio=4), **config}
    own = {k.removeprefix("encoder_"): v for k, v in c.items() if not k.startswith("decoder_")}
    a, width = _mae_arguments({**own, "frames": 16}), c["decoder_embed_dim"]
    model = torch_model.VideoMAE(
        a, width, c["decoder_depth"], c["decoder_num_heads"], int(width * c["mlp_ratio"]), 1e-6
    )
    fill(model, seed)
    slots, places = 16 // a["tubelet"], (a["image_size"] // a["patch"]) ** 2
    video = normal(seed, 2, 3, 16, *[a["image_size"]] * 2)
    mask = random_mask(seed, 2, 1, places, seen)[:, 1:].repeat(1, slots)
    order = lambda m: torch.stack([torch.nonzero(row)[:, 0] for row in m])
    mean, deviation = (torch.tensor(x)[:, None, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # fmt: skip
    cubes = _cubes(video * deviation + mean, a["tubelet"], a["patch"])
    scaled = (cubes - cubes.mean(2, keepdim=True)) / (cubes.var(2, keepdim=True).sqrt() + 1e-6)
    plain, target = (torch_model.gather(x.flatten(2), order(mask)) for x in (cubes, scaled))
    prediction = model.reconstruct(video, order(~mask), order(mask))
    loss = (prediction - target).square().mean()
    trace: Tensors = {}
    keep = lambda key: lambda module, given, made: trace.update({key: made.detach()})
    hooks = [model.encoder.patch_embed.register_forward_hook(keep("patch_embed"))]
    hooks += [b.register_forward_hook(keep(f"encoder_block{i}")) for i, b in enumerate(model.encoder.blocks)]  # fmt: skip
    hooks += [b.register_forward_hook(keep(f"decoder_block{i}")) for i, b in enumerate(model.decoder.blocks)]  # fmt: skip
    hooks += [model.encoder_to_decoder.register_forward_hook(keep("encoder_to_decoder"))]
    with torch.no_grad():
        model.reconstruct(video, order(~mask), order(mask))
    for hook in hooks:
        hook.remove()
    tables = dict(encoder_pos_embed=model.encoder.place[None], decoder_pos_embed=model.place[None])
    losses = dict(mse_normalised_target=loss, mse_plain_target=(prediction - plain).square().mean())
    labels = dict(labels_normalised=target, labels_plain=plain[:, :3])
    groups = {
        "state": model.state_dict(), "in": {"video": video, "mask": mask} | tables, "trace": trace,
        "out": {"pred": prediction}, "loss": losses, "target": labels, "grad": gradients(model, loss),
    }  # fmt: skip
    meta = dict(what=f"{name}, LayerNorm eps 1e-6", config=dict(config), seed=seed)
    return save(folder, name, meta, groups)


def write_hf(folder, name, config, *, seed=1, seen=2) -> pathlib.Path:
    """VideoMAE's pretraining model of transformers itself."""
    import transformers

    model = transformers.VideoMAEForPreTraining(
        transformers.VideoMAEConfig(**config, attn_implementation="eager")
    )
    fill(model, seed)
    c = model.config
    video = normal(seed, 2, c.num_channels, c.num_frames, c.image_size, c.image_size)
    slots, places = c.num_frames // c.tubelet_size, (c.image_size // c.patch_size) ** 2
    mask = random_mask(seed, 2, 1, places, seen)[:, 1:].repeat(1, slots)
    out = model(video.swapaxes(1, 2), bool_masked_pos=mask)
    groups = {
        "state": model.state_dict(), "in": {"video": video, "mask": mask}, "out": {"logits": out.logits},
        "loss": {"loss": out.loss}, "grad": gradients(model, out.loss),
    }  # fmt: skip
    return save(folder, name, dict(what=name, config=dict(config), seed=seed), groups)
