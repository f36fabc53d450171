"""A small video encoder is trained to name the motions of the built-in dataset: minutes on two CPU cores.

    python -m invideo_jax.data.synthetic --output=data/synthetic
    python -m invideo_jax.train --config=configs/quickstart_finetune.py --workdir=workdir_finetune

From scratch: the labels are 15 motions (chance is 6.7 %), of held-out combinations of shape, colour, texture and motion.
With what `configs/quickstart.py` has learned before, at its size of 64 pixels:

    ... --config=configs/quickstart_finetune.py:pretrained --config.stages.finetune.init.source=workdir

After the colon: `pretrained`, and `smoke`, for seconds instead of minutes.
"""

from configs import common
from configs.common.classify import from_pretraining


def get_config(arg=None):
    words = common.parse_arg(arg, "pretrained", "smoke")
    c = common.classifier("video_mae")
    c.data.train = "synthetic:data/synthetic"
    c.model.size = "Mini"
    c.model.scan = False
    stage = c.stages.finetune
    stage.length = "800 steps"
    stage.batch_size = 32
    stage.clip.size = 32
    stage.clip.frames = 8
    stage.clip.stride = 2
    stage.clip.sampling = "window"
    stage.clip.crop = "resize"
    stage.clip.flip = 0.0  # left and right are in the labels
    stage.clip.randaugment = ""
    stage.clip.erase = 0.0
    stage.clip.repeats = 1
    stage.head.classes = 15
    stage.head.init_scale = 1.0
    stage.mix.mixup = 0.0
    stage.mix.cutmix = 0.0
    stage.optimizer.name = "muon"
    stage.optimizer.learning_rate = 3e-3
    stage.optimizer.scale_by_batch = 0
    stage.schedule.warmup = "10%"
    stage.schedule.warmup_start = 0.0
    stage.schedule.final = 0.0
    if words["pretrained"]:
        stage.clip.size = 64
        from_pretraining(stage)
    del c.evals.multi_view
    c.evals.classification.every = "25%"
    c.checkpoint.every = "25%"
    c.checkpoint.keep_last = 2
    c.log.every = "40 steps"
    return common.smoke(c) if words["smoke"] else c
