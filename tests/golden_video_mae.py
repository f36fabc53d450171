"""VideoMAE for `tests.golden`: the original pretraining model and transformers'."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import losses, masking, sharding
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import pixels, positions, video_mae
from invideo_jax.steps import masked
from tests import originals
from tests.golden import Outcome, Tensors

_ORIGINAL = {  # theirs -> ours
    "img_size": "image_size",
    "patch_size": "patch",
    "encoder_in_chans": "channels",
    "encoder_embed_dim": "width",
    "encoder_depth": "depth",
    "encoder_num_heads": "heads",
    "decoder_embed_dim": "decoder_width",
    "decoder_depth": "decoder_depth",
    "decoder_num_heads": "decoder_heads",
    "qkv_bias": "qkv_bias",
    "qk_scale": "scale",
    "drop_path_rate": "drop_path",
    "init_values": "layer_scale",
    "tubelet_size": "tubelet",
    "num_frames": "frames",
}
_HF = {
    "image_size": "image_size",
    "patch_size": "patch",
    "num_channels": "channels",
    "num_frames": "frames",
    "tubelet_size": "tubelet",
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "eps",
    "qv_bias": "qkv_bias",
    "qkv_bias": "qkv_bias",  # its name in transformers 4
    "decoder_num_attention_heads": "decoder_heads",
    "decoder_hidden_size": "decoder_width",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_intermediate_size": "decoder_mlp_width",
}
_HF_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


def _translate(config: Mapping[str, Any], table: Mapping[str, str], fixed: Mapping[str, Any]):
    """Our arguments; `fixed` are theirs that must have this value, since ours has no other."""
    for name, value in config.items():
        if name not in table and name not in fixed:
            raise ValueError(f"argument {name}={value!r} is not known here")
        if name in fixed and fixed[name] is not ... and value not in fixed[name]:
            raise ValueError(f"argument {name} must be one of {fixed[name]}; got {value!r}")
    ours = {table[k]: v for k, v in config.items() if k in table}
    for name in ("image_size", "patch"):  # (height, width) pairs
        if isinstance(ours.get(name), (list, tuple)):
            height, width = ours[name]
            if height != width:
                raise ValueError(f"{name} must be square; got {ours[name]}")
            ours[name] = height
    return ours


def original_model(meta: Mapping[str, Any], frames: int) -> video_mae.VideoMAE:
    """The model of MCG-NJU's constructor arguments; its class has 16 frames, the input says ours."""
    config = originals.complete("mae_pretraining", meta["config"])
    none = (0, 0.0, False, None)
    fixed = dict(
        encoder_num_classes=none,
        decoder_num_classes=...,
        mlp_ratio=...,
        use_learnable_pos_emb=none,
        drop_rate=none,
        attn_drop_rate=none,
        num_classes=...,
        in_chans=...,
        use_checkpoint=...,
    )
    ours = {"frames": frames} | _translate(config, _ORIGINAL, fixed)
    ours["layer_scale"] = ours.get("layer_scale") or 0.0
    ratio = config["mlp_ratio"]
    said = re.search(r"eps\s+([0-9.]+e-?[0-9]+)", meta.get("what", ""))
    eps = float(said.group(1)) if said else 1e-6
    return video_mae.make(
        **ours,
        mlp_width=int(ours["width"] * ratio),
        decoder_mlp_width=int(ours["decoder_width"] * ratio),
        eps=eps,
        decoder_eps=eps,
    )


def hf_model(config: Mapping[str, Any], *, decoder_eps: float = 1e-5) -> video_mae.VideoMAE:
    """The model of transformers' configuration; there the decoder's last norm has a fixed eps."""
    none = (0, 0.0, None)
    fixed = dict(
        hidden_act=tuple(_HF_ACTIVATIONS),
        use_mean_pooling=(True, False),
        norm_pix_loss=(True, False),
        hidden_dropout_prob=none,
        attention_probs_dropout_prob=none,
        initializer_range=...,
    )
    ours = _translate(originals.HF | dict(config), _HF, fixed)
    return video_mae.make(
        **ours,
        activation=_HF_ACTIVATIONS[config.get("hidden_act", "gelu")],
        last_norm=not config.get("use_mean_pooling", True),
        decoder_eps=decoder_eps,
    )


