"""The towers of a workdir or of a folder of imported weights, with the tokenizer that belongs to them."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from invideo_jax import build, handover, sharding, stage_words
from invideo_jax import config as config_lib
from invideo_jax.data.audio import AudioSpec
from invideo_jax.data.modalities import TextSpec
from invideo_jax.data.text import check_vocabulary
from invideo_jax.data.transforms import ClipSpec
from invideo_jax.errors import UserError
from invideo_jax.interop import models as imported
from invideo_jax.models.beats import Beats
from invideo_jax.models.llama import LlamaText
from invideo_jax.models.stage2 import Stage2
from invideo_jax.models.text_encoder import Bert
from invideo_jax.models.video_clip import VideoClip
from invideo_jax.programs import contrastive
from invideo_jax.steps.contrastive import make_towers
from invideo_jax.towers import Towers

PyTree = Any
SEEING = ("vision", "audio")  # parts of a model that words alone do not need
BERT_LENGTH = 32  # tokens of a text in InternVideo2's second stage
LLAMA_LENGTH, LLAMA_PROMPT = 80, "summarize:"  # of InternVL-C, as the CLIP stage keeps them
LLAMA_UNUSED = (
    1  # rows of its table of words that tokenizer.model has no piece for: [PAD], added by hand
)
PUBLISHED_SECONDS = 10.0  # of sound


@dataclasses.dataclass(frozen=True)
class Words:
    """How a query becomes tokens: as the texts of training did.

    Attributes:
        spec: tokenizer, length, and how texts are written.
        unused: rows at the end of the tower's table of words that may stand for no token.
    """

    spec: TextSpec
    unused: int = 0

    def cut(self, text: str) -> str:
        """What is read of a text that is too long; '' for one that is read whole."""
        tokenizer = self.spec.open()
        room = self.spec.length - (tokenizer.first is not None) - (tokenizer.last is not None)
        found = tokenizer.encode(self.spec.written(text))
        return tokenizer.decode(found[:room]) if len(found) > room else ""

    def unknown(self, text: str) -> list[str]:
        """The words of a text in which the tokenizer does not know something."""
        tokenizer, words = self.spec.open(), dict.fromkeys(self.spec.written(text).split())
        return [word for word in words if tokenizer.unknown_share([tokenizer.encode(word)])]


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model of several modalities; parameters are read when first asked for.

    Attributes:
        model: `Stage2` or `VideoClip`, with the shapes that are asked for.
        towers: what it makes of videos, sounds and texts.
        words: how queries become tokens.
        clip: how frames become a clip.
        audio: what sound is loaded; None where the model does not hear.
        about: what tells its embeddings from others, JSON-able.
        name: the checkpoint as the user gave it.
        source: of the parameters.
        old: the model with the shapes that it was trained with.
        mesh: where parameters go.
    """

    model: nn.Module
    towers: Towers
    words: Words
    clip: ClipSpec
    audio: AudioSpec | None
    about: Mapping[str, Any]
    name: str
    source: handover.Source
    old: nn.Module
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def params(self) -> PyTree:
        """All parameters, on the devices."""
        return self.text_params | self._read(self._shapes.keys() & set(SEEING))

    @functools.cached_property
    def text_params(self) -> PyTree:
        """Those that words alone need: a large video tower is not read to look into an index."""
        return self._read(self._shapes.keys() - set(SEEING))

    def filled(self, text_params: PyTree) -> PyTree:
        """`text_params` with zeros in place of the rest; under jit they cost nothing.

        The model looks at all its towers when it is set up, even where it uses one.
        """
        rest = {name: tree for name, tree in self._shapes.items() if name not in text_params}
        return dict(text_params) | jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), rest)

    @functools.cached_property
    def _shapes(self) -> PyTree:
        boxed = jax.eval_shape(self._init)
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            sharding.unbox(boxed),
            sharding.param_shardings(boxed, self.mesh),
        )

    def _init(self) -> PyTree:
        return imported.init(self.model, jax.random.key(0))

    def _read(self, parts: set[str]) -> PyTree:
        """Some parts; the positions of the video tower are interpolated to other clips."""
        found = {}
        for part in sorted(parts):
            begin = f"{part}/"
            stored = {
                path: x
                for path, x in self.source.shapes.items()
                if path.startswith(begin) or path == part
            }
            encoder, before = (imported.encoder_of(m)[0] for m in (self.model, self.old))
            grids = dict(grid=encoder.grid, tubelet=encoder.tubelet, old_grid=before.grid)
            try:
                table = handover.plan(
                    {part: self._shapes[part]},
                    stored,
                    about=self.source.about,
                    **(grids if part == "vision" else {}),
                )
            except UserError as error:
                what = str(error).partition(" To ")[0]  # the rest is for recipes
                raise UserError(
                    f"{self.name} must hold the model that it says it is of. {what}"
                ) from None
            with sharding.use(self.mesh):
                found |= handover.apply(table, self.source.get, self._init)
        return found


