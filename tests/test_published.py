"""The values of the published scripts: batch, rates, lengths, regularisation and test of every recipe that has one.

The tables are transcribed from the scripts of OpenGVLab/InternVideo (InternVideo2/single_modality, InternVideo-Next,
InternVideo1/Pretrain/VideoMAE), MCG-NJU/VideoMAE, OpenGVLab/VideoMAEv2 and OpenGVLab/unmasked_teacher, not from the
recipes, and in the scripts' own units: GPUs, videos of each, clips of each video, rates for 256.
"""

import dataclasses

import jax
import pytest
from test_recipes import NAMES, RECIPES, arguments, load

from invideo_jax import programs, sharding, train
from invideo_jax.models import sizes
from invideo_jax.programs import base

VIDEOS = 240_000
FINE = "rand-m7-n4-mstd0.5-inc1"
PROBE = "rand-m5-n2-mstd0.25-inc1"


@dataclasses.dataclass(frozen=True)
class Labels:
    """A script of classification; the defaults are those of the scripts' arguments."""

    gpus: int
    rows: int
    epochs: int
    warmup: int
    lr: float
    num_sample: int = 2
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    ld: float = 1.0
    dp: float = 0.0
    dropout: float = 0.0
    wd: float = 0.05
    test: tuple[int, int] = (4, 3)
    aa: str = FINE
    frames: int = 8
    size: int = 224
    counts_clips: bool = True  # whether the rate's factor counts num_sample


def big(lr, epochs, warmup, **more):  # 1B
    return Labels(32, 8, epochs, warmup, lr, **dict(ld=0.9, dp=0.3) | more)


def biggest(lr, epochs, warmup, **more):  # 6B
    return Labels(64, 4, epochs, warmup, lr, **dict(ld=0.915, dp=0.35, min_lr=0.0) | more)


def small(gpus, rows, lr, epochs, warmup, **more):  # S, B, L
    return Labels(gpus, rows, epochs, warmup, lr, **dict(ld=0.75, dp=0.1) | more)


def probe(gpus, rows, lr, epochs, warmup, **more):
    fixed = dict(num_sample=1, min_lr=0.0, wd=0.0, test=(1, 3), aa=PROBE, frames=16)
    return Labels(gpus, rows, epochs, warmup, lr, **fixed | more)


def mae(gpus, rows, num_sample, lr, epochs, warmup=5, **more):  # VideoMAE, InternVideo1
    fixed = dict(ld=0.75, dp=0.1, test=(5, 3), frames=16, counts_clips=False)
    return Labels(gpus, rows, epochs, warmup, lr, num_sample, **fixed | more)


def _kinetics(row):
    return {"k400": row, "k600": row, "k700": row}


_H1 = dict(ld=0.8, dp=0.2, dropout=0.5, test=(7, 3), warmup_lr=1e-8)
_NET = probe(16, 64, 2e-4, 40, 0, dropout=0.5, test=(4, 3), aa=FINE)
_SMALL = dict(dropout=0.5, test=(2, 1))

