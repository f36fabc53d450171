"""What recipes share: the base config with every field there is, and the reading of their argument."""

import ml_collections

from configs.common.aligned import aligned_stage, smoke_teacher
from configs.common.classify import classify_stage, evaluation, smoke_stage
from configs.common.contrastive import (
    FRESH_IN_STAGE2,
    clip_words,
    contrastive_stage,
    llama_words,
    smoke_contrastive,
    take_encoder,
    two_towers,
    unmasked,
)
from configs.common.fusion import smoke_fusion
from configs.common.latent import latent_stage, smoke_latent
from configs.common.masked import masked_stage

__all__ = [
    "FRESH_IN_STAGE2",
    "aligned",
    "aligned_stage",
    "base",
    "classifier",
    "classify_stage",
    "contrastive",
    "clip_words",
    "contrastive_stage",
    "latent",
    "latent_stage",
    "llama_words",
    "masked_stage",
    "parse_arg",
    "smoke",
    "take_encoder",
    "two_towers",
    "unmasked",
]


def parse_arg(arg: str | None, *words: str, **defaults: str) -> dict[str, str | bool]:
    """Reads the part of --config after the colon: 'size=L/16,smoke'.

    Args:
        arg: the text, or None.
        words: switches that may appear; False when absent.
        defaults: keys that may be given a value, with the value they have when absent.

    Returns:
        All words and keys with their values.

    Raises:
        ValueError: a word or key that the recipe does not take.
    """
    values: dict[str, str | bool] = {**dict.fromkeys(words, False), **defaults}
    for part in filter(None, (arg or "").split(",")):
        key, equals, value = part.partition("=")
        if key not in values or bool(equals) != (key in defaults):
            takes = [*words, *(f"{k}=..." for k in defaults)]
            raise ValueError(
                f'this recipe does not take "{part}" after the colon; it takes {takes}'
            )
        values[key] = value if equals else True
    return values


def base() -> ml_collections.ConfigDict:
    """Every field of a run. Recipes start from here, and change and add nothing that is not named here."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.compute_dtype = "auto"  # float32 on a CPU, bfloat16 on accelerators; or one of these by name

    c.model = ml_collections.ConfigDict()
    c.model.name = "video_mae"
    c.model.size = "B/16"
    c.model.drop_path = 0.0
    c.model.layer_scale = 0.0  # initial value; 0: no LayerScale
    c.model.scan = (
        True  # one compiled block for all layers; False compiles each layer (faster on a CPU)
    )
    c.model.remat = "none"  # what the backward pass recomputes

    c.stage_order = ("masked",)
    c.total_steps = 0  # what a stage length in percent is a share of
    c.stages = ml_collections.ConfigDict()
    c.stages.masked = masked_stage()

    c.data = ml_collections.ConfigDict()
    # A folder, a manifest (.csv .json .jsonl), synthetic:FOLDER, tfds:NAME or arrayrecord:GLOB; several
    # with weights: 'first,0.7;second,0.3'.
    c.data.train = ""
    c.data.eval = ""  # like train; empty: the rows of `train` whose split is `eval_split`
    c.data.train_split = "train"  # a source without any split serves whole
    c.data.eval_split = "validation"
    c.data.roots = ()  # further folders that a manifest may name files in
    c.data.workers = 0  # decoding processes; 0 decodes in threads of the training process
    c.data.threads = 2
    c.data.min_seconds = 0.0  # of a clip, where a manifest says it; shorter ones are left out
    c.data.max_seconds = 0.0  # 0: no limit
    c.data.bad_share = 0.01  # the run stops when more of the videos seen than this are unusable
    c.data.bad_count = 20  # ... and at least so many are
    c.data.max_megapixels = 10.0
    c.data.max_hours = 6.0
    c.data.decode_seconds = 20.0  # of CPU time, for one clip
    c.data.read_seconds = 60.0  # after which a read that does not end is given up

    c.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1, sequence=1))  # -1: the rest

    c.checkpoint = ml_collections.ConfigDict()
    c.checkpoint.every = "1000 steps"
    c.checkpoint.keep_last = 3
    c.checkpoint.keep_every = 0  # also keep every step divisible by this; 0: none
    c.checkpoint.keep_best = 1
    c.checkpoint.best = "reconstruction/loss"  # the evaluation result that says which is best
    c.checkpoint.best_mode = "min"  # or 'max'

    c.evals = ml_collections.ConfigDict()
    c.evals.reconstruction = ml_collections.ConfigDict()
    c.evals.reconstruction.every = "10%"  # 0 steps: never
    c.evals.reconstruction.examples = 256
    c.evals.reconstruction.pictures = 6

    c.log = ml_collections.ConfigDict()
    c.log.every = "50 steps"
    c.log.tensorboard = False  # event files beside metrics.jsonl; needs the extra [tensorboard]

    c.guard = ml_collections.ConfigDict()
    c.guard.nonfinite_in_a_row = 10  # skipped updates after which the run stops
    c.guard.hang_seconds = 600.0  # without a step, after which the process ends itself
    return c


def aligned() -> ml_collections.ConfigDict:
    """A run of one stage of unmasked-token alignment, with InternVideo2's encoder as the student."""
    c = base()
    c.model.name = "internvideo2"
    c.model.size = "1B"
    c.model.layer_scale = 1e-5
    del c.stages.masked
    c.stages.aligned = aligned_stage()
    c.stage_order = ("aligned",)
    c.evals = ml_collections.ConfigDict(dict(loss=dict(every="10%", examples=256)))
    c.checkpoint.best = "loss/loss"
    return c


