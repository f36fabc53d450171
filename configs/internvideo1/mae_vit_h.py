"""VideoMAE ViT-H/16, 16 frames at 224 px, tube mask 0.9.

    python -m invideo_jax.train --config=configs/internvideo1/mae_vit_h.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `kinetics400` (default; decoder 640 wide, 12 blocks) or `hybrid` (InternVideo's own:
decoder 512 wide, 8 blocks, on UnlabeledHybrid), and `smoke`.

Hardware and hours: InternVideo's on 64 A100, two weeks (arXiv:2212.03191); not run at full size by
this project.
Published result: Kinetics-400 86.6 % after fine-tuning (Kinetics-400 pretraining).

Sources: MCG-NJU/VideoMAE scripts/, OpenGVLab/InternVideo InternVideo1/Pretrain/VideoMAE/scripts/. The
hybrid script takes 64 * 6 videos a step, each 4 times, for 301 epochs (15 of warm-up), and scales its
rate by the videos alone. Here a step takes 64 * 6 * 4 different videos, so that the same number of steps and
of clips is 1204 epochs (60 of warm-up; the paper speaks of 1200), at the same rate.
"""

from configs import common
from configs.internvideo1 import mae_vit_b


def get_config(arg=None):
    words = common.parse_arg(arg, "kinetics400", "hybrid", "smoke")
    c = mae_vit_b.get_config()
    c.model.size = "H"
    c.model.remat = "full"
    stage = c.stages.masked
    stage.batch_size = 64 * 16
    if words["hybrid"]:
        c.model.size = "H-internvideo1"
        stage.length = "1204 epochs"
        stage.batch_size = 64 * 6 * 4
        stage.optimizer.learning_rate = 1e-3
        stage.optimizer.scale_by_batch = 256 * 4
        stage.schedule.warmup = "60 epochs"
        stage.schedule.final = 5e-5
    return common.smoke(c) if words["smoke"] else c
