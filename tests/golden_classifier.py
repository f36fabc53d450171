"""InternVideo2's three classifiers for `tests.golden`."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from invideo_jax import optim, sharding
from invideo_jax.interop import mapping
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import classifier
from invideo_jax.models.classifier import Classifier
from invideo_jax.models.video_encoder import VideoEncoder
from invideo_jax.steps import classify
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
    "init_values": "layer_scale",
    "qk_normalization": "qk_norm",
    "depth": "depth",
    "attn_pool_num_heads": "pool_heads",
    "clip_embed_dim": "pool_width",
    "num_frames": "frames",
    "tubelet_size": "tubelet",
}
_HEAD = {
    "num_classes": "classes",
    "fc_drop_rate": "dropout",
    "init_scale": "init_scale",
    "merge_method": "merge",
    "merge_norm": "merge_norm",
}
# Read below; the last four change no number (`head_drop_path_rate` is never used there).
_ELSEWHERE = ("mlp_ratio", "layerscale_no_force_fp32", "sep_pos_embed")
_ELSEWHERE += ("head_drop_path_rate", "use_checkpoint", "checkpoint_num", "fused_mlp_heuristic")
_ELSEWHERE += ("use_flash_attn", "use_fused_rmsnorm", "use_fused_mlp")
# Position tables of other names than `pos_embed` have the head's rate there.
_PUBLISHED_LAYER_0 = r"(^|/)(cls_token|patch_embed|position_embedding)(/|$)"
_TABLE = "param_weight_decay_and_lr_scale_at_layer_decay_0_75"
_LAYOUT = "internvideo2_classification"


def model_of(config: Mapping[str, Any], state: Tensors, activation: str) -> Classifier:
    """The model of the original's constructor arguments; of its three classes one has `extra_mlp`."""
    for name, value in config.items():
        if name not in {*_ENCODER, *_HEAD, *_ELSEWHERE}:
            raise ValueError(f"argument {name}={value!r} is not known here")
    config = complete("classifier", config)
    of = lambda table: {table[k]: v for k, v in config.items() if k in table}
    ours = of(_ENCODER)
    encoder = VideoEncoder(
        **ours | {"layer_scale": ours.get("layer_scale") or 0.0},
        mlp_width=int(ours["width"] * config["mlp_ratio"]),
        positions="separate" if config.get("sep_pos_embed") else "joint",
        layer_scale_float32=not config.get("layerscale_no_force_fp32", False),
        activation=activation,
    )
    attentive = any(key.startswith("extra_mlp.") for key in state)
    variant = "attentive" if attentive else "cat" if "merge_method" in config else "plain"
    return Classifier(encoder, variant=variant, **of(_HEAD))


def _blocks(wanted: Sequence[str]) -> tuple[int, ...]:
    found = (re.fullmatch(r"trace/block(\d+)", name) for name in wanted)
    return tuple(int(m.group(1)) for m in found if m)


def optimizer_table(boxed: Any, decay: float) -> dict[str, Any]:
    """Their key -> (weight decay, factor of the rate), as the official optimiser groups have them."""
    leaves = optim.plan(
        "adamw",
        boxed,
        weight_decay=0.05,
        layer_decay=dict(decay=decay, embedding=_PUBLISHED_LAYER_0),
    )
    by_path = {leaf.path: leaf for leaf in leaves}
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    found = {}
    for row, key, block in mapping.keys_of(mapping.names.get(_LAYOUT), shapes):
        leaf = by_path[row.ours[0]]
        rate = leaf.rate if block is None or not isinstance(leaf.rate, tuple) else leaf.rate[block]
        found[key] = [leaf.weight_decay, rate]
    return found


def _trained_already(after: Tensors, batch: Tensors):
    """The running statistics behind the one training step, of a file whose state has it already.

    The step is taken back: before = (after - m*batch) / (1 - m). Of a norm that was fresh that is mean 0 and
    variance 1, and the step can be repeated from there, which checks it. Other values stand nowhere in the file.

    Raises:
        ValueError: taken back, a variance is not positive.
    """
    share = classifier.MOMENTUM
    fresh = {"mean": 0.0, "variance": 1.0}
    before = {k: (after[k] - share * batch[k]) / (1 - share) for k in fresh}
    if not (before["variance"] > 0).all():
        raise ValueError("no running variance before the training step gives that behind it")
    # A wrong share or a biased variance would leave less than this.
    if all(float(jnp.abs(before[k] - fresh[k]).max()) < 0.2 for k in fresh):
        begin = {"down_norm": fresh | {"batches": 0}}
        return classifier.with_statistics(begin, batch)["down_norm"], ()
    note = "the state has its training step in it, and did not start at 0 and 1: statistics not checked"
    return after, (note,)


def run(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Logits for both GELUs, inner activations, loss, gradients, batch norm, optimiser groups."""
    video = jnp.asarray(inputs["video"].transpose(0, 2, 3, 4, 1))
    model = model_of(meta["config"], state, "gelu")
    boxed = jax.eval_shape(lambda: classifier.init(model, jax.random.key(0)))
    params = to_params(state, layout=_LAYOUT, expected=sharding.unbox(boxed))
    cube = (model.encoder.tubelet, model.encoder.patch, model.encoder.patch)
    back = lambda tree: to_state_dict(jax.device_get(tree), layout=_LAYOUT, cube=cube)
    run_model = jax.jit(lambda p, v: model.apply({"params": p}, v, features=_blocks(wanted)))
    logits, out = run_model(params, video)
    other = model_of(meta["config"], state, "gelu_tanh")
    tanh, _ = jax.jit(lambda p, v: other.apply({"params": p}, v))(params, video)
    tensors = {
        "out/logits": logits,
        "out/logits_tanh_gelu": tanh,
        "trace/tokens_in": out.pop("embedded"),
    }
    tensors |= {f"trace/{name}": value for name, value in out.items()}
    notes = ()
    if model.counts_batches:
        trained, more = model.apply({"params": params}, video, train=True)
        after = classifier.with_statistics(params, more["statistics"])["down_norm"]
        if params["down_norm"]["batches"] > 0:
            after, notes = _trained_already(params["down_norm"], more["statistics"])
        tensors["out/train_logits"] = trained
        tensors["out/after_train_down_norm.running_mean"] = after["mean"]
        tensors["out/after_train_down_norm.running_var"] = after["variance"]
    if "label" in inputs:
        batch = {"label": jnp.asarray(inputs["label"]), "valid": jnp.ones(len(video), bool)}

        def loss(params):
            logits, _ = model.apply({"params": params}, video)
            return classify.soft_cross_entropy(logits, batch, classes=model.classes).value

        tensors["loss/cross_entropy"], grad = jax.jit(jax.value_and_grad(loss))(params)
        tensors |= {f"grad/{key}": g for key, g in back(grad).items()}
    json_only = {}
    if _TABLE in meta:
        ours = optimizer_table(boxed, 0.75)
        tensors |= {f"optimizer/{key}": value for key, value in ours.items()}
        json_only = {f"optimizer/{key}": value for key, value in meta[_TABLE].items()}
    return Outcome(tensors, back(params), wanted=json_only, notes=notes)


def _is_internvideo2(meta: Mapping[str, Any], tensors: Tensors) -> bool:
    return "state/fc_norm.weight" in tensors and "state/clip_projector.norm1_q.weight" in tensors


FAMILIES = [(_is_internvideo2, run)]
