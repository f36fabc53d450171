"""Stages that align video with text, sound and speech: InternVideo2's second stage, CLIP, ViCLIP."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from invideo_jax.data.audio import AudioSpec
from invideo_jax.data.captions import CaptionRule
from invideo_jax.data.modalities import Modalities, TextSpec
from invideo_jax.errors import UserError
from invideo_jax.models import alignment, audio_encoder, stage2, text_towers, video_clip
from invideo_jax.programs import aligned, base
from invideo_jax.stages import Stage
from invideo_jax.steps import contrastive, pair_losses
from invideo_jax.steps.masked import draw_mask
from invideo_jax.steps.update import in_parts, named_averages

Config = ml_collections.ConfigDict

PROJECTIONS = ("pool", "norm")
VIEWS = ("video", "audio", "audio_video", "speech")


def audio_spec(config: Config, stage_name: str) -> AudioSpec | None:
    """What sound is loaded; None for none."""
    audio = config.stages[stage_name].audio
    if not audio.name:
        return None
    return AudioSpec(seconds=audio.seconds, mels=audio.mels, silence=audio.silence)


def slots(config: Config, stage_name: str) -> dict[str, str]:
    """{view: slot}; views whose texts are chosen by the same rule share one."""
    of, first = config.stages[stage_name].text.of, {}
    return {view: first.setdefault(of[view], view) for view in VIEWS if of[view]}


def modalities(config: Config, stage_name: str) -> Modalities:
    """What is loaded besides pictures; reads no file."""
    text, found = config.stages[stage_name].text, []
    positives = config.stages[stage_name].contrast.positives
    for slot in dict.fromkeys(slots(config, stage_name).values()):
        rule = CaptionRule(text.of[slot], normalise=text.normalise, min_words=text.min_words)
        found.append((slot, rule))
    spec = TextSpec(text.tokenizer, text.length, tuple(found), text.prefix, text.normalise)
    return Modalities(spec, audio_spec(config, stage_name), example=positives)


def hides_words(stage: Config) -> bool:
    """Whether a loss of the stage needs a token that stands for hidden words."""
    return any(
        weight and pair_losses.LOSSES[name].kind == "words" for name, weight in stage.losses.items()
    )


def model(
    config: Config, stage_name: str, *, dtype: jnp.dtype | None = None
) -> stage2.Stage2 | video_clip.VideoClip:
    """The model with its shapes of this stage; makes no parameters. Arguments as `base.encoder`."""
    stage = config.stages[stage_name]
    encoder = _encoder(config, stage_name, dtype=dtype)
    shared, running = stage.shared, dict(scan=config.model.scan, remat=config.model.remat)
    running |= dict(dtype=encoder.dtype)
    named = dict(
        initial_temperature=shared.temperature,
        temperature_range=(shared.coldest, shared.warmest or float("inf")),
        initial_bias=stage.contrast.bias if stage.contrast.kind == "sigmoid" else None,
    )
    tower = stage.text_tower
    own = {name: value for name, value in tower.to_dict().items() if name not in ("name", "size")}
    own |= dict(vocabulary=stage.text.vocabulary)
    if text_towers.has_pad(tower.name):
        own |= dict(pad=stage.text.pad)
    if stage.objective == "towers":
        vision = _projected(encoder, stage_name, shared)
        text = text_towers.build(
            tower.name, tower.size, output_width=vision.width, **own, **running
        )
        made = video_clip.VideoClip(vision, text, logarithmic=shared.logarithmic, **named)
    else:
        text = text_towers.build(tower.name, tower.size, **own, **running)
        audio = None
        if stage.audio.name:
            audio = audio_encoder.build(
                stage.audio.name, stage.audio.size, mels=stage.audio.mels, **running
            )
        vision = alignment.AlignedEncoder(encoder, **_heads(config, stage_name, encoder))
        used = [pair_losses.LOSSES[name] for name, weight in stage.losses.items() if weight]
        made = stage2.Stage2(
            vision,
            text,
            audio=audio,
            width=shared.width,
            fusion_width=shared.fusion_width,
            views=tuple(v for v in stage2.VIEWS if ("match", v) in used),
            joint=any(loss.view == "audio_video" for loss in used),
            **named,
        )
    made.check()
    return made


def _encoder(config: Config, stage_name: str, *, dtype: jnp.dtype | None = None) -> nn.Module:
    positions = config.stages[stage_name].image_positions
    more = {"image_positions": positions} if positions != "average" else {}
    return base.encoder(config, stage_name, dtype=dtype, **more)


def _projected(encoder: nn.Module, stage_name: str, shared: Config) -> nn.Module:
    if shared.projection == "norm":
        return alignment.ProjectedEncoder(encoder, shared.width)
    if shared.width:
        raise UserError(
            f"With projection='pool' the shared space is as wide as the encoder's pool; got stages.{stage_name}."
            f"shared.width={shared.width}. Set it to 0, or use projection='norm'."
        )
    return video_clip.PooledEncoder(encoder)


def _heads(config: Config, stage_name: str, encoder: nn.Module) -> dict[str, Any]:
    """Heads that predict a teacher, where that is asked for."""
    stage = config.stages[stage_name]
    if not stage.losses.uta:
        return {}
    teacher = aligned.frozen_models(config, stage_name, dtype=encoder.dtype).clip
    if teacher is None:
        raise UserError(
            f"The loss uta needs stage 1's teacher; got stages.{stage_name}.teachers.clip.name=''. Name it, or "
            f"set stages.{stage_name}.losses.uta=0."
        )
    blocks = alignment.last_blocks(encoder.depth, len(teacher.layers))
    final = alignment.FinalSpec(teacher.final_width) if teacher.final_width else None
    return dict(clip=alignment.HeadsSpec(blocks, teacher.width), final=final)


def objective(config: Config, stage_name: str) -> dict[str, Any]:
    """Options of the stage's losses, as `contrastive.make_objective` takes them."""
    stage = config.stages[stage_name]
    text, contrast = stage.text, stage.contrast.to_dict()
    words = stage.words.to_dict() | dict(pad=text.pad, first=text.first)
    words |= dict(mask=text.mask if text.mask >= 0 else None)
    words |= dict(vocabulary=text.vocabulary - text.unused)
    uta = dict(clip_middle=1.0, clip_final=1.0, images_only=stage.teachers.images_only)
    if stage.losses.uta and not _heads(config, stage_name, _encoder(config, stage_name)).get(
        "final"
    ):
        uta["clip_final"] = 0.0
    del contrast["bias"], contrast["positives"]  # the model's, and the loader's
    return contrast | dict(
        weights=stage.losses.to_dict(),
        slots=slots(config, stage_name),
        mask=stage.mask.to_dict(),
        words=words,
        negatives=stage.negatives.to_dict(),
        uta=uta,
    )