def _loss(model, params, video, visible, hidden, normalise):
    prediction, _ = model.apply({"params": params}, video, visible, hidden)
    target = masked.target_cubes(model.encoder, video, hidden)
    if normalise:
        target, _, _ = losses.normalise_cubes(target, channels=model.encoder.channels)
    return losses.squared_error(prediction, target, jnp.ones(len(video))).value


def loss_and_grad(model, params, video, visible, hidden, *, normalise=True):
    """The pixel loss and its gradient in every parameter, as the originals compute it."""
    run = jax.value_and_grad(lambda p: _loss(model, p, video, visible, hidden, normalise))
    return jax.jit(run)(params)


def _params(model, state, layout):
    expected = sharding.unbox(jax.eval_shape(lambda: video_mae.init(model, jax.random.key(0))))
    params = to_params(state, layout=layout, expected=expected)
    cube = (model.encoder.tubelet, model.encoder.patch, model.encoder.patch)
    back = lambda tree: to_state_dict(jax.device_get(tree), layout=layout, cube=cube)
    return params, back


def _ids(mask: np.ndarray) -> masking.Ids:
    mask = mask.reshape(len(mask), -1).astype(bool)
    return masking.ids_of(jnp.asarray(mask), int(mask[0].sum()))


def _blocks(wanted: Sequence[str], prefix: str) -> tuple[int, ...]:
    found = (re.fullmatch(rf"trace/{prefix}_block(\d+)", name) for name in wanted)
    return tuple(int(m.group(1)) for m in found if m)


def run_original(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Outputs, inner activations, both losses, targets and gradients of the original model."""
    video = jnp.asarray(inputs["video"].transpose(0, 2, 3, 4, 1))
    model = original_model(meta, frames=video.shape[1])
    params, back = _params(model, state, "videomae")
    visible, hidden = _ids(inputs["mask"])
    prediction, out = model.apply(
        {"params": params},
        video,
        visible,
        hidden,
        features=_blocks(wanted, "encoder"),
        decoder_features=_blocks(wanted, "decoder"),
    )
    embed = lambda m, x: m.encoder.patch_embed(
        pixels.patchify(x, tubelet=m.encoder.tubelet, patch=m.encoder.patch)
    )
    plain = masked.target_cubes(model.encoder, video, hidden)
    target = losses.normalise_cubes(plain, channels=model.encoder.channels)[0]
    loss, grad = loss_and_grad(model, params, video, visible, hidden)
    stored = meta["tensors"].get("target/labels_plain", [None, [0, plain.shape[1]]])[1][1]
    tensors = {
        "in/encoder_pos_embed": positions.sinusoid(model.encoder.tokens, model.encoder.width)[None],
        "in/decoder_pos_embed": positions.sinusoid(model.encoder.tokens, model.decoder_width)[None],
        "out/pred": prediction,
        "loss/mse_normalised_target": loss,
        "loss/mse_plain_target": _loss(model, params, video, visible, hidden, False),
        "target/labels_normalised": target,
        "target/labels_plain": plain[:, :stored],  # the file keeps the first few of each clip
        "trace/patch_embed": model.apply({"params": params}, video, method=embed),
    }
    tensors |= {f"trace/{'encoder_' * k.startswith('block')}{k}": v for k, v in out.items()}
    tensors |= {f"grad/{k}": v for k, v in back(grad).items()}
    return Outcome(tensors, back(params))


def run_hf(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Logits, loss and gradients of transformers' VideoMAEForPreTraining."""
    model = hf_model(meta["config"])
    video = jnp.asarray(inputs["video"].transpose(0, 2, 3, 4, 1))
    params, back = _params(model, state, "videomae_hf")
    visible, hidden = _ids(inputs["mask"])
    logits, _ = model.apply({"params": params}, video, visible, hidden)
    normalise = meta["config"].get("norm_pix_loss", True)
    loss, grad = loss_and_grad(model, params, video, visible, hidden, normalise=normalise)
    tensors = {"out/logits": logits, "loss/loss": loss}
    tensors |= {f"grad/{k}": v for k, v in back(grad).items()}
    return Outcome(tensors, back(params))


FAMILIES = [
    (
        lambda meta, tensors: (
            "state/encoder_to_decoder.weight" in tensors and "state/encoder.norm.weight" in tensors
        ),
        run_original,
    ),
    (lambda meta, tensors: "decoder_hidden_size" in meta.get("config", {}), run_hf),
]
