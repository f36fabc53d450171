"""The contrastive stage: its objective, train step and evaluation, and its towers for retrieval.

Source: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo InternVideo2/multi_modality.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from invideo_jax import losses
from invideo_jax.errors import UserError
from invideo_jax.registry import nearest
from invideo_jax.state import TrainState
from invideo_jax.steps.masked import example_keys, host_key
from invideo_jax.steps.pair_losses import LOSSES, SIDES, TOWERS, Objective
from invideo_jax.steps.update import (
    Batch,
    Metrics,
    Schedule,
    Split,
    in_parts,
    parts_of,
    two_pass,
    update,
)
from invideo_jax.towers import Towers

PyTree = Any

MASK = dict(name="random", video=0.8, image=0.5)
WORDS = dict(ratio=0.5, hidden=0.8, swapped=0.5, pad=0, first=101, mask=103, vocabulary=30522)
NEGATIVES = dict(kind="hard", floor=0.0)
UTA = dict(clip_middle=1.0, clip_final=1.0, images_only=False)


def make_objective(
    model: nn.Module,
    *,
    weights: Mapping[str, float],
    slots: Mapping[str, str],
    mask: Mapping[str, Any] = MASK,
    words: Mapping[str, Any] = WORDS,
    negatives: Mapping[str, Any] = NEGATIVES,
    uta: Mapping[str, Any] = UTA,
    kind: str = "softmax",
    form: str = "dense",
    chunk: int = 1024,
    equal_texts: bool = False,
    gradient_factor: float = 1.0,
    match_parts: int = 1,
    trainable: PyTree | None = None,
) -> Objective:
    """The weighted sum of losses, each a mean over the rows of the global batch that have its sides.

    Args:
        model: `Stage2` or `VideoClip`.
        weights: factor of each loss of `pair_losses.LOSSES`; one of factor 0 is not computed.
        slots: view -> the slot whose text goes with it; views may share one, which is encoded once.
        mask: name of a mask, and its ratio on the tokens of videos and of images; 0 hides none. Further
            options are the mask's.
        words: ratio, hidden and swapped of `draw_words`; pad, first and mask of `mask_words`; vocabulary.
        negatives: kind 'hard' or 'uniform', and floor of `negatives.weights`.
        uta: factors of the alignments with the stage-1 teacher; images_only leaves videos out.
        kind, form, chunk: of `pairs.contrastive`; 'sigmoid' needs a model with a bias.
        equal_texts: rows with the same text are positives too.
        gradient_factor: of what contrastive losses give to embeddings, not to the temperature; the
            published code has 1 / processes.
        match_parts: pairs go through the fusion blocks in 3 * match_parts pieces.
        trainable: bool for each parameter; None: all.

    Raises:
        UserError: a loss that the model cannot give, or options that do not fit.
    """
    wanted = {name: float(weight) for name, weight in weights.items() if weight}
    if not wanted or set(weights) - set(LOSSES):
        odd = sorted(set(weights) - set(LOSSES))
        raise UserError(
            f"weights must weigh at least one of {', '.join(LOSSES)}, and nothing else; got "
            f"{dict(weights)}.{nearest(odd[0], LOSSES) if odd else ''}"
        )
    mask = dict(MASK) | dict(mask)
    words = _filled("words", words, WORDS)
    negatives = _filled("negatives", negatives, NEGATIVES)
    uta = _filled("uta", uta, UTA)
    ratios = {k: float(uta[k]) for k in ("clip_middle", "clip_final") if uta[k]}
    if negatives["kind"] not in ("hard", "uniform"):
        raise UserError(
            f"negatives.kind must be 'hard' or 'uniform'; got kind={negatives['kind']!r}."
        )
    if kind == "sigmoid" and model.initial_bias is None:
        raise UserError(
            "kind='sigmoid' needs a model with a bias of its scores; got initial_bias=None. Give the "
            "model one (SigLIP: -10), or use kind='softmax'."
        )
    for name in wanted:
        _check_loss(name, model, slots, words, ratios)
    return Objective(
        model=model,
        weights=wanted,
        slots=dict(slots),
        mask=mask,
        words=words,
        negatives=negatives,
        uta=dict(ratios=ratios, images_only=uta["images_only"]),
        contrast=dict(kind=kind, form=form, chunk=chunk),
        equal_texts=equal_texts,
        gradient_factor=gradient_factor,
        match_parts=match_parts,
        still=_still(slots, trainable),
    )


def _filled(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    if odd := sorted(set(given) - set(defaults)):
        raise UserError(
            f"{name} must have only the keys {', '.join(defaults)}; got {odd[0]!r}."
            f"{nearest(odd[0], defaults)}"
        )
    return dict(defaults) | dict(given)


def _check_loss(name: str, model: nn.Module, slots, words, ratios) -> None:
    """Raises UserError where the model or the options cannot give a loss."""
    kind, view = LOSSES[name]
    text, vision = model.text, model.vision

    def need(there: Any, what: str, advice: str) -> None:
        if not there:
            raise UserError(
                f"The loss {name} needs {what}; got none. {advice}, or set weights.{name}=0."
            )

    if name not in ("avc", "uta"):
        need(view in slots, f"a text slot for the view {view}", f"Set slots.{view}")
    if "audio" in SIDES[view]:
        need(getattr(model, "audio", None), "a model with an audio tower", "Add one")
    if kind in ("match", "words"):
        fuses = hasattr(model, "match") and text.fusion_from < text.depth
        need(fuses, "a text tower with fusion blocks", "Lower fusion_from below depth")
    if kind == "match":
        need(view in model.views, f"a matching head for the view {view}", "Name it in views")
    if view == "audio_video" and kind != "words":
        need(model.joint, "an embedding of sound and video together", "Set joint=True")
    if kind == "words":
        need(text.word_head, "a text tower with a head for words", "Set word_head")
        need(words["mask"] is not None, "a tokenizer with a mask word", "Take another tokenizer")
        if words["vocabulary"] > text.vocabulary:
            raise UserError(
                "Hidden words must be in the text tower's vocabulary; got words.vocabulary="
                f"{words['vocabulary']}, the tower's {text.vocabulary}. Give both the tokenizer's."
            )
    if kind == "teacher":
        heads = {"clip_middle": "clip", "clip_final": "final"}
        need(ratios, "a factor for clip_middle or clip_final", "Set one in uta")
        for part in ratios:
            there = getattr(vision, heads[part], None)
            need(
                there, f"a vision tower with the heads of {part}", f"Add them, or set uta.{part}=0"
            )


def _still(slots: Mapping[str, str], trainable: PyTree | None) -> frozenset[str]:
    """Names of the tokens that come from frozen towers alone."""
    if trainable is None:
        return frozenset()
    trained = {side: any(jax.tree.leaves(trainable.get(part, {}))) for side, part in TOWERS.items()}
    names = {"video": ["video"], "audio": ["audio"], "text": [f"text_{s}" for s in slots.values()]}
    return frozenset(f"{n}/tokens" for side in TOWERS if not trained[side] for n in names[side])


def make_loss(
    *,
    model: nn.Module,
    stage_key: jax.Array,
    train: bool = True,
    rows: int | None = None,
    **options: Any,
) -> Split:
    """The loss (params, batch) -> (Mean, averages by name), which is also in two parts.

    Args:
        model, options: of `make_objective`.
        stage_key: random key of the stage; every draw for an example comes from it and `position`.
        train: False switches dropout and drop path off; masks and negatives are drawn all the same.
        rows: at most so many go through the model at a time, as those of a microbatch of the train step;
            it stands for `match_parts`. None: all at once. Changes memory and no value; for evaluations.
    """
    objective, key = make_objective(model, **options), host_key(stage_key)
    keys = lambda batch: example_keys(key(), batch["position"])

    def encode(params, batch):
        return objective.encode(params, batch, keys(batch), train)

    def join(params, encoded, batch):
        of = objective
        if rows is not None:
            of = dataclasses.replace(of, match_parts=parts_of(len(batch["valid"]), rows))
        return of.join(params, encoded, batch, keys(batch), train)

    return Split(encode if rows is None else in_parts(encode, rows), join)


def make_train_step(
    *,
    model: nn.Module,
    tx: optax.GradientTransformation,
    stage_key: jax.Array,
    accumulation: int = 1,
    clip_norm: float | None = None,
    schedule: Schedule | None = None,
    ema_decay: float | None = None,
    ema_warmup: bool = False,
    trainable: PyTree | None = None,
    **options: Any,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The pure train step (state, batch) -> (state, metrics); jit and donation stand beside it.

    The losses are over the whole batch whatever `accumulation` is. After an update the temperature is
    put back into its range, as the published code does before each step.

    Args as in `make_objective` (`match_parts` is `accumulation` unless given) and `update.update`.
    """
    options = dict(match_parts=accumulation) | options
    loss = make_loss(model=model, stage_key=stage_key, trainable=trainable, **options)
    return functools.partial(
        update,
        loss_fn=loss,
        find_gradients=two_pass,
        within_bounds=functools.partial(hold_temperature, bounds=model.temperature_range),
        tx=tx,
        accumulation=accumulation,
        clip_norm=clip_norm,
        schedule=schedule,
        ema_decay=ema_decay,
        ema_warmup=ema_warmup,
        trainable=trainable,
    )


