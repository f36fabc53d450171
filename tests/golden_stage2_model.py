"""The whole stage-2 model for `tests.golden`: towers, fusion, heads and losses with given draws.

The original is built from a configuration file in which the two towers are nested, so arguments are taken
wherever they stand; what they leave open is read off the shapes of the state. Names of results differ between
files. One that is not known here is identified by its numbers, if any of our results of that shape equals it
within the bound, and a note says which; else it counts as not checked. That can hide a wrong name, not a
wrong number: no two results of random weights are equal.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import losses, sharding
from invideo_jax.interop.from_torch import to_params
from invideo_jax.interop.to_torch import to_state_dict
from invideo_jax.models import stage2
from invideo_jax.models.text_encoder import Bert
from tests.golden import BOUND, Outcome, Tensors, difference
from tests.golden_internvideo2 import student_of, visible_of
from tests.golden_stage2 import masked_words, published, uta
from tests.originals import complete

LAYOUT = "internvideo2_stage2"
_VISION, _TEXT = "vision_encoder.", "text_encoder.bert."
# Arguments of the vision tower, besides those that shapes say.
_VISION_ARGUMENTS = (
    "in_chans patch_size img_size qkv_bias drop_path_rate num_heads mlp_ratio init_values "
    "qk_normalization depth attn_pool_num_heads clip_embed_dim layerscale_no_force_fp32 num_frames "
    "tubelet_size sep_pos_embed sep_image_video_pos_embed clip_teacher_embed_dim clip_teacher_final_dim "
    "clip_norm_type clip_return_layer clip_student_return_interval clip_student_return_index"
).split()
_TEXT_ARGUMENTS = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "intermediate_size": "mlp_width",
    "vocab_size": "vocabulary",
    "max_position_embeddings": "positions",
    "type_vocab_size": "types",
    "fusion_layer": "fusion_from",
    "pad_token_id": "pad",
    "layer_norm_eps": "eps",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# No number in evaluation depends on these: how the original runs, trains, names, reads and masks.
_WITHOUT_EFFECT = set(
    (
        "use_flash_attn use_fused_rmsnorm use_fused_mlp fused_mlp_heuristic use_checkpoint checkpoint_num "
        "head_drop_path_rate name pretrained config model_cls model_type architectures d_model encoder_width "
        "clip_teacher clip_input_resolution clip_teacher_return_interval video_mask_type video_mask_ratio "
        "image_mask_type image_mask_ratio keep_temporal only_mask find_unused_parameters freeze_vision "
        "freeze_text gradient_checkpointing enable temp temp_min vtm_hard_neg mlm_masking_prob "
        "distill_final_features clip_loss_ratio uta_image_only is_pretrain initializer_range use_cache "
        "position_embedding_type classifier_dropout add_cross_attention is_decoder cross_module "
        "transformers_version torch_dtype dtype max_txt_l bert tokenizer seed num_frames_test evaluate "
        "deep_fusion vision_width text_width cls_token_id mask_token_id add_pooling_layer max_txt_len "
        "chunk_size_feed_forward output_attentions output_hidden_states return_dict tie_word_embeddings"
    ).split()
)
_LOSSES = ("vtc", "vtm", "mlm", "uta", "mvm")


def _leaves(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple]:
    """(path, value, names beside it) of everything that is no mapping."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value, set(config)


def _arguments(config: Mapping[str, Any], width: int):
    """Arguments of the vision tower, of the text tower, and weights of the losses.

    Raises:
        ValueError: an argument that nothing here knows.
    """
    vision, text, weights = {}, {}, {}
    for path, value, beside in _leaves(config):
        name = path[-1]
        if name in _LOSSES:
            weights[name] = value
        elif name in _VISION_ARGUMENTS:
            vision[name] = value
        elif name in _TEXT_ARGUMENTS:
            text[name] = value
        elif name == "embed_dim":  # of the vision tower, or of the shared space
            if beside & {"num_heads", "depth"} and value == width:
                vision[name] = value
        elif name not in _WITHOUT_EFFECT and not re.match(r"use_(flash|mem|half|bf16)", name):
            raise ValueError(f"argument {'.'.join(path)}={value!r} is not known here")
    return vision, text, weights