def open_model(
    checkpoint: str,
    mesh: jax.sharding.Mesh,
    *,
    tokenizer: str = "",
    ema: bool = True,
    frames: int = 0,
    size: int = 0,
    crop: str = "",
    dtype: jnp.dtype = jnp.float32,
) -> Opened:
    """Opens a checkpoint of a stage that aligns videos with texts; reads no parameters.

    Args:
        checkpoint: a workdir ('WORKDIR@STEP' for an older step), or a folder that
            `python -m invideo_jax.interop.from_torch` wrote.
        mesh: where parameters go.
        tokenizer: spec of `data.text.open_tokenizer`; '' for the one that the workdir keeps.
        ema: take the moving average where the run keeps one.
        frames, size: of the clips; 0 as the model was made for.
        crop: 'center' or 'resize'; '' as the run evaluates, or as published ('resize').
        dtype: what the towers compute in.

    Raises:
        UserError: nothing there, or a model that does not read texts.
    """
    source = handover.open_source(checkpoint, ema=ema, key="--checkpoint")
    old, words, clip, audio = (_of_run if "config" in source.meta else _of_weights)(
        source, checkpoint, tokenizer
    )
    before = imported.encoder_of(old)[0]
    shapes = dict(frames=frames or before.frames, image_size=size or before.image_size)
    inside = {
        part: getattr(old, part).clone(dtype=dtype)
        for part in ("text", "audio")
        if getattr(old, part, None) is not None
    }
    model = imported.with_encoder(old, **shapes, dtype=dtype).clone(**inside)
    model.check()
    check_vocabulary(words.spec.reopen(), model.text.vocabulary, words.unused)
    clip |= dict(frames=shapes["frames"], size=shapes["image_size"])
    spec = ClipSpec(sampling="middle", views=1, flip=0.0, **clip | ({"crop": crop} if crop else {}))
    towers = make_towers(model, words.spec.asked)
    about = _about(model, source, words, spec, audio)
    return Opened(model, towers, words, spec, audio, about, checkpoint, source, old, mesh)


def _of_run(source: handover.Source, checkpoint: str, tokenizer: str):
    """Model, words, clip and sound of a workdir, as its stage has them."""
    meta = source.meta
    config, name = config_lib.from_saved(meta["config"]), meta["stage"]
    stage = config.stages[name]
    if stage.step != "contrastive":
        raise UserError(
            f"--checkpoint must be of a contrastive stage, which has a text tower; got {checkpoint}, which "
            f"is of the stage {name!r} (step={stage.step!r}). Train one from it: a recipe with "
            "step='contrastive', as configs/internvideo2/stage2_1b.py, whose "
            f"stages.contrastive.init.source names {checkpoint}."
        )
    stage_words.use_kept(config, pathlib.Path(source.about["name"]))
    text = contrastive.modalities(config, name).text
    if tokenizer:
        text = dataclasses.replace(text, tokenizer=tokenizer)
    old = (
        imported.make(meta["model"])
        if meta.get("model")
        else contrastive.model(config, name, dtype=jnp.float32)
    )
    clip = build.clip_spec(config, name, train=False)
    words = Words(text, stage.text.unused)
    taken = dict(crop=clip.crop, interpolation=clip.interpolation)
    return old, words, taken, contrastive.audio_spec(config, name)


def _of_weights(source: handover.Source, checkpoint: str, tokenizer: str):
    """Model, words, clip and sound of imported weights, as published."""
    kind = source.meta.get("model", "parts of several models")
    old = imported.make(source.meta) if "arguments" in source.meta else None
    if not isinstance(old, (Stage2, VideoClip)):
        raise UserError(
            f"--checkpoint must be of a model of video and text; got {checkpoint}, which holds {kind}. "
            "Import a whole model (python -m invideo_jax.interop.from_torch), or give the workdir of a "
            "contrastive stage."
        )
    if not tokenizer:
        raise UserError(
            f"Imported weights need the tokenizer that they were trained with; got --checkpoint={checkpoint} "
            "and no --tokenizer. Give --tokenizer=FOLDER of the published model."
        )
    llama = isinstance(old.text, LlamaText)
    written = "internvideo2" if isinstance(old, Stage2) else ""
    text = TextSpec(tokenizer, _length(old.text), (), LLAMA_PROMPT if llama else "", written)
    sound = getattr(old, "audio", None)
    audio = None if sound is None else AudioSpec(seconds=_seconds(sound), mels=sound.mels)
    return (
        old,
        Words(text, LLAMA_UNUSED if llama else 0),
        dict(crop="resize", interpolation="bicubic"),
        audio,
    )


def _length(tower: nn.Module) -> int:
    if isinstance(tower, LlamaText):
        return LLAMA_LENGTH
    return min(BERT_LENGTH, tower.positions) if isinstance(tower, Bert) else tower.positions


def _seconds(tower: nn.Module) -> float:
    """The longest sound that a tower takes."""
    if isinstance(tower, Beats):
        return PUBLISHED_SECONDS
    spec = AudioSpec()
    return (tower.frames - 1) * spec.shift + spec.window


def _about(model, source, words, clip, audio) -> dict[str, Any]:
    keep = {k: source.about[k] for k in ("weights", "step", "digest") if k in source.about}
    return imported.describe(model) | dict(
        dtype=np.dtype(model.text.dtype).name,
        clip=dataclasses.asdict(clip),
        audio=audio and dataclasses.asdict(audio),
        tokenizer=words.spec.open().digest,
        length=words.spec.length,
        normalise=words.spec.normalise,
        **keep,
    )
