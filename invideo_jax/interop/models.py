"""Models as text: what folders of weights and checkpoints say of the model that they are of."""

import dataclasses
import importlib
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict

from invideo_jax import sharding
from invideo_jax.errors import UserError
from invideo_jax.models import audio_encoder, pixels
from invideo_jax.models.audio_encoder import AudioViT, Beats
from invideo_jax.models.llama import LlamaText
from invideo_jax.models.text_encoder import Bert, ClipText
from invideo_jax.models.video_clip import ClipHead
from invideo_jax.registry import Registry

PyTree = Any

# Name -> class, and where that stands the functions `init` (module, key) -> boxed parameters.
MODELS = Registry(
    "model",
    {
        "video_mae": "invideo_jax.models.video_mae:VideoMAE",
        "video_mae_encoder": "invideo_jax.models.video_mae:VideoMAEEncoder",
        "internvideo2": "invideo_jax.models.video_encoder:VideoEncoder",
        "aligned": "invideo_jax.models.alignment:AlignedEncoder",
        "heads": "invideo_jax.models.alignment:HeadsSpec",
        "final": "invideo_jax.models.alignment:FinalSpec",
        "projected": "invideo_jax.models.alignment:ProjectedEncoder",
        "classifier": "invideo_jax.models.classifier:Classifier",
        "beats": "invideo_jax.models.beats:Beats",
        "audio_vit": "invideo_jax.models.audio_encoder:AudioViT",
        "stage2": "invideo_jax.models.stage2:Stage2",
        "video_clip": "invideo_jax.models.video_clip:VideoClip",
        "pooled": "invideo_jax.models.video_clip:PooledEncoder",
        "clip_head": "invideo_jax.models.video_clip:ClipHead",
        "bert": "invideo_jax.models.text_encoder:Bert",
        "llama_text": "invideo_jax.models.llama:LlamaText",
        "clip_text": "invideo_jax.models.text_encoder:ClipText",
        "clip_vit": "invideo_jax.models.clip_vit:ClipViT",
        "umt": "invideo_jax.models.umt:UMTStudent",
        "uniformer_v2": "invideo_jax.models.uniformer_v2:UniFormerV2",
        "latent": "invideo_jax.models.predictor:LatentModel",
        "predictor": "invideo_jax.models.predictor:Predictor",
        "fused_classifier": "invideo_jax.models.fusion:FusedClassifier",
    },
)
TEXT = (Bert, ClipText, LlamaText)  # the towers that see no video
AUDIO = (Beats, AudioViT)  # the towers of sounds alone
# Attributes that change no number of the model in evaluation.
RUNNING = ("parent", "name", "scan", "remat", "dtype", "drop_path", "dropout")


def describe(model: Any) -> dict[str, Any]:
    """{'model': name, 'arguments': of its constructor}, JSON-able; models within it alike.

    Raises:
        UserError: a model that has no name here, or an argument that is no plain value.
    """
    name = next((n for n in MODELS if MODELS.get(n) is type(model)), None)
    if name is None:
        raise UserError(
            f"A model of {', '.join(MODELS)} can be written as text; {type(model).__name__} cannot."
        )
    arguments = {}
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        if field.name in RUNNING or callable(value) and value is field.default:
            continue
        arguments[field.name] = _plain(value, f"{name}.{field.name}")
    return {"model": name, "arguments": arguments}


def _plain(value: Any, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(x, name) for x in value]
    if dataclasses.is_dataclass(value):
        return describe(value)
    raise UserError(f"{name} must be a plain value to be written as text; got {value!r}.")


def text_of(model: Any) -> dict[str, Any] | None:
    """`describe`, or None for a model that cannot be written as text."""
    try:
        return describe(model)
    except UserError:
        return None


def make(meta: Mapping[str, Any], **overrides: Any) -> Any:
    """The model that `describe` gave as text; other entries of `meta` are not looked at.

    Args:
        overrides: arguments to replace.

    Raises:
        UserError: an unknown model or argument.
    """
    kind = MODELS.get(meta["model"])
    arguments = {name: _made(value) for name, value in (meta["arguments"] | overrides).items()}
    known = {field.name for field in dataclasses.fields(kind)}
    if not set(arguments) <= known:
        odd = ", ".join(sorted(set(arguments) - known))
        raise UserError(
            f"Model {meta['model']!r} has no argument {odd}. Convert the weights again."
        )
    return kind(**arguments)


def _made(value: Any) -> Any:
    if isinstance(value, Mapping) and "arguments" in value:
        return make(value)
    return tuple(map(_made, value)) if isinstance(value, (list, tuple)) else value


def init(model: nn.Module, key: jax.Array) -> PyTree:
    """Fresh parameters, each in a box with the logical names of its axes."""
    if type(model) is MODELS.get("video_mae_encoder"):
        return model.init(key, pixels.blank_video(model))["params"]
    if isinstance(model, AUDIO):
        return audio_encoder.init(model, key)
    return module_of(model).init(model, key)


def check(model: nn.Module) -> None:
    """Raises UserError where the model's attributes do not fit together."""
    (model if hasattr(type(model), "check") else encoder_of(model)[0]).check()


def module_of(model: Any) -> Any:
    """The Python module that the model's class stands in."""
    return importlib.import_module(type(model).__module__)


