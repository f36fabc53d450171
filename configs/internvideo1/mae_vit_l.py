"""VideoMAE ViT-L/16, 16 frames at 224 px, tube mask 0.9, decoder of 12 blocks.

    python -m invideo_jax.train --config=configs/internvideo1/mae_vit_l.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `kinetics400` (default) or `hybrid` (InternVideo's UnlabeledHybrid), and `smoke`.

Hardware and hours: scripts for 64 GPUs (Kinetics-400) and 48 GPUs (hybrid), hours not published; not
run at full size by this project.
Published result: Kinetics-400 85.2 % after fine-tuning.

Sources: MCG-NJU/VideoMAE scripts/, OpenGVLab/InternVideo InternVideo1/Pretrain/VideoMAE/scripts/.
"""

from configs import common
from configs.internvideo1 import mae_vit_b


def get_config(arg=None):
    words = common.parse_arg(arg, "kinetics400", "hybrid", "smoke")
    c = mae_vit_b.get_config("hybrid" if words["hybrid"] else None)
    c.model.size = "L"
    c.model.remat = "full"
    c.stages.masked.batch_size = 48 * 24 if words["hybrid"] else 64 * 8
    return common.smoke(c) if words["smoke"] else c