def visible_count(encoder: nn.Module, mask: dict[str, Any]) -> int:
    """Patches of one clip that the encoder sees; touches no device."""
    ratio = mask.pop("video")
    del mask["image"]
    if not ratio:
        return encoder.tokens
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    draw = lambda keys: draw_mask(encoder.grid, keys, mask | dict(ratio=ratio))[0]
    return jax.eval_shape(draw, keys).shape[1]


def check(config: Config, stage_name: str) -> None:
    """Raises ValueError or TypeError for what does not fit together; touches no device."""
    stage, at = config.stages[stage_name], f"stages.{stage_name}"
    for name, weight in stage.losses.items():
        view = pair_losses.LOSSES[name].view
        texts = name not in ("uta", "avc")
        if weight and texts and not stage.text.of[view]:
            raise UserError(
                f"The loss {name} needs texts; got {at}.text.of.{view}=''. Say which kind, as "
                f"{at}.text.of.{view}='video', or set {at}.losses.{name}=0."
            )
    made = model(config, stage_name, dtype=jnp.float32)
    contrastive.make_objective(made, **objective(config, stage_name))
    modalities(config, stage_name)
    if stage.losses.uta:
        of = aligned.frozen_models(config, stage_name, dtype=jnp.float32)
        of.check(made.vision.encoder.grid)


def program(config: Config, stage: Stage) -> base.Program:
    """What runs the stage."""
    options, made = config.stages[stage.name], model(config, stage.name)
    start = stage2.init if options.objective == "fused" else video_clip.init
    init_params = lambda: start(made, jax.random.key(config.seed))
    of_program, of_update = base.parts(config, stage, init_params)
    key, loads = base.stage_key(config, stage), modalities(config, stage.name)
    loss = dict(model=made, **objective(config, stage.name))
    held_out = jax.random.fold_in(key, base.EVAL_STREAM)
    rows = options.batch_size // options.accumulation
    evaluated = contrastive.make_loss(stage_key=held_out, train=False, rows=rows, **loss)
    encoder = made.vision.encoder
    built = base.Program(
        **of_program,
        model=made,
        encoder=encoder,
        encoder_path="vision/encoder",
        train_step=contrastive.make_train_step(stage_key=key, **loss, **of_update),
        eval_loss=named_averages(evaluated),
        visible_tokens=visible_count(encoder, options.mask.to_dict()) + encoder.prefix,
        flops_per_clip=0,
        modalities=loads,
        images=True,
        towers=contrastive.make_towers(made, loads.text.asked),
        teacher=_teacher(config, stage, encoder) if options.losses.uta else None,
    )
    return dataclasses.replace(built, flops_per_clip=_flops(config, built))


def _flops(config: Config, built: base.Program) -> int:
    """FLOPs of forward and backward for one clip; frozen towers have no backward pass."""
    plain, stage = config.copy_and_resolve_references(), built.stage
    plain.model.remat = "none"
    loss = contrastive.make_loss(
        model=model(plain, stage.name),
        stage_key=base.stage_key(config, stage),
        trainable=built.trainable,
        **objective(config, stage.name),
    )
    batch = built.abstract_batch()
    return base.traced_flops(loss, built.init_params, batch, trainable=built.trainable)


def _teacher(config: Config, stage: Stage, encoder: nn.Module) -> base.Teacher:
    """Stage 1's clip teacher, on whole clips; the masks are drawn with the losses."""
    of, options = aligned.frozen_models(config, stage.name), config.stages[stage.name]
    features = in_parts(of.features, options.batch_size // options.accumulation)
    return base.Teacher(aligned.teacher_models(config, stage.name), features)