def abstract(model: nn.Module) -> PyTree:
    """Shapes of the parameters, unboxed, without making any."""
    return sharding.unbox(jax.eval_shape(lambda: init(model, jax.random.key(0))))


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Path -> shape of every parameter."""
    return {path: tuple(x.shape) for path, x in flatten_dict(abstract(model), sep="/").items()}


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(math.prod(shape) for shape in shapes(model).values())


def sees_video(model: nn.Module) -> bool:
    """Whether there is a video encoder in a model."""
    return not isinstance(model, (*TEXT, *AUDIO, ClipHead))


def text_tower(model: nn.Module) -> nn.Module | None:
    """The text tower of a model of text, or of video and text."""
    return model if isinstance(model, TEXT) else getattr(model, "text", None)


def parts_of(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """The model, what it is built around, and so on to its video encoder; each with its parameters' path."""
    parts, path = [(model, "")], []
    while sees_video(model) and not hasattr(model, "patch"):
        inside = _inside(model)
        path.append(inside)
        model = getattr(model, inside)
        parts.append((model, "/".join(path)))
    return parts


def encoder_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The video encoder within a model, and the path of its parameters ('' where it is the model).

    Raises:
        UserError: there is none.
    """
    if not sees_video(model):
        raise UserError(f"{type(model).__name__} has no video encoder.")
    return parts_of(model)[-1]


def _inside(model: nn.Module) -> str:
    """The attribute that holds the video encoder, or the model with it."""
    fields = [field.name for field in dataclasses.fields(model)]
    inside = next((n for n in ("encoder", "vision", "masked", "backbone") if n in fields), None)
    if inside is None:
        raise UserError(f"{type(model).__name__} has no video encoder.")
    return inside


def with_encoder(model: nn.Module, **overrides: Any) -> nn.Module:
    """The same model with other attributes of its encoder (frames, image_size, dtype)."""
    if "patch" in {field.name for field in dataclasses.fields(model)}:
        return model.clone(**overrides)
    inside = _inside(model)
    return model.clone(**{inside: with_encoder(getattr(model, inside), **overrides)})


def cube_of(model: nn.Module) -> tuple[int, int, int]:
    """(frames, rows, columns) of one cube; ones for a model of text or sound."""
    if not sees_video(model):
        return 1, 1, 1
    encoder, _ = encoder_of(model)
    return getattr(encoder, "tubelet", 1), encoder.patch, encoder.patch


# What is compared of models with text: `tokens`, `pooled`, `clip_final`, `projected` and `embedding` of a
# video; the same of a text; of both, what matching and word heads give.
_OF_TEXT = ("tokens", "pooled", "clip_final", "projected", "embedding")
_OF_TEXT += ("text_tokens", "text_pooled", "text_embedding", "match", "words")


def embed(
    model: nn.Module, params: PyTree, video: Any = None, ids: Any = None, valid: Any = None
) -> dict[str, np.ndarray]:
    """What an exported model is compared by.

    Args:
        video: normalised float [B, T, H, W, C]; None for a model of text.
        ids, valid: int and bool [B, L], for models of text and of both; CLIP's towers take no `valid`.

    Returns:
        float32 'tokens' [B, prefix+N, D], and where the model has them 'pooled' [B, P], 'clip_final'
        [B, C], 'projected' [B, C], 'logits' [B, classes]; of both, 'embedding' and 'text_embedding'
        [B, P], 'match' [B, 2], 'words' [B, L, vocabulary]; of text alone, as in `torch_model`.
    """
    if ids is not None:
        run = lambda params: _with_text(model, params, video, ids, valid)
        return {name: np.asarray(x, np.float32) for name, x in jax.jit(run)(params).items()}
    kind = next(n for n in MODELS if MODELS.get(n) is type(model))
    encoder, path = encoder_of(model)

    def run(params, video):
        if kind in ("aligned", "projected"):
            out = model.apply({"params": params}, video)
            return {n: out[n] for n in ("tokens", "pooled", "clip_final", "projected") if n in out}
        if kind == "classifier":
            logits, out = model.apply({"params": params}, video)
            return {"tokens": out["tokens"], "pooled": out["pooled"], "logits": logits}
        for part in filter(None, path.split("/")):
            params = params[part]
        tokens, _ = encoder.apply({"params": params}, video)
        if not getattr(encoder, "pool_width", 1):
            return {"tokens": tokens}
        pooled = encoder.apply({"params": params}, tokens, method="pooled")
        return {"tokens": tokens, "pooled": pooled}

    out = jax.jit(run)(params, jax.numpy.asarray(video))
    return {name: np.asarray(value, np.float32) for name, value in out.items()}


def _with_text(model: nn.Module, params: PyTree, video: Any, ids: Any, valid: Any) -> PyTree:
    apply = lambda *inputs, **options: model.apply({"params": params}, *inputs, **options)
    if isinstance(model, ClipText):
        return dict(zip(("embedding", "tokens"), apply(ids)))
    if isinstance(model, LlamaText):
        return apply(ids, valid)
    if isinstance(model, Bert):
        tokens = apply(ids, valid, method="encode")
        words = {"words": apply(tokens, method="words")} if model.word_head else {}
        return {"tokens": tokens, "pooled": tokens[:, 0]} | words
    text = (ids,) if isinstance(model.text, ClipText) else (ids, valid)
    out = apply(video, None, *text)
    return {name: out[name] for name in _OF_TEXT if name in out}
