"""A small student learns from a small teacher on the built-in dataset: minutes on two CPU cores.

    python -m invideo_jax.train --config=configs/internvideo2/distill_small.py --workdir=DIR \
        --config.data.train=synthetic:data/synthetic --config.stages.aligned.teachers.clip.source=DIR_OF_TEACHER

The objective of `distill_s.py` at sizes for a laptop: clips of 8 frames at 32 px, 129 tokens, of which the student sees 27.
`python tests/benchmarks/bench_distill.py --output=DIR` makes data and teacher, runs this, and measures what was learned.
After the colon: `smoke`, for seconds instead of minutes.

Hardware and hours: two CPU cores, minutes.
Source: this project's own sizes, for the objective of `distill_s.py`.
"""

from configs import common
from configs.internvideo2 import distill_s


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = distill_s.get_config()
    c.model.size = "Nano"
    c.model.scan = False
    c.model.drop_path = 0.0
    c.model.layer_scale = 1.0
    stage = c.stages.aligned
    stage.length = "1500 steps"
    stage.batch_size = 32
    stage.clip.size = 32
    stage.clip.crop = "center"
    stage.clip.flip = 0.0  # left and right are labels of this dataset
    stage.teachers.clip.size = "Micro"
    stage.teachers.clip.layers = 2
    stage.teachers.clip.interval = 1.0
    stage.teachers.clip.old_frames = 0
    stage.optimizer.scale_by_batch = 0
    stage.optimizer.learning_rate = 2e-3
    stage.schedule.warmup = "10%"
    c.checkpoint.every = "50%"
    c.log.every = "100 steps"
    return common.smoke(c) if words["smoke"] else c