def _count(state: Tensors, pattern: str) -> int:
    return len({m.group(1) for key in state if (m := re.match(pattern, key))})


def _vision_of(state: Tensors, given: Mapping[str, Any], frames: int, side: int) -> dict[str, Any]:
    """Constructor arguments of the vision tower: those of shapes, then the given ones."""
    own = {k.removeprefix(_VISION): v.shape for k, v in state.items() if k.startswith(_VISION)}
    width, channels, tubelet, patch, _ = own["patch_embed.proj.weight"]
    found = dict(
        in_chans=channels,
        patch_size=patch,
        tubelet_size=tubelet,
        img_size=side,
        num_frames=frames,
        embed_dim=width,
        depth=_count(own, r"blocks\.(\d+)\."),
        # The class's own: heads of 88 channels, of the 6B 128; the file says it for others.
        num_heads=25 if width == 3200 else 16,
        mlp_ratio=(own["blocks.0.mlp.fc1.weight"][0] + 0.5) / width,
        attn_pool_num_heads=16,
        clip_embed_dim=own["clip_projector.cross_attn.proj.weight"][0],
        qk_normalization="blocks.0.attn.q_norm.weight" in own,
        qkv_bias="blocks.0.attn.qkv.bias" in own,
        init_values=float("blocks.0.ls1.gamma" in own),
        sep_image_video_pos_embed="img_pos_embed" in own,
        clip_return_layer=_count(own, r"clip_decoder\.(\d+)\."),
        clip_teacher_embed_dim=own.get("clip_decoder.0.head.weight", (0,))[0],
        clip_teacher_final_dim=own.get("final_clip_decoder.head.weight", (0,))[0],
    )
    return found | given


