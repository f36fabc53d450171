"""Stages of unmasked-token alignment with frozen teachers: InternVideo2's stage 1, distillation, UMT."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from invideo_jax import handover
from invideo_jax.errors import UserError
from invideo_jax.models import alignment, pixels, teachers, umt
from invideo_jax.models.teachers import TEACHERS
from invideo_jax.programs import base
from invideo_jax.stages import Stage
from invideo_jax.steps import aligned, masked
from invideo_jax.steps.update import in_parts, named_averages

PyTree = Any
Config = ml_collections.ConfigDict


def frozen_models(
    config: Config, stage_name: str, *, dtype: jnp.dtype | None = None
) -> aligned.Teachers:
    """The teachers with their shapes of this stage; makes no parameters."""
    stage, found = config.stages[stage_name], {}
    stride = stage.teachers.stride
    for name in ("clip", "mae"):
        if name not in stage.teachers:
            continue
        options = stage.teachers[name].to_dict()
        kind, size = options.pop("name"), options.pop("size")
        if not kind:
            continue
        for key in ("source", "old_frames", "rename", "leftover"):
            del options[key]
        if constants := options.pop("constants"):
            pixels.constants(constants)
            options["normalisation"] = constants
        options["image_size"] = options["image_size"] or stage.clip.size
        found[name] = TEACHERS.get(kind)(
            size,
            **options,
            frames=stage.clip.frames // (stride if name == "clip" else 1),
            dtype=dtype or base.compute_dtype(config.compute_dtype),
            scan=config.model.scan,
        )
    return aligned.Teachers(**found, stride=stride)


def model(config: Config, stage_name: str, *, dtype: jnp.dtype | None = None) -> nn.Module:
    """The student with heads as wide as its teachers; makes no parameters."""
    stage, of = config.stages[stage_name], frozen_models(config, stage_name, dtype=dtype)
    frames = stage.clip.frames // stage.teachers.stride
    if config.model.name == "video_mae":
        encoder = base.encoder(config, stage_name, dtype=dtype, frames=frames, tubelet=1)
        return umt.student(encoder, of.clip, interval=stage.student.interval)
    encoder = base.encoder(config, stage_name, dtype=dtype, frames=frames)
    blocks = lambda teacher: alignment.last_blocks(
        encoder.depth, len(teacher.layers), stage.student.interval
    )
    clip = mae = final = None
    if of.clip is not None and stage.target.clip_middle:
        clip = alignment.HeadsSpec(blocks(of.clip), of.clip.width, stage.student.mlp)
    if of.clip is not None and stage.target.clip_final:
        final = alignment.FinalSpec(of.clip.final_width, stage.student.mlp)
    if of.mae is not None and stage.target.mae:
        mae = alignment.HeadsSpec(blocks(of.mae), of.mae.width, mlp=True)
    made = alignment.AlignedEncoder(encoder, clip, final, mae)
    made.check()
    return made


def init_student(made: nn.Module, key: jax.Array) -> PyTree:
    """Fresh parameters of a student, boxed."""
    init = umt.init if isinstance(made, umt.UMTStudent) else alignment.init
    return init(made, key)


def visible_count(config: Config, stage_name: str) -> int:
    """Patches of one clip that the student sees; touches no device."""
    grid = model(config, stage_name, dtype=jnp.float32).encoder.grid
    tokens, mask = grid[0] * grid[1] * grid[2], config.stages[stage_name].mask.to_dict()

    def draw(keys):
        features = {"attention": jnp.ones((1, tokens))}
        return aligned.entries(features, keys, grid=grid, mask=mask)["visible"]

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    return jax.eval_shape(draw, keys).shape[1]


def check(config: Config, stage_name: str) -> None:
    """Raises ValueError or TypeError for what does not fit together; touches no device."""
    stage, at = config.stages[stage_name], f"stages.{stage_name}"
    if stage.clip.frames % stage.teachers.stride:
        raise UserError(
            f"clip.frames must be a multiple of teachers.stride; got frames={stage.clip.frames}, "
            f"stride={stage.teachers.stride}. The student sees every stride-th frame."
        )
    of = frozen_models(config, stage_name, dtype=jnp.float32)
    for part, ratio in stage.target.items():
        teacher = of.mae if part == "mae" else of.clip
        lacks = teacher is None or (part == "clip_final" and not teacher.final_width)
        if ratio and lacks:
            raise UserError(
                f"{at}.target.{part} needs a teacher that gives it; got {part}={ratio} and no such "
                f"teacher. Name one in {at}.teachers, or set {at}.target.{part}=0."
            )
    of.check(model(config, stage_name, dtype=jnp.float32).encoder.grid)
    if stage.mask.name == "attention" and of.clip is None:
        raise UserError(
            f"{at}.mask.name='attention' needs a clip teacher, whose attention decides; got none. "
            "Use tube, random or block."
        )
    visible_count(config, stage_name)
    if stage.teachers.cache:
        require_fixed_clips(stage.clip.to_dict(), key=at)


def require_fixed_clips(clip: Mapping[str, Any], *, key: str = "stages.NAME") -> None:
    """Raises UserError unless every example always gives the same clip, so that its features can be kept."""
    fixed = {
        "sampling": ("middle",),
        "crop": ("center",),
        "flip": (0.0,),
        "randaugment": ("",),
        "erase": (0.0,),
    }
    for name, allowed in fixed.items():
        if clip[name] not in allowed:
            raise UserError(
                f"Features can be kept only of clips that are always cut in the same way; got "
                f"{key}.clip.{name}={clip[name]!r}. Use {' or '.join(map(repr, allowed))}, or no cache."
            )


def cache_facts(config: Config, stage_name: str) -> dict[str, Any]:
    """What kept features belong to: weights and shapes of the teachers, and how clips are cut.

    The weights are known by the hashes that stand beside them; they are not read.
    """
    stage = config.stages[stage_name]
    of = frozen_models(config, stage_name)
    about = {
        name: [_identity(stage.teachers[name], f"stages.{stage_name}.teachers.{name}"), _shape(t)]
        for name, t in of.named().items()
    }
    text = json.dumps(about, sort_keys=True)
    clip = json.loads(json.dumps(stage.clip.to_dict()))
    return {
        "teacher": hashlib.sha256(text.encode()).hexdigest()[:16],
        "clip": clip,
        "stride": stage.teachers.stride,
    }


def _identity(options: Config, key: str) -> Any:
    if options.source.startswith("random:"):
        return options.source
    if not options.source:
        raise UserError(
            f"{key}.source must say which teacher the features are of; got an empty one."
        )
    about = handover.open_source(options.source, key=key).about
    return [about["digest"], options.old_frames, *options.rename]


def _shape(teacher: teachers.Teacher) -> dict[str, str]:
    """Everything that decides what a teacher makes of a clip."""
    names = [f.name for f in dataclasses.fields(teacher.encoder)]
    free = ("parent", "name", "scan", "remat")  # these change no value
    said = {n: getattr(teacher.encoder, n) for n in names if n not in free}
    said = {n: getattr(v, "__qualname__", None) or str(v) for n, v in said.items()}
    return said | {"layers": str(teacher.layers), "kind": type(teacher).__name__}


def teacher_models(config: Config, stage_name: str) -> dict[str, base.Frozen]:
    """The teachers as `teaching.place` takes them; parameters are kept in the type that they compute in."""
    stage, found = config.stages[stage_name], {}
    for name, teacher in frozen_models(config, stage_name).named().items():
        options, encoder = stage.teachers[name], teacher.encoder
        seed = options.source.partition(":")[2]
        init = functools.partial(_init, teacher, int(seed) if seed.isdecimal() else 0)
        of_plan = dict(rename=tuple(options.rename), leftover=tuple(options.leftover))
        if options.old_frames:
            of_plan |= dict(old_frames=options.old_frames)
        of_plan |= dict(grid=encoder.grid, tubelet=encoder.tubelet)
        found[name] = base.Frozen(options.source, init, of_plan, encoder)
    return found


def _init(teacher: teachers.Teacher, seed: int) -> PyTree:
    boxed = teacher.init(jax.random.key(seed))
    return jax.tree.map(lambda x: x.astype(teacher.encoder.dtype), boxed)


def program(config: Config, stage: Stage) -> base.Program:
    """What runs the stage."""
    options, made = config.stages[stage.name], model(config, stage.name)
    of = frozen_models(config, stage.name)
    init_params = lambda: init_student(made, jax.random.key(config.seed))
    pooled = bool(getattr(made, "final", None)) or not base.no_pool(made.encoder)
    freeze = () if pooled else base.no_pool(made.encoder)
    of_program, of_update = base.parts(config, stage, init_params, freeze=freeze)
    key, mask = base.stage_key(config, stage), options.mask.to_dict()
    target = dict(ratios=options.target.to_dict(), stride=of.stride, prefix=of.prefix)
    loss = dict(model=made, stage_key=key, objective="aligned", mask=mask, target=target)
    teach = aligned.make_teach(of, stage_key=key, grid=made.encoder.grid, mask=mask)
    teach = in_parts(teach, options.batch_size // options.accumulation)
    built = base.Program(
        **of_program,
        model=made,
        encoder=made.encoder,
        frames=options.clip.frames,
        train_step=masked.make_train_step(**loss, **of_update),
        # Teachers draw with the key of the stage, so the evaluation does as well.
        eval_loss=named_averages(masked.make_loss(train=False, **loss)),
        visible_tokens=visible_count(config, stage.name) + made.encoder.prefix,
        flops_per_clip=0,
        teacher=base.Teacher(teacher_models(config, stage.name), teach),
        pool_trained=pooled,
    )
    flops = base.traced_flops(masked.make_loss(**loss), init_params, built.abstract_batch())
    more = dict(flops_per_clip=flops)
    if options.teachers.cache:
        facts = functools.partial(cache_facts, config, stage.name)
        kept = base.Kept(pathlib.Path(options.teachers.cache), facts)
        more |= dict(teacher=None, kept=kept)
    return dataclasses.replace(built, **more)