LABELS = {
    "internvideo2/finetune_1b": {
        "k710": big(5e-5, 9, 2),
        **_kinetics(big(1e-5, 3, 0)),
        "mit": big(5e-5, 15, 5, num_sample=1),
        "ssv1": big(1e-4, 9, 3, ld=0.915, test=(2, 3)),
        "ssv2": big(1e-4, 8, 3, ld=0.915, test=(2, 3)),
    },
    "internvideo2/finetune_6b": {
        "k710": biggest(2.5e-5, 6, 1),
        **_kinetics(biggest(1e-5, 1, 0, min_lr=1e-6)),
        "mit": biggest(2.5e-5, 8, 2, num_sample=1),
        "mit336": biggest(1e-5, 2, 0, num_sample=1, dp=0.4, wd=0.1, size=336),
        "ssv1": biggest(7.5e-5, 7, 2, dp=0.4),
        "ssv2": biggest(7.5e-5, 6, 2, dp=0.4, test=(5, 3)),
    },
    "internvideo2/finetune_b": {
        "k710": small(16, 16, 2e-4, 20, 4),
        **_kinetics(small(32, 32, 2e-5, 5, 1)),
        "ssv2": small(16, 16, 2e-4, 10, 2, ld=0.85, dp=0.2, test=(2, 3)),
    },
    "internvideo2/finetune_l": {
        "k710": small(16, 16, 2e-4, 14, 2),
        **_kinetics(small(32, 32, 2e-5, 5, 1)),
        "ssv2": small(16, 32, 5e-4, 30, 5),
    },
    "internvideo2/finetune_s": {
        "k710": small(8, 32, 2e-4, 35, 5),
        **_kinetics(small(32, 32, 2e-5, 5, 1)),
        "ssv2": small(8, 32, 5e-4, 30, 5),
    },
    "internvideo2/attentive_probe_1b": {
        "k710": probe(16, 64, 2e-4, 25, 5),
        **_kinetics(probe(16, 64, 1e-5, 3, 0)),
        "mit": probe(16, 64, 2e-4, 35, 5),
        "ssv2": probe(16, 64, 2e-4, 25, 5),
    },
    "internvideo2/attentive_probe_6b": {
        "k710": probe(32, 32, 1e-4, 20, 4),
        **_kinetics(probe(16, 64, 1e-5, 3, 0)),
        "mit": probe(32, 64, 1e-4, 30, 5),
        "ssv2": probe(16, 64, 1e-4, 20, 4),
        "anet": _NET,
        "hacs": _NET,
    },
    "internvideo2/linear_probe_1b": {
        "k400": probe(16, 64, 1e-3, 15, 3, min_lr=1e-6),
        "ssv2": probe(16, 64, 1e-4, 25, 5),
        "ucf101": probe(8, 64, 1e-3, 20, 0, **_SMALL),
        "hmdb51": probe(8, 64, 2e-3, 20, 0, **_SMALL | dict(dropout=0.3)),
    },
    "internvideo2/linear_probe_6b": {
        "k400": probe(16, 64, 5e-4, 9, 2),
        "ssv2": probe(16, 64, 1e-4, 20, 4),
        "ucf101": probe(8, 64, 1e-3, 20, 0, **_SMALL),
        "hmdb51": probe(8, 64, 2e-3, 20, 0, **_SMALL | dict(dropout=0.3)),
    },
    "internvideo1/finetune_vit_b": {
        "kinetics400": mae(64, 6, 2, 5e-4, 75),
        "ssv2": mae(64, 8, 1, 5e-4, 50, test=(2, 3)),
        "internvideo1": mae(32, 16, 1, 1e-3, 100),
        "ssv2,internvideo1": mae(16, 16, 2, 2e-3, 25, ld=0.65, test=(2, 3)),
        "sparse": mae(32, 16, 1, 1e-3, 100, test=(2, 3)),
    },
    "internvideo1/finetune_vit_l": {
        "kinetics400": mae(64, 2, 2, 2e-3, 35),
        "internvideo1": mae(32, 6, 1, 2e-3, 40, dp=0.2),
        "kinetics700": mae(32, 6, 1, 2e-3, 40, dp=0.2),
    },
    "internvideo1/finetune_vit_h": {
        "kinetics400": mae(64, 8, 2, 1e-3, 50, dp=0.2, dropout=0.5),
        "internvideo1": mae(32, 4, 2, 1e-3, 35, **_H1),
        "k710": mae(32, 4, 2, 1e-3, 40, **_H1),
        "k710_k400": mae(8, 4, 2, 2e-6, 3, 1, **_H1),
        "k710_k700": mae(8, 4, 2, 2e-6, 3, 1, **_H1),
        "ssv2": mae(32, 8, 1, 5e-4, 30, ld=0.8, dp=0.2, dropout=0.3, test=(2, 3)),
    },
}
CLASSES = {"k710": 710, "k400": 400, "k600": 600, "k700": 700, "mit": 339, "ssv1": 174, "ssv2": 174}
CLASSES |= {"anet": 200, "hacs": 200, "ucf101": 101, "hmdb51": 51, "mit336": 339}
CLASSES |= {"kinetics700": 700, "k710_k700": 700, "ssv2,internvideo1": 174}  # the others: 400
CASES = [(recipe, word) for recipe, rows in LABELS.items() for word in rows]


def schedule_of(config, name):
    """The stage, and (step -> rate) as floats."""
    stage = train.place_stages(config, epoch_examples=VIDEOS)[0]
    assert stage.name == name
    rate = base.schedule(config, stage)
    return stage, lambda step: float(rate(step))


