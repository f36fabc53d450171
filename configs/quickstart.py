"""A small video encoder learns from the built-in dataset: minutes on two CPU cores.

    bash launch/quickstart.sh

or, with the dataset made by `python -m invideo_jax.data.synthetic --output=data/synthetic`,

    python -m invideo_jax.train --config=configs/quickstart.py --workdir=workdir

VideoMAE's objective at a size for a laptop: clips of 8 frames (of 16) at 64 px in cubes of 2x8x8 pixels, of which the
encoder sees a quarter, the ratio VideoMAE uses for its smallest dataset. The optimiser is Muon, which got further on so
little training than AdamW did.
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
    return common.smoke(c) if words["smoke"] else c
