"""A small video encoder learns from the built-in dataset, then to find clips by captions: minutes on two CPU cores.

    bash launch/quickstart.sh

or step by step, the third command for both stages:

    python -m invideo_jax.data.synthetic --output=data/synthetic
    python -m invideo_jax.tokenizer --data=synthetic:data/synthetic --output=data/captions.model --vocabulary=500
    python -m invideo_jax.train --config=configs/quickstart.py --workdir=workdir

Stage `masked`: VideoMAE's objective at a size for a laptop: clips of 8 frames (of 16) at 64 px in cubes of 2x8x8 pixels, of
which the encoder sees a quarter, the ratio VideoMAE uses for its smallest dataset. The optimiser is Muon, which got further
on so little training than AdamW did.
Stage `contrastive`: video and text meet in one space, by the contrastive loss alone; docs/contrastive.md has what it reaches.
After the colon: `masked` for the first stage alone, which needs no captions; `contrastive` for the second alone, from
`stages.contrastive.init.source`; `sound`: clips are found by what is seen and heard; `smoke`, for seconds instead of minutes.
"""

import ml_collections

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "masked", "contrastive", "sound", "smoke")
    c = common.base()
    c.data.train = "synthetic:data/synthetic"
    c.model.size = "Mini"
    c.model.scan = False
    stage = c.stages.masked
    stage.length = "1600 steps"
    stage.batch_size = 16
    stage.clip.frames = 8
    stage.clip.size = 64
    stage.clip.stride = 2
    stage.clip.crop = "center"
    stage.clip.flip = 0.0
    stage.mask.ratio = 0.75
    stage.target.normalise = (
        False  # plain pixels: the pictures then show nothing but what the model made
    )
    stage.optimizer.name = "muon"
    stage.optimizer.learning_rate = 1e-2
    stage.optimizer.scale_by_batch = 0
    stage.schedule.warmup = "10%"
    c.checkpoint.every = "25%"
    c.checkpoint.keep_last = 2
    c.evals.reconstruction.every = "25%"
    c.evals.reconstruction.examples = 128
    c.log.every = "40 steps"
    if not words["masked"]:
        add_contrastive(c)
    if words["sound"]:
        add_sound(c)
    if words["contrastive"]:
        del c.stages.masked, c.evals.reconstruction
        c.stage_order = ("contrastive",)
    return common.smoke(c) if words["smoke"] else c


def add_contrastive(c: ml_collections.ConfigDict) -> None:
    """The second stage, which takes the encoder of the first."""
    stage = c.stages.contrastive = common.contrastive_stage()
    c.stage_order = ("masked", "contrastive")
    stage.length = "240 steps"
    stage.batch_size = 64
    stage.clip = c.stages.masked.clip.copy_and_resolve_references()
    stage.mask.video = 0.75
    # What `python -m invideo_jax.tokenizer` makes of these captions: 12 tokens each, 24 or fewer in 99 %.
    stage.text.tokenizer = "data/captions.model"
    stage.text.vocabulary, stage.text.pad, stage.text.first, stage.text.mask = 500, 0, 2, 4
    stage.text.length = 24
    stage.text_tower.size = "Mini"
    stage.text_tower.dropout = 0.0
    stage.text_tower.attention_dropout = 0.0
    stage.shared.width = 128
    stage.losses.vtm = 0.0
    stage.losses.mlm = 0.0
    stage.contrast.form = "dense"
    stage.contrast.equal_texts = True  # 'red star sliding left' is said of several clips
    stage.optimizer.name = "muon"
    stage.optimizer.learning_rate = 5e-3
    stage.optimizer.clip_norm = 0.0
    # At a rate for so few steps the temperature, a single number, would run to the end of its range.
    stage.optimizer.lr_multipliers = ("^temperature$=0",)
    stage.schedule.warmup = "10%"
    stage.schedule.final = 0.0
    stage.init.rename = (r"^encoder/->vision/encoder/",)
    stage.init.fresh = (r"^(vision|text)_projection/", r"^text/", r"^temperature$")
    stage.init.leftover = (r"^(?!encoder/)",)  # the decoder, which has done its work
    c.evals.reconstruction.stages = ("masked",)
    retrieval = dict(every="25%", examples=300, text="video", gallery="video")
    retrieval |= dict(stages=("contrastive",))
    c.evals.retrieval = ml_collections.ConfigDict(retrieval)
    c.checkpoint.best = "retrieval/text_video_r1"
    c.checkpoint.best_mode = "max"


def add_sound(c: ml_collections.ConfigDict) -> None:
    """Pictures, and sound and pictures together, are aligned with captions that name both and with those of pictures."""
    stage = c.stages.contrastive
    stage.audio.name = "audio_vit"
    stage.audio.size = "Micro"
    stage.audio.seconds = 2.0  # as long as the clips
    stage.shared.fusion_width = 128
    # With `avtc` alone the sound, which is learned first, takes the place of the picture.
    stage.losses.vtc, stage.losses.avtc = 1.0, 1.0
    stage.text.of.video, stage.text.of.audio_video = "fused+video", "fused+video"
    stage.init.fresh += (r"^audio(_projection|_tokens)?/", r"^av_fusion/", r"^vision_tokens/")
    c.evals.retrieval.text, c.evals.retrieval.gallery = "fused", "audio_video"
    c.checkpoint.best = "retrieval/text_audio_video_r1"
