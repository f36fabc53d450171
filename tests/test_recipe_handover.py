"""The patterns in recipes of classification, against the parameters of what they start from."""

import jax
import pytest
from conftest import REPOSITORY
from flax.traverse_util import flatten_dict

from invideo_jax import config as config_lib
from invideo_jax import handover, programs, sharding, stage_start, train
from invideo_jax.interop import models
from invideo_jax.models import (
    alignment,
    audio_encoder,
    classifier,
    clip_vit,
    stage2,
    text_towers,
    video_encoder,
    video_mae,
)
from invideo_jax.models.text_encoder import Bert

TINY = dict(frames=4, image_size=32)
HEADS = dict(clip_width=24, clip_layers=2, final_width=16)
BERT = Bert(32, 3, 2, 40, 2, vocabulary=30, positions=12)

SOURCES = {
    "stage 1": lambda: alignment.build("Micro", **TINY, **HEADS, mae_layers=1, mae_width=20),
    "distillation": lambda: alignment.build("Micro", **TINY, **HEADS, mlp=True, mae_layers=0),
    "stage 2": lambda: stage2.Stage2(
        alignment.build("Micro", **TINY, **HEADS, mae_layers=0, image_positions="separate"), BERT, 24
    ),
    "encoder": lambda: video_encoder.build("Micro", **TINY),
    "VideoMAE": lambda: video_mae.build("Micro", **TINY),
    "VideoMAE encoder": lambda: video_mae.build_encoder("Micro", **TINY),
    "classes": lambda: classifier.build("Micro", classes=20, **TINY),
}  # fmt: skip
INTERNVIDEO2 = ("stage 1", "distillation", "stage 2", "encoder")
CASES = [
    *(("internvideo2/finetune_s.py:smoke", source) for source in INTERNVIDEO2),
    ("internvideo2/finetune_1b.py:ssv2,smoke", "stage 1"),
    ("internvideo2/finetune_1b.py:k400,smoke", "classes"),
    ("internvideo2/finetune_1b.py:mit,smoke", "classes"),
    ("internvideo2/attentive_probe_1b.py:smoke", "stage 2"),
    ("internvideo2/attentive_probe_1b.py:ssv2,smoke", "stage 2"),
    ("internvideo2/attentive_probe_6b.py:ssv2,smoke", "stage 1"),
    ("internvideo2/linear_probe_1b.py:smoke", "stage 1"),
    ("internvideo2/linear_probe_1b.py:ssv2,smoke", "encoder"),
    ("internvideo2/linear_probe_6b.py:ssv2,smoke", "stage 2"),
    ("internvideo1/finetune_vit_b.py:smoke", "VideoMAE"),
    ("internvideo1/finetune_vit_l.py:smoke", "VideoMAE encoder"),
    ("quickstart_finetune.py:pretrained,smoke", "VideoMAE"),
]


@pytest.mark.parametrize(("recipe", "source"), CASES)
def test_recipes_take_every_encoder_whole(recipe, source):
    """Each parameter of the encoder comes from the source, and nothing of the rest does but a head."""
    config = config_lib.load(f"{REPOSITORY}/configs/{recipe}", ["data.train=somewhere"]).config
    (stage,) = train.place_stages(config, epoch_examples=240)
    program, given = programs.program(config, stage), SOURCES[source]()
    options = config.stages.finetune.init.to_dict()
    assert options.pop("source") == stage_start.FRESH and options.pop("ema")
    before = flatten_dict(models.abstract(given), sep="/")
    table = handover.plan(
        sharding.unbox(jax.eval_shape(program.init_params)),
        before,
        grid=program.encoder.grid,
        tubelet=program.encoder.tubelet,
        old_grid=models.encoder_of(given)[0].grid,
        **options,
    )
    fresh = {row.path for row in table.rows if row.transform == "fresh"}
    assert not [path for path in fresh if path.startswith("encoder/")]
    if source == "classes":
        assert fresh == ({"head/kernel", "head/bias"} if ":mit" in recipe else set())
    else:
        assert {path.split("/")[0] for path in fresh} >= {"fc_norm", "head"}
        assert not [p for p in table.left if p.endswith(("patch_embed/kernel", "cls_token"))]


