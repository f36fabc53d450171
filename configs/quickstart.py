"""A small video encoder learns from the built-in dataset: minutes on two CPU cores.

    bash launch/quickstart.sh

or, with the dataset made by `python -m invideo_jax.data.synthetic --output=data/synthetic`,

    python -m invideo_jax.train --config=configs/quickstart.py --workdir=workdir

VideoMAE's objective at a size for a laptop: clips of 16 frames at 64 px, of which the encoder sees 10 %.
After the colon: `smoke`, for seconds instead of minutes.
"""

from configs import common


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = common.base()
    c.data.train = "synthetic:data/synthetic"
    c.model.size = "Mini"
    c.model.scan = False
    stage = c.stages.masked
    stage.length = "1000 steps"
    stage.batch_size = 32
    stage.clip.frames = 16
    stage.clip.size = 64
    stage.clip.stride = 1
    stage.clip.crop = "center"
    stage.clip.flip = 0.0
    stage.optimizer.learning_rate = 2e-3
    stage.optimizer.scale_by_batch = 0
    stage.schedule.warmup = "10%"
    c.checkpoint.every = "20%"
    c.checkpoint.keep_last = 2
    c.evals.reconstruction.every = "25%"
    c.evals.reconstruction.examples = 128
    c.log.every = "20 steps"
    return common.smoke(c) if words["smoke"] else c