def _text_of(state: Tensors, given: Mapping[str, Any]) -> Bert:
    """The text tower: sizes of shapes, then the given ones."""
    shape = lambda key: state[_TEXT + key].shape
    vocabulary, width = shape("embeddings.word_embeddings.weight")
    layer = _TEXT.replace(".", r"\.") + r"encoder\.layer\.(\d+)\."
    depth = _count(state, layer)
    found = dict(
        width=width,
        depth=depth,
        heads=max(width // 64, 1),
        mlp_width=shape("encoder.layer.0.intermediate.dense.weight")[0],
        vocabulary=vocabulary,
        positions=shape("embeddings.position_embeddings.weight")[0],
        types=shape("embeddings.token_type_embeddings.weight")[0],
        fusion_from=depth - _count(state, layer + "crossattention"),
    )
    ours = {_TEXT_ARGUMENTS[k]: v for k, v in given.items()}
    ours["fusion_from"] = min(ours.get("fusion_from", found["fusion_from"]), depth)
    return Bert(**(found | ours))


def model_of(
    config: Mapping[str, Any], state: Tensors, frames: int, side: int, activation: str = "gelu"
) -> tuple[stage2.Stage2, dict[str, float]]:
    """The model of an original's configuration, and the weights of its losses.

    Args:
        frames, side: of the videos, where the configuration does not say.

    Raises:
        ValueError: an argument that nothing here knows.
    """
    width = state[f"{_VISION}cls_token"].shape[-1]
    vision, text, weights = _arguments(config, width)
    config = complete("stage2", _vision_of(state, vision, frames, side))
    tower = student_of(config, activation)
    shared = state["vision_proj.weight"].shape[0]
    return stage2.Stage2(tower, _text_of(state, text), shared), weights


# --------------------------------------------------------------------------------------- inputs


class Given:
    """The inputs of a file, found by their kind and shape where names differ.

    Attributes:
        videos: kind ('video', 'image') -> [B, T, H, W, C].
        masks: kind -> bool [B, 1+N], True = hidden.
        ids, valid: int and bool [B, L]; pairs: int [B], equal for the same example.
        negatives: the video for each text, the text for each video, or None.
        words, labels: int [B, L], masked ids and what is to be predicted (-100: nothing), or None.
    """

    def __init__(self, meta: Mapping[str, Any], inputs: Tensors, channels: int):
        self.used: set[str] = set()
        made = re.compile(r"(out|loss|trace|grad)\w*/")
        inputs = {n: v for n, v in inputs.items() if not made.match(n)}
        self.videos = {
            ("image" if 1 in (v.shape[1], v.shape[2]) else "video"): _frames_last(v, channels)
            for n, v in inputs.items()
            if v.ndim == 5 and "/" not in n
        }
        text = {n: v for n, v in inputs.items() if v.ndim == 2 and v.dtype.kind in "iub"}
        self.ids = self._one(text, r"(^|/)(input_ids|text_ids|ids|text|tokens)$", r"in_ids")
        same = {n: v for n, v in text.items() if v.shape == self.ids.shape}
        valid = self._one(same, r"att|(^|text_)mask$|valid")
        self.valid = np.ones_like(self.ids, bool) if valid is None else valid.astype(bool)
        self.masks = {}
        for kind in self.videos:
            # Their masks have a column for the class token, which is never hidden.
            flags = {n: v for n, v in text.items() if v.dtype == bool and not n.startswith("mlm")}
            mask = self._one(flags, rf"{kind}.*mask", r"^(?!.*(video|image|text|att)).*mask")
            if mask is not None and mask is not valid and not mask[:, 0].any():
                self.masks[kind] = visible_of(mask)
        rows = {n: v for n, v in inputs.items() if v.ndim == 1 and v.dtype.kind in "iu"}
        self.pairs = self._one(rows, r"(^|/)(idx|index|ids?)$")
        found = [self._one(rows, rf"{s}.*neg", rf"neg.*{s}") for s in ("vi|im", "te?xt")]
        self.negatives = None if any(x is None for x in found) else found
        self.words, self.labels = self._masked(meta, inputs, same)
        self.targets = self._one(inputs, r"uta.*middle"), self._one(inputs, r"uta.*final")

    def _one(self, named: Tensors, *patterns: str) -> np.ndarray | None:
        for pattern in patterns:
            for name, value in named.items():
                if re.search(pattern, name):
                    self.used.add(name)
                    return value
        return None

    def _masked(self, meta, inputs: Tensors, same: Tensors):
        if any("drawn_" in n for n in inputs):
            prefix = next(n.split("drawn_")[0] for n in inputs if "drawn_" in n)
            self.used |= {n for n in inputs if "drawn_" in n}
            special = dict(pad=0, cls=101, mask=103) | meta.get("mlm", {})
            words = masked_words(inputs | {f"{prefix}in_ids": self.ids}, prefix, special)
            return tuple(np.asarray(x) for x in words)
        words = self._one(same, r"mlm.*(ids|input)|masked.*ids|out_ids")
        labels = self._one(same, r"label|target")
        return (None, None) if words is None or labels is None else (words, labels)


def _frames_last(video: np.ndarray, channels: int) -> jax.Array:
    """[B, C, T, H, W] (or [B, T, C, H, W]) to [B, T, H, W, C]."""
    order = (0, 2, 3, 4, 1) if video.shape[1] == channels else (0, 1, 3, 4, 2)
    return jnp.asarray(video.transpose(order))


# -------------------------------------------------------------------------------------- results


def _case(model, variables, given: Given, kind: str, masked: bool) -> dict[str, jax.Array]:
    """Everything that one kind of video gives with the texts; the names are the published ones."""
    apply = functools.partial(model.apply, variables)
    seen = given.masks[kind] if masked else None
    video = apply(given.videos[kind], seen, method="encode_video")
    text = apply(given.ids, given.valid, method="encode_text")
    temperature = apply(method="temperature")
    out = published(video) | {
        "vision_embeds": video["tokens"],
        "pooled_vision_embeds": video["pooled"],
        "vision_proj": video["embedding"],
        "vision_feat": losses.unit(video["embedding"]),
        "text_embeds": text["tokens"],
        "pooled_text_embeds": text["pooled"],
        "text_proj": text["embedding"],
        "text_feat": losses.unit(text["embedding"]),
    }
    scores = losses.similarity(video["embedding"], text["embedding"], temperature)
    out |= {"sim_v2t": scores, "sim_t2v": scores.T}
    out["loss_vtc"] = losses.contrastive(scores, given.pairs).value
    fuse = lambda t: apply(t, given.valid, video["tokens"], method=lambda m, *a: m.text.fuse(*a))
    fused = fuse(text["tokens"])
    out |= {"fusion": fused, "fusion_pooled": fused[:, 0]}
    out["itm_logits_positive"] = apply(fused[:, 0], method=lambda m, x: m.match_head(x))
    out["mlm_logits_unmasked"] = apply(fused, method=lambda m, x: m.text.words(x))
    if given.negatives is not None:
        pairs = text["tokens"], given.valid, video["tokens"], *given.negatives
        out["itm_logits"] = apply(*pairs, method="match_negatives")
        out["loss_vtm"] = losses.matching(out["itm_logits"], jnp.ones(3 * len(fused))).value
    if given.words is not None:
        out["mlm_ids"], out["mlm_labels"] = given.words, given.labels
        hidden = apply(given.words, given.valid, method="encode_text")["tokens"]
        again = fuse(hidden)
        out |= {"mlm_text_embeds": hidden, "mlm_fusion": again}
        out["mlm_logits"] = apply(again, method=lambda m, x: m.text.words(x))
        chosen = given.labels >= 0
        out["loss_mlm"] = losses.cross_entropy(out["mlm_logits"], given.labels, chosen).value
    middle, final = given.targets
    if middle is not None and "clip_middle" in video and middle.shape == out["x_clip_align"].shape:
        out["loss_uta"] = uta(video, middle, final)
    return out


def _totals(losses_: Mapping[str, Any], weights: Mapping[str, float]) -> dict[tuple, Any]:
    """The weighted sum of every selection of losses, the largest first."""
    names = [n for n in losses_ if weights.get(n.removeprefix("loss_"), 1.0)]
    weigh = lambda n: weights.get(n.removeprefix("loss_"), 1.0)
    chosen = itertools.chain(*(itertools.combinations(names, k) for k in range(len(names), 0, -1)))
    add = lambda group: jax.tree.map(
        lambda *x: sum(weigh(n) * y for n, y in zip(group, x)), *(losses_[n] for n in group)
    )
    return {group: add(group) for group in chosen}


def _spelling(name: str) -> str:
    """What a name comes down to: other spellings of the same."""
    name = name.split("/", 1)[-1].lower()
    for pattern, other in (
        (r"^(video|image)_(no)?mask/", ""),
        (r"vtm_logits|match_logits|itm_scores", "itm_logits"),
        (r"prediction_scores|word_logits", "mlm_logits"),
        (r"image_(embeds|proj|feat)|video_(embeds|proj|feat)", r"vision_\1\2"),
        (r"^(vtc|vtm|mlm|uta)(_loss)?$", r"loss_\1"),
    ):
        name = re.sub(pattern, other, name)
    return name


def _resolve(name: str, want: np.ndarray, cases: Mapping[str, Mapping[str, Any]], first: str):
    """Our value for a wanted name, and a note where its spelling is not known here."""
    said = [c for c in cases if f"/{c}/" in f"{name}/" or f"/{c}_" in name] or [first]
    own = cases[said[0]].get(_spelling(name))
    if own is not None and np.shape(own) == want.shape:
        return own, None
    alike = [
        (difference(value, want), f"{case}/{ours}", value)
        for case, found in cases.items()
        for ours, value in found.items()
        if np.shape(value) == want.shape
    ]
    gap, ours, value = min(alike, key=lambda x: x[:2], default=(np.inf, "", None))
    if not gap <= BOUND:
        return None, None
    return value, f"{name} is a name not known here; it equals {ours} within the bound"


def _gradients(model, params, given: Given, kind: str, masked: bool, back) -> dict[str, Tensors]:
    """Loss -> key -> gradient, each loss on its own."""
    names = _case_losses(given)

    def values(p):
        out = _case(model, {"params": p}, given, kind, masked)
        return jnp.stack([out[n] for n in names])

    rows = jax.jit(jax.jacrev(values))(params)
    each = [jax.tree.map(lambda x, i=i: x[i], rows) for i in range(len(names))]
    return dict(zip(names, map(back, each)))


def _case_losses(given: Given) -> list[str]:
    wanted = dict(loss_vtm=given.negatives, loss_mlm=given.words, loss_uta=given.targets[0])
    return ["loss_vtc", *(n for n, x in wanted.items() if x is not None)]


def _match_gradients(wanted: Mapping[str, np.ndarray], found: Mapping[tuple, Tensors]):
    """The selection of losses whose gradient comes nearest."""
    worst = lambda grads: max(
        difference(grads[k], v) if k in grads else np.inf for k, v in wanted.items()
    )
    return min(found, key=lambda group: worst(found[group]))


def run_model(meta, state: Tensors, inputs: Tensors, wanted: Sequence[str]) -> Outcome:
    """Outputs, losses with the file's draws, gradients."""
    channels = state[f"{_VISION}patch_embed.proj.weight"].shape[1]
    given = Given(meta, inputs, channels)
    shown = max(given.videos.values(), key=lambda v: v.shape[1])
    tensors, notes, back, params = {}, [], None, None
    groups = sorted({n.split("/")[0] for n in wanted} & {"out", "out_tanh_gelu"} | {"out"})
    for group in reversed(groups):  # the exact GELU comes last, and is what the losses are of
        activation = "gelu_tanh" if "tanh" in group else "gelu"
        model, weights = model_of(meta["config"], state, *shown.shape[1:3], activation)
        params, back = _load(model, state)
        kinds = [
            (k, m) for k in given.videos for m in ([True] if k in given.masks else []) + [False]
        ]
        cases = {}
        for kind, masked in kinds:
            run = jax.jit(functools.partial(_case, model, given=given, kind=kind, masked=masked))
            cases[f"{kind}_{'mask' if masked else 'nomask'}"] = run({"params": params})
        first = next(iter(cases))
        for case in cases.values():
            parts = {n: v for n, v in case.items() if n.startswith("loss_")}
            case |= {"+".join(k): v for k, v in _totals(parts, weights).items() if len(k) > 1}
        for name in wanted:
            mine = name.split("/")[0]
            if (
                mine == "in"
                or mine.startswith("grad")
                or name in given.used
                or (mine in groups) != (mine == group)
            ):
                continue
            value, note = _resolve(name, inputs[name], cases, first)
            if value is not None:
                tensors[name] = value
                notes += [note] if note else []
    tensors |= _all_gradients(model, params, given, kinds, weights, back, inputs, wanted, notes)
    return Outcome(tensors, back(params), given=frozenset(given.used), notes=tuple(notes))


def _all_gradients(model, params, given, kinds, weights, back, inputs, wanted, notes) -> Tensors:
    tensors = {}
    for group in sorted({n.split("/")[0] for n in wanted if n.startswith("grad")}):
        names = {n: n.removeprefix(f"{group}/") for n in wanted if n.startswith(f"{group}/")}
        of = {key: inputs[n] for n, key in names.items()}
        best = None
        for kind, masked in kinds:
            alone = _gradients(model, params, given, kind, masked, back)
            found = _totals(alone, weights)
            which = _match_gradients(of, found)
            gap = max(difference(found[which].get(k, np.nan), v) for k, v in of.items())
            if best is None or gap < best[0]:
                best = gap, found[which], f"{'+'.join(which)} of {kind}, masked={masked}"
            if gap <= BOUND:
                break
        notes.append(f"{group}/ does not say of what; compared with the gradient of {best[2]}")
        tensors |= {n: best[1][key] for n, key in names.items() if key in best[1]}
    return tensors


def _load(model: stage2.Stage2, state: Tensors):
    expected = sharding.unbox(jax.eval_shape(lambda: stage2.init(model, jax.random.key(0))))
    params = to_params(state, layout=LAYOUT, expected=expected)
    encoder = model.vision.encoder
    cube = (encoder.tubelet, encoder.patch, encoder.patch)
    return params, lambda tree: to_state_dict(jax.device_get(tree), layout=LAYOUT, cube=cube)


def _claims(meta: Mapping[str, Any], tensors: Tensors) -> bool:
    return all(
        any(n.startswith(f"state/{part}") for n in tensors)
        for part in (_VISION, _TEXT, "itm_head.")
    )


FAMILIES = [(_claims, run_model)]
