"""VideoMAE V2 ViT-g/14, 16 frames at 224 px: tube mask 0.9 on the encoder, running cells 0.5 on the decoder.

    python -m invideo_jax.train --config=configs/internvideo1/mae_v2_g.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `smoke`.

The teacher of InternVideo2's first stage for patches was trained so, on UnlabeledHybrid (1.35 M
videos). The script takes each of 64 * 32 videos 4 times a step, for 300 epochs (30 of warm-up), and scales its
rate by the videos alone; here a step takes 4 times as many different videos, so that the same steps and clips
are 1200 epochs (120 of warm-up), at the same rate.

Hardware and hours: more than two weeks on 64 A100 (arXiv:2303.16727); not run at full size by this
project.

Source: VideoMAE V2 (arXiv:2303.16727) 3.2 and appendix; OpenGVLab/VideoMAEv2 scripts/pretrain/vit_g_hybrid_pt.sh. That
the rate counts videos, not clips, is from copies of its run_mae_pretraining.py, and gives the paper's peak
(1.5e-4 for 256 clips).
"""

from configs import common
from configs.internvideo1 import mae_v2_b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = mae_v2_b.get_config()
    c.model.size = "g"
    c.model.remat = "full"
    stage = c.stages.masked
    stage.length = "1200 epochs"
    stage.batch_size = 64 * 32 * 4
    stage.optimizer.learning_rate = 6e-4
    stage.schedule.warmup = "120 epochs"
    stage.optimizer.clip_norm = 0.02
    return common.smoke(c) if words["smoke"] else c
