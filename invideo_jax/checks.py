"""What the values of a config may be: checked before any device, file or compilation is touched.

Each rule is one row of a table; what depends on the machine (devices, files) is checked by the parts
that use it. All mistakes of a config are reported together.
"""

import functools
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import ml_collections

from invideo_jax import build, masking, optim, pairs, programs
from invideo_jax import config as config_lib
from invideo_jax.data import captions, modalities
from invideo_jax.errors import UserError
from invideo_jax.evals import EVALUATORS
from invideo_jax.handover.matching import INFLATE
from invideo_jax.models import (
    audio_encoder,
    classifier,
    layers,
    pixels,
    text_towers,
    video_encoder,
)
from invideo_jax.models import fusion as fusion_models
from invideo_jax.models.teachers import TEACHERS
from invideo_jax.programs import base, contrastive, fusion
from invideo_jax.registry import nearest
from invideo_jax.stages import Duration
from invideo_jax.steps import latent

Rule = tuple[str, Callable[[Any], bool], str]

_SHARE = (lambda v: 0 <= v < 1, "must be at least 0 and less than 1")
_POSITIVE = (lambda v: v > 0, "must be greater than 0")
_COUNT = (lambda v: v >= 1, "must be at least 1")
_NOT_NEGATIVE = (lambda v: v >= 0, "must not be negative")
_WITHIN = (lambda v: 0 < v < 1, "must lie between 0 and 1, both excluded")
_PROBABILITY = (lambda v: 0 <= v <= 1, "must be between 0 and 1")

