"""Stage 2 for `tests.golden`: its vision tower, its losses in isolation, MobileCLIP's text tower."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import losses, negatives, sharding
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models.text_encoder import ClipText
from invideo_jax.text_masking import WordDraws, mask_words
from tests.golden import Outcome, Tensors
from tests.golden_internvideo2 import (
    ACTIVATIONS,
    frames_last,
    load,
    student_of,
    visible_of,
)
from tests.originals import complete

# ------------------------------------------------------------------------------- the vision tower

_CASE = re.compile(
    r"(?P<group>out|out_tanh_gelu)/(?P<kind>video|image)_(?P<mask>mask|nomask)"
    r"(/(?P<name>x_vis|x_pool_vis|x_clip_align|x_align)|_xvisonly(_idx(?P<index>-\d+))?)"
)


def published(made: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The four results of the published vision tower; without a final head the last is the pooled one."""
    names = dict(x_vis=made["tokens"], x_pool_vis=made["pooled"])
    names["x_align"] = made.get("clip_final", made["pooled"])
    if "clip_middle" in made:
        names["x_clip_align"] = made["clip_middle"].swapaxes(0, 1)
    return names


def uta(made: Mapping[str, jax.Array], middle: np.ndarray, final: np.ndarray) -> jax.Array:
    """The published alignment loss of stage 2: middle [K, B, 1+V, C] and final [B, C] with factor 1."""
    valid = jnp.ones(len(final))
    first = losses.cosine_distance(made["clip_middle"], jnp.asarray(middle).swapaxes(0, 1), valid)
    return first.value + losses.cosine_distance(made["clip_final"], jnp.asarray(final), valid).value