@pytest.mark.parametrize(("recipe", "word"), CASES)
def test_classification(recipe, word):
    row, config = LABELS[recipe][word], load(f"configs/{recipe}.py", word).config
    stage, rate = schedule_of(config, "finetune")
    options, videos = config.stages.finetune, row.gpus * row.rows
    batch, factor = videos * row.num_sample, videos / 256
    factor *= row.num_sample if row.counts_clips else 1
    warmup = row.warmup * VIDEOS * row.num_sample // batch
    assert (stage.batch_size, options.clip.repeats) == (batch, row.num_sample)
    assert stage.steps == row.epochs * VIDEOS // videos
    assert rate(warmup) == pytest.approx(row.lr * factor, rel=1e-5)
    assert rate(stage.steps - 1) == pytest.approx(
        row.min_lr * factor, rel=2e-2, abs=row.lr * factor * 1e-4
    )
    if warmup:
        assert rate(0) == pytest.approx(row.warmup_lr * factor, rel=1e-5)
        assert rate(warmup // 2) == pytest.approx((row.warmup_lr + row.lr) / 2 * factor, rel=1e-2)
    o = options.optimizer
    assert (o.name, o.b1, o.b2, o.eps, o.clip_norm) == ("adamw", 0.9, 0.999, 1e-8, 0)
    assert (o.layer_decay, o.weight_decay) == (row.ld, row.wd)
    assert (config.model.drop_path, options.head.dropout) == (row.dp, row.dropout)
    assert options.mix.to_dict() == dict(
        mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, group=row.rows * row.num_sample
    )
    clip, views = options.clip, config.evals.multi_view
    assert (options.smoothing, clip.erase, clip.randaugment) == (0.1, 0.25, row.aa)
    assert (clip.frames, clip.size, clip.crop) == (row.frames, row.size, "random_resized")
    assert (views.clips, views.crops) == row.test
    assert options.head.classes == CLASSES.get(word, 400)
    assert clip.flip == (0 if "ssv" in word else 0.5)
    assert clip.sampling == _sampling(recipe, word)


def _sampling(recipe, word):
    if "finetune_vit" in recipe:
        return "tsn" if "ssv2" in word or word == "sparse" else "window"
    if word == "ucf101":
        return "window"
    return "tsn_padded" if word in ("ssv1", "ssv2", "hmdb51") else "segments_inclusive"


# batch, base rate, epochs, warm-up epochs, betas, eps, clipping, drop path, frames read and seen, whether the
# mask is drawn for each frame
ALIGNED = {
    "internvideo2/stage1_1b": (128 * 32, 1.5e-4, 301, 40, 0.98, 1e-6, 3.0, 0.25, 16, 8, True),
    "internvideo2/stage1_6b": (256 * 8, 1.5e-4, 301, 40, 0.98, 1e-6, 3.0, 0.3, 16, 8, True),
    "internvideo2/distill_s": (32 * 128, 1e-3, 101, 20, 0.98, 1e-6, 5.0, 0.05, 8, 8, False),
    "internvideo2/distill_b": (32 * 128, 1e-3, 101, 20, 0.98, 1e-6, 5.0, 0.05, 8, 8, False),
    "internvideo2/distill_l": (32 * 64, 1e-3, 101, 20, 0.98, 1e-6, 5.0, 0.05, 8, 8, False),
    "umt/umt_b": (32 * 64, 1.5e-4, 201, 40, 0.95, 1e-8, 0.0, 0.1, 8, 8, True),
    "umt/umt_l": (32 * 64, 1.5e-4, 201, 40, 0.95, 1e-8, 0.0, 0.2, 8, 8, True),
}


@pytest.mark.parametrize("recipe", ALIGNED)
def test_alignment(recipe):
    batch, lr, epochs, warmup, b2, eps, clip_norm, drop_path, read, seen, per_frame = ALIGNED[
        recipe
    ]
    config = load(f"configs/{recipe}.py", "").config
    stage, rate = schedule_of(config, "aligned")
    options = config.stages.aligned
    check_pretraining(stage, rate, batch, lr * batch / 256, 1e-5 * batch / 256, epochs, warmup)
    o = options.optimizer
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay) == ("adamw", 0.9, b2, eps, 0.05)
    assert (o.clip_norm, config.model.drop_path) == (clip_norm, drop_path)
    assert (options.clip.frames, options.clip.frames // options.teachers.stride) == (read, seen)
    assert options.mask.to_dict() == dict(name="attention", ratio=0.8, per_frame=per_frame)
    assert (options.clip.sampling, options.clip.crop, options.clip.flip) == (
        "segments",
        "multi_scale",
        0.5,
    )
    clip, mae = options.teachers.clip, options.teachers.mae
    distilled, umt = "distill" in recipe, "umt" in recipe
    assert (clip.layers, clip.interval) == (6, 3.34 if distilled else 1.0)
    assert (mae.name, mae.layers) == ("" if distilled or umt else "video_mae", 4)
    assert options.target.to_dict() == dict(
        clip_middle=1.0, clip_final=0.0 if umt else 1.0, mae=0.0 if distilled or umt else 1.0
    )
    assert (options.student.interval, options.student.mlp) == (1.0, distilled)
    assert config.model.layer_scale == (0.0 if umt else 1e-5)


def check_pretraining(stage, rate, batch, peak, final, epochs, warmup):
    """Warm-up starts at a rate of 0; numbers of epochs count videos."""
    steps = warmup * VIDEOS // batch
    assert (stage.batch_size, stage.steps) == (batch, epochs * VIDEOS // batch)
    assert rate(steps) == pytest.approx(peak, rel=1e-5)
    assert rate(stage.steps - 1) == pytest.approx(final, rel=1e-2)
    if steps:
        assert rate(0) == 0 and rate(steps // 2) == pytest.approx(peak / 2, rel=1e-2)


@pytest.mark.parametrize(("size", "rows", "drop_path"), [("b", 14, 0.1), ("l", 8, 0.2)])
def test_latent_prediction(size, rows, drop_path):
    config = load(f"configs/internvideo_next/stage2_{size}.py", "").config
    stage, rate = schedule_of(config, "latent")
    options, batch = config.stages.latent, 128 * rows
    check_pretraining(stage, rate, batch, 1e-4 * batch / 256, 1e-5 * batch / 256, 101, 0)
    o = options.optimizer
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay) == ("adamw", 0.9, 0.98, 1e-6, 0.05)
    assert (o.clip_norm, config.model.drop_path) == (5.0, drop_path)
    assert (options.clip.frames, options.clip.size, options.clip.flip) == (32, 224, 0.5)
    assert (options.target.loss, options.ema_decay) == ("cosine", 0.0)
    masks = {n: (v.blocks, v.share, tuple(v.aspect), v.context) for n, v in options.views.items()}
    assert masks == {
        "short": (8, 0.15, (0.75, 1.5), 400 * 32 // 8),
        "long": (2, 0.7, (0.75, 1.5), 400 * 32 // 8),
    }


# GPUs, videos of each, clips of each video, base rate (for 256 videos), epochs, warm-up, clipping, size
DUAL = {
    "b": (32, 32, 4, 1e-3, 200, 20, 0.0, "B"),
    "l": (48, 32, 1, 1e-3, 300, 30, 0.0, "L-v2"),
    "g": (64, 32, 4, 6e-4, 300, 30, 0.02, "g"),
}


@pytest.mark.parametrize("size", DUAL)
def test_dual_masking(size):
    """A video that the script takes 4 times a step is here taken in 4 times as many epochs."""
    gpus, rows, times, lr, epochs, warmup, clip_norm, name = DUAL[size]
    config = load(f"configs/internvideo1/mae_v2_{size}.py", "").config
    stage, rate = schedule_of(config, "masked")
    options, factor = config.stages.masked, gpus * rows / 256
    check_pretraining(
        stage, rate, gpus * rows * times, lr * factor, 1e-5 * factor, epochs * times, warmup * times
    )
    o = options.optimizer
    assert (o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm) == (0.9, 0.95, 1e-8, 0.05, clip_norm)
    assert (options.mask.name, options.mask.ratio) == ("tube", 0.9)
    assert options.target.decoder_mask.to_dict() == dict(name="running_cell", ratio=0.5)
    assert (options.clip.frames, options.clip.stride, options.clip.sampling) == (16, 4, "dense")
    assert config.model.size == name and sizes.video_mae(name).decoder_depth == 4


def test_every_word_of_these_recipes_has_a_row():
    """`f16` changes the frames alone, and is no row of its own."""
    for recipe, rows in LABELS.items():
        words = set(arguments(RECIPES[NAMES.index(f"configs/{recipe}.py")])) - {"smoke", "f16"}
        assert words == set(rows) - {"ssv2,internvideo1"}, recipe
    for recipe in ("1b", "6b"):
        config = load(f"configs/internvideo2/finetune_{recipe}.py", "k400,f16").config
        assert config.stages.finetune.clip.frames == 16


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A script of alignment with text; the defaults are those of stage 2."""

    gpus: int
    rows: int
    epochs: float
    warmup: float
    lr: float = 5e-5
    wd: float = 0.05
    clip_norm: float = 3.0
    frames: int = 4
    text: int = 32
    mask: tuple[float, float] = (0.8, 0.5)
    drop_path: float = 0.0
    temperature: tuple[float, float, float] = (0.07, 0.001, 0.5)
    losses: tuple[str, ...] = ("vtc", "vtm", "mlm")
    frozen: tuple[str, ...] = ()


_CLIP = dict(
    lr=4e-4, wd=0.2, clip_norm=0.0, frames=8, mask=(0.0, 0.0), temperature=(0.01, 0.01, 0.0),
    losses=("vtc",), frozen=("^vision/encoder/(?!pool/)", "^text/"),
)  # fmt: skip
_SOUND = ("vtc", "vtm", "mlm", "avtc", "avtm", "avmlm")
CONTRAST = {
    "internvideo2/stage2_1b": Contrast(64, 64, 10, 1, drop_path=0.25),
    "internvideo2/stage2_6b": Contrast(
        256, 64, 5, 1, text=40, drop_path=0.3, losses=_SOUND, frozen=("^audio/",)
    ),
    "internvideo2/clip_s": Contrast(16, 256, 3, 0.6, text=77, **_CLIP),
    "internvideo2/clip_b": Contrast(16, 256, 3, 0.6, text=77, **_CLIP),
    "internvideo2/clip_l": Contrast(16, 256, 3, 0.6, text=77, **_CLIP),
    "internvideo2/clip_1b": Contrast(16, 256, 3, 0.6, text=80, drop_path=0.3, **_CLIP),
    "internvideo2/clip_6b": Contrast(16, 128, 1, 0.2, text=80, drop_path=0.35, **_CLIP),
    "internvideo1/viclip_b": Contrast(
        8, 512, 10, 0.5, text=77, **_CLIP | dict(lr=2e-4, mask=(0.9, 0.5), frozen=("^text/",))
    ),
    "internvideo1/viclip_l": Contrast(
        8, 512, 10, 0.5, text=77, **_CLIP | dict(mask=(0.9, 0.5), frozen=("^text/",))
    ),
}


@pytest.mark.parametrize("recipe", CONTRAST)
def test_contrastive(recipe):
    row, config = CONTRAST[recipe], load(f"configs/{recipe}.py", "").config
    stage, rate = schedule_of(config, "contrastive")
    options, o = config.stages.contrastive, config.stages.contrastive.optimizer
    batch = row.gpus * row.rows
    assert (stage.batch_size, stage.steps) == (batch, int(row.epochs * VIDEOS // batch))
    assert rate(int(row.warmup * VIDEOS / batch)) == pytest.approx(row.lr, rel=1e-2)
    assert rate(stage.steps) == pytest.approx(0.01 * row.lr, abs=0.001 * row.lr)  # few steps
    assert (o.name, o.b1, o.b2, o.eps, o.weight_decay) == ("adamw", 0.9, 0.98, 1e-8, row.wd)
    assert (o.clip_norm, tuple(o.freeze)) == (row.clip_norm, row.frozen)
    assert (options.clip.frames, options.clip.size, options.clip.sampling) == (
        row.frames,
        224,
        "rand",
    )
    assert (options.clip.crop, tuple(options.clip.crop_scale)) == ("random_resized", (0.5, 1.0))
    assert (options.clip.interpolation, options.clip.flip) == ("bicubic", 0.5)
    assert options.mask.to_dict() == dict(name="random", video=row.mask[0], image=row.mask[1])
    assert options.text.length == row.text and config.model.drop_path == row.drop_path
    shared = options.shared
    assert (shared.temperature, shared.coldest, shared.warmest) == row.temperature
    assert {k: v for k, v in options.losses.items() if v} == dict.fromkeys(row.losses, 1.0)
    assert options.words.to_dict() == dict(ratio=0.5, hidden=0.8, swapped=0.5)


def test_stage2_at_full_size_has_the_published_towers():
    """360.1 M of text with the cross-attention; of the 6B model 768 wide projections and BEATs beside it."""
    found = {}
    for size in ("1b", "6b"):
        config = load(f"configs/internvideo2/stage2_{size}.py", "").config
        (stage,) = train.place_stages(config, VIDEOS)
        shapes = sharding.unbox(jax.eval_shape(programs.program(config, stage).init_params))
        found[size] = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in shapes.items()}
    assert round(found["1b"]["text"] / 1e6, 1) == 360.1
    assert found["1b"]["vision_projection"] == 768 * 512 + 512
    assert found["6b"]["audio"] == 90_311_792 and found["6b"]["av_fusion"] == 1536 * 768 + 768
    assert found["6b"]["vision_tokens"] == 3200 * 768 + 3 * 768
