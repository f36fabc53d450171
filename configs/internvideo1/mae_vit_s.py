"""VideoMAE ViT-S/16, 16 frames at 224 px, tube mask 0.9.

    python -m invideo_jax.train --config=configs/internvideo1/mae_vit_s.py \
        --config.data.train=FOLDER_OR_MANIFEST --workdir=DIR

After the colon: `kinetics400` (default) or `ssv2`, and `smoke`.

Hardware and hours: scripts for 32 GPUs (Kinetics-400) and 64 GPUs (SSv2), hours not published; not
run at full size by this project.
Published result: Kinetics-400 79.0 %, SSv2 66.8 % after fine-tuning.

Source: MCG-NJU/VideoMAE scripts/.
"""

from configs import common
from configs.internvideo1 import mae_vit_b


def get_config(arg=None):
    words = common.parse_arg(arg, "kinetics400", "ssv2", "smoke")
    c = mae_vit_b.get_config("ssv2" if words["ssv2"] else None)
    c.model.size = "S"
    c.stages.masked.batch_size = 64 * 32 if words["ssv2"] else 32 * 32
    return common.smoke(c) if words["smoke"] else c