def hold_temperature(params: PyTree, *, bounds: tuple[float, float]) -> PyTree:
    """Parameters with the temperature (or 'logit_scale', the logarithm of 1 / temperature) within bounds."""
    low, high = bounds
    name = "logit_scale" if "logit_scale" in params else "temperature"
    if name == "logit_scale":
        low, high = -math.log(high), -math.log(low)
    return dict(params) | {name: jnp.clip(params[name], low, high)}


def make_towers(
    model: nn.Module,
    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
) -> Towers:
    """What a trained model makes of each modality, of whole clips and without dropout.

    What the model has no parameters for is None, so that who asks for it is told at once.

    Args:
        model: `Stage2` or `VideoClip`.
        tokenize: texts -> ids int32 [B, L] and valid bool [B, L].
    """
    run = lambda params, method, *args, **more: model.apply(
        {"params": params}, *args, method=method, **more
    )
    unit = lambda embedding: losses.unit(embedding.astype(jnp.float32))

    def encoded(made):
        return {"embedding": unit(made["embedding"]), "tokens": made["tokens"]}

    def video(params, batch):
        return encoded(run(params, "encode_video", batch["video"]))

    def text(params, ids, valid):
        return encoded(run(params, "encode_text", ids, valid))

    def audio(params, batch):
        made = run(params, "encode_audio", batch["audio"], batch["audio_frames"])
        return encoded(made) | {"valid": batch["audio_frames"] > 0}

    def audio_video(params, batch):
        sound = run(params, "encode_audio", batch["audio"], batch["audio_frames"])
        seen = run(params, "encode_video", batch["video"])
        both = run(params, "combine", sound["embedding"], seen["embedding"])
        return {"embedding": unit(both), "valid": batch["audio_frames"] > 0}

    def match(params, tokens, valid, others):
        context = run(params, "context", others, None)
        return run(params, "match", tokens, valid, context)[:, 1].astype(jnp.float32)

    hears = getattr(model, "audio", None) is not None
    judges = "video" in getattr(model, "views", ())
    return Towers(
        video=video,
        text=text,
        tokenize=tokenize,
        audio=audio if hears else None,
        audio_video=audio_video if hears and model.joint else None,
        match=match if judges else None,
        vocabulary=model.text.vocabulary,
    )