def latent() -> ml_collections.ConfigDict:
    """A run of one stage of latent prediction, with InternVideo2's encoder."""
    c = base()
    c.model.name = "internvideo2"
    c.model.size = "B"
    c.model.layer_scale = 1e-5
    del c.stages.masked
    c.stages.latent = latent_stage()
    c.stage_order = ("latent",)
    c.evals = ml_collections.ConfigDict(dict(loss=dict(every="10%", examples=256)))
    c.checkpoint.best = "loss/loss"
    return c


def classifier(encoder: str) -> ml_collections.ConfigDict:
    """A run of one stage of classification; `encoder` is a `model.name`."""
    c = base()
    c.model.name = encoder
    c.model.layer_scale = 1e-5 if encoder == "internvideo2" else 0.0
    del c.stages.masked
    c.stages.finetune = classify_stage()
    c.stage_order = ("finetune",)
    c.evals = evaluation()
    c.checkpoint.every = "1 epochs"
    c.checkpoint.best = "classification/top1"
    c.checkpoint.best_mode = "max"
    return c


def contrastive(stage: ml_collections.ConfigDict | None = None) -> ml_collections.ConfigDict:
    """A run of one contrastive stage, with InternVideo2's encoder.

    Args:
        stage: InternVideo2's second stage by default.
    """
    c = base()
    c.model.name = "internvideo2"
    c.model.size = "1B"
    c.model.layer_scale = 1e-5
    del c.stages.masked
    c.stages.contrastive = stage or contrastive_stage()
    c.stage_order = ("contrastive",)
    c.evals = ml_collections.ConfigDict(dict(retrieval=dict(every="10%", examples=1000)))
    c.checkpoint.best = "retrieval/text_video_r1"
    c.checkpoint.best_mode = "max"
    return c


def smoke(c: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Shrinks every size of a recipe, and keeps its shape: a run of seconds on a CPU.

    Without other data it trains on the built-in dataset, and without `init.source` from a fresh start.
    """
    c.model.size = "Micro"
    c.stages[c.stage_order[0]].init.source = "fresh"
    for name in c.stage_order:
        stage = c.stages[name]
        stage.length = "20 steps"
        stage.batch_size = 8
        stage.clip.frames = 8
        stage.clip.size = 32
        stage.clip.stride = 1
        stage.schedule.warmup = "20%"
        stage.optimizer.scale_by_batch = 0
        stage.optimizer.learning_rate = 1e-3
        for teacher in ("clip", "mae") if "teachers" in stage else ():
            if teacher in stage.teachers:
                smoke_teacher(stage.teachers[teacher])
        if "head" in stage:
            smoke_stage(stage)
        if "predictor" in stage:
            smoke_latent(stage)
        if "fusion" in stage:
            smoke_fusion(stage)
        if "text_tower" in stage:
            smoke_contrastive(stage)
    c.data.train = c.data.train or "synthetic:data/synthetic"
    c.checkpoint.every = "10 steps"
    for name in c.evals:
        c.evals[name].every = "50%"
        c.evals[name].examples = 8
        if "pictures" in c.evals[name]:
            c.evals[name].pictures = 2
    c.log.every = "5 steps"
    return c