def _part(name, model):
    """Shapes of a part of a source, 'NAME/...'."""
    return {f"{name}/{k}": v for k, v in flatten_dict(models.abstract(model), sep="/").items()}


SMALL = dict(TINY, frames=8)
WORDS = dict(vocabulary=260)
TEXT = {
    "bert": text_towers.build("bert", "Micro", context_width=48, **WORDS),
    "bert for sound": text_towers.build("bert", "Micro", context_width=768, **WORDS),
    "clip": text_towers.build("clip", "Micro", output_width=24, **WORDS),
    "mobileclip": text_towers.build("mobileclip", "Micro", output_width=512, **WORDS),
    "llama": text_towers.build("llama", "Micro", output_width=32, **WORDS),
}
STAGE2_RUN = stage2.Stage2(
    alignment.build("Micro", **TINY, **HEADS, mae_layers=0, image_positions="separate"), BERT, 24
)
STAGE1 = alignment.build("Micro", **SMALL, **HEADS, mae_layers=1, mae_width=20)
CLASSES = classifier.build("Micro", classes=20, **SMALL)
CONTRASTIVE = {
    "internvideo2/stage2_1b.py": [("vision", STAGE1), ("text", TEXT["bert"])],
    "internvideo2/stage2_6b.py": [
        ("vision", video_encoder.build("Micro", **SMALL)),
        ("text", TEXT["bert for sound"]),
        ("audio", audio_encoder.build("beats", "Micro")),
    ],
    "internvideo2/clip_b.py": [("vision", CLASSES), ("text", TEXT["mobileclip"])],
    "internvideo2/clip_1b.py": [("stage2", STAGE2_RUN), ("text", TEXT["llama"])],
    "internvideo2/clip_6b.py": [("stage2", STAGE2_RUN), ("text", TEXT["llama"])],
    "internvideo1/viclip_l.py": [
        ("vision/encoder", clip_vit.build("Micro", **SMALL)),
        ("text", TEXT["clip"]),
    ],
    "internvideo1/multimodal_b.py": [
        ("vision/encoder/backbone", clip_vit.build("Micro", **SMALL)),
        ("text", TEXT["clip"]),
    ],
}
BEGINS = ("projection", "tokens", "match_head", "av_fusion", "temperature", "logit_scale", "align")
GLOBAL = ("temporal_cls_token", "balance", "global_blocks", "position_temporal", "image_position")


@pytest.mark.parametrize("recipe", CONTRASTIVE)
def test_contrastive_recipes_take_every_tower_whole(recipe):
    """From 'PART=SPEC;PART=SPEC': towers come from their parts, and only what no part has starts fresh."""
    spec = f"{REPOSITORY}/configs/{recipe}:smoke"
    config = config_lib.load(spec, ["data.train=somewhere"]).config
    (stage,) = train.place_stages(config, epoch_examples=240)
    program, options = programs.program(config, stage), config.stages.contrastive.init.to_dict()
    assert options.pop("source") == stage_start.FRESH and options.pop("ema")
    before = {k: v for name, given in CONTRASTIVE[recipe] for k, v in _part(name, given).items()}
    table = handover.plan(
        sharding.unbox(jax.eval_shape(program.init_params)),
        before,
        grid=program.encoder.grid,
        tubelet=program.encoder.tubelet,
        **options,
    )
    fresh = {row.path for row in table.rows if row.transform == "fresh"}
    odd = [p for p in fresh if not any(word in p for word in BEGINS + GLOBAL)]
    assert fresh and not odd
    # What stays behind are heads of other stages, and the tower of texts that another part replaces.
    towers = [p for p in table.left if "encoder/stack" in p or p.startswith(("text/", "audio/"))]
    assert not towers


def test_a_source_of_fewer_frames_than_its_clips():
    """A student of stage 1 sees every second frame: its own grid counts, not that of its clips."""
    spec = f"{REPOSITORY}/configs/internvideo2/stage1_1b.py:smoke"
    config = config_lib.load(spec, ["data.train=somewhere"]).config
    (stage,) = train.place_stages(config, epoch_examples=240)
    text = models.text_of(programs.program(config, stage).model)
    meta = dict(config=config.to_dict(), stage="aligned", model=text)
    assert stage_start._grid(meta) == (4, 4, 4) == stage_start._grid(text)
