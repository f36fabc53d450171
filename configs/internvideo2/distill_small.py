"""A small InternVideo2 learns from the encoder of the quickstart: minutes on two CPU cores.

    bash launch/quickstart.sh
    python -m invideo_jax.train --config=configs/internvideo2/distill_small.py --workdir=workdir_distill \
        --config.stages.aligned.teachers.mae.source=workdir

Stage 1's branch of patches at sizes for a laptop: the teacher sees 8 frames of 64 px, 256 tokens; the student every second
frame, and 52 of these tokens. `python tests/benchmarks/bench_distill.py` runs it and measures what was learned
(docs/distillation.md). After the colon: `smoke`, for seconds instead of minutes.

Hardware and hours: two CPU cores, about 6 minutes. Source: the settings are this project's own.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = common.aligned()
    c.data.train = "synthetic:data/synthetic"
    c.model.size = "Micro"
    c.model.scan = False
    c.model.layer_scale = 1.0
    stage = c.stages.aligned
    stage.length = "800 steps"
    stage.batch_size = 32
    stage.clip.frames = 8
    stage.clip.size = 64
    stage.clip.stride = 2
    stage.clip.sampling = "dense"
    stage.clip.crop = "center"
    stage.clip.flip = 0.0
    stage.mask.name = "random"
    del stage.mask.per_frame
    stage.target.clip_middle = 0.0
    stage.target.clip_final = 0.0
    stage.teachers.clip.name = ""
    teacher = stage.teachers.mae
    teacher.size = "Mini"
    teacher.layers = 2
    teacher.rename = ("^(vision/)?encoder/->",)
    teacher.leftover = ("^(?!(vision/)?encoder/)",)
    stage.optimizer.scale_by_batch = 0
    stage.optimizer.learning_rate = 2e-3
    stage.schedule.warmup = "10%"
    c.checkpoint.every = "50%"
    c.evals.loss.examples = 300
    c.log.every = "40 steps"
    return common.smoke(c) if words["smoke"] else c
