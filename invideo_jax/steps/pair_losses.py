"""The losses that align video, text, audio and speech, over the whole global batch.

Each loss is over the rows that have both of its sides, and is divided by their number: a row without
text, sound or picture takes no part in the losses that want it, and stands in for nothing.

An objective is in two parts, so that accumulation is exact (`update.two_pass`): `encode` makes of each
row what depends on this row alone, `join` compares rows with each other.

Source: InternVideo2 (arXiv:2403.15377) 3.3; OpenGVLab/InternVideo InternVideo2/multi_modality.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from invideo_jax import losses, pairs
from invideo_jax.errors import UserError
from invideo_jax.losses import Mean
from invideo_jax.models.attention import fold
from invideo_jax.steps import aligned, matching, positives
from invideo_jax.steps.masked import DROP_PATH
from invideo_jax.steps.update import Batch, on_rows
from invideo_jax.text_masking import draw_words, mask_words

PyTree = Any


class Term(NamedTuple):
    """What a loss compares: `kind` is pairs, match, words or teacher; `view` is what a text goes with."""

    kind: str
    view: str


# avc is audio with video: its view is the audio, and the video takes the place of the text.
LOSSES = {
    "vtc": Term("pairs", "video"),
    "vtm": Term("match", "video"),
    "mlm": Term("words", "video"),
    "atc": Term("pairs", "audio"),
    "atm": Term("match", "audio"),
    "amlm": Term("words", "audio"),
    "avtc": Term("pairs", "audio_video"),
    "avtm": Term("match", "audio_video"),
    "avmlm": Term("words", "audio_video"),
    "vsc": Term("pairs", "speech"),
    "avc": Term("pairs", "audio"),
    "uta": Term("teacher", "video"),
}
SIDES = {
    "video": ("video",),
    "audio": ("audio",),
    "audio_video": ("audio", "video"),
    "speech": ("video",),
}
TOWERS = {"video": "vision", "audio": "audio", "text": "text"}  # names of the models' parts

# What a key of an example is folded with, besides `masked.MASK` and DROP_PATH of the vision tower.
_AUDIO, _TEXT, _WORDS, _FUSED_WORDS, _NEGATIVES, _MATCH = range(3, 9)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The weighted sum of losses; `contrastive.make_objective` makes it, and says what the rest is.

    Attributes:
        weights: of the losses that there are; none is 0.
        contrast: kind, form and chunk of `pairs.contrastive`.
        still: names of what `encode` makes from frozen weights alone: no gradient goes there.
    """

    model: nn.Module
    weights: Mapping[str, float]
    slots: Mapping[str, str]
    mask: Mapping[str, Any]
    words: Mapping[str, Any]
    negatives: Mapping[str, Any]
    uta: Mapping[str, Any]
    contrast: Mapping[str, Any]
    equal_texts: bool
    gradient_factor: float
    match_parts: int
    still: frozenset[str]

    # ------------------------------------------------------------------------ each row on its own

    def encode(
        self, params: PyTree, batch: Batch, keys: jax.Array, train: bool
    ) -> dict[str, jax.Array]:
        """What the losses compare, of each row.

        Args:
            batch: any part of a global one.
            keys: [B], from `masked.example_keys`.
            train: whether there is dropout; masks there always are.

        Returns:
            'video', 'audio', 'audio_video', 'text_<slot>': embeddings [B, P]; where pairs are matched,
            with '/tokens' behind it tokens, with '/seen' 1 for those that texts may look at; the name
            of a loss of words or of a teacher: its sum over a row, [B]; '<loss>/words': number of
            words predicted, [B]. All floating point.
        """
        run = functools.partial(self._apply, params)
        random = keys if train else None
        made, found = self._encode_sides(run, batch, keys, random), {}
        for i, slot in enumerate(self._slots_read()):
            ids, valid = batch[f"text_{slot}"], batch[f"text_{slot}_valid"]
            own = fold(fold(random, _TEXT), i)
            made[f"text_{slot}"] = run("encode_text", ids, valid, keys=own)
        for name in self._of_kind("words"):
            found |= self._predict_words(run, name, made, batch, keys, random)
        if "uta" in self.weights:
            found["uta"] = self._teach(made["video"])
        for name in self._sides("pairs", "match"):
            found[name] = made[name]["embedding"]
        for name in self._sides("match"):
            if name in ("video", "audio"):
                found |= {f"{name}/{k}": v for k, v in self._side(made[name]).items()}
            elif name != "audio_video":
                found[f"{name}/tokens"] = made[name]["tokens"]
        return on_rows(found)

    def _apply(self, params: PyTree, method: str, *args: Any, **more: Any) -> Any:
        return self.model.apply({"params": params}, *args, method=method, **more)

    def _encode_sides(self, run, batch: Batch, keys: jax.Array, random) -> dict[str, Any]:
        read = {side for name in self.weights for side in self._read(name)}
        made: dict[str, Any] = {}
        if "video" in read:
            shown = self._shown(batch, keys)
            drop = fold(random, DROP_PATH)
            made["video"] = run("encode_video", batch["video"], shown.get("visible"), keys=drop)
            made["video"] |= {f"wanted_{k}": shown[k] for k in self.uta["ratios"] if k in shown}
        if "audio" in read:
            sound = batch["audio"], batch["audio_frames"]
            made["audio"] = run("encode_audio", *sound, keys=fold(random, _AUDIO))
        if any(term.view == "audio_video" for term in self._terms()):
            both = made["audio"]["embedding"], made["video"]["embedding"]
            made["audio_video"] = {"embedding": run("combine", *both)}
        return made

    def _shown(self, batch: Batch, keys: jax.Array) -> dict[str, jax.Array]:
        """Which video tokens are seen (all: no 'visible'), and a teacher's features at these places."""
        features = {k: batch[k] for k in ("clip_middle", "clip_final", "attention") if k in batch}
        if "visible" in batch:
            return features | {"visible": batch["visible"]}
        encoder = self.model.vision.encoder
        options = dict(self.mask)
        of = {kind: options.pop(kind) for kind in ("video", "image")}
        image = batch["video"].shape[1] == 1 and encoder.frames > 1
        ratio, grid = (
            (of["image"], (1, *encoder.grid[1:])) if image else (of["video"], encoder.grid)
        )
        if not ratio:
            return features
        mask = options | dict(ratio=ratio)
        made = aligned.entries(features, keys, grid=grid, mask=mask, prefix=encoder.prefix)
        return jax.lax.stop_gradient(made)

    def _predict_words(self, run, name: str, made, batch: Batch, keys, random):
        """Sum of the cross-entropies of a row's hidden words, and their number."""
        view = LOSSES[name].view
        slot, use = self.slots[view], list(LOSSES).index(name)
        ids, valid = batch[f"text_{slot}"], batch[f"text_{slot}_valid"].astype(bool)
        options = dict(self.words)
        special = {k: options.pop(k) for k in ("pad", "first", "mask")}
        special["first"] = -1 if special["first"] is None else special["first"]
        draws = draw_words(fold(fold(keys, _WORDS), use), length=ids.shape[1], **options)
        shown, chosen = mask_words(ids, draws, **special)
        chosen = chosen & valid
        sides = {side: self._side(made[side]) for side in SIDES[view]}
        own = fold(fold(random, _FUSED_WORDS), use)
        logits = run("words", shown, valid, *self._context(run, sides), keys=own)
        sums = jax.vmap(losses.cross_entropy)(logits, ids, chosen)
        return {name: sums.total, f"{name}/words": jax.lax.stop_gradient(sums.weight)}

    def _side(self, made: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Tokens of a tower, and 1 or 0 for those that texts may look at and those that they may not."""
        seen = made["seen"] if "seen" in made else jnp.ones(made["tokens"].shape[:2], bool)
        return {"tokens": made["tokens"], "seen": seen.astype(made["tokens"].dtype)}

    def _context(self, run, sides: Mapping[str, Mapping[str, jax.Array]]) -> tuple[jax.Array, ...]:
        """Tokens of these sides that fusion blocks look at, sound first, and which of them are real."""
        tokens = (sides[k]["tokens"] if k in sides else None for k in ("video", "audio"))
        seen = [sides[k]["seen"] > 0 for k in ("audio", "video") if k in sides]
        return run("context", *tokens), jnp.concatenate(seen, axis=1)

    def _teach(self, video: Mapping[str, jax.Array]) -> jax.Array:
        """The weighted sum of a row's alignments with a teacher."""
        one = lambda x, y: losses.cosine_distance(x[None], y[None], jnp.ones(1)).total
        parts = self.uta["ratios"].items()
        if lost := [k for k, _ in parts if f"wanted_{k}" not in video]:
            raise UserError(
                f"uta needs a teacher's features in each batch; got none called {', '.join(lost)}. Name a "
                "teacher of the stage, or set the weight of uta to 0."
            )
        return sum(ratio * jax.vmap(one)(video[k], video[f"wanted_{k}"]) for k, ratio in parts)

    # ---------------------------------------------------------------------------- rows together

    def join(
        self, params: PyTree, encoded: Mapping[str, jax.Array], batch: Batch, keys, train: bool
    ) -> tuple[Mean, dict[str, Mean]]:
        """The losses over the global batch.

        Args:
            encoded: of `encode`, of all rows.
            batch, keys, train: as in `encode`, of all rows.

        Returns:
            The sum of the losses' means by weight, weighed by the number of rows that are not padding; and
            each loss, the share of clips and texts that find each other in the batch (vtc), the share of
            pairs that are judged right, and the temperature.
        """
        run = functools.partial(self._apply, params)
        stop = jax.lax.stop_gradient
        encoded = {k: stop(v) if k in self.still else v for k, v in encoded.items()}
        temperature = run("temperature")
        contrast = self.contrast | dict(temperature=temperature)
        if self.contrast["kind"] == "sigmoid":
            contrast |= dict(bias=run("bias"))
        found, more = {}, {}
        for name in self.weights:
            valid = self._rows(name, batch)
            if name in self._of_kind("pairs"):
                found[name] = self._contrast(name, encoded, batch, valid, contrast)
            elif name in self._of_kind("match"):
                made = self._match(run, name, encoded, batch, keys, train, valid, temperature)
                found[name], more[f"{name}_accuracy"] = made
            elif name in self._of_kind("words"):
                counts = encoded[f"{name}/words"] * valid
                total = jnp.where(valid, encoded[name], 0).sum()
                found[name] = Mean(total, stop(counts.sum()))
            else:
                found[name] = losses.mean(encoded[name], valid)
        if "vtc" in self.weights:
            more |= self._retrieval("vtc", encoded, batch, keys)
        total = sum(weight * found[name].value for name, weight in self.weights.items())
        rows = batch["valid"].sum().astype(total.dtype)
        more["temperature"] = Mean(temperature, jnp.ones_like(temperature))
        return Mean(total * rows, rows), found | stop(more)

    def _rows(self, name: str, batch: Batch) -> jax.Array:
        """bool [B], the rows that have all that a loss reads."""
        there = batch["valid"].astype(bool)
        read = self._read(name)
        if "video" in read and "has_video" in batch:
            there = there & batch["has_video"]
        if "audio" in read:
            there = there & (batch["audio_frames"] > 0)
        if slot := self._slot(name):
            there = there & batch[f"text_{slot}_valid"].astype(bool).any(axis=1)
        if name == "uta" and self.uta["images_only"] and batch["video"].shape[1] > 1:
            there = jnp.zeros_like(there)
        return there

    def _ids(self, name: str, batch: Batch) -> jax.Array:
        ids = batch["example"]
        slot = self._slot(name)
        if not self.equal_texts or not slot:
            return ids
        texts = positives.text_ids(batch[f"text_{slot}"], batch[f"text_{slot}_valid"].astype(bool))
        return positives.merged(ids, texts)

    def _two(self, name: str, encoded) -> tuple[jax.Array, jax.Array]:
        """Embeddings of the two sides of a loss; those of texts come second."""
        view, slot = LOSSES[name].view, self._slot(name)
        first = encoded["video" if view == "speech" else view]
        return first, encoded[f"text_{slot}" if slot else "video"]

    def _contrast(self, name, encoded, batch, valid, options) -> Mean:
        sides = (losses.scaled_gradient(x, self.gradient_factor) for x in self._two(name, encoded))
        return pairs.contrastive(*sides, ids=self._ids(name, batch), valid=valid, **options)

    def _match(self, run, name, encoded, batch, keys, train, valid, temperature):
        view, use, slot = LOSSES[name].view, list(LOSSES).index(name), self._slot(name)
        options = dict(self.negatives)
        if options.pop("kind") == "uniform":
            temperature = math.inf
        options |= dict(form=self.contrast["form"], chunk=self.contrast["chunk"])
        options |= dict(temperature=temperature, ids=self._ids(name, batch), valid=valid)
        clips, texts = self._two(name, encoded)
        negatives = matching.draw(fold(fold(keys, _NEGATIVES), use), clips, texts, **options)

        def match(tokens, real, clips, keys):
            return run("match", tokens, real, *self._context(run, clips), view=view, keys=keys)

        scores = matching.scores(
            match,
            (encoded[f"text_{slot}/tokens"], batch[f"text_{slot}_valid"].astype(bool)),
            {s: {k: encoded[f"{s}/{k}"] for k in ("tokens", "seen")} for s in SIDES[view]},
            negatives,
            keys=fold(fold(keys, _MATCH), use) if train else None,
            parts=self.match_parts,
            form=self.contrast["form"],
        )
        return matching.loss(scores, negatives, valid)

    def _retrieval(self, name, encoded, batch, keys) -> dict[str, Mean]:
        """Shares of clips whose own text is nearer than all others, and of texts likewise."""
        valid = self._rows(name, batch)
        options = dict(form=self.contrast["form"], chunk=self.contrast["chunk"])
        # The nearest of the others is what is drawn at next to no temperature.
        options |= dict(temperature=1e-8, ids=self._ids(name, batch), valid=valid)
        clips, texts = (losses.unit(x) for x in jax.lax.stop_gradient(self._two(name, encoded)))
        own, found = (clips * texts).sum(-1), {}
        for to, a, b in (("video_to_text", clips, texts), ("text_to_video", texts, clips)):
            column, exists = pairs.hard_negatives(keys, a, b, **options)
            other = (a * pairs.take_rows(b, column, form=self.contrast["form"])).sum(-1)
            found[f"{name}_{to}"] = losses.mean((own > other).astype(own.dtype), exists)
        return found

    # ------------------------------------------------------------------------- what reads what

    def _terms(self) -> list[Term]:
        return [LOSSES[name] for name in self.weights]

    def _of_kind(self, kind: str) -> list[str]:
        return [name for name in self.weights if LOSSES[name].kind == kind]

    def _read(self, name: str) -> tuple[str, ...]:
        return ("audio", "video") if name == "avc" else SIDES[LOSSES[name].view]

    def _slot(self, name: str) -> str | None:
        return None if name in ("avc", "uta") else self.slots[LOSSES[name].view]

    def _sides(self, *kinds: str) -> list[str]:
        """Names of what losses of these kinds compare, without repetition, in a fixed order."""
        found = []
        for name in self.weights:
            if LOSSES[name].kind in kinds:
                view, slot = LOSSES[name].view, self._slot(name)
                found += ["video" if view == "speech" else view]
                found += SIDES[view] if LOSSES[name].kind == "match" else ()
                found += [f"text_{slot}" if slot else "video"]
        return list(dict.fromkeys(found))

    def _slots_read(self) -> list[str]:
        return sorted(
            {n.removeprefix("text_") for n in self._sides("pairs", "match") if "text_" in n}
        )