def run_vision(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Outputs on videos and images, masked and not, for both kinds of GELU; the loss and its gradient."""
    cases = {n: m for n in wanted if (m := _CASE.fullmatch(n))}
    config = complete("stage2", meta["config"])
    tensors, unit, back = {}, set(), None
    for group, activation in ACTIVATIONS.items():
        model = student_of(config, activation)
        params, back = load(model, model.encoder, state, "internvideo2")
        run = jax.jit(functools.partial(model.apply, features=range(model.encoder.depth)))
        kinds = {(m["kind"], m["mask"]) for m in cases.values() if m["group"] == group}
        for kind, mask in sorted(kinds):
            seen = visible_of(inputs[f"{kind}_mask"]) if mask == "mask" else None
            made = run({"params": params}, frames_last(inputs[kind]), seen)
            found, start = published(made), f"{group}/{kind}_{mask}"
            tensors |= {f"{start}/{k}": v for k, v in found.items()}
            tensors[f"{start}_xvisonly"] = made["tokens"]
            for name, m in cases.items():
                if m["index"] and name.startswith(f"{start}_"):
                    tensors[name] = made[f"block{model.encoder.depth + int(m['index'])}"]
            specs = [("x_clip_align", model.clip), ("x_align", model.final)]
            unit |= {f"{start}/{n}" for n, spec in specs if spec and spec.normalise}
    if "uta_target_middle" in inputs:
        model = student_of(config, ACTIVATIONS["out"])
        seen, video = visible_of(inputs["video_mask"]), frames_last(inputs["video"])
        targets = inputs["uta_target_middle"], inputs["uta_target_final"]
        value = lambda p: uta(model.apply({"params": p}, video, seen), *targets)
        loss, grad = jax.jit(jax.value_and_grad(value))(params)
        tensors["loss/uta"] = loss
        tensors |= {f"grad/{k}": v for k, v in back(grad).items()}
    return Outcome(tensors, back(params), normalised=frozenset(unit))


# --------------------------------------------------------------------------------------- losses


def _contrastive(inputs: Tensors, kind: str, reduce: str, with_ids: bool) -> Tensors:
    """Similarities, targets, loss and gradients of one case, `kind` '2d' or '3d'.

    In float64: a gradient of 63 in float32 is as uncertain as the bound allows.
    """
    vision, text = (np.float64(inputs[n]) for n in (f"v{kind[0]}", "t2"))
    ids = jnp.asarray(inputs["idx"]) if with_ids else jnp.arange(len(text))

    def loss(vision, text, temperature):
        scores = losses.similarity(vision, text, temperature, reduce=reduce)
        return losses.contrastive(scores, ids).value, scores

    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    with jax.enable_x64(True):
        (value, scores), grads = run(vision, text, np.float64(inputs["temp"]))
    same = np.equal.outer(np.asarray(ids), np.asarray(ids)).astype(np.float32)
    found = dict(loss=value, sim_v2t=scores, sim_t2v=scores.T, targets=same / same.sum(1)[:, None])
    return found | dict(zip(("grad_vision", "grad_text", "grad_temp"), grads))


def _fake_scores(inputs: Tensors, videos: jax.Array, texts: jax.Array, real: jax.Array):
    """Matching scores by the small stand-in for the fusion blocks that the file's json states."""
    real = real.astype(jnp.float32)
    mean = (texts * real[..., None]).sum(1, keepdims=True) / real.sum(1)[:, None, None]
    hidden = jnp.tanh((texts + mean) @ inputs["fakeW"]) + videos.mean(1, keepdims=True)
    return hidden[:, 0] @ inputs["vtm_head.weight"].T + inputs["vtm_head.bias"]


def _matching(inputs: Tensors, case: str, hard: bool, with_ids: bool) -> Tensors:
    """Weights, negatives (drawn ones are given) and loss of one case."""
    ids = jnp.asarray(inputs["idx"]) if with_ids else jnp.arange(len(inputs["t2"]))
    scores = losses.similarity(inputs["v2"], inputs["t2"], inputs["temp"])
    found = {"mask": np.equal.outer(np.asarray(ids), np.asarray(ids)).astype(np.float32)}
    if hard:
        found["weights_v2t"] = negatives.weights(scores, ids)
        found["weights_t2v"] = negatives.weights(scores.T, ids)
        picked = [inputs[f"{case}/{side}_neg_indices"] for side in ("vision", "txt")]
    else:
        allowed = negatives.candidates(ids)
        noise = [inputs[f"{case}/randn_for_{side}"] for side in ("vision", "text")]
        picked = [negatives.highest(jnp.asarray(x), allowed)[0] for x in noise]
        found |= dict(zip(("vision_neg_indices", "txt_neg_indices"), picked))
    other_video, other_text = picked
    videos, texts = jnp.asarray(inputs["vision_embeds"]), jnp.asarray(inputs["text_embeds"])
    real = jnp.asarray(inputs["text_atts"])
    three = lambda *parts: jnp.concatenate(parts)
    logits = _fake_scores(
        inputs,
        three(videos, videos[other_video], videos),
        three(texts, texts, texts[other_text]),
        three(real, real, real[other_text]),
    )
    return found | {"loss": losses.matching(logits, jnp.ones(len(logits))).value}


def masked_words(inputs: Tensors, prefix: str, special: Mapping[str, int]):
    """Ids and labels (-100 where nothing is to be predicted) of saved draws."""
    draws = {
        n.removeprefix(f"{prefix}drawn_").split("(")[0]: jnp.asarray(v)
        for n, v in inputs.items()
        if n.startswith(f"{prefix}drawn_")
    }
    ids = jnp.asarray(inputs[f"{prefix}in_ids"])
    flags = (draws[n].astype(bool) for n in ("masked", "replace", "random"))
    words = WordDraws(*flags, draws["words"])
    shown, chosen = mask_words(
        ids, words, pad=special["pad"], first=special["cls"], mask=special["mask"]
    )
    return shown, jnp.where(chosen, ids, -100)


def run_losses(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Contrastive, matching, word and alignment losses on given features and draws."""
    tensors, given = {}, set()
    for case in {n.split("/")[0] for n in wanted}:
        if m := re.fullmatch(r"vtc_(2d|3d)(_(mean|max))?(_idx)?", case):
            found = _contrastive(inputs, m[1], m[3] or "mean", bool(m[4]))
            tensors |= {f"{case}/{k}": v for k, v in found.items()}
        elif m := re.fullmatch(r"vtm_(hard|rand)(_idx)?", case):
            found = _matching(inputs, case, m[1] == "hard", bool(m[2]))
            tensors |= {f"{case}/{k}": v for k, v in found.items()}
    if "mlm/in_ids" in inputs:
        shown, labels = masked_words(inputs, "mlm/", meta["mlm"])
        tensors |= {"mlm/out_ids": shown, "mlm/labels": labels}
    tensors |= _alignments(inputs, wanted)
    # Draws, and what they lead to in a file whose draws were not saved.
    given = {n for n in wanted if re.search(r"/(drawn_|in_ids|randn_|student_|teacher_)", n)}
    given |= {n for n in wanted if n.endswith("neg_indices") and n not in tensors}
    return Outcome(tensors, given=frozenset(given))


def _alignments(inputs: Tensors, wanted: Sequence[str]) -> Tensors:
    tensors = {}
    for name in wanted:
        if m := re.fullmatch(r"uta/loss_(?:ratio_([\d.]+)_([\d.]+)|nofinal)", name):
            side = lambda part: [
                jnp.asarray(inputs[f"uta/{n}_{part}"]) for n in ("student", "teacher")
            ]
            valid = jnp.ones(len(side("final")[0]))
            middle = losses.cosine_distance(
                *(x.swapaxes(0, 1) for x in side("middle")), valid
            ).value
            final = losses.cosine_distance(*side("final"), valid).value
            ratios = (float(m[1]), float(m[2])) if m[1] else (1.0, 0.0)
            value = ratios[0] * middle + ratios[1] * final
            tensors[name] = value.reshape(inputs[name].shape)
    return tensors


# ----------------------------------------------------------------------------- MobileCLIP's text

_MOBILECLIP = {
    "dim": "width",
    "n_transformer_layers": "depth",
    "n_heads_per_layer": "heads",
    "vocab_size": "vocabulary",
    "context_length": "positions",
    "causal_masking": "causal",
}


def mobileclip_of(config: Mapping[str, Any], output_width: int) -> ClipText:
    """The tower of the original's constructor arguments."""
    fixed = {
        "norm_layer": ("layer_norm", "layer_norm_fp32"),
        "model_name": ("base",),
        "no_scale_embedding": (False, True),  # read there, and never used
        "no_pos_embedding": (False,),
        "embed_dropout": (0, 0.0),
    }
    for name, value in config.items():
        if name in fixed and value not in fixed[name]:
            raise ValueError(f"argument {name} must be one of {fixed[name]}; got {value!r}")
        if name not in (*fixed, *_MOBILECLIP, "ffn_multiplier_per_layer"):
            raise ValueError(f"argument {name}={value!r} is not known here")
    ours = {_MOBILECLIP[k]: v for k, v in config.items() if k in _MOBILECLIP}
    alike = lambda x: x[0] if isinstance(x, (list, tuple)) and len(set(x)) == 1 else x
    ratio = alike(config["ffn_multiplier_per_layer"])
    ours["heads"] = alike(ours["heads"])
    if isinstance(ratio, (list, tuple)) or isinstance(ours["heads"], (list, tuple)):
        raise ValueError("all layers must have the same width and number of heads")
    mlp_width = -(-int(np.ceil(ours["width"] * ratio)) // 16) * 16
    return ClipText(**ours, mlp_width=mlp_width, output_width=output_width, activation="gelu")


def run_mobileclip(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """The text feature and all tokens."""
    width = meta.get("projection_dim", state["projection_layer"].shape[1])
    model, ids = mobileclip_of(meta["config"], width), jnp.asarray(inputs["ids"])
    expected = sharding.unbox(jax.eval_shape(model.init, jax.random.key(0), ids)["params"])
    params = to_params(state, layout="mobileclip_text", expected=expected)
    feature, tokens = jax.jit(model.apply)({"params": params}, ids)
    back = to_state_dict(params, layout="mobileclip_text", cube=(1, 1, 1))
    return Outcome({"out/text_feat": feature, "out/all_tokens": tokens}, back)


def _is_vision(meta, tensors):
    return any(re.fullmatch(r"state/pos_embed\w*", n) for n in tensors) and any(
        _CASE.fullmatch(n) for n in tensors
    )


FAMILIES = [
    (_is_vision, run_vision),
    (lambda meta, tensors: any(n.startswith(("vtc_", "vtm_")) for n in tensors), run_losses),
    (
        lambda meta, tensors: "n_transformer_layers" in meta.get("config", {}),
        run_mobileclip,
    ),
]
