"""VideoMAE V2 ViT-B/16, 16 frames at 224 px: tube mask 0.9 on the encoder, running cells 0.5 on the decoder.

    python -m invideo_jax.train --config=configs/internvideo1/mae_v2_b.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `smoke`.

The decoder sees the visible tokens and half of the hidden places, over which the loss is taken: about
half of the decoder's work is spared.

The script takes each of 32 * 32 videos 4 times a step, for 200 epochs (20 of warm-up), and scales its rate by
the videos alone. Here a step takes 4 times as many different videos, so that the same number of steps and of
clips is 800 epochs (80 of warm-up), at the same rate.

Hardware and hours: published on 32 GPUs, hours not published; not run at full size by this project.

Source: VideoMAE V2 (arXiv:2303.16727) 3.2; OpenGVLab/VideoMAEv2 scripts/pretrain/vit_b_hybrid_pt.sh. That the rate
counts videos, not clips, is from copies of its run_mae_pretraining.py.
"""

from configs import common
from configs.internvideo1 import mae_vit_b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = mae_vit_b.get_config()
    stage = c.stages.masked
    stage.target.decoder_mask.name = "running_cell"
    stage.target.decoder_mask.ratio = 0.5
    stage.length = "800 epochs"
    stage.batch_size = 32 * 32 * 4
    stage.optimizer.learning_rate = 1e-3
    stage.optimizer.scale_by_batch = 256 * 4
    stage.schedule.warmup = "80 epochs"
    return common.smoke(c) if words["smoke"] else c