# (pattern of the key, what must hold, the rule in words). A key may match several rows.
RULES: tuple[Rule, ...] = (
    ("seed", lambda v: 0 <= v < 2**31, "must be between 0 and 2147483647"),
    ("total_steps", *_NOT_NEGATIVE),
    ("model.drop_path", *_SHARE),
    ("model.layer_scale", *_NOT_NEGATIVE),
    ("stages.*.batch_size", *_COUNT),
    ("stages.*.accumulation", *_COUNT),
    ("stages.*.mask.ratio", *_WITHIN),
    ("stages.*.ema_decay", *_SHARE),
    ("stages.*.ema_final", *_PROBABILITY),
    ("stages.*.old_frames", *_NOT_NEGATIVE),
    ("stages.*.clip.repeats", *_COUNT),
    ("stages.*.smoothing", *_SHARE),
    ("stages.*.mix.mixup", *_NOT_NEGATIVE),
    ("stages.*.mix.cutmix", *_NOT_NEGATIVE),
    ("stages.*.mix.group", *_NOT_NEGATIVE),
    ("stages.*.mix.probability", *_PROBABILITY),
    ("stages.*.mix.switch", *_PROBABILITY),
    ("stages.*.classes", *_COUNT),
    ("stages.*.head.dropout", *_SHARE),
    ("stages.*.head.eps", *_POSITIVE),
    ("stages.*.head.init_scale", *_NOT_NEGATIVE),
    ("stages.*.teachers.stride", *_COUNT),
    ("stages.*.teachers.*.layers", *_COUNT),
    ("stages.*.teachers.*.interval", *_POSITIVE),
    ("stages.*.teachers.*.image_size", *_NOT_NEGATIVE),
    ("stages.*.student.interval", *_POSITIVE),
    ("stages.*.target.clip_middle", *_NOT_NEGATIVE),
    ("stages.*.target.clip_final", *_NOT_NEGATIVE),
    ("stages.*.target.mae", *_NOT_NEGATIVE),
    ("stages.*.target.decoder_mask.ratio", *_WITHIN),
    ("stages.*.views.*.ratio", *_WITHIN),
    ("stages.*.views.*.share", *_WITHIN),
    ("stages.*.views.*.blocks", *_COUNT),
    ("stages.*.views.*.context", *_NOT_NEGATIVE),
    ("stages.*.predictor.*", *_COUNT),
    ("stages.*.fusion.modules", *_COUNT),
    ("stages.*.fusion.heads", *_COUNT),
    ("stages.*.multimodal.frames", *_COUNT),
    ("stages.*.mask.video", *_SHARE),
    ("stages.*.mask.image", *_SHARE),
    ("stages.*.text.length", *_COUNT),
    ("stages.*.text.vocabulary", *_COUNT),
    ("stages.*.text.unused", *_NOT_NEGATIVE),
    ("stages.*.text.min_words", *_NOT_NEGATIVE),
    ("stages.*.text_tower.dropout", *_SHARE),
    ("stages.*.audio.seconds", *_POSITIVE),
    ("stages.*.audio.mels", *_COUNT),
    ("stages.*.shared.width", *_NOT_NEGATIVE),
    ("stages.*.shared.fusion_width", *_NOT_NEGATIVE),
    ("stages.*.shared.temperature", *_POSITIVE),
    ("stages.*.shared.coldest", *_POSITIVE),
    ("stages.*.shared.warmest", *_NOT_NEGATIVE),
    ("stages.*.losses.*", *_NOT_NEGATIVE),
    ("stages.*.contrast.chunk", *_COUNT),
    ("stages.*.contrast.gradient_factor", *_POSITIVE),
    ("stages.*.words.*", *_PROBABILITY),
    ("stages.*.negatives.floor", *_NOT_NEGATIVE),
    ("stages.*.optimizer.learning_rate", *_POSITIVE),
    ("stages.*.optimizer.scale_by_batch", *_NOT_NEGATIVE),
    ("stages.*.optimizer.b1", *_SHARE),
    ("stages.*.optimizer.b2", *_SHARE),
    ("stages.*.optimizer.eps", *_POSITIVE),
    ("stages.*.optimizer.weight_decay", *_NOT_NEGATIVE),
    ("stages.*.optimizer.layer_decay", lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    ("stages.*.optimizer.clip_norm", *_NOT_NEGATIVE),
    ("stages.*.optimizer.momentum", *_SHARE),
    ("stages.*.schedule.final", *_NOT_NEGATIVE),
    ("stages.*.schedule.warmup_start", *_NOT_NEGATIVE),
    ("data.workers", *_NOT_NEGATIVE),
    ("data.threads", *_NOT_NEGATIVE),
    ("data.bad_share", *_PROBABILITY),
    ("data.bad_count", *_NOT_NEGATIVE),
    ("data.max_megapixels", *_POSITIVE),
    ("data.max_hours", *_POSITIVE),
    ("data.decode_seconds", *_POSITIVE),
    ("data.read_seconds", *_POSITIVE),
    ("mesh.*", lambda v: v == -1 or v >= 1, "must be at least 1, or -1 for all remaining devices"),
    ("checkpoint.keep_last", *_COUNT),
    ("checkpoint.keep_best", *_NOT_NEGATIVE),
    ("checkpoint.keep_every", *_NOT_NEGATIVE),
    ("data.min_seconds", *_NOT_NEGATIVE),
    ("data.max_seconds", *_NOT_NEGATIVE),
    ("evals.*.examples", *_COUNT),
    ("evals.*.pictures", *_NOT_NEGATIVE),
    ("evals.*.clips", *_COUNT),
    ("evals.*.crops", lambda v: v in (1, 3), "must be 1 or 3"),
    ("evals.*.train_examples", *_COUNT),
    ("evals.*.k", *_COUNT),
    ("evals.*.temperature", *_POSITIVE),
    ("evals.*.l2", *_NOT_NEGATIVE),
    ("evals.*.iterations", *_COUNT),
    ("guard.nonfinite_in_a_row", *_COUNT),
    ("guard.hang_seconds", *_POSITIVE),
)

# Keys that hold a duration; False: zero is allowed and switches the thing off.
DURATIONS = {
    "stages.*.length": True,
    "stages.*.schedule.warmup": False,
    "stages.*.schedule.decay": False,
    "checkpoint.every": True,
    "evals.*.every": False,
    "log.every": True,
}


def choices() -> dict[str, tuple[str, ...]]:
    """Keys whose value is a name out of a list."""
    masks = tuple(sorted(masking.MASKS))
    return {
        "compute_dtype": ("auto", "float32", "bfloat16"),
        "checkpoint.best_mode": ("min", "max"),
        "model.name": tuple(base.ENCODERS),
        "model.remat": tuple(layers.REMAT),
        "stages.*.step": tuple(dict.fromkeys(kind.split("/")[0] for kind in programs.PROGRAMS)),
        "stages.*.optimizer.name": optim.OPTIMIZERS,
        "stages.*.schedule.name": base.SCHEDULES,
        "stages.*.schedule.decay_shape": ("linear", "sqrt"),
        "stages.*.mask.name": masks,
        "stages.*.views.*.name": masks,
        "stages.*.target.decoder_mask.name": ("", *(m for m in masks if m != "attention")),
        "stages.*.target.loss": tuple(latent.ERRORS),
        "stages.*.head.variant": classifier.VARIANTS,
        "stages.*.head.merge": classifier.MERGES,
        "stages.*.head.merge_norm": classifier.NORMS,
        "stages.*.teachers.*.name": ("", *TEACHERS),
        "stages.*.multimodal.name": tuple(fusion.MULTIMODAL),
        "stages.*.fusion.reading": tuple(fusion_models.READINGS),
        "stages.*.text_tower.name": tuple(text_towers.KINDS),
        "stages.*.audio.name": ("", *audio_encoder.KINDS),
        "stages.*.shared.projection": contrastive.PROJECTIONS,
        "stages.*.contrast.kind": pairs.KINDS,
        "stages.*.contrast.form": pairs.FORMS,
        "stages.*.contrast.positives": modalities.NUMBERED,
        "stages.*.negatives.kind": ("hard", "uniform"),
        "stages.*.image_positions": video_encoder.IMAGE_POSITIONS,
        "stages.*.text.normalise": captions.NORMALISE,
        "stages.*.init.inflate": ("", *INFLATE),
        "stages.*.objective": tuple(kind.split("/")[1] for kind in programs.PROGRAMS),
        "stages.*.normalisation": tuple(pixels.NORMALISATION),
    }


def check(config: ml_collections.ConfigDict) -> None:
    """Raises one UserError that lists every mistake in the config."""
    config_lib.require_finite(config)
    flat = config_lib.flatten(config)
    mistakes = [*_single_values(flat)]
    if not mistakes:  # the following combine values, each of which must make sense by itself
        mistakes += [
            *_whole_run(config),
            *(m for n in config.stage_order for m in _stage(config, n)),
        ]
    if mistakes:
        head = "The config has a mistake:" if len(mistakes) == 1 else f"{len(mistakes)} mistakes:"
        raise UserError("\n".join([head, *(f"  {m}" for m in mistakes)]))


def _single_values(flat: dict[str, Any]) -> Iterator[str]:
    for key, value in flat.items():
        for pattern, holds, rule in RULES:
            if fnmatchcase(key, pattern) and not holds(value):
                yield f"{key} {rule}; got {key}={value}."
        for pattern, names in choices().items():
            if fnmatchcase(key, pattern) and value not in names:
                yield f"{key} must be one of {', '.join(names)}; got {key}={value!r}.{nearest(value, names)}"
        for pattern, positive in DURATIONS.items():
            if fnmatchcase(key, pattern):
                yield from _duration(key, value, positive)


def _duration(key: str, value: Any, positive: bool) -> Iterator[str]:
    try:
        if Duration.parse(value, name=key).amount == 0 and positive:
            yield f"{key} must be more than nothing; got {key}={value!r}."
    except UserError as error:
        yield str(error)


def _whole_run(config: ml_collections.ConfigDict) -> Iterator[str]:
    if not config.data.train:
        yield (
            "data.train must name the training videos; got an empty one. Give a folder, a manifest, "
            "synthetic:FOLDER, tfds:NAME or arrayrecord:GLOB: --config.data.train=FOLDER"
        )
    # Half of hang_seconds is the longest wait for a batch; several reads in it may hang.
    if config.data.read_seconds > config.guard.hang_seconds / 4:
        yield (
            "data.read_seconds must be at most a quarter of guard.hang_seconds, so that a read that hangs is given "
            f"up before the run ends; got read_seconds={config.data.read_seconds:g}, "
            f"hang_seconds={config.guard.hang_seconds:g}."
        )
    rest = [axis for axis in config.mesh if config.mesh[axis] == -1]
    if len(rest) > 1:
        yield f"mesh must leave one size to fill in; got -1 for {' and '.join(sorted(rest))}."
    best = config.checkpoint.best.partition("/")[0]
    if config.checkpoint.keep_best and best not in config.evals:
        yield (
            "checkpoint.best must be a result of an evaluator, as 'reconstruction/loss'; got "
            f"checkpoint.best={config.checkpoint.best!r}.{nearest(best, config.evals)}"
        )
    for name, options in config.evals.items():
        if name not in EVALUATORS:
            yield f'evals has "{name}", which is no evaluator.{nearest(name, EVALUATORS)}'
        for stage in options.get("stages", ()):
            if stage not in config.stage_order:
                yield f'evals.{name}.stages names "{stage}".{nearest(stage, config.stage_order)}'
    if not config.stage_order:
        yield "stage_order must name at least one stage; got stage_order=()."
    for name in config.stage_order:
        if name not in config.stages:
            yield f'stage_order names "{name}", which stages lacks.{nearest(name, config.stages)}'
    if len(set(config.stage_order)) < len(config.stage_order):
        yield f"stage_order must name each stage once; got stage_order={config.stage_order}."
    shares = [n for n in config.stage_order if n in config.stages and _in_percent(config.stages[n])]
    if shares and not config.total_steps:
        yield f"stages.{shares[0]}.length is a share of total_steps; set total_steps."


def _in_percent(stage: ml_collections.ConfigDict) -> bool:
    return Duration.parse(stage.length).unit == "percent"


def _stage(config: ml_collections.ConfigDict, name: str) -> Iterator[str]:
    """Mistakes that show when the parts of a stage are put together."""
    if name not in config.stages:
        return
    stage, at = config.stages[name], f"stages.{name}"
    if stage.batch_size % stage.accumulation:
        near = [a for a in range(1, stage.batch_size + 1) if stage.batch_size % a == 0]
        near = min(near, key=lambda a: abs(a - stage.accumulation))
        yield (
            f"{at}.accumulation must divide {at}.batch_size; got accumulation={stage.accumulation}, "
            f"batch_size={stage.batch_size}. The nearest that does is {near}."
        )
    if stage.schedule.final > stage.optimizer.learning_rate:
        yield (
            f"{at}.schedule.final must be at most {at}.optimizer.learning_rate; got "
            f"final={stage.schedule.final}, learning_rate={stage.optimizer.learning_rate}."
        )
    for key in ("freeze", "no_decay", "lr_multipliers"):
        for pattern in stage.optimizer[key]:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"{at}.optimizer.{key} must hold regular expressions; {pattern!r}: {error}."
    multipliers = lambda config, name: base.rate_multipliers(stage.optimizer.lr_multipliers)
    held_out = functools.partial(build.clip_spec, train=False)
    for part in (multipliers, build.clip_spec, held_out, programs.check):
        try:
            part(config, name)
        except (ValueError, TypeError) as error:
            yield f"{at}: {error}"
            return  # a later part fails for the same reason
