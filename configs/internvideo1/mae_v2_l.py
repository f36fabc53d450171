"""VideoMAE V2 ViT-L/16, 16 frames at 224 px: tube mask 0.9 on the encoder, running cells 0.5 on the decoder.

    python -m invideo_jax.train --config=configs/internvideo1/mae_v2_l.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `smoke`.

The decoder has 4 blocks, where VideoMAE's ViT-L has 12. The script takes each video once a step, for 300 epochs, though the
folder of its results is called 1200e; those of ViT-B and ViT-g take each 4 times.

Hardware and hours: published on 48 GPUs (32 videos each), hours not published; not run at full size by this
project.

Source: VideoMAE V2 (arXiv:2303.16727) 3.2; OpenGVLab/VideoMAEv2 scripts/pretrain/vit_l_hybrid_pt.sh.
"""

from configs import common
from configs.internvideo1 import mae_v2_b


def get_config(arg=None):
    words = common.parse_arg(arg, "smoke")
    c = mae_v2_b.get_config()
    c.model.size = "L-v2"
    c.model.remat = "full"
    stage = c.stages.masked
    stage.length = "300 epochs"
    stage.batch_size = 48 * 32
    stage.optimizer.scale_by_batch = 256
    stage.schedule.warmup = "30 epochs"
    return common.smoke(c) if words["smoke"] else c
